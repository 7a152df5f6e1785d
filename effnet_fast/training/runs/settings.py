"""The arguments of a run beside its recipe, and what may differ when it is resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effnet_fast.models.backbone import check_count, check_memory
from effnet_fast.models.variants import Variant
from effnet_fast.training.runs.recipe import Recipe

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # here, and in Accelerate's words
STRATEGIES = ("ddp", "fsdp")
DEVICES = ("auto", "cpu", "cuda")
# Arguments that change no number: another value may be given when a run is resumed.
FREE = ("workers", "save_minutes", "device")
CHOICES = {"precision": tuple(PRECISIONS), "strategy": STRATEGIES, "device": DEVICES}
ADDRESS = re.compile(r"[a-z]+://")
LARGEST_SEED = 2**32  # what NumPy's generator takes


@dataclass(frozen=True)
class Settings:
    """The arguments of `loop.train`, whose documentation describes them."""

    model: str | Variant | None = None
    weights: str | None = None
    resolution: int | None = None
    seed: int = 0
    precision: str = "fp32"
    memory: str = "fast"
    grad_checkpointing: bool = False
    backend: str = "auto"
    device: str = "auto"
    strategy: str = "ddp"
    workers: int | None = None
    unreadable_limit: int | None = None
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        check_memory(self.memory)
        check_count("seed", self.seed, least=0)
        if self.seed >= LARGEST_SEED:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        for name in ("workers", "unreadable_limit"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if self.resolution is not None:
            check_count("resolution", self.resolution)
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must be at least 0, got {self.save_minutes!r}")


def described(
    data: Any, val: Any, settings: Settings, recipe_name: str, recipe: Recipe, world: int
) -> dict[str, Any]:
    """The arguments of a run as run.json keeps them."""
    own = {name: _as_json(v) for name, v in asdict(settings).items() if name not in FREE}
    if own["weights"] is not None and os.path.exists(own["weights"]):  # no published name
        own["weights"] = os.path.abspath(own["weights"])
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
