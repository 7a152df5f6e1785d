"""Reads weights from files, and puts them into a model only when all of them fit.

Names of parameters are torchvision's. Files named as timm, lukemelas or NVIDIA name them are
recognised and refused.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FORMATS = ("auto", "torchvision")
STEM_KEYS = {  # the stem convolution's name tells whose naming a state dict follows
    "features.0.0.weight": "torchvision",
    "conv_stem.weight": "timm",
    "_conv_stem.weight": "lukemelas",
    "stem.conv.weight": "nvidia",
}
WRAPPERS = ("state_dict", "model")  # where training scripts put the state dict in their checkpoint
PARALLEL_PREFIX = "module."  # DataParallel's and DistributedDataParallel's
SHOWN = 3  # differences that an error message names


def load(path: str | os.PathLike[str], format: str = "auto") -> dict[str, Tensor]:
    """Reads a state dict named as torchvision names it, on the CPU.

    `.safetensors` files are read by safetensors, every other by `torch.load(weights_only=True)`;
    what that refuses is not tried again without. A checkpoint that holds the state dict under
    "state_dict" or "model", or whose names all begin with "module.", is unwrapped.

    Args:
        path: a local file.
        format: "auto" (told from the names) or "torchvision".

    Raises:
        OSError: the file cannot be opened.
        ValueError: unknown format; the file is corrupt or holds something else than tensors; or
            it names its parameters in no known way. The message names the path.
        NotImplementedError: it names its parameters as timm, lukemelas or NVIDIA do.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, given {format!r}")
    state = _unwrap(_read(path), path)
    naming = next((name for key, name in STEM_KEYS.items() if key in state), None)
    if naming is None:
        raise ValueError(
            f"{os.fspath(path)}: not an EfficientNet's state dict: none of "
            f"{', '.join(STEM_KEYS)} is in it"
        )
    if naming != "torchvision":
        raise NotImplementedError(
            f"{os.fspath(path)}: parameters are named as {naming} names them; only torchvision's "
            "names can be loaded"
        )
    return state


def load_into(model: nn.Module, path: str | os.PathLike[str], format: str = "auto") -> None:
    """Loads a file into `model`, in place: all of it or, when anything differs, nothing.

    Raises:
        what `load` and `check` raise, with the path.
    """
    state = load(path, format)
    try:
        check(model, state)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    model.load_state_dict(state, strict=True)


def check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compares names, shapes and dtypes with the model's own state dict.

    Floating-point tensors of any precision fit one another (they are cast when loaded); a
    floating-point tensor and an integer one do not.

    Raises:
        ValueError: something differs; the first few differences of each kind are named.
    """
    own = model.state_dict()
    common = [key for key in own if key in state]
    kinds = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in common
            if state[key].shape != own[key].shape
        ],
        "of another dtype": [
            f"{key} {state[key].dtype} instead of {own[key].dtype}"
            for key in common
            if state[key].is_floating_point() != own[key].is_floating_point()
        ],
    }
    problems = [f"{len(found)} {kind} ({_first(found)})" for kind, found in kinds.items() if found]
    if problems:
        raise ValueError(f"weights do not fit the model: {'; '.join(problems)}")


def _first(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def _read(path: str | os.PathLike[str]) -> Any:
    name = os.fspath(path)
    with open(name, "rb"):
        pass  # what cannot be opened raises OSError here, before either reader words it its own way
    try:
        if name.endswith(".safetensors"):
            return load_file(name)
        return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: not a file of plain tensors, which is all that is loaded"
        ) from error
    except OSError:
        raise
    except Exception as error:  # on garbage, either reader raises whatever it trips over
        raise ValueError(f"{name}: truncated or corrupt weights file") from error


def _unwrap(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{os.fspath(path)}: holds {type(content).__name__}, not named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{os.fspath(path)}: entry {key!r} is of type {type(value).__name__}, not a tensor"
            )
    if all(key.startswith(PARALLEL_PREFIX) for key in content):
        return {key.removeprefix(PARALLEL_PREFIX): value for key, value in content.items()}
    return dict(content)
