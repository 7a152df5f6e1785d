"""From a file to named tensors: both formats, and what training scripts wrap around a state dict.

Nothing that a file holds is executed: `.safetensors` files are read by safetensors, all others by
`torch.load(weights_only=True)`, and what that refuses is not tried again without.
"""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from effnet_fast.checkpoints.naming import SHOWN, STEM_KEYS

# Where training scripts keep the state dict and its exponential moving average, and what
# torch.compile, data parallel wrappers and AveragedModel put in front of names or beside them.
EMA_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
COMPILED_PREFIX = "_orig_mod."
COUNTERS = ("n_averaged",)
ARCHITECTURE = "arch"  # timm's entry with the name of the model
DEPTH = 4  # wrappers within wrappers


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Args:
        state: named tensors on the CPU, as the file names them but for wrappers' prefixes.
        metadata: a safetensors file's text entries.
        architecture: the model's name where the file tells it, else "".
    """

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    architecture: str = ""


def read(path: str | os.PathLike[str], *, ema: bool = True) -> Content:
    """Reads a checkpoint.

    Args:
        path: a local file.
        ema: whether the moving average of the weights goes before the weights where there is one;
            False never takes it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is corrupt, needs code to be loaded, or holds something else than tensors
            under an EfficientNet's names. The message names the path.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:  # raises OSError, before either reader words it its own way
        head = file.read(9)
    is_safetensors = name.endswith(".safetensors") or head[8:] == b"{"
    try:
        content, metadata = _read_safetensors(name) if is_safetensors else (_read_pth(name), {})
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: not a file of plain tensors, which is all that is loaded"
        ) from error
    except (OSError, ScriptError):
        raise
    except Exception as error:  # on garbage, either reader raises whatever it trips over
        raise ValueError(f"{name}: truncated or corrupt weights file") from error
    try:
        state = _state_dict(content, ema)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    architecture = content.get(ARCHITECTURE, "") if isinstance(content, Mapping) else ""
    return Content(state, metadata, architecture if isinstance(architecture, str) else "")


class ScriptError(ValueError):
    """A TorchScript archive, which holds code."""


def _read_safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Read, not mapped: tensors stay as they are when the file is written to, and mapping it took
    # ten times as long where page faults are dear.
    with safe_open(name, framework="pt", backend="pread") as file:
        return file.get_tensors(), dict(file.metadata() or {})


def _read_pth(name: str) -> Any:
    if zipfile.is_zipfile(name):  # the format since torch 1.6
        with zipfile.ZipFile(name) as archive:
            if any(member.endswith("/constants.pkl") for member in archive.namelist()):
                raise ScriptError(
                    f"{name}: a TorchScript archive, which holds code: save the "
                    "module's state_dict() instead"
                )
    # The options that torchvision's and timm's scripts store: reading one sets attributes only.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(name, map_location="cpu", weights_only=True)


def _state_dict(content: Any, ema: bool) -> dict[str, Tensor]:
    """The state dict within a file's content, without what wrappers put in front of its names."""
    if isinstance(content, Mapping):
        for mapping in _within(content, ema, DEPTH):
            prefix = _prefix(mapping)
            if prefix is not None:
                return _strip(mapping, prefix)
    innermost = _innermost(content)
    if not isinstance(innermost, Mapping) or not innermost:
        raise ValueError(f"holds {type(innermost).__name__}, not named tensors")
    for key, value in innermost.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} is of type {type(value).__name__}, not a tensor")
    raise ValueError(f"not an EfficientNet's state dict: none of {', '.join(STEM_KEYS)} is in it")


def _within(content: Mapping[Any, Any], ema: bool, depth: int) -> Iterator[Mapping[Any, Any]]:
    """The mappings in which a state dict may be, the preferred ones first."""
    for wrapper in (*(EMA_WRAPPERS if ema else ()), *WRAPPERS):
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and depth > 0:
            yield from _within(inner, ema, depth - 1)
    yield content


def _innermost(content: Any) -> Any:
    for _ in range(DEPTH):
        if not isinstance(content, Mapping):
            break
        inner = (content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping))
        content = next(inner, content)
    return content


def _prefix(mapping: Mapping[Any, Any]) -> str | None:
    """What stands before the stem's name; None where there is no stem."""
    for key in mapping:
        if not isinstance(key, str):
            continue
        plain = key.replace(COMPILED_PREFIX, "")
        for stem in STEM_KEYS:
            if plain == stem or plain.endswith(f".{stem}"):
                return plain.removesuffix(stem)
    return None


def _strip(mapping: Mapping[Any, Any], prefix: str) -> dict[str, Tensor]:
    state = {}
    strays = []
    for key, value in mapping.items():
        if isinstance(key, str) and key.removeprefix(COMPILED_PREFIX) in COUNTERS:
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} is of type {type(value).__name__}, not a tensor")
        plain = key.replace(COMPILED_PREFIX, "")
        if not plain.startswith(prefix):
            strays.append(key)
            continue
        state[plain.removeprefix(prefix)] = value.detach()
    if strays:
        raise ValueError(
            f"names begin with {prefix!r}, but for {len(strays)} ({', '.join(strays[:SHOWN])})"
        )
    return state
