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
from effnet_fast.training.answers import class_names, inference, prediction
from effnet_fast.training.answers.inference import Answering
from effnet_fast.training.answers.metrics import TOP, Tally
from effnet_fast.training.answers.prediction import Means, OnRows, Options
from effnet_fast.training.answers.rows import Answers
from effnet_fast.training.data.folders import listed
from effnet_fast.training.data.loading import UnreadableLimitError
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
        first_unreadable: path and reason of the first of them.
        agreement: of the fused predictions with stock PyTorch's: on how many "images", "same"
            (share with the same likeliest class), and "largest_difference" of the probability of
            the likeliest class; None where nothing was compared.
    """

    tally: Tally
    names: list[str] | None
    seconds: float = 0.0
    unreadable: int = 0
    first_unreadable: list[tuple[str, str]] = field(default_factory=list)
    agreement: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the confusion matrix, as `effnet-fast eval --json` prints it."""
        tally = self.tally
        read = tally.images + self.unreadable
        return {
            "images": tally.images,
            "unreadable": self.unreadable,
            "top1": tally.top1,
            "top5": tally.top5,
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
    options: Options | None = None,
    means: Means | None = None,
    compared: int = COMPARED,
    unreadable_limit: int | None = None,
    on_rows: Callable[[int], OnRows] | None = None,
) -> Evaluation:
    """Answers every image of a labelled data set and counts.

    Args:
        model: an EfficientNet, whose eval mode is used.
        data: as for `open_images`, with labels; of a folder its `val` or `test`, where it has one.
            Its classes are matched with the network's by `class_names.matched`.
        preset: how images are prepared; None means as the model's variant says.
        options: as for `prediction.predict`; top and embeddings are not used.
        means: as for `prediction.predict`; ray is not used.
        compared: number of images, evenly spread, on which stock PyTorch answers too.
        unreadable_limit: how many unreadable images are allowed; None means any number.
        on_rows: as for `prediction.predict`.

    Raises:
        ValueError: no images, no labels, or classes that the network does not have.
        UnreadableLimitError: more unreadable images than allowed; the message names the first.
        OSError: the data cannot be read.
    """
    options, means = options or Options(), means or Means()
    names = _names(model, options)
    images = open_images(data, split="val")
    truth = Truth(images, names, model.num_classes)
    preset = preset or preset_of(model.variant)
    network = prediction.prepared(model, options)
    answering = Answering(
        network, images, preset, top=min(TOP, model.num_classes), draft=options.draft
    )
    result = Evaluation(Tally(model.num_classes), names)
    device = next(network.parameters()).device
    batch = means.batch or inference.BATCH[device.type]
    workers = inference.worker_count(means.workers, len(images), batch)
    report = on_rows(len(images)) if on_rows else None
    begin = time.perf_counter()
    with inference.answers(answering, device, workers=workers) as answer:
        for found in answer(inference.batched(range(len(images)), batch)):
            _count(result, found, images, truth)
            _check_limit(result, unreadable_limit)
            if report is not None:
                report(len(found.indices), found.unreadable)
    result.seconds = time.perf_counter() - begin
    if compared and options.backend != "reference":
        result.agreement = _agreement(model, answering, device, compared)
    return result


def _names(model: Any, options: Options) -> list[str] | None:
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

    Raises:
        ValueError: no labels, or classes that the network does not have.
    """

    def __init__(self, images: ImageList, names: list[str] | None, count: int) -> None:
        self._paths, self._count = images.paths, count
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
                    f"network's {self._count}: {listed(self._names)}"
                )
        if not 0 <= place < self._count:
            what = "no label" if label == NO_LABEL else f"label {label} is out of range"
            raise ValueError(
                f"{self._paths[index]}: {what}: the network's classes are 0 to {self._count - 1}"
            )
        return place


def _count(result: Evaluation, found: Answers, images: ImageList, truth: Truth) -> None:
    labels = []
    for (index, reason, _), label in zip(found.places(), found.labels, strict=True):
        if reason is None:
            labels.append(truth.of(index, label))
        elif len(result.first_unreadable) < NAMED:
            result.first_unreadable.append((images.paths[index], reason))
    result.unreadable += found.unreadable
    if labels:
        result.tally.add(labels, found.classes, found.values[:, 0])


def _check_limit(result: Evaluation, limit: int | None) -> None:
    if limit is not None and result.unreadable > limit:
        paths = ", ".join(f"{path} ({reason})" for path, reason in result.first_unreadable)
        raise UnreadableLimitError(
            f"{result.unreadable} images cannot be read, more than the {limit} allowed: {paths}"
        )


def _agreement(
    model: Any, answering: Answering, device: torch.device, compared: int
) -> dict[str, Any] | None:
    """Asks stock PyTorch about some of the images."""
    total = len(answering.decoding.images)
    spread = np.unique(np.linspace(0, total - 1, min(compared, total)).astype(np.int64)).tolist()
    stock = inference.stock_of(model).eval()
    same, largest, count = 0, 0.0, 0
    for batch in inference.batched(spread, inference.BATCH["cpu"]):
        pixels = answering.decoding(batch).pixels.to(device)
        if not len(pixels):
            continue
        classes, values = answering.start(pixels)
        with torch.inference_mode():
            expected = stock(answering.preset.normalise(pixels)).softmax(dim=1)
        same += int((expected.argmax(dim=1) == classes[:, 0]).sum())
        difference = expected.gather(1, classes[:, :1]) - values[:, :1]
        largest = max(largest, float(difference.abs().max()))
        count += len(pixels)
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
