"""A network over a folder of images, into a file of answers that an interruption leaves whole."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.pretrained.images import preset as preset_of
from effnet_fast.training.answers import inference, shares
from effnet_fast.training.answers.inference import Answering
from effnet_fast.training.answers.outputs import Description, Output
from effnet_fast.training.answers.rows import Answers, Columns, shown
from effnet_fast.training.answers.shares import Share
from effnet_fast.training.data.sources import ImageList, open_images

VERSION = 1  # of the description beside a file
OnRows = Callable[[int, int], None]


@dataclass(frozen=True)
class PredictionOptions:
    """What the rows of a file depend on, beside the network and the images.

    Args:
        top: number of classes per row.
        embeddings: whether rows hold pooled features instead of classes.
        dtype: of the activations between layers, a name of `inference.DTYPES`.
        backend: as for `deploy`, or "reference"; rounding alone depends on it.
        draft: whether JPEG files may be decoded at a smaller size.
        labels: names of the classes, in the order of the logits; None means the network's own.
    """

    top: int = 5
    embeddings: bool = False
    dtype: str = "float32"
    backend: str = "auto"
    draft: bool = False
    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class Resources:
    """How fast it goes; the rows do not depend on it.

    Args:
        batch: images per call of the network; None means 8 on a CPU, 64 on a GPU.
        workers: processes; None means one per core, 0 none beside this one.
        ray: address of a Ray cluster, "local" for one on this machine; None for no Ray.
    """

    batch: int | None = None
    workers: int | None = None
    ray: str | None = None


def predict(
    model: Any,
    data: Any,
    out: str | os.PathLike[str],
    *,
    preset: ImageClassification | None = None,
    options: PredictionOptions | None = None,
    resources: Resources | None = None,
    on_rows: Callable[[int], OnRows] | None = None,
) -> dict[str, Any]:
    """Writes a row of answers for each image.

    Called again it continues where it stopped: every image has one row, whatever ended the call
    before. Under torchrun each process takes a share of the images; the file is one.

    Args:
        model: an EfficientNet, whose eval mode is used.
        data: as for `open_images`: a folder, all of whose images are taken, those of its folders
            too; a list `.txt`, a table `.csv` or `.parquet`, shards, or a torch dataset.
        out: `.csv`, `.jsonl` or `.parquet`; see docs/prediction.md for the columns.
        preset: how images are prepared; None means as the model's variant says.
        options, resources: see there.
        on_rows: called once with the number of images that are left; what it returns is called
            with the numbers of images and of unreadable ones after each batch.

    Returns:
        out, images (rows of this call), unreadable (those of them without an answer), present
        (rows that were there), seconds and images_per_second of this call.

    Raises:
        ValueError: no images; an option outside what is allowed; `out` was begun with another
            network, other images or options, or is written by another process.
        OSError: a file cannot be read or written.
        ImportError: pyarrow or ray is missing.
    """
    options, resources = options or PredictionOptions(), resources or Resources()
    images = open_images(data, labelled=False)
    preset = preset or preset_of(model.variant)
    columns = columns_of(model, options)
    network = prepared(model, options)
    answering = Answering(network, images, preset, top=columns.top, draft=options.draft)
    description = describe(model, data, preset, options)
    with shares.torchrun() as share:
        output = Output(
            out, columns, description, rank=share.rank, world=share.world, barrier=share.barrier
        )
        with output:
            present = len(output.done)
            left = _left(images, output.done, share)
            counts = _write(answering, output, left, resources, on_rows)
        everyone = share.gather(counts)
    images_done, unreadable = (sum(part[i] for part in everyone) for i in range(2))
    seconds = counts[2]
    return {
        "out": os.fspath(out),
        "images": images_done,
        "unreadable": unreadable,
        "present": present,
        "seconds": seconds,
        "images_per_second": images_done / seconds if seconds and images_done else None,
    }


def columns_of(model: Any, options: PredictionOptions) -> Columns:
    """The columns of the rows.

    Raises:
        ValueError: no classifier, or labels of another number.
    """
    if options.embeddings:
        return Columns(0, int(model.head_hidden_size), None)
    if not model.num_classes:
        raise ValueError("the network has no classifier: it gives embeddings alone")
    labels = options.labels or model.class_names or None
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"{len(labels)} labels for a network of {model.num_classes} classes")
    return Columns(min(options.top, model.num_classes), 0, labels)


def describe(
    model: Any, data: Any, preset: ImageClassification, options: PredictionOptions
) -> Description:
    """What the rows depend on, as JSON: a file begun with something else is not continued."""
    labels = None if options.embeddings else list(options.labels or model.class_names)
    is_place = isinstance(data, (str, os.PathLike))
    return {
        "version": VERSION,
        "network": {"size": model.variant.name, "sha256": weights_digest(model)},
        "images": os.fspath(data) if is_place else type(data).__name__,
        # Rows have paths as they were named: from another folder they would name other images.
        "folder": os.getcwd() if is_place and not os.path.isabs(data) else None,
        "preparation": {
            "resize": preset.resize_size,
            "crop": preset.crop_size,
            "mean": preset.mean,
            "std": preset.std,
            "interpolation": preset.interpolation,
            "draft": options.draft,
        },
        "answer": "embeddings" if options.embeddings else f"top {options.top}",
        "labels": _digest(json.dumps(labels).encode()) if labels else None,
        "dtype": options.dtype,
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names and values of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(flat.numpy())
    return found.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def prepared(model: Any, options: PredictionOptions) -> nn.Module:
    """The network that answers, on its device."""
    if options.dtype not in inference.DTYPES:
        allowed = ", ".join(inference.DTYPES)
        raise ValueError(f"dtype must be one of {allowed}, got {options.dtype!r}")
    if options.top < 1:
        raise ValueError(f"top must be at least 1, got {options.top!r}")
    if model.training:
        model = copy.deepcopy(model).eval()
    if options.embeddings:
        model = inference.without_classifier(model)
    return inference.inference_form(model, inference.DTYPES[options.dtype], options.backend)


def _left(images: ImageList, done: set[str], share: Share) -> list[int]:
    """The indices of this process's images without a row, which are entered in `done`."""
    left = []
    for index, path in enumerate(images.paths):
        text = shown(path)
        if text not in done and share.has(text):
            done.add(text)
            left.append(index)
    return left


def _write(
    answering: Answering,
    output: Output,
    left: list[int],
    resources: Resources,
    on_rows: Callable[[int], OnRows] | None,
) -> tuple[int, int, float]:
    """Answers what is left: numbers of images and of unreadable ones, and seconds."""
    count = unreadable = 0
    begin = time.perf_counter()
    report = on_rows(len(left)) if on_rows else None
    paths = answering.decoding.images.paths
    for answer in _answers(answering, left, resources, output.descriptors) if left else ():
        output.add([paths[i] for i in answer.indices], answer)
        count += len(answer.indices)
        unreadable += answer.unreadable
        if report is not None:
            report(len(answer.indices), answer.unreadable)
    return count, unreadable, time.perf_counter() - begin


def _answers(
    answering: Answering, left: list[int], resources: Resources, descriptors: Sequence[int]
) -> Iterator[Answers]:
    device = next(answering.network.parameters()).device
    batch = resources.batch or inference.BATCH[device.type]
    if resources.ray is not None:
        from effnet_fast.training.answers import ray_prediction

        yield from ray_prediction.answers(answering, left, batch, resources.ray, resources.workers)
        return
    workers = inference.worker_count(resources.workers, len(left), batch)
    with inference.answers(answering, device, workers=workers, descriptors=descriptors) as answer:
        yield from answer(inference.batched(left, batch))
