"""Depth, width or resolution alone against all three together, at equal multiply-adds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from effnet_fast.models.variants import B0_STAGES, VARIANTS, Stage, Variant
from effnet_fast.scaling.accuracy import estimate_top1, is_scaled_b0
from effnet_fast.scaling.budget import fit
from effnet_fast.scaling.compound import BASE_RESOLUTION, CompoundScaling, Point
from effnet_fast.scaling.conditions import Conditions
from effnet_fast.scaling.counts import Counts, count
from effnet_fast.scaling.latency import check_measurable, measure
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
    """A network of a series."""

    series: str  # one of `SERIES`
    target_macs: float  # common to all series; the network is the largest below it
    point: Point  # the network, with the series' own phi
    counts: Counts  # of one image
    memory: Memory  # under the conditions of the comparison
    # Estimated, percent; None for a baseline other than B0, and where the network is shallower,
    # narrower or of smaller images than B0: the formula knows no such network.
    top1: float | None
    seconds: dict[str, float] | None  # measured for a call on the batch, by plan


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
        ValueError: as `fit`, naming the series that has no such network; conditions that cannot be
            measured here.
    """
    if targets is None:
        base = count(VARIANTS["b0"]).macs
        targets = [base * factor for factor in FACTORS]
    conditions = conditions or Conditions()
    if measured:
        check_measurable(conditions)
    rules = ONE_DIMENSION | {"compound": scaling or CompoundScaling()}
    found = []
    for target, (name, rule) in itertools.product(targets, rules.items()):
        try:
            result = fit(
                target_macs=target, scaling=rule, stages=stages, multiple=multiple, refine=False
            )
        except ValueError as error:
            raise ValueError(f"series {name!r}: {error}") from error
        found.append((name, target, result))
    variants = [result.point.variant for *_, result in found]
    seconds = measure(variants, conditions, on_burst=on_burst) if measured else [None] * len(found)
    return [
        Row(
            name,
            target,
            result.point,
            result.counts,
            conditions.memory(result.point.variant),
            _top1(result.point.variant),
            times,
        )
        for (name, target, result), times in zip(found, seconds, strict=True)
    ]


def _top1(variant: Variant) -> float | None:
    smallest = min(variant.depth, variant.width, variant.resolution / BASE_RESOLUTION)
    known = is_scaled_b0(variant) and smallest >= 1.0
    return estimate_top1(variant) if known else None
