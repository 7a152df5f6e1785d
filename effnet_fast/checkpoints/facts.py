"""What a checkpoint says of its network beside tensors: class names, images, constants, layers.

A file has them as JSON under FACTS_ENTRY, or a family's own files beside it do. They come from
files that anyone may have written, so every value is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

FACTS_ENTRY = "effnet_fast.facts"  # of a safetensors file's metadata, or of a state dict's
INTERPOLATIONS = ("bilinear", "bicubic", "nearest-exact")
LARGEST = 1 << 16  # pixels, channels and repeats that a file may name
NOTHING: Mapping[str, Any] = MappingProxyType({})


def is_count(value: object) -> bool:
    """Whether a number counts pixels, channels or blocks."""
    return type(value) is int and 1 <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _are_numbers(value: object) -> bool:
    """Whether a value is a list of a number for each channel."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= LARGEST:
        return False
    return all(map(is_number, value))


def _are_scales(value: Any) -> bool:
    return _are_numbers(value) and all(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_multiplier(value: Any) -> bool:
    return _is_positive(value) and value < 1000


def _is_stage(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 6 and all(map(is_count, value))


def _are_stages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 1 <= len(value) < 100 and all(map(_is_stage, value))


Check = Callable[[Any], bool]
# Fields of `models.Variant`, and what each may hold.
_IMAGES: dict[str, Check] = {
    "resize": is_count,
    "crop": is_count,
    "resolution": is_count,
    "mean": _are_numbers,
    "std": _are_scales,
    "interpolation": lambda value: value in INTERPOLATIONS,
    "squash": lambda value: type(value) is bool,
}
IMAGE_FIELDS = tuple(_IMAGES)
_NETWORK: dict[str, Check] = {
    "bn_eps": _is_positive,
    "bn_momentum": _is_share,
    "expand_bn_momentum": _is_share,
    "padded_as": is_count,
    "dropout": _is_share,
}
_TABLE: dict[str, Check] = {
    "width": _is_multiplier,
    "depth": _is_multiplier,
    "head": is_count,
    # (expand_ratio, kernel, stride, in_channels, out_channels, repeats) of each stage
    "baseline": _are_stages,
}


@dataclass(frozen=True)
class Facts:
    """What is known; empty where nothing is.

    Args:
        classes: the names of the classes, in the order of the logits.
        images: how evaluation images are prepared, and constants of the network: fields of
            `models.Variant`.
        network: those of its constants that are not the family's.
        table: the layers of a network that may be of no published size.
    """

    classes: tuple[str, ...] = ()
    images: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    network: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    table: Mapping[str, Any] = field(default_factory=lambda: NOTHING)

    def __bool__(self) -> bool:
        return bool(self.classes or self.images or self.network or self.table)

    def over(self, other: Facts) -> Facts:
        """These, and those of `other` where these say nothing."""
        return Facts(
            self.classes or other.classes,
            {**other.images, **self.images},
            {**other.network, **self.network},
            self.table or other.table,
        )

    def as_text(self) -> str:
        """JSON that `facts_of` reads."""
        parts = {"classes": self.classes, **{name: dict(getattr(self, name)) for name in _PARTS}}
        return json.dumps({name: part for name, part in parts.items() if part})


_PARTS = {"images": _IMAGES, "network": _NETWORK, "table": _TABLE}


def facts_of(text: str) -> Facts:
    """The facts of a file's entry.

    Raises:
        ValueError: it is no JSON that `as_text` could have written.
    """
    content = json.loads(text) if len(text) < 1 << 24 else None
    if not isinstance(content, dict) or content.keys() - {"classes", *_PARTS}:
        raise ValueError(f"{FACTS_ENTRY} holds something other than facts of a network")
    classes = content.pop("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{FACTS_ENTRY}: classes must be a list of names")
    return Facts(tuple(classes), **{name: checked(name, content.get(name, {})) for name in _PARTS})


def checked(part: str, given: Any) -> dict[str, Any]:
    """The entries of one part of the facts, lists as tuples.

    Raises:
        ValueError: an entry that the part does not have, or one with a value out of its range.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{part} must be a mapping, got {type(given).__name__}")
    for name, value in given.items():
        if name not in _PARTS[part] or not _PARTS[part][name](value):
            raise ValueError(f"{part} cannot have {name!r} of {str(value)[:100]}")
    return {name: _frozen(value) for name, value in given.items()}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
