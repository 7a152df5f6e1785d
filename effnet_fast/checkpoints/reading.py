"""From a file to named tensors: both formats, and the wrappers of training scripts.

Nothing that a file holds is executed: `.safetensors` files are read by safetensors, all others by
`torch.load(weights_only=True)`; a file that it refuses is not tried again without.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from effnet_fast import files
from effnet_fast.checkpoints import keras_files, plain_data
from effnet_fast.checkpoints.facts import Facts
from effnet_fast.checkpoints.namings import STEM_KEYS
from effnet_fast.checkpoints.parameter_names import SHOWN, first_of
from effnet_fast.checkpoints.plain import problem

# Where training scripts keep the state dict and its exponential moving average, and what
# torch.compile, data parallel wrappers and AveragedModel put in front of names or beside them.
EMA_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "params")
COMPILED_PREFIX = "_orig_mod."
COUNTERS = ("n_averaged",)
ARCHITECTURE = "arch"  # timm's entry with the name of the model
DEPTH = 4  # wrappers within wrappers
# What the Hugging Face Hub's folders hold.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_CONFIG = "config.json"

_NEEDED = re.compile(r"GLOBAL (\S+)")  # in the message with which torch refuses a type


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    state: dict[str, Tensor]  # on the CPU, as the file names them but for wrappers' prefixes
    # A safetensors file's text entries, or those that this package's networks put into the
    # attribute of a state dict in which PyTorch keeps versions of modules.
    metadata: dict[str, str] = field(default_factory=dict)
    architecture: str = ""  # the model's name where the file, or config.json beside it, has it
    folder: str = ""  # where the file is
    config: dict[str, Any] = field(default_factory=dict)  # of config.json beside it
    family: str = ""  # of a file of Keras, which shows it
    facts: Facts = field(default_factory=Facts)


def read(path: str | os.PathLike[str], *, ema: bool = True) -> Content:
    """Reads a checkpoint.

    Args:
        path: a local file, or a folder in the layout of the Hugging Face Hub.
        ema: whether to prefer the moving average of the weights where the file has one.

    Raises:
        OSError: the file cannot be opened, or memory is lacking (ENOMEM).
        ValueError: it is no file on a disk, is corrupt, needs code to be loaded, or holds something
            other than plain tensors under an EfficientNet's names. The message names the path.
    """
    name = _file_of(os.fspath(path))
    files.check_regular(name)
    with open(name, "rb") as file:  # raises OSError, before either reader words it its own way
        head = file.read(9)
    if keras_files.is_keras(name, head):
        return _read_keras(name)
    is_safetensors = name.endswith(".safetensors") or head[8:] == b"{"
    try:
        content, metadata = _read_safetensors(name) if is_safetensors else (_read_pth(name), {})
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: not a file of plain tensors; only plain tensors are loaded{_needed(error)}"
        ) from error
    except (OSError, ScriptError):
        raise
    except Exception as error:  # on garbage, either reader raises whatever it trips over
        if files.is_out_of_memory(error):
            raise files.out_of_memory(name) from error
        raise ValueError(f"{name}: truncated or corrupt weights file") from error
    with files.naming_file(name):
        state, beside = _state_dict(content, ema)
    folder = os.path.dirname(name)
    config = read_json(os.path.join(folder, HUB_CONFIG))
    architecture = _architecture(content) or _hub_architecture(config)
    return Content(state, {**beside, **metadata}, architecture, folder, config)


def _read_keras(name: str) -> Content:
    try:
        state, family, facts = keras_files.read(name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # on garbage, h5py raises whatever it trips over
        if files.is_out_of_memory(error):
            raise files.out_of_memory(name) from error
        raise ValueError(f"{name}: truncated or corrupt weights file") from error
    with files.naming_file(name):
        return Content(_state_dict(state, ema=True)[0], family=family, facts=facts)


def _file_of(name: str) -> str:
    """The file itself, or the one that a folder of the Hugging Face Hub holds."""
    if not os.path.isdir(name):
        return name
    files = [os.path.join(name, file) for file in HUB_FILES]
    for file in files:
        if os.path.isfile(file):
            return file
    raise ValueError(f"{name}: a folder that holds neither {' nor '.join(HUB_FILES)}")


def _architecture(content: Any) -> str:
    """The model's name in timm's training checkpoints, else in the options stored with them."""
    if not isinstance(content, Mapping):
        return ""
    arguments = content.get("args")
    for name in (content.get(ARCHITECTURE), getattr(arguments, "model", None)):
        if isinstance(name, str) and name:
            return name
    return ""


def read_json(name: str) -> dict[str, Any]:
    """The entries of a JSON file; none where there is no file, or another program's."""
    try:
        content = json.loads(files.read_text(name))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _hub_architecture(config: dict[str, Any]) -> str:
    """The model's name in config.json, with the tag of its weights as timm has it."""
    if not isinstance(config.get("architecture"), str):
        return ""
    weights = config.get("pretrained_cfg")
    tag = weights.get("tag") if isinstance(weights, dict) else None
    return f"{config['architecture']}.{tag}" if tag else config["architecture"]


def _needed(error: pickle.UnpicklingError) -> str:
    match = _NEEDED.search(str(error))
    if match is None:
        return ""
    return f": it needs {match[1]}. Where it was written, save the model's state_dict() alone"


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
    with plain_data.allowed():
        return torch.load(name, map_location="cpu", weights_only=True)


def _state_dict(content: Any, ema: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict within a file's content, without what wrappers put in front of its names.

    Returns:
        it, and what the network that it was saved from has put into it beside tensors.
    """
    if isinstance(content, Mapping):
        for mapping in itertools.chain(_within(content, ema, DEPTH), _only_network(content)):
            prefix = _prefix(mapping)
            if prefix is not None:
                return _strip(mapping, prefix), remembered(mapping)
    innermost = _innermost(content)
    if not isinstance(innermost, Mapping) or not innermost:
        raise ValueError(f"holds {type(innermost).__name__}, not named tensors")
    for key, value in innermost.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} is of type {type(value).__name__}, not a tensor")
    raise ValueError(f"not an EfficientNet's state dict: none of {', '.join(STEM_KEYS)} is in it")


def remembered(mapping: Mapping[Any, Any]) -> dict[str, str]:
    """The text that a network put into its state dict beside tensors."""
    modules = getattr(mapping, "_metadata", None)
    if not isinstance(modules, Mapping):
        return {}
    entries = [entry for entry in modules.values() if isinstance(entry, Mapping)]
    return {
        key: value
        for entry in entries
        for key, value in entry.items()
        if isinstance(key, str) and isinstance(value, str)
    }


def _within(content: Mapping[Any, Any], ema: bool, depth: int) -> Iterator[Mapping[Any, Any]]:
    """The mappings in which a state dict may be, the preferred ones first."""
    for wrapper in (*(EMA_WRAPPERS if ema else ()), *WRAPPERS):
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and depth > 0:
            yield from _within(inner, ema, depth - 1)
    yield content


def _only_network(content: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """The network among the entries of a file that are under none of the known names.

    Raises:
        ValueError: there are several.
    """
    found = [
        (str(key), value)
        for key, value in content.items()
        if isinstance(value, Mapping) and key not in EMA_WRAPPERS and _prefix(value) is not None
    ]
    if len(found) > 1:
        names = first_of([name for name, _ in found])
        raise ValueError(f"holds several networks ({names}): save the state dict of one of them")
    for _, network in found:
        yield network


def _innermost(content: Any) -> Any:
    for _ in range(DEPTH):
        if not isinstance(content, Mapping):
            break
        inner = (content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping))
        content = next(inner, content)
    return content


def _prefix(mapping: Mapping[Any, Any]) -> str | None:
    """What stands before the stem's name; None where there is no stem.

    Raises:
        ValueError: there are several stems, of several networks.
    """
    prefixes = []
    for key in mapping:
        if not isinstance(key, str):
            continue
        plain = key.replace(COMPILED_PREFIX, "")
        for stem in STEM_KEYS:
            if plain == stem or plain.endswith(f".{stem}"):
                prefixes.append(plain.removesuffix(stem))
                break
    if len(prefixes) > 1:
        names = ", ".join(map(repr, prefixes[:SHOWN]))
        raise ValueError(
            f"holds several networks (names begin with {names}): save the state dict of one of them"
        )
    return prefixes[0] if prefixes else None


def _strip(mapping: Mapping[Any, Any], prefix: str) -> dict[str, Tensor]:
    """The network's tensors by their names behind `prefix`.

    What else the module that wraps the network has, such as the weights of a loss, is left out.
    """
    state: dict[str, Tensor] = {}
    others, twice, unusable = [], [], []
    for key, value in mapping.items():
        if isinstance(key, str) and key.removeprefix(COMPILED_PREFIX) in COUNTERS:
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} is of type {type(value).__name__}, not a tensor")
        plain = key.replace(COMPILED_PREFIX, "")
        if not plain.startswith(prefix):
            others.append(plain)
            continue
        name = plain.removeprefix(prefix)
        if name in state:
            twice.append(name)
        # By the class's own functions: a file can give a tensor attributes of any name.
        state[name] = Tensor.detach(value)
        if why := problem(state[name]):
            unusable.append(f"{name} is {why}")
        else:  # kernels read the memory, and the bit that negates a tensor is not in it
            state[name] = state[name].resolve_neg()
    if twice:
        raise ValueError(f"{len(twice)} names are given twice ({first_of(twice)})")
    if unusable:
        raise ValueError(f"{len(unusable)} entries are no plain tensors ({first_of(unusable)})")
    own = {name.partition(".")[0] for name in state}
    if strays := [name for name in others if name.partition(".")[0] in own]:
        raise ValueError(
            f"names begin with {prefix!r}, but for {len(strays)} ({', '.join(strays[:SHOWN])})"
        )
    return state
