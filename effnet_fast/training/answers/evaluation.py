"""How good a network is on labelled images: accuracy, classes, calibration, agreement, speed."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet_fast import files
from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.pretrained.images import preset as preset_of
from effnet_fast.training.answers import class_names, inference, prediction, shares
from effnet_fast.training.answers.inference import Answering
from effnet_fast.training.answers.metrics import TOP, Tally
from effnet_fast.training.answers.prediction import OnRows, PredictionOptions, Resources
from effnet_fast.training.answers.rows import Answers
from effnet_fast.training.answers.shares import Share
from effnet_fast.training.data.folders import listed
from effnet_fast.training.data.loading import check_limit
from effnet_fast.training.data.sources import NO_LABEL, DatasetList, ImageList, open_images

NAMED = 10  # unreadable images whose paths are kept
COMPARED = 64  # images on which stock PyTorch answers too
LARGEST_SIDE = 40  # classes that get their names along the axes of the figure


@dataclass
class Evaluation:
    """What came out.

    Args:
        tally: the counts.
        names: of the classes, in the order of the logits; None where they are not known.
        seconds: that decoding and computing took.
        unreadable: images that could not be read, which no share counts.
        agreement: of the fused predictions with stock PyTorch's: on how many "images", "same"
            (share with the same likeliest class), and "largest_difference" of the probability of
            the likeliest class; None where nothing was compared.
    """

    tally: Tally
    names: list[str] | None
    seconds: float = 0.0
    unreadable: int = 0
    agreement: dict[str, Any] | None = None
    # With their places in the list.
    _problems: list[tuple[int, str, str]] = field(default_factory=list, init=False)

    def _count(self, found: Answers, images: ImageList) -> None:
        """Counts answers to images of a list."""
        problems = [(i, reason) for i, reason, _ in found.places() if reason is not None]
        room = NAMED - len(self._problems)
        self._problems += [(i, images.paths[i], reason) for i, reason in problems[:room]]
        self.unreadable += found.unreadable
        self.tally.add(*found.counted())

    def _share(self, share: Share) -> None:
        """Makes it that of all processes."""
        self.tally.share(share.add_up)
        everyone = share.gather((self.seconds, self.unreadable, self._problems))
        self.seconds = max(seconds for seconds, _, _ in everyone)
        self.unreadable = sum(unreadable for _, unreadable, _ in everyone)
        self._problems = sorted(entry for *_, found in everyone for entry in found)[:NAMED]

    @property
    def first_unreadable(self) -> list[tuple[str, str]]:
        """Path and reason of the first unreadable images of the list."""
        return [(path, reason) for _, path, reason in self._problems]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the confusion matrix, as `effnet-fast eval --json` prints it."""
        tally = self.tally
        read = tally.images + self.unreadable
        return {
            "images": tally.images,
            "unreadable": self.unreadable,
            "top1": tally.top1,
            "top5": tally.top5,
            "loss": tally.loss,
            "mean_recall": tally.balanced(),
            "ece": tally.ece,
            "seconds": self.seconds,
            "images_per_second": read / self.seconds if self.seconds else None,
            "agreement": self.agreement,
            "first_unreadable": [{"path": p, "reason": r} for p, r in self.first_unreadable],
            "calibration": tally.calibration(),
            "classes": [result.as_dict() for result in tally.per_class(self.names)],
        }


def evaluate(
    model: Any,
    data: Any,
    *,
    preset: ImageClassification | None = None,
    options: PredictionOptions | None = None,
    resources: Resources | None = None,
    compared: int = COMPARED,
    unreadable_limit: int | None = None,
    on_rows: Callable[[int], OnRows] | None = None,
) -> Evaluation:
    """Answers every image of a labelled data set and counts.

    Under torchrun, and in any process group that is there, all processes have to call it: each
    answers some of the batches, and all return the same counts.

    Args:
        model: an EfficientNet, whose eval mode is used.
        data: as for `open_images`, with labels; of a folder its `val` or `test`, where it has one.
            Its classes are matched with the network's by `class_names.matched`.
        preset: how images are prepared; None means as the model's variant says.
        options: as for `prediction.predict`; top and embeddings are not used.
        resources: as for `prediction.predict`; ray is not used.
        compared: number of images, evenly spread, on which stock PyTorch answers too.
        unreadable_limit: how many unreadable images are allowed; None means any number.
        on_rows: as for `prediction.predict`.

    Raises:
        ValueError: no images, no labels, or classes that the network does not have.
        UnreadableLimitError: more unreadable images than allowed; the message names the first.
        OSError: the data cannot be read.
    """
    options, resources = options or PredictionOptions(), resources or Resources()
    names = _names(model, options)
    images = open_images(data, split="val")
    truth = Truth(images, names, model.num_classes)
    network = prediction.prepared(model, options)
    answering = Answering(
        network,
        images,
        preset or preset_of(model.variant),
        top=min(TOP, model.num_classes),
        draft=options.draft,
        truth=truth.of,
    )
    result = Evaluation(Tally(model.num_classes), names)
    device = next(network.parameters()).device
    with shares.torchrun() as share:
        batch = resources.batch or inference.BATCH[device.type]
        # Whole batches, as they are in one process, so that every answer is the same.
        batches = share.dealt(list(inference.batched(range(len(images)), batch)))
        report = on_rows(sum(map(len, batches))) if on_rows else None
        workers = inference.worker_count(resources.workers, sum(map(len, batches)), batch)
        begin = time.perf_counter()
        with inference.answers(answering, device, workers=workers) as answer:
            for found in answer(batches):
                result._count(found, images)
                if report is not None:
                    report(len(found.indices), found.unreadable)
                if unreadable_limit is not None and result.unreadable > unreadable_limit:
                    break  # the others are told below
        result.seconds = time.perf_counter() - begin
        result._share(share)
        check_limit(result.unreadable, unreadable_limit, result.first_unreadable)
        if compared and options.backend != "reference":
            result.agreement = _agreement(model, answering, device, compared, share)
    return result


def _names(model: Any, options: PredictionOptions) -> list[str] | None:
    """The names of the network's classes, where they are known.

    Raises:
        ValueError: there are no classes, or names of another number.
    """
    if not model.num_classes:
        raise ValueError("the network has no classifier: there is nothing to evaluate")
    names = list(options.labels or model.class_names) or None
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"{len(names)} labels for a network of {model.num_classes} classes")
    return names


class Truth:
    """The true classes of a list's images, among the network's.

    Args:
        images: the list.
        names, count: of the network's classes.

    Attributes:
        count: of the network's classes.

    Raises:
        ValueError: no labels, or classes that the network does not have.
    """

    def __init__(self, images: ImageList, names: list[str] | None, count: int) -> None:
        self._paths, self.count = images.paths, count
        self._classes, self._names = images.classes, names
        self._places: list[int] | None = None
        if images.classes is not None:
            self._places = class_names.matched(images.classes, names, count)
        if images.labels is not None:
            for index, label in enumerate(images.labels):
                self.of(index, int(label))
        elif type(images) is not DatasetList:
            raise ValueError(
                "the images have no labels: evaluation needs a folder per class, or a table with "
                "the columns path and label"
            )

    def of(self, index: int, label: int) -> int:
        """The class of an image.

        Raises:
            ValueError: the image has no label, or one that the network does not have.
        """
        place = label
        if self._places is not None and 0 <= label < len(self._places):
            place = self._places[label]
            if place == class_names.NONE:
                assert self._classes is not None and self._names is not None
                raise ValueError(
                    f"{self._paths[index]}: class {self._classes[label]!r} is not among the "
                    f"network's {self.count}: {listed(self._names)}"
                )
        if not 0 <= place < self.count:
            what = "no label" if label == NO_LABEL else f"label {label} is out of range"
            raise ValueError(
                f"{self._paths[index]}: {what}: the network's classes are 0 to {self.count - 1}"
            )
        return place


def _agreement(
    model: Any, answering: Answering, device: torch.device, compared: int, share: Share
) -> dict[str, Any] | None:
    """Asks stock PyTorch about some of the images; each process about some of their batches."""
    total = len(answering.decoding.images)
    spread = np.unique(np.linspace(0, total - 1, min(compared, total)).astype(np.int64)).tolist()
    stock = inference.stock_of(model).eval()
    same, largest, count = 0, 0.0, 0
    for batch in share.dealt(list(inference.batched(spread, inference.BATCH["cpu"]))):
        pixels = answering.decoding(batch).pixels.to(device)
        if not len(pixels):
            continue
        classes, values, _ = answering.start(pixels)
        with torch.inference_mode():
            expected = stock(answering.preset.normalise(pixels)).softmax(dim=1)
        same += int((expected.argmax(dim=1) == classes[:, 0]).sum())
        difference = expected.gather(1, classes[:, :1]) - values[:, :1]
        largest = max(largest, float(difference.abs().max()))
        count += len(pixels)
    everyone = share.gather((same, largest, count))
    same, count = sum(part[0] for part in everyone), sum(part[2] for part in everyone)
    largest = max(part[1] for part in everyone)
    if not count:
        return None
    return {"images": count, "same": same / count, "largest_difference": largest}


def write_tables(result: Evaluation, folder: Path) -> list[Path]:
    """Writes classes.csv, calibration.csv and, unless there are too many classes, confusion.csv.

    Raises:
        OSError: they cannot be written.
    """
    classes = [entry.as_dict() for entry in result.tally.per_class(result.names)]
    tables: dict[str, list[list[Any]]] = {
        "classes.csv": [list(classes[0]), *(list(row.values()) for row in classes)],
        "calibration.csv": [
            list(result.tally.calibration()[0]),
            *(list(row.values()) for row in result.tally.calibration()),
        ],
    }
    if result.tally.confusion is not None:
        names = [row["name"] for row in classes]
        counts = result.tally.confusion.tolist()
        rows = ([name, *row] for name, row in zip(names, counts, strict=True))
        tables["confusion.csv"] = [["true \\ predicted", *names], *rows]
    for name, content in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(content)
        with files.replacing(folder / name) as temporary:
            temporary.write_text(text.getvalue(), "utf-8")
    return [folder / name for name in tables]


def draw_confusion(result: Evaluation, path: Path) -> None:
    """Draws the confusion matrix as a PNG file: of each class the share of its images.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: too many classes for a matrix.
        OSError: it cannot be written.
    """
    from effnet_fast.training import extras

    if result.tally.confusion is None:
        raise ValueError(f"{result.tally.classes} classes are too many for a confusion matrix")
    extras.require("matplotlib", "train")
    from matplotlib.figure import Figure  # without pyplot there is no choice of a window system

    counts = result.tally.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(16.0, max(4.0, 0.35 * len(counts)))
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    ax = figure.subplots()
    drawn = ax.imshow(shares, vmin=0.0, vmax=1.0, cmap="viridis", interpolation="nearest")
    figure.colorbar(drawn, label="share of the class's images")
    if len(counts) <= LARGEST_SIDE:
        names: Sequence[str] = [entry.name for entry in result.tally.per_class(result.names)]
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
