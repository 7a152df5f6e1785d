"""config.json beside a network's weights: all that rebuilds the network, and nothing to execute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from effnet_fast.checkpoints import FAMILIES, FAMILY_ENTRY, INCEPTION, NORMALISATION_ENTRY
from effnet_fast.models.variants import VARIANTS, Stage, Variant

FORMAT = 1
LIBRARY = "effnet_fast"
CUSTOM = "custom"  # architecture of what is no published network, unchanged
Check = Callable[[str, Any], Any]  # a value under its name, or ValueError


class NetworkConfig(NamedTuple):
    """A network without its weights.

    Attributes:
        variant: the row of the table.
        options: further arguments of `EfficientNet`.
        origin: the facts of a checkpoint's family that the network remembers.
        class_names: of the classes, in the order of the logits; () where nobody gave them.
    """

    variant: Variant
    options: dict[str, Any]
    origin: dict[str, str]
    class_names: tuple[str, ...]


def write(config: NetworkConfig) -> str:
    """The text of config.json."""
    variant = {f.name: getattr(config.variant, f.name) for f in fields(Variant)}
    variant["baseline"] = [
        {f.name: getattr(stage, f.name) for f in fields(Stage)} for stage in config.variant.baseline
    ]
    is_published = VARIANTS.get(config.variant.name) == config.variant
    name = f"efficientnet_{config.variant.name}" if is_published else CUSTOM
    content = {
        "library_name": LIBRARY,
        "format": FORMAT,
        "architecture": name,
        "variant": variant,
        **config.options,
    }
    if config.origin:
        content["origin"] = config.origin
    if config.class_names:
        content["label_names"] = list(config.class_names)
    return json.dumps(content, indent=2, allow_nan=False, default=float) + "\n"


def read(text: str) -> NetworkConfig:
    """The network of a config.json.

    Raises:
        ValueError: it is no JSON, of another library or a later format, or an entry is missing,
            unknown, of another type or outside what is allowed. The message names the entry.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if content.get("library_name") != LIBRARY:
        raise ValueError(
            f"library_name is {content.get('library_name')!r}, not {LIBRARY!r}: of a network of "
            "another library EfficientNet.from_checkpoint loads the weights"
        )
    if content.get("format") != FORMAT:
        raise ValueError(f"format is {content.get('format')!r}; this version reads {FORMAT}")
    _check_names("", content, ENTRIES, ("origin", "label_names"))
    variant = _variant(_checked("", content, "variant", _object))
    options = {name: _checked("", content, name, check) for name, check in OPTIONS.items()}
    origin = _origin(content.get("origin", {}))
    names: Any = content.get("label_names", ())
    if "label_names" in content:
        names = check_class_names(names, options["num_classes"], "label_names")
    architecture = _checked("", content, "architecture", _text)
    published = VARIANTS.get(architecture.removeprefix("efficientnet_"))
    if architecture != CUSTOM and published != variant:
        raise ValueError(f"architecture is {architecture!r}, but variant has other entries")
    return NetworkConfig(variant, options, origin, names)


def check_class_names(
    class_names: Any, num_classes: int, name: str = "class_names"
) -> tuple[str, ...]:
    """Names of classes as a tuple; ValueError for others than one text for each logit."""
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise ValueError(f"{name} must be a sequence of names, got {class_names!r}")
    if not all(isinstance(entry, str) for entry in class_names):
        raise ValueError(f"{name} must hold text alone")
    if len(class_names) != num_classes:
        raise ValueError(f"{name} has {len(class_names)} names for {num_classes} classes")
    return tuple(class_names)


def _check_names(
    place: str, given: Mapping[str, Any], expected: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if missing := [name for name in expected if name not in given]:
        raise ValueError(f"{place}{missing[0]} is missing")
    if unknown := [name for name in given if name not in expected and name not in optional]:
        raise ValueError(f"{place}{unknown[0]} is unknown")


def _checked(place: str, given: Mapping[str, Any], name: str, check: Check) -> Any:
    return check(f"{place}{name}", given[name])


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _integer(least: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        return value

    return check


def _number(least: float, most: float, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least} to {most}, got {value!r}")
        if above and value == least:
            raise ValueError(f"{name} must be above {least}")
        return float(value)

    return check


def _channels(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of numbers, got {value!r}")
    return tuple(_number(-1e6, 1e6)(name, entry) for entry in value)


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _stages(name: str, value: Any) -> tuple[Stage, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of stages, got {value!r}")
    stages: list[Stage] = []
    for index, entry in enumerate(value):
        place = f"{name}[{index}]"
        given = _object(place, entry)
        _check_names(f"{place}.", given, tuple(STAGE))
        stage = Stage(**{k: _checked(f"{place}.", given, k, check) for k, check in STAGE.items()})
        if stages and stages[-1].out_channels != stage.in_channels:
            raise ValueError(
                f"{place}.in_channels is {stage.in_channels}, and the stage before has "
                f"{stages[-1].out_channels} output channels"
            )
        stages.append(stage)
    return tuple(stages)


def _variant(given: dict[str, Any]) -> Variant:
    _check_names("variant.", given, tuple(VARIANT))
    return Variant(**{k: _checked("variant.", given, k, check) for k, check in VARIANT.items()})


def _origin(value: Any) -> dict[str, str]:
    origin = _object("origin", value)
    for name, entry in origin.items():
        if entry not in ORIGINS.get(name, ()):
            raise ValueError(f"origin.{name} is unknown: {entry!r}")
    return origin


POSITIVE, MANY = _integer(1), 1e4
STAGE: dict[str, Check] = {f.name: POSITIVE for f in fields(Stage)} | {"kind": _text}
VARIANT: dict[str, Check] = {
    "name": _text,
    "width": _number(0, MANY, above=True),
    "depth": _number(0, MANY, above=True),
    "resolution": POSITIVE,
    "dropout": _number(0, 1),
    "bn_eps": _number(0, MANY, above=True),
    "bn_momentum": _number(0, 1),
    "resize": POSITIVE,
    "crop": POSITIVE,
    "interpolation": _text,
    "baseline": _stages,
    "padding": _text,
    "mean": _channels,
    "std": _channels,
    "activation": _text,
    "squeeze": _flag,
    "fixed_ends": _flag,
    "head": _optional(POSITIVE),
    "padded_as": _optional(POSITIVE),
    "squash": _flag,
    "expand_bn_momentum": _optional(_number(0, 1)),
}
OPTIONS: dict[str, Check] = {
    "num_classes": _integer(0),
    "in_chans": POSITIVE,
    "global_pool": _text,
    "dropout": _number(0, 1),
    "stochastic_depth_prob": _number(0, 1),
    "memory": _text,
}
ENTRIES = ("library_name", "format", "architecture", "variant", *OPTIONS)
ORIGINS: dict[str, tuple[str, ...]] = {
    FAMILY_ENTRY: tuple(FAMILIES),
    NORMALISATION_ENTRY: (INCEPTION,),
}
