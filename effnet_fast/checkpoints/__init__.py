"""Checkpoints of every family: read, renamed, checked, and put into a model whole or not at all.

Names of parameters are torchvision's once a file is loaded; `convert` gives them any family's.
`families.FAMILIES` has the rest of a family: padding, BN constants, input normalisation.
`EfficientNet.from_checkpoint` builds the network that goes with a file.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from effnet_fast.checkpoints import families, plain, transformers_folder
from effnet_fast.checkpoints.facts import FACTS_ENTRY, Facts, facts_of
from effnet_fast.checkpoints.families import FAMILIES, Family, check_family
from effnet_fast.checkpoints.namings import NAMINGS
from effnet_fast.checkpoints.parameter_names import complete, convert, first_of, naming_of
from effnet_fast.checkpoints.reading import Content, read, read_json
from effnet_fast.checkpoints.writing import SAFETENSORS, SUFFIXES, check_suffix, save, save_folder
from effnet_fast.files import naming_file

__all__ = [
    "FAMILIES",
    "FAMILY_ENTRY",
    "FORMATS",
    "NAMINGS",
    "SAFETENSORS",
    "SUFFIXES",
    "Checkpoint",
    "Family",
    "check",
    "check_suffix",
    "convert",
    "load",
    "load_into",
    "open_checkpoint",
    "save",
    "save_folder",
]

FORMATS = ("auto", *FAMILIES)
ADDRESSES = ("https://", "http://")
# Entries of a safetensors file's metadata.
FAMILY_ENTRY = "effnet_fast.family"
NORMALISATION_ENTRY = "effnet_fast.normalisation"  # INCEPTION, where it is not ImageNet's
INCEPTION = "inception"


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights and their family.

    Args:
        state: named as torchvision names them, in its order, on the CPU.
        family: a key of FAMILIES.
        naming: how the file names parameters, a key of NAMINGS.
        assumption: the assumption that was made where the file shows no family, else "".
        inception: whether the file's metadata or name say that images are normalised to [-1, 1].
        facts: class names, preprocessing, constants and layers, as far as the file, or those
            beside it, have them.
    """

    state: dict[str, Tensor]
    family: str
    naming: str
    assumption: str = ""
    inception: bool = False
    facts: Facts = field(default_factory=Facts)

    @property
    def metadata(self) -> dict[str, str]:
        """The facts that no parameter name holds, for `save` to write into a safetensors file."""
        entries = {FAMILY_ENTRY: self.family}
        if self.inception:
            entries[NORMALISATION_ENTRY] = INCEPTION
        if self.facts:
            entries[FACTS_ENTRY] = self.facts.as_text()
        return entries


def load(
    path_or_url: str | os.PathLike[str],
    format: str = "auto",
    *,
    ema: bool = True,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Reads a state dict of any family; names and order are torchvision's, tensors on the CPU.

    A state dict within a training checkpoint ("state_dict", "model", ...) is found, prefixes of
    wrappers ("module.", "_orig_mod.", ...) are removed, and missing counts of batches become 0.
    Only names are converted: a network with another padding or eps gives other numbers. Use
    `EfficientNet.from_checkpoint` to build the network of the family.

    Args:
        path_or_url: a file, `.safetensors` or one that torch.save wrote; a folder in the layout of
            the Hugging Face Hub, with model.safetensors or pytorch_model.bin; or the https address
            of a file, which `downloads.fetch` keeps in torch.hub.get_dir()/checkpoints and whose
            SHA-256 it checks at every call (the name holds some of its digits, or the address
            ends in #sha256=...).
        format: "auto" (recognised by the names), or the naming that the file must have:
            "torchvision", "timm", "timm_tf" (the same names), "lukemelas", "monai",
            "nvidia", "transformers", "keras" or "efficientnet" (the package for Keras).
        ema: whether to prefer the moving average of the weights in a training checkpoint.
        progress: shows a progress bar while downloading.

    Raises:
        OSError: the file cannot be opened or downloaded, or memory is lacking (ENOMEM).
        ValueError: unknown format; the file is corrupt, needs code to be loaded, holds something
            other than plain tensors (sparse or quantized ones, say), or its names are unknown, lead
            to one name or are not those of `format`; or it is a pipe or a device. The message names
            the path.
    """
    check_family(format, FORMATS, "format")
    return open_checkpoint(path_or_url, format, ema=ema, names_too=True, progress=progress).state


def open_checkpoint(
    path_or_url: str | os.PathLike[str],
    family: str = "auto",
    *,
    ema: bool = True,
    names_too: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """Reads a file and finds the family of its network.

    Args:
        path_or_url: as for `load`.
        family: a key of FAMILIES, or "auto": the family in the file's metadata, else that of its
            parameter names. timm's plain and `tf_` networks have the same names; then the model's
            name decides ("tf_efficientnet_b0..."), as found in the file, in config.json beside
            it, or in the name of the file or its folders. Without any of these the network is
            assumed to be plain, and `Checkpoint.assumption` says so.
        ema, progress: as for `load`.
        names_too: whether the file must also name its parameters as `family` does.

    Raises:
        what `load` does.
    """
    check_family(family, FORMATS)
    given = os.fspath(path_or_url)
    path = given
    if given.startswith(ADDRESSES):
        from effnet_fast.pretrained import downloads  # imports urllib, which files do without

        path = os.fspath(downloads.fetch(given, progress=progress))
    content = read(path, ema=ema)
    with naming_file(path):
        naming = naming_of(content.state)
        if names_too and family != "auto" and FAMILIES[family].naming != naming:
            raise ValueError(f"parameters are named as {naming} names them, not as {family} does")
        state = complete(convert(content.state))
    hints = (content.architecture, *reversed(Path(given).parts))
    assumption = ""
    if family == "auto":
        family, assumption = content.family, ""
        if not family:
            family, assumption = _find_family(content.metadata, naming, hints)
    inception = families.is_inception_normalised(hints) or (
        content.metadata.get(NORMALISATION_ENTRY) == INCEPTION
    )
    with naming_file(path):
        facts = _find_facts(content, naming, family)
    return Checkpoint(state, family, naming, assumption, inception, facts)


def _find_facts(content: Content, naming: str, family: str) -> Facts:
    """What the file's metadata and the files of its folder say.

    Raises:
        ValueError: a value out of its range, or of which there is no network here.
    """
    facts = content.facts
    if FACTS_ENTRY in content.metadata:
        facts = facts_of(content.metadata[FACTS_ENTRY])
    elif naming == "transformers" and transformers_folder.is_config(content.config):
        processor = read_json(os.path.join(content.folder, transformers_folder.PROCESSOR_FILE))
        facts = transformers_folder.read(content.config, processor or None)
        if family != naming:  # the caller says whose constants they are
            facts = replace(facts, network={})
    return facts


def _find_family(
    metadata: Mapping[str, str], naming: str, hints: tuple[str, ...]
) -> tuple[str, str]:
    """The family, and what had to be assumed to tell it."""
    if metadata.get(FAMILY_ENTRY) in FAMILIES:
        return metadata[FAMILY_ENTRY], ""
    if naming != "timm":
        return naming, ""
    if family := families.timm_family(hints):
        return family, ""
    return "timm", (
        "timm's plain network is assumed (symmetric padding, eps 1e-5), as nothing tells it from "
        'the tf_ one (SAME padding, eps 1e-3): give family="timm" or family="timm_tf"'
    )


def load_into(model: nn.Module, path: str | os.PathLike[str], format: str = "auto") -> None:
    """Loads a file into `model`, in place: all of it or, when anything differs, nothing.

    Warns where the file's family has another padding or normalisation than the model, so that the
    logits differ from the family's. `EfficientNet.from_checkpoint` builds the network that goes
    with a file.

    Raises:
        what `load` and `check` raise, with the path.
    """
    check_family(format, FORMATS, "format")
    checkpoint = open_checkpoint(path, format, names_too=True)
    with naming_file(os.fspath(path)):
        check(model, checkpoint.state)
        own = model.state_dict()
        _check_writable(own, checkpoint.state)
        # What can fail in a cast fails here, before the first tensor of the model is written.
        state = {key: value.to(own[key].dtype) for key, value in checkpoint.state.items()}
    model.load_state_dict(state, strict=True)
    if difference := _difference(model, FAMILIES[checkpoint.family]):
        warnings.warn(
            f"{os.fspath(path)}: networks of {checkpoint.family} have {difference}: logits will "
            "not be theirs. EfficientNet.from_checkpoint builds the network that goes with a file",
            stacklevel=2,
        )


def _difference(model: nn.Module, family: Family) -> str:
    """What the family's networks compute with, where the model's variant has something else."""
    variant = getattr(model, "variant", None)
    family = family.of_blocks(getattr(variant, "squeeze", True))
    expected = {"padding": family.padding, "bn_eps": family.bn_eps}
    found = {name: getattr(variant, name, None) for name in expected}
    return ", ".join(
        f"{name}={value!r} and this model {found[name]!r}"
        for name, value in expected.items()
        if None not in (value, found[name]) and value != found[name]
    )


def _check_writable(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuses a model that would take some of the tensors, or keep some of them wrong.

    Raises:
        ValueError: an entry of the model has no memory of its own, or is not plain.
    """
    if found := plain.problems(own):
        raise ValueError(f"the model cannot be loaded into: {first_of(found)}")
    owners: dict[int, str] = {}
    for key, value in own.items():
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"the model cannot be loaded into: {key} was made in inference mode")
        if plain.overlaps_itself(value):
            raise ValueError(f"the model cannot be loaded into: elements of {key} share memory")
        other = owners.setdefault(value.data_ptr(), key) if value.numel() else key
        if other != key and not torch.equal(state[key], state[other]):
            raise ValueError(f"{other} and {key} are one tensor in the model, and differ here")


def check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compares names, shapes and dtypes with the model's own state dict.

    Floating-point tensors of any precision fit one another (they are cast when loaded); a
    floating-point tensor and an integer or complex one do not. The state's tensors must be plain:
    dense, with values in memory.

    Raises:
        ValueError: something differs; the first few differences of each kind are named.
    """
    own = model.state_dict()
    common = [key for key in own if key in state]
    strange = plain.problems({key: state[key] for key in common})
    if strange:
        raise ValueError(f"{len(strange)} weights are no plain tensors ({first_of(strange)})")
    if lazy := [key for key in common if is_lazy(own[key])]:
        raise ValueError(f"the model is not initialised ({first_of(lazy)})")
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
            if not _is_cast(state[key].dtype, own[key].dtype)
        ],
    }
    problems = [
        f"{len(found)} {kind} ({first_of(found)})" for kind, found in kinds.items() if found
    ]
    if problems:
        raise ValueError(f"weights do not fit the model: {'; '.join(problems)}")


@functools.cache
def _is_cast(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether numbers of one dtype are loaded as another: the same kind, and PyTorch can do it."""
    kinds = [(dtype.is_complex, dtype.is_floating_point) for dtype in (given, wanted)]
    if kinds[0] != kinds[1]:
        return False
    try:
        torch.empty(1, dtype=given).to(wanted)
    except (RuntimeError, TypeError):
        return False
    return True
