"""torchvision's old calling forms: `pretrained=`, and the first two arguments by position.

Source: torchvision 0.28, torchvision/models/_utils.py, `handle_legacy_interface`. The same calls
are taken, with warnings of the same class; a call that torchvision takes by letting one argument
win over another in silence is a TypeError here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from effnet_fast.pretrained.weights import ENUMS

POSITIONAL = ("weights", "progress")  # in this order
MEANT = "IMAGENET1K_V1"  # the published set that pretrained=True meant


def takes_old_forms(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build(*, weights, progress, ...)`, which takes the old forms too, each with a UserWarning.

    `pretrained=` counts by its truth, `weights=` by its truth where it is a bool or an int, and
    weights="legacy" as True: true stands for the published set "IMAGENET1K_V1", false for None.

    Raises:
        ValueError: pretrained weights of a network that has none.
        TypeError: arguments that Python refuses, or both weights and pretrained.
    """
    name = build.__name__

    @functools.wraps(build)
    def build_from_any_form(*args: Any, **options: Any) -> Any:
        if args:
            options = _by_name(name, args, options)
        if "pretrained" in options or _is_old(options.get("weights")):
            options = _renewed(name, options)
        return build(**options)

    return build_from_any_form


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)  # at the line that calls the network's function


def _is_old(weights: Any) -> bool:
    return isinstance(weights, int) or (isinstance(weights, str) and weights == "legacy")


def _by_name(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments, all by name."""
    if len(args) > len(POSITIONAL):
        raise TypeError(
            f"{name}() takes at most {len(POSITIONAL)} arguments by position, which are "
            f"{' and '.join(POSITIONAL)}, got {len(args)}"
        )
    given = dict(zip(POSITIONAL, args, strict=False))
    if "pretrained" in options:
        raise TypeError(f"{name}() got pretrained and an argument by position: give weights alone")
    if twice := given.keys() & options.keys():
        raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
    names = " and ".join(given)
    _warn(f"{name} takes {names} by position for old callers alone: give {names} by name")
    return given | options


def _renewed(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `weights` in today's form and no `pretrained`."""
    if "weights" in options and "pretrained" in options:
        raise TypeError(f"{name}() got weights and pretrained: give weights alone")
    is_named = "pretrained" in options
    wanted = options.pop("pretrained") if is_named else options["weights"]
    member = None
    if wanted:
        if name not in ENUMS:
            raise ValueError(f"{name} has no pretrained weights: no weights of it are published")
        member = ENUMS[name][MEANT]
    text = f"{name} takes "
    text += "pretrained=" if is_named else "weights that are neither None nor published ones"
    text += f" for old callers alone: give weights={member!r}, which is the same"
    if member is not None:
        text += f", or weights={type(member).__name__}.DEFAULT for the best that are published"
    _warn(text)
    return {**options, "weights": member}
