"""Networks near the scaling rule that use more of a budget than those on it.

Rounding makes the rule's networks jump: beyond phi = 0 every stage of B0 gets a block more, and
the multiply-adds grow by 42%. Depth, width and resolution may then leave the rule a little, each
by itself. Many multipliers give the same network; a cell is the interval that does. The distance
of a network is that between its cells and the rule, in logarithms, so that a network on the rule
has the distance 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from effnet_fast.models.variants import Stage, Variant, custom_variant
from effnet_fast.scaling.compound import CompoundScaling, Point

ENOUGH = 0.95  # share of a budget at which the rule's own network is kept
RADII = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the multipliers' logarithms, tried in this order
DIVISOR = 8  # of channels, as in `round_channels`
INSIDE = 1e-9  # relative distance from the ends of a cell, where rounding may go either way
PHI_RANGE, PHI_STEPS = 4.0, 60  # searched around the rule's phi, and thirds that are cut off


@dataclass(frozen=True)
class Offset:
    """How far a network lies from the rule at the nearest phi.

    Args:
        depth, width, resolution: factors over the rule's multipliers before rounding; 1 is on it.
    """

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    @property
    def distance(self) -> float:
        """Root of the sum of the squares of their logarithms."""
        logs = (math.log(factor) for factor in (self.depth, self.width, self.resolution))
        return math.hypot(*logs)


@dataclass(frozen=True)
class Cell:
    """An interval of multipliers, or of exact sides, that all round to the same network."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high)

    def nearest(self, value: float) -> float:
        """The value inside that is nearest to the given one."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Neighbourhood:
    """The networks around one of the rule's.

    Args:
        ray: the rule's network.
        scaling: the rule; dimensions that it does not grow keep their multiplier.
        stages, base_resolution, multiple: as for `CompoundScaling.at`.
        shares: what a network uses of each limit, by name; they grow with every dimension.
    """

    ray: Point
    scaling: CompoundScaling
    stages: tuple[Stage, ...]
    base_resolution: int
    multiple: int
    shares: Callable[[Variant], Mapping[str, float]]

    def refine(self, wanted: Collection[str]) -> tuple[Point, Offset] | None:
        """The network within all limits that is nearest to the rule and uses ENOUGH.

        Args:
            wanted: names of the limits of which enough is to be used.

        Returns:
            where there is none, the network that uses most; None where that is the rule's.
        """

        def used(shares: Mapping[str, float]) -> float:
            return max(shares[name] for name in wanted)

        best_share = used(self.shares(self.ray.variant))
        best: tuple[tuple[Cell, ...], int] | None = None
        for radius in RADII:
            found: list[tuple[Point, Offset, float]] = []
            for share, cells, side in self._candidates(radius, used):
                if share >= ENOUGH:
                    point, offset = self._place(cells, side)
                    found.append((point, offset, share))
                elif share > best_share:
                    best_share, best = share, (cells, side)
            if found:
                return min(found, key=lambda f: (f[1].distance, -f[2]))[:2]
        return None if best is None else self._place(*best)

    def _candidates(
        self, radius: float, used: Callable[[Mapping[str, float]], float]
    ) -> Iterator[tuple[float, tuple[Cell, ...], int]]:
        """For each depth and resolution the widest network within the limits, and narrower ones
        that use ENOUGH: the share, the cells of depth, width and exact side, and the side."""
        widths = self._width_cells(radius)
        for depth, (sides, side) in itertools.product(
            self._depth_cells(radius), self._sides(radius)
        ):

            def shares(width: Cell, depth: Cell = depth, side: int = side) -> Mapping[str, float]:
                return self.shares(self._variant(depth.middle, width.middle, side))

            low, high = -1, len(widths)  # the last within the limits, the first beyond
            while high - low > 1:
                middle = (low + high) // 2
                fits = max(shares(widths[middle]).values()) <= 1
                low, high = (middle, high) if fits else (low, middle)
            for width in reversed(widths[: low + 1]):
                share = used(shares(width))
                yield share, (depth, width, sides), side
                if share < ENOUGH:
                    break

    def _variant(self, depth: float, width: float, side: int) -> Variant:
        return custom_variant(depth=depth, width=width, resolution=side, stages=self.stages)

    def _place(self, cells: tuple[Cell, ...], side: int) -> tuple[Point, Offset]:
        """The point of the cells that is nearest to the rule."""

        def exact(phi: float) -> tuple[float, ...]:
            s = self.scaling
            return s.alpha**phi, s.beta**phi, self.base_resolution * s.gamma**phi

        def offset(phi: float) -> Offset:
            pairs = zip(cells, exact(phi), strict=True)
            return Offset(*(cell.nearest(value) / value for cell, value in pairs))

        low, high = self.ray.phi - PHI_RANGE, self.ray.phi + PHI_RANGE
        for _ in range(PHI_STEPS):  # the distance is convex in phi
            first, second = low + (high - low) / 3, high - (high - low) / 3
            if offset(first).distance < offset(second).distance:
                high = second
            else:
                low = first
        phi = (low + high) / 2
        depth, width, exact_side = (
            cell.nearest(value) for cell, value in zip(cells, exact(phi), strict=True)
        )
        return Point(phi, exact_side, self._variant(depth, width, side)), offset(phi)

    def _depth_cells(self, radius: float) -> list[Cell]:
        return _cells(
            self.ray.depth,
            radius if self.scaling.alpha > 1 else 0.0,
            [(0.0, 1.0 / stage.repeats) for stage in self.stages],
        )

    def _width_cells(self, radius: float) -> list[Cell]:
        """Channels go to the nearest multiple, or to the next where that is below 0.9 of them."""
        channels = {stage.out_channels for stage in self.stages} | {self.stages[0].in_channels}
        changes = [(-DIVISOR / 2 / c, DIVISOR / c) for c in channels]
        changes += [(0.0, DIVISOR / 0.9 / c) for c in channels]
        return _cells(self.ray.width, radius if self.scaling.beta > 1 else 0.0, changes)

    def _sides(self, radius: float) -> list[tuple[Cell, int]]:
        """Sides near the ray's, from the next below to the next above, with their exact ones."""
        if self.scaling.gamma == 1:
            exact = self.ray.exact_resolution
            return [(Cell(exact, exact), self.ray.resolution)]
        m = self.multiple
        low = math.floor(self.ray.exact_resolution * math.exp(-radius) / m)
        high = math.ceil(self.ray.exact_resolution * math.exp(radius) / m)
        return [
            (_inside((n - 0.5) * m, (n + 0.5) * m), n * m)
            for n in range(max(1, low), max(1, high) + 1)
        ]


def _cells(center: float, radius: float, changes: Sequence[tuple[float, float]]) -> list[Cell]:
    """The cells between `center * exp(-radius)` and `center * exp(radius)`, in order.

    Args:
        changes: (first, step) of multipliers at which rounding changes.
    """
    if radius == 0.0:
        return [Cell(center, center)]
    low, high = center * math.exp(-radius), center * math.exp(radius)
    ends = {low, high}
    for first, step in changes:
        place = math.ceil((low - first) / step)
        while (end := first + place * step) < high:
            ends.add(end)
            place += 1
    cells = (_inside(a, b) for a, b in itertools.pairwise(sorted(ends)))
    return [cell for cell in cells if cell.low < cell.high]


def _inside(low: float, high: float) -> Cell:
    return Cell(low * (1 + INSIDE), high * (1 - INSIDE))
