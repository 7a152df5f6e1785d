"""From a budget to a network: the largest phi whose counts stay within every limit."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_fast.models.variants import B0_STAGES, Stage
from effnet_fast.scaling.compound import BASE_RESOLUTION, CompoundScaling, Point
from effnet_fast.scaling.counts import Counts, count

SMALLEST_PHI, LARGEST_PHI = -64.0, 32.0  # 8 channels and one block a stage; 2**32 times B0
STEPS = 48  # halvings of the interval: 3e-13 of phi


@dataclass(frozen=True)
class Fit:
    """The network that a budget buys.

    Args:
        point: the network and its phi, the largest within the budget.
        counts: its counts.
        binding: names of the limits that the next larger network passes.
        shares: what the network uses of each limit, by name, at most 1.
    """

    point: Point
    counts: Counts
    binding: tuple[str, ...]
    shares: dict[str, float]


def fit(
    *,
    target_flops: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    scaling: CompoundScaling | None = None,
    stages: tuple[Stage, ...] = B0_STAGES,
    base_resolution: int = BASE_RESOLUTION,
    multiple: int = 8,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Fit:
    """The network at the largest phi that passes none of the limits, of which one must be given.

    Args:
        target_flops: floating-point operations for one image, two per multiply-add. What the
            literature on EfficientNet calls FLOPs is target_macs.
        target_macs: multiply-adds for one image.
        target_params: trained parameters.
        scaling: the rule; None means the paper's constants.
        stages, base_resolution, multiple: as for `CompoundScaling.at`.
        num_classes, in_chans: as for `count`.

    Raises:
        ValueError: no limit, one that is not positive, one below what the smallest network needs
            (the text says what that is) or beyond phi = 32, or a rule that does not grow.
    """
    scaling = scaling or CompoundScaling()
    given = {"flops": target_flops, "macs": target_macs, "params": target_params}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if not limits:
        raise ValueError("give at least one of target_flops, target_macs and target_params")
    for name, limit in limits.items():
        if not limit > 0:
            raise ValueError(f"target_{name} must be positive, got {limit!r}")
    if scaling.growth == 1.0:
        raise ValueError("alpha, beta and gamma are all 1: no phi makes the network larger")

    def at(phi: float) -> tuple[Point, Counts]:
        point = scaling.at(phi, stages=stages, base_resolution=base_resolution, multiple=multiple)
        return point, count(point.variant, num_classes=num_classes, in_chans=in_chans)

    def shares(counts: Counts) -> dict[str, float]:
        used = {"flops": counts.flops, "macs": counts.macs, "params": counts.parameters}
        return {name: used[name] / limit for name, limit in limits.items()}

    def passed(counts: Counts) -> tuple[str, ...]:
        return tuple(name for name, share in shares(counts).items() if share > 1.0)

    within, counts = at(SMALLEST_PHI)
    if passed(counts):
        raise ValueError(
            f"no network is that small: the smallest needs {counts.parameters} parameters, "
            f"{counts.macs} multiply-adds and {counts.flops} FLOPs; given were "
            + ", ".join(f"target_{name}={limit:g}" for name, limit in limits.items())
        )
    beyond = LARGEST_PHI
    binding = passed(at(beyond)[1])
    if not binding:
        raise ValueError(f"the limits lie beyond phi = {LARGEST_PHI:g}")
    for _ in range(STEPS):
        point, larger = at((within.phi + beyond) / 2)
        if over := passed(larger):
            beyond, binding = point.phi, over
        else:
            within, counts = point, larger
    # Networks may change at a round phi, as all do at 0, which halving never meets exactly.
    point, larger = at(round(within.phi, 9) + 0.0)
    if point.phi > within.phi and not passed(larger):
        within, counts = point, larger
    return Fit(within, counts, binding, shares(counts))
