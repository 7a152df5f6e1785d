"""Keras's files, read with h5py: weights alone, as PyTorch lays them out.

Three layouts hold the same layers: the legacy `.h5` (a group for each layer), Keras 3's
`.weights.h5` (numbered variables under `layers`, with the layer's name in an attribute), and
`.keras`, a zip archive of the latter and config.json. Nothing that a file holds is executed, links
that lead out of a file are not followed, and of a configuration only numbers are read.

The layers that rescale and normalise images before the stem are not folded into it: their numbers
become the mean and std with which images are prepared.

Source: keras/src/applications/efficientnet.py (3.15); https://github.com/qubvel/efficientnet (1.1).
"""

from __future__ import annotations

import importlib
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet_fast.checkpoints.facts import Facts, checked, is_number
from effnet_fast.checkpoints.families import IMAGENET_STD

MAGIC = b"\x89HDF\r\n\x1a\n"
SUFFIX = ".keras"
WEIGHTS, CONFIG = "model.weights.h5", "config.json"  # in a `.keras` archive
EXTRA = "pip install 'effnet-fast[keras]'"
LARGEST = 1 << 33  # bytes of all weights of a file
LONGEST = 1 << 26  # bytes of a configuration
DEPTH = 8  # groups within groups
EVEN = 64  # a side that stays even behind each layer that strides
EPSILON = 1e-7  # below which Normalization's divisor never is
# The variables of a layer in PyTorch's words: in a legacy file by name, in others by number.
NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
}
OTHERS = ("optimizer_weights", "top_level_model_weights")  # groups of no layer
CLASSIFIERS = {"probs": "predictions"}  # of the package efficientnet
Layers = dict[str, dict[str, np.ndarray[Any, Any]]]  # variables by the layer's name


def is_keras(name: str, head: bytes) -> bool:
    """Whether a file is one of Keras's, by its name or its first bytes."""
    return head[:8] == MAGIC or name.endswith(SUFFIX)


def read(name: str) -> tuple[dict[str, Tensor], str, Facts]:
    """Weights, the family and what else a file says.

    Raises:
        ValueError: h5py is not installed, or the file holds something else.
        OSError: it cannot be read.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise ValueError(f"Keras's files are read with h5py: {EXTRA}") from error
    source: Any = name
    config: Any = None
    if name.endswith(SUFFIX):
        with zipfile.ZipFile(name) as archive:
            source = io.BytesIO(_member(archive, WEIGHTS, LARGEST))
            config = json.loads(_member(archive, CONFIG, LONGEST))
    with h5py.File(source, "r") as file:
        text = file.attrs.get("model_config")
        if config is None and isinstance(text, (str, bytes)) and len(text) < LONGEST:
            config = json.loads(text)
        root = _child(h5py, file, "model_weights", file)
        layered = None if "stem_conv" in root else _child(h5py, root, "layers")
        found = _named(h5py, root) if layered is None else _numbered(h5py, layered)
        layers: Layers = dict(found)
    state = _state(layers)
    begins = any(name.startswith(("stem_conv_pad", "normalization")) for name in layers)
    return state, "keras" if begins else "efficientnet", _facts(layers, config, fixed=begins)


def _member(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise ValueError(f"an archive without {name}") from error
    if info.file_size > largest:
        raise ValueError(f"{name} is larger than {largest} bytes")
    return archive.read(info)


def _child(h5py: Any, group: Any, key: str, default: Any = None) -> Any:
    """A group or array in a group; `default` where there is none of that name.

    Raises:
        ValueError: it is a link, behind which may lie another file.
    """
    if key not in {*group}:  # `in group` would follow a link
        return default
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise ValueError(f"{key!r} is a link")
    return group[key]


def _datasets(h5py: Any, group: Any, depth: int = DEPTH) -> Iterator[tuple[str, Any]]:
    """The arrays in a group and the groups in it, but for what lies behind links."""
    for key in group:
        item = _child(h5py, group, key)
        if isinstance(item, h5py.Group):
            if depth == 0:
                raise ValueError("groups are nested too deeply")
            yield from _datasets(h5py, item, depth - 1)
        else:
            if item.external or item.is_virtual:
                raise ValueError(f"{key!r} lies in another file")
            yield key, item


def _arrays(h5py: Any, group: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for key, item in _datasets(h5py, group):
        # Other kinds of numbers hold seeds and counts, which no layer here has.
        if item.dtype.kind == "f":
            if item.nbytes > LARGEST:
                raise ValueError(f"{key!r} is larger than {LARGEST} bytes")
            yield key, np.asarray(item)


def _named(h5py: Any, root: Any) -> Iterator[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    """The layers of a legacy file."""
    for layer in root:
        if layer not in OTHERS:
            group = _child(h5py, root, layer)
            if isinstance(group, h5py.Group):
                yield layer, {k.partition(":")[0]: v for k, v in _arrays(h5py, group)}


def _numbered(h5py: Any, root: Any) -> Iterator[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    """The layers of Keras 3's files, whose variables have the names of a legacy file."""
    for key in root:
        variables = _child(h5py, _child(h5py, root, key), "vars")
        name = None if variables is None else variables.attrs.get("name")
        if not isinstance(name, str):
            raise ValueError(
                f"layers/{key} has no name: write the file with a newer Keras 3, or as .h5"
            )
        values = [value for _, value in sorted(_arrays(h5py, variables), key=_number)]
        kind = key.rstrip("0123456789").rstrip("_")
        if kind == "normalization":
            names: tuple[str, ...] = ("mean", "variance")
        elif kind == "batch_normalization":
            names = ("gamma", "beta", "moving_mean", "moving_variance")
        else:
            names = ("kernel", "bias")
        if len(values) > len(names):
            raise ValueError(f"layers/{key} has {len(values)} variables, not {len(names)}")
        yield name, dict(zip(names, values, strict=False))


def _number(item: tuple[str, Any]) -> int:
    return int(item[0]) if item[0].isdigit() else 1 << 30


def _state(layers: Layers) -> dict[str, Tensor]:
    """The layers with weights, named as `NAMINGS["keras"]` has it."""
    state = {}
    for layer, values in layers.items():
        if layer.startswith(("normalization", "rescaling")):
            continue
        for name, value in values.items():
            if name not in NAMES:
                raise ValueError(f"{layer} has an unknown variable {name!r}")
            array = np.ascontiguousarray(_laid_out(layer, value))
            state[f"{CLASSIFIERS.get(layer, layer)}.{NAMES[name]}"] = torch.from_numpy(array.copy())
    return state


def _laid_out(layer: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A kernel as PyTorch has it: [H,W,I,O] as [O,I,H,W], depthwise [H,W,C,1] as [C,1,H,W]."""
    if value.ndim == 4:
        return value.transpose((2, 3, 0, 1) if layer.endswith("dwconv") else (3, 2, 0, 1))
    return value.T if value.ndim == 2 else value


def _facts(layers: Layers, config: Any, *, fixed: bool) -> Facts:
    """How images are prepared, and for which side the padding was made."""
    described = _described(config)
    images: dict[str, Any] = {"squash": True}
    network: dict[str, Any] = {}
    shapes = [layer.get("batch_shape", layer.get("batch_input_shape")) for layer in described]
    shape = next((shape for shape in shapes if isinstance(shape, list) and len(shape) == 4), None)
    if shape is not None and shape[1:3] == [None, None]:
        network["padded_as"] = EVEN
    elif shape is not None and shape[1] == shape[2]:
        network["padded_as"] = shape[1]
        images |= dict.fromkeys(("resolution", "resize", "crop"), shape[1])
    normalised = next((v for k, v in layers.items() if k.startswith("normalization")), {})
    if "mean" in normalised and "variance" in normalised:
        images |= _normalisation(normalised, layers, described)
    if not fixed:  # the package efficientnet pads each image by its own size
        network = {}
    return Facts(images=checked("images", images), network=checked("network", network))


def _described(config: Any) -> list[dict[str, Any]]:
    """The layers' own configurations."""
    inner = config.get("config") if isinstance(config, Mapping) else None
    layers = inner.get("layers") if isinstance(inner, Mapping) else None
    found = [layer.get("config") for layer in layers or [] if isinstance(layer, Mapping)]
    return [layer for layer in found if isinstance(layer, dict)]


def _normalisation(
    normalised: Mapping[str, Any], layers: Layers, described: list[dict[str, Any]]
) -> dict[str, Any]:
    """Mean and std over [0, 1] of: rescale, normalise, rescale (where there is a second)."""
    mean, variance = (np.ravel(normalised[name]).tolist() for name in ("mean", "variance"))
    mean, variance = (v * 3 if len(v) == 1 else v for v in (mean, variance))
    rescalings = [
        (_three(layer["scale"]), _three(layer.get("offset", 0.0)))
        for layer in described
        if str(layer.get("name", "")).startswith("rescaling") and "scale" in layer
    ]
    if not rescalings:
        rescalings = [([1 / 255] * 3, [0.0] * 3)]
        # The published weights' variances are deviations: a second layer divides by their root.
        is_published = np.allclose(variance, IMAGENET_STD, rtol=1e-4, atol=0)
        if is_published or sum(name.startswith("rescaling") for name in layers) > 1:
            rescalings.append(([1 / math.sqrt(std) for std in IMAGENET_STD], [0.0] * 3))
    if len(rescalings) > 2 or len(mean) != 3 or len(variance) != 3:
        raise ValueError("images are not rescaled and normalised as keras.applications does")
    (scale, offset), *rest = rescalings
    last_scale, last_offset = rest[0] if rest else ([1.0] * 3, [0.0] * 3)
    if not all(map(is_number, [*mean, *variance])) or min(variance) < 0 or 0 in scale + last_scale:
        raise ValueError("the numbers by which images are normalised are out of range")
    divisors = [max(math.sqrt(value), EPSILON) for value in variance]
    columns = list(zip(mean, divisors, scale, offset, last_scale, last_offset, strict=True))
    return {
        "mean": [(m - o - o2 * d / s2) / (255 * s) for m, d, s, o, s2, o2 in columns],
        "std": [d / (255 * s * s2) for _, d, s, _, s2, _ in columns],
    }


def _three(value: Any) -> list[float]:
    """A number for each channel."""
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, 3) or not all(map(is_number, numbers)):
        raise ValueError(f"a rescaling by {str(value)[:100]} is none of three channels")
    return [float(number) for number in numbers] * (3 // len(numbers))
