"""The arguments of a run beside its recipe, and what may differ when it is resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effnet_fast.models.backbone import MEMORY_MODES
from effnet_fast.models.variants import Variant
from effnet_fast.training.runs.options import (
    FLAG,
    TEXT,
    Rule,
    check,
    documented,
    one_of,
    option,
    whole,
)
from effnet_fast.training.runs.recipe import Recipe

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # here, and in Accelerate's words
STRATEGIES = ("ddp", "fsdp")
DEVICES = ("auto", "cpu", "cuda")
# Arguments that change no number: another value may be given when a run is resumed.
FREE = ("workers", "save_minutes", "device")
ADDRESS = re.compile(r"[a-z]+://")
LARGEST_SEED = 2**32  # what NumPy's generator takes


@documented
@dataclass(frozen=True)
class Settings:
    """The arguments of `train` beside its data, its folder and its recipe."""

    model: str | Variant | None = option(  # noqa: RUF009, it makes a field
        None,
        'a size, "lite0", or in Python a `Variant` of one\'s own (default: that of a file of '
        "weights, else b0)",
        Rule(lambda v: v is None or isinstance(v, (str, Variant)), "a size or a Variant", str),
    )
    weights: str | None = option(
        None,
        'where training begins: published weights by name ("DEFAULT"), a file, or a run\'s folder '
        "(default: random ones)",
        TEXT.or_none(),
    )
    resolution: int | None = option(
        None, "side of the images, pixels (default: the weights' own)", whole(1).or_none()
    )
    seed: int = option(
        0,
        "of weights, order, crops and augmentation",
        whole(0, LARGEST_SEED - 1, "an int of at least 0 and below 2**32"),
    )
    precision: str = option(
        "fp32", "of training steps; evaluation is in fp32", one_of(tuple(PRECISIONS))
    )
    memory: str = option(
        "fast", "lean computes some activations again in backward", one_of(MEMORY_MODES)
    )
    grad_checkpointing: bool = option(
        False, "keep the input of each block alone for backward, and run one more forward", FLAG
    )
    backend: str = option("auto", "auto, reference, cpu, cpu:avx2 and so on", TEXT)
    device: str = option("auto", "where it runs", one_of(DEVICES))
    strategy: str = option(
        "ddp", "of several processes; fsdp spreads weights over them", one_of(STRATEGIES)
    )
    workers: int | None = option(
        None,
        "processes that read images (default: one per core, none for few images)",
        whole(0).or_none(),
    )
    unreadable_limit: int | None = option(
        None,
        "how many unreadable training images, and how many validation images, all processes "
        "together leave out before the run ends (default: any number)",
        whole(0).or_none(),
    )
    save_minutes: float = option(
        10.0,
        "time between two states within an epoch; one is written after each epoch, too",
        Rule(lambda v: type(v) in (int, float) and v >= 0, "a number of at least 0"),  # inf, too
    )

    def __post_init__(self) -> None:
        check(self)


def described(
    data: Any,
    val: Any,
    settings: Settings,
    recipe_name: str,
    recipe: Recipe,
    world: int,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of a run as run.json keeps them.

    before: what it holds of a run that is resumed; a file of weights may be gone since.
    """
    own = {name: _as_json(v) for name, v in asdict(settings).items() if name not in FREE}
    if (text := own["weights"]) is not None:
        path = os.path.abspath(text)
        if os.path.exists(text) or path == before.get("arguments", {}).get("weights"):
            own["weights"] = path  # else a published name
    fields = {name: _as_json(value) for name, value in asdict(recipe).items()}
    places = {"data": _place(data), "val": None if val is None else _place(val)}
    return {
        "recipe": recipe_name,
        "arguments": {**places, **own, "processes": world},
        "fields": fields,
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume a run with other arguments than those that it began with.

    Raises:
        ValueError: names each argument that differs, with both values.
    """
    differing = []
    for part in ("arguments", "fields"):
        old, new = before.get(part, {}), now[part]
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                differing.append(f"{name} was {old.get(name)!r}, now {new.get(name)!r}")
    if differing:
        raise ValueError(f"--resume continues a run as it began; {'; '.join(differing)}")


def _as_json(value: Any) -> Any:
    """The value as it is read back."""
    return json.loads(json.dumps(value))


def _place(data: Any) -> str:
    """A path that is the same from every folder; the type of a dataset from Python."""
    if not isinstance(data, (str, os.PathLike)):
        return f"a {type(data).__name__}"
    text = os.fspath(data)
    return text if ADDRESS.match(text) else os.path.abspath(text)
