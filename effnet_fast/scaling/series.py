"""Depth, width or resolution alone against all three together, at equal multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from effnet_fast.models.variants import B0_STAGES, VARIANTS, Stage
from effnet_fast.scaling.accuracy import estimate_top1
from effnet_fast.scaling.budget import fit
from effnet_fast.scaling.compound import CompoundScaling, Point
from effnet_fast.scaling.conditions import Conditions
from effnet_fast.scaling.counts import Counts, count
from effnet_fast.scaling.latency import measure
from effnet_fast.scaling.memory import Memory

# Each doubles the multiply-adds for each unit of phi, before rounding.
ONE_DIMENSION = {
    "depth": CompoundScaling(2.0, 1.0, 1.0),
    "width": CompoundScaling(1.0, 2.0**0.5, 1.0),
    "resolution": CompoundScaling(1.0, 1.0, 2.0**0.5),
}
SERIES = (*ONE_DIMENSION, "compound")
FACTORS = (1.0, 2.0, 4.0, 8.0)  # times B0's multiply-adds


@dataclass(frozen=True)
class Row:
    """A network of a series.

    Args:
        series: one of `SERIES`.
        target_macs: what the series were to have in common; the network is the largest below.
        point: the network, with the series' own phi.
        counts: of one image.
        memory: under the conditions of the comparison.
        top1: estimated, percent; None for a baseline other than B0.
        seconds: measured for a call on the batch, by plan; None where nothing was measured.
    """

    series: str
    target_macs: float
    point: Point
    counts: Counts
    memory: Memory
    top1: float | None
    seconds: dict[str, float] | None


def compare(
    targets: Iterable[float] | None = None,
    *,
    scaling: CompoundScaling | None = None,
    conditions: Conditions | None = None,
    stages: tuple[Stage, ...] = B0_STAGES,
    multiple: int = 8,
    measured: bool = True,
    on_burst: Callable[[str], None] | None = None,
) -> list[Row]:
    """The four series at each target.

    Args:
        targets: multiply-adds of one image; None means 1, 2, 4 and 8 times B0's.
        scaling: the compound rule; None means the paper's.
        conditions: of memory and time; None means one image in fp32 on the CPU.
        stages, multiple: as for `CompoundScaling.at`.
        measured: whether every network is timed, stock and by the conditions' plan.
        on_burst: called after each burst of calls, as for `calibrate`.

    Raises:
        ValueError: as `fit`.
    """
    if targets is None:
        base = count(VARIANTS["b0"]).macs
        targets = [base * factor for factor in FACTORS]
    conditions = conditions or Conditions()
    rules = ONE_DIMENSION | {"compound": scaling or CompoundScaling()}
    found = [
        (name, target, fit(target_macs=target, scaling=rule, stages=stages, multiple=multiple))
        for target in targets
        for name, rule in rules.items()
    ]
    variants = [result.point.variant for *_, result in found]
    seconds = measure(variants, conditions, on_burst=on_burst) if measured else [None] * len(found)
    return [
        Row(
            name,
            target,
            result.point,
            result.counts,
            conditions.memory(result.point.variant),
            estimate_top1(result.point.variant) if stages == B0_STAGES else None,
            times,
        )
        for (name, target, result), times in zip(found, seconds, strict=True)
    ]
