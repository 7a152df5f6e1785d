"""ONNX and torch.export files of a network, with its classes and how images are prepared.

Both kinds of file hold PyTorch's own operators, or ONNX's standard ones, and none of this package:
they run where it is not installed. A file is compared with the network before it takes its place.

Source: https://docs.pytorch.org/docs/stable/onnx_export.html (torch.onnx) and
https://docs.pytorch.org/docs/stable/export.html (torch.export).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import files
from effnet_fast.models.backbone import Backbone, check_count
from effnet_fast.pretrained import images

KINDS = {"onnx": ".onnx", "torch": ".pt2"}  # what `to` takes, and the suffix of such a file
# Entries beside the graph: ONNX's metadata_props, torch.export's extra_files.
MODEL = "effnet_fast.model"  # "efficientnet_b0"
CLASSES = "effnet_fast.classes"  # JSON: the names in the order of the logits
TRANSFORM = "effnet_fast.transform"  # JSON: the arguments of `ImageClassification`
ONNX_PACKAGES = ("onnx", "onnxscript")
LARGEST_ONNX = 1_500_000_000  # bytes of weights; a protobuf file ends at 2 GiB
EXAMPLES = 2  # images: an exporter takes a batch of 1 for a constant
COMPARED = 3  # images, in one batch, then one alone
SPREAD = 1e-3  # largest error as a share of what images differ by
ROUNDING = 10.0  # or as a multiple of stock PyTorch's own error in the same dtype


class ExportError(RuntimeError):
    """The exported file computes something else than the network; it is not kept."""


@dataclass(frozen=True)
class Exported:
    """A file that has been written.

    Args:
        path, kind: the file, and one of KINDS.
        resolution: side of the images that it takes, pixels.
        batch: images per call; None where any number goes.
        bytes: size of the file.
        checked_by: what ran it for the comparison; None where onnxruntime is not installed.
        error, allowed: the largest rms error of its results against the network in float64, and
            what was allowed there.
    """

    path: str
    kind: str
    resolution: int
    batch: int | None
    bytes: int
    checked_by: str | None
    error: float | None = None
    allowed: float | None = None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    preset: images.ImageClassification | None = None,
    class_names: Sequence[str] | None = None,
    resolution: int | None = None,
    batch: int | None = None,
) -> Exported:
    """Writes a network for other runtimes; `path` has the whole, compared file or is untouched.

    The file takes images [N,C,H,W] in fp32, prepared as its entry TRANSFORM says, and gives what
    the network gives: logits, pooled features, or the maps of an encoder. The rms error of each
    result against the network in float64 may be at most SPREAD times what two images differ by, or
    ROUNDING times stock PyTorch's own error where that is more.

    Args:
        model: an `EfficientNet` or `EfficientNetFeatures` in eval mode and fp32, on any device. It
            stays as it is.
        path: the file, replaced where it exists.
        to: "onnx" or "torch"; None goes by the suffix, .onnx or .pt2.
        preset: how images are prepared; None means as `model.variant` says.
        class_names: in the order of the logits; None means `model.class_names`.
        resolution: side of the images, pixels; None means the preset's crop. The entry TRANSFORM
            has the preset at that side.
        batch: images per call; None leaves it open.

    Raises:
        TypeError: model is no network of this package.
        ValueError: it is in training mode or not in fp32; another kind or suffix; a resolution or
            batch below 1; names that are not one for each class; weights too large for one ONNX
            file.
        ImportError: ONNX is asked for, and onnx or onnxscript is not installed.
        ExportError: the file computes something else than the network.
        OSError: the file cannot be written.
    """
    kind = _kind_of(path, to)
    network = _checked_network(model)
    preset = preset or images.preset(network.variant)
    side = preset.crop_size[0] if resolution is None else resolution
    for name, value in (("resolution", side), ("batch", batch)):
        if value is not None:
            check_count(name, value)
    entries = _entries(network, preset, side, class_names)
    if kind == "onnx":
        _require_onnx(network)
    network = copy.deepcopy(network).cpu().requires_grad_(False)
    network.backend = "reference"
    x = _random_images(batch or EXAMPLES, network.in_chans, side)
    write, open_file = _WAYS[kind]
    with files.replacing(path) as temporary:
        write(network, x, batch is None, entries, temporary)
        try:
            run, checked_by = open_file(temporary, entries)
            error = allowed = None
            if run is not None:
                x = _random_images(max(batch or 0, COMPARED), network.in_chans, side)
                batches = (x, x[-1:]) if batch is None else (x[:batch],)
                error, allowed = _compare(run, network, x, batches)
        except ExportError as failure:
            raise ExportError(f"{os.fspath(path)}: {failure}; the file is not kept") from None
        size = temporary.stat().st_size
    return Exported(os.fspath(path), kind, side, batch, size, checked_by, error, allowed)


def _kind_of(path: str | os.PathLike[str], to: str | None) -> str:
    suffix = Path(path).suffix
    if to is None:
        to = next((kind for kind, own in KINDS.items() if own == suffix), None)
        if to is None:
            allowed = " or ".join(KINDS.values())
            raise ValueError(f"{os.fspath(path)}: the suffix must be {allowed}")
    if to not in KINDS:
        raise ValueError(f"to must be one of {', '.join(KINDS)}, got {to!r}")
    if suffix != KINDS[to]:
        raise ValueError(f"{os.fspath(path)}: the suffix of a file for {to} must be {KINDS[to]}")
    return to


def _checked_network(model: nn.Module) -> Any:
    if not isinstance(model, Backbone):
        raise TypeError(
            "export takes an EfficientNet or EfficientNetFeatures of effnet_fast, got "
            f"{type(model).__name__}; load other packages' weights with "
            "EfficientNet.from_checkpoint, and give deploy's network as the one it was made of"
        )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if other := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(f"the model must be in torch.float32, got {other.pop()}: model.float()")
    return model


def _entries(
    network: Any, preset: images.ImageClassification, side: int, class_names: Sequence[str] | None
) -> dict[str, str]:
    """What is kept beside the graph, for images of `side` pixels."""
    names = tuple(network.class_names if class_names is None else class_names)
    classes = getattr(network, "num_classes", 0)
    if names and len(names) != classes:
        raise ValueError(f"{len(names)} class names were given, the network has {classes} classes")
    crop = preset.crop_size[0]
    sides = [max(side, round(length * side / crop)) for length in preset.resize_size]
    transform = {
        "crop_size": side,
        "resize_size": sides[0] if len(sides) == 1 else sides,
        "mean": preset.mean,
        "std": preset.std,
        "interpolation": preset.interpolation,
        "antialias": preset.antialias,
    }
    entries = {
        MODEL: f"efficientnet_{network.variant.name}",
        TRANSFORM: json.dumps(transform),
    }
    if names:
        entries[CLASSES] = json.dumps(names, ensure_ascii=False)
    return entries


def _require_onnx(network: nn.Module) -> None:
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"ONNX files need the packages onnx and onnxscript, and {name} is missing: "
                'pip install "effnet-fast[onnx]" (or onnx onnxscript)'
            ) from error
    size = sum(p.nbytes for p in network.parameters())
    if size > LARGEST_ONNX:
        raise ValueError(
            f"the weights take {size} bytes, and one ONNX file holds at most {LARGEST_ONNX}: "
            "export to torch"
        )


def _random_images(count: int, channels: int, side: int) -> Tensor:
    """Smooth random images [count,channels,side,side] of mean 0 between -2 and 2."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 8, 8, generator=generator)
    return (F.interpolate(coarse, (side, side), mode="bilinear") - 0.5) / 0.25


def _capture(network: nn.Module, x: Tensor, dynamic: bool) -> Any:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(network, (x,), dynamic_shapes=shapes)


Run = Callable[[Tensor], list[Tensor]]


def _write_torch(
    network: nn.Module, x: Tensor, dynamic: bool, entries: dict[str, str], path: Path
) -> None:
    program = _capture(network, x, dynamic)
    with path.open("wb") as file, _quiet():  # by name it would ask for another suffix
        torch.export.save(program, file, extra_files=entries)


def _open_torch(path: Path, entries: dict[str, str]) -> tuple[Run | None, str | None]:
    found = dict.fromkeys(entries, "")
    with path.open("rb") as file, _quiet():
        module = torch.export.load(file, extra_files=found).module()
    _check_entries(found, entries)

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _listed(module(x))

    return run, f"torch.export of torch {torch.__version__}"


def _write_onnx(
    network: nn.Module, x: Tensor, dynamic: bool, entries: dict[str, str], path: Path
) -> None:
    with _quiet():
        program = torch.onnx.export(
            _capture(network, x, dynamic),
            dynamo=True,
            input_names=["images"],
            verbose=False,
        )
    assert program is not None
    outputs = program.model.graph.outputs
    for index, value in enumerate(outputs):
        value.name = "output" if len(outputs) == 1 else f"map{index}"
    program.model.metadata_props.update(entries)
    program.save(path)


def _open_onnx(path: Path, entries: dict[str, str]) -> tuple[Run | None, str | None]:
    onnx = importlib.import_module("onnx")
    onnx.checker.check_model(str(path))
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None, None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    _check_entries(session.get_modelmeta().custom_metadata_map, entries)
    (name,) = (value.name for value in session.get_inputs())

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]

    return run, f"onnxruntime {onnxruntime.__version__}"


_WAYS: dict[str, Any] = {
    "onnx": (_write_onnx, _open_onnx),
    "torch": (_write_torch, _open_torch),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps an exporter's remarks on its own future to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_entries(found: dict[str, Any], entries: dict[str, str]) -> None:
    for name, text in entries.items():
        read = found.get(name)
        if (read.decode("utf-8") if isinstance(read, bytes) else read) != text:
            raise ExportError(f"the file's entry {name} is not what was written")


def _listed(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def _compare(
    run: Run, network: nn.Module, x: Tensor, batches: Sequence[Tensor]
) -> tuple[float, float]:
    """The error nearest to what is allowed, and that.

    Args:
        run: runs the file.
        network: in fp32 on stock PyTorch.
        x: images of which some differ; what their results differ by is the scale of errors.
        batches: what the file is run on.

    Raises:
        ExportError: a result has another shape, or an error that is too large.
    """
    exact_network = copy.deepcopy(network).double()
    worst = (0.0, 0.0)
    with torch.no_grad():
        spreads = [_rms(y - y.mean(0)) for y in _listed(network(x))]
        for images_ in batches:
            exact = _listed(exact_network(images_.double()))
            stock, found = _listed(network(images_)), run(images_)
            shapes, expected = ([list(y.shape) for y in ys] for ys in (found, exact))
            if shapes != expected:
                raise ExportError(f"its results have shapes {shapes}, the network's {expected}")
            for actual, beside, y, spread in zip(found, stock, exact, spreads, strict=True):
                allowed = max(ROUNDING * _rms(beside - y), SPREAD * spread)
                error = _rms(actual - y)
                if not error <= allowed:  # NaN, too
                    raise ExportError(
                        f"its results are off by {error:.2e} (rms), and {allowed:.2e} is allowed"
                    )
                worst = max(worst, (error, allowed), key=lambda pair: pair[0] / (pair[1] or 1.0))
    return worst


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()
