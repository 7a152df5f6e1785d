"""From a budget to a network: the largest phi within every limit, and better networks near it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from effnet_fast.models.variants import B0_STAGES, Stage, Variant
from effnet_fast.scaling.checks import positive
from effnet_fast.scaling.compound import BASE_RESOLUTION, CompoundScaling, Point
from effnet_fast.scaling.conditions import Conditions
from effnet_fast.scaling.counts import Counts, count
from effnet_fast.scaling.latency import LatencyModel, calibrate
from effnet_fast.scaling.memory import OPTIMIZER_TENSORS, Memory
from effnet_fast.scaling.refinement import ENOUGH, Neighbourhood, Offset

SMALLEST_PHI, LARGEST_PHI = -64.0, 32.0  # 8 channels and one block a stage; 2**32 times B0
STEPS = 48  # halvings of the interval: 3e-13 of phi


@dataclass(frozen=True)
class Fit:
    """The largest network within a budget.

    Args:
        point: the network, and the phi at which the rule is nearest.
        counts: its counts, of one image.
        memory: memory under the conditions, bytes for the whole batch.
        latency: predicted seconds for the whole batch; None where no latency was limited.
        binding: names of the limits that the rule's next larger network passes; of a network beside
            the rule, those of which it uses at least 95%.
        shares: the network's share of each limit, by name, at most 1.
        conditions: those of memory and latency.
        latency_model: the model that predicted the latency, with its error.
        ray: the largest network on the rule; `point` is the same where that uses enough.
        ray_shares: what it uses of each limit.
        offset: how far `point` lies from the rule.
    """

    point: Point
    counts: Counts
    memory: Memory
    latency: float | None
    binding: tuple[str, ...]
    shares: dict[str, float]
    conditions: Conditions
    latency_model: LatencyModel | None
    ray: Point
    ray_shares: dict[str, float]
    offset: Offset = field(default_factory=Offset)


# The name of each limit, its unit, and how a text gives an amount of it.
UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("FLOPs", "{:.0f}".format),
    "macs": ("multiply-adds", "{:.0f}".format),
    "params": ("parameters", "{:.0f}".format),
    "memory": ("bytes of memory", "{:.0f}".format),
    "latency": ("ms", lambda seconds: f"{seconds * 1e3:.3g}"),
}


@dataclass(frozen=True)
class _Budget:
    """The limits, and what a network uses of each."""

    limits: dict[str, float]
    conditions: Conditions
    latency_model: LatencyModel | None
    num_classes: int
    in_chans: int

    def count(self, variant: Variant) -> Counts:
        return count(variant, num_classes=self.num_classes, in_chans=self.in_chans)

    def memory(self, variant: Variant) -> Memory:
        return self.conditions.memory(variant, num_classes=self.num_classes, in_chans=self.in_chans)

    def latency(self, variant: Variant) -> float | None:
        if self.latency_model is None:
            return None
        return self.latency_model.predict(
            variant, self.conditions.plan, num_classes=self.num_classes, in_chans=self.in_chans
        )

    def used(self, variant: Variant) -> dict[str, float]:
        """By name, for the limits alone."""
        counts = self.count(variant)
        used: dict[str, float] = {
            "flops": counts.flops,
            "macs": counts.macs,
            "params": counts.parameters,
        }
        if "memory" in self.limits:
            used["memory"] = self.memory(variant).peak
        if (latency := self.latency(variant)) is not None:
            used["latency"] = latency
        return {name: used[name] for name in self.limits}

    def shares(self, variant: Variant) -> dict[str, float]:
        used = self.used(variant)
        return {name: used[name] / limit for name, limit in self.limits.items()}

    def passed(self, variant: Variant) -> tuple[str, ...]:
        return tuple(name for name, share in self.shares(variant).items() if share > 1.0)

    def refuse(self, smallest: Variant) -> ValueError:
        """For a budget that the smallest network passes: what that needs, and what was given."""
        names = dict.fromkeys(("params", "macs", "flops", *self.limits))
        used = replace(self, limits=dict.fromkeys(names, 1.0)).used(smallest)
        needs = [f"{UNITS[name][1](used[name])} {UNITS[name][0]}" for name in names]
        given = [
            f"target_{name}={UNITS[name][1](limit)} {UNITS[name][0]}"
            for name, limit in self.limits.items()
        ]
        return ValueError(
            f"no network is that small: the smallest needs {', '.join(needs[:-1])} and "
            f"{needs[-1]}; given were {', '.join(given)}"
        )


def _check_limits(**given: float | None) -> dict[str, float]:
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if not limits:
        names = [f"target_{name}" for name in given]
        raise ValueError(f"give at least one of {', '.join(names[:-1])} and {names[-1]}")
    return {name: positive(f"target_{name}", limit) for name, limit in limits.items()}


def fit(
    *,
    target_flops: float | None = None,
    target_macs: float | None = None,
    target_memory: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    device: str = "cpu",
    plan: str | None = None,
    optimizer_tensors: int = OPTIMIZER_TENSORS,
    latency_model: LatencyModel | None = None,
    scaling: CompoundScaling | None = None,
    stages: tuple[Stage, ...] = B0_STAGES,
    base_resolution: int = BASE_RESOLUTION,
    multiple: int = 8,
    num_classes: int = 1000,
    in_chans: int = 3,
    refine: bool = True,
) -> Fit:
    """The largest network of the rule within all limits; at least one limit must be given.

    Rounding may leave much of the limits unused. Where less than 95% of each is used, depth, width
    and resolution leave the rule, those of them that it grows: of all networks near it that use at
    least 95% of a limit, the nearest to the rule is taken.

    Args:
        target_flops: floating-point operations for one image, two per multiply-add. The literature
            on EfficientNet calls target_macs FLOPs.
        target_macs: multiply-adds for one image.
        target_memory: bytes for the whole batch, as `Memory.peak`.
        target_params: trained parameters.
        target_latency: seconds for the whole batch.
        batch, dtype, training, device, plan, optimizer_tensors: as for `Conditions`; the counted
            limits do not depend on them.
        latency_model: the model that predicts the latency under the same conditions; None measures
            this machine when target_latency is given (about a minute).
        scaling: the rule; None means the paper's constants.
        stages, base_resolution, multiple: as for `CompoundScaling.at`.
        num_classes, in_chans: as for `count`.
        refine: whether the network may leave the rule.

    Raises:
        ValueError: no limit, a limit that is not positive, below the need of the smallest network
            (the message has the number) or beyond phi = 32, a rule that does not grow, or a
            latency model of other conditions.
    """
    scaling = scaling or CompoundScaling()
    limits = _check_limits(
        flops=target_flops,
        macs=target_macs,
        memory=target_memory,
        params=target_params,
        latency=target_latency,
    )
    if scaling.growth == 1.0:
        raise ValueError("alpha, beta and gamma are all 1: no phi makes the network larger")
    conditions = Conditions(batch, dtype, training, device, plan, optimizer_tensors)
    if target_latency is None:
        latency_model = None
    else:
        latency_model = latency_model or calibrate(conditions)
        latency_model.check(conditions)
    budget = _Budget(limits, conditions, latency_model, num_classes, in_chans)

    def at(phi: float) -> Point:
        return scaling.at(phi, stages=stages, base_resolution=base_resolution, multiple=multiple)

    ray, binding = _largest(at, budget)
    point, offset, ray_shares = ray, Offset(), budget.shares(ray.variant)
    if refine and max(ray_shares.values()) < ENOUGH:
        near = Neighbourhood(ray, scaling, tuple(stages), base_resolution, multiple, budget.shares)
        point, offset, binding = _refined(near, binding, tuple(limits))
    return Fit(
        point,
        budget.count(point.variant),
        budget.memory(point.variant),
        budget.latency(point.variant),
        binding,
        budget.shares(point.variant),
        conditions,
        latency_model,
        ray,
        ray_shares,
        offset,
    )


def _refined(
    near: Neighbourhood, binding: tuple[str, ...], limits: tuple[str, ...]
) -> tuple[Point, Offset, tuple[str, ...]]:
    """The best network near the rule's, how far it is from the rule, and what binds it."""
    best = near.ray, Offset(), binding
    for wanted in (binding, limits):  # of the limit that stopped the rule, else of another one
        if refined := near.refine(wanted):
            point, offset = refined
            used = near.shares(point.variant)
            if enough := tuple(name for name, share in used.items() if share >= ENOUGH):
                return point, offset, enough
            best = point, offset, binding
    return best


def _largest(at: Callable[[float], Point], budget: _Budget) -> tuple[Point, tuple[str, ...]]:
    """The largest point within the budget, and what the next larger one passes."""
    within = at(SMALLEST_PHI)
    if budget.passed(within.variant):
        raise budget.refuse(within.variant)
    beyond = LARGEST_PHI
    binding = budget.passed(at(beyond).variant)
    if not binding:
        raise ValueError(f"the limits lie beyond phi = {LARGEST_PHI:g}")
    for _ in range(STEPS):
        point = at((within.phi + beyond) / 2)
        if over := budget.passed(point.variant):
            beyond, binding = point.phi, over
        else:
            within = point
    # Networks may change at a round phi, as all do at 0, which halving never meets exactly.
    point = at(round(within.phi, 9) + 0.0)
    if point.phi > within.phi and not budget.passed(point.variant):
        within = point
    return within, binding


def max_batch(
    variant: Variant,
    memory: float,
    conditions: Conditions | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> int:
    """The largest batch whose peak memory stays within `memory` bytes.

    Args:
        variant: the network, at its own resolution.
        memory: bytes.
        conditions: its batch is ignored; None means inference in fp32 on the CPU.
        num_classes, in_chans: as for `count`.

    Raises:
        ValueError: memory not positive and finite, or too little for one image (the message has the
            need of one image).
    """
    conditions = conditions or Conditions()
    if positive("memory", memory) == math.inf:
        raise ValueError("memory must be finite: no batch is the largest in an infinite one")

    def peak(batch: int) -> int:
        held = replace(conditions, batch=batch)
        return held.memory(variant, num_classes=num_classes, in_chans=in_chans).peak

    if peak(1) > memory:
        raise ValueError(
            f"one image takes {peak(1)} bytes in {conditions.mode}, given were {memory:.0f}"
        )
    small, large = 1, 2
    while peak(large) <= memory:
        small, large = large, 2 * large
    while large - small > 1:
        middle = (small + large) // 2
        small, large = (middle, large) if peak(middle) <= memory else (small, middle)
    return small
