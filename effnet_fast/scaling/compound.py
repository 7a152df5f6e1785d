"""The compound scaling rule: one number phi sets depth, width and resolution together.

Source: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv 1905.11946), section 3.3: depth alpha^phi, width beta^phi, resolution gamma^phi under
alpha * beta^2 * gamma^2 ~ 2, so that the multiply-adds grow by about 2^phi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from effnet_fast.models.variants import B0_STAGES, VARIANTS, Stage, Variant, custom_variant
from effnet_fast.scaling.checks import is_real, whole

BASE_RESOLUTION = 224
LIKE = ("padding", "activation", "squeeze", "fixed_ends", "head")  # of a Variant, beside its size


@dataclass(frozen=True)
class Point:
    """A scaled network.

    Args:
        phi: the compound coefficient.
        exact_resolution: side of the images before rounding, pixels.
        variant: the network after rounding; `effnet_fast.EfficientNet` builds it.
    """

    phi: float
    exact_resolution: float
    variant: Variant

    @property
    def depth(self) -> float:
        """Multiplier of the baseline's repeats, before rounding."""
        return self.variant.depth

    @property
    def width(self) -> float:
        """Multiplier of the baseline's channels, before rounding."""
        return self.variant.width

    @property
    def resolution(self) -> int:
        """Side of the images, pixels."""
        return self.variant.resolution


@dataclass(frozen=True)
class CompoundScaling:
    """The rule with its three constants; the defaults are the paper's, found by its grid search.

    Args:
        alpha, beta, gamma: growth of depth, width and resolution for each unit of phi.

    Raises:
        ValueError: a constant below 1 or not finite.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not (is_real(value) and math.isfinite(value) and value >= 1.0):
                raise ValueError(f"{name} must be a finite number of at least 1, got {value!r}")

    @property
    def growth(self) -> float:
        """Factor of the multiply-adds for each unit of phi, before rounding: about 2."""
        return self.alpha * self.beta**2 * self.gamma**2

    def at(
        self,
        phi: float,
        *,
        stages: tuple[Stage, ...] = B0_STAGES,
        base_resolution: int = BASE_RESOLUTION,
        multiple: int = 8,
        like: Variant | None = None,
    ) -> Point:
        """The network at phi.

        Args:
            phi: any real number; 0 is the baseline, below it networks are smaller.
            stages: the baseline's table.
            base_resolution: side of the baseline's images, pixels.
            multiple: resolutions are rounded to the nearest multiple of this, at least one.
            like: a network whose blocks, ends and padding it has, such as `VARIANTS["lite0"]`; None
                means B0's.

        Raises:
            ValueError: phi not finite, or so far from 0 that no float holds the multipliers, or
                base_resolution or multiple no int of at least 1.
        """
        if not (is_real(phi) and math.isfinite(phi)):
            raise ValueError(f"phi must be a finite number, got {phi!r}")
        base_resolution = whole("base_resolution", base_resolution)
        multiple = whole("multiple", multiple)
        try:
            depth, width = self.alpha**phi, self.beta**phi
            exact = base_resolution * self.gamma**phi
        except OverflowError:
            depth = width = exact = math.inf
        if not all(0 < size < math.inf for size in (depth, width, exact)):
            raise ValueError(f"phi = {phi:g} is too far from 0: no float holds its multipliers")
        rounded = max(1, math.floor(exact / multiple + 0.5)) * multiple
        variant = custom_variant(depth=depth, width=width, resolution=rounded, stages=stages)
        if like is not None:
            variant = replace(variant, **{name: getattr(like, name) for name in LIKE})
        return Point(phi, exact, variant)


def fit_phi(variant: Variant, scaling: CompoundScaling | None = None) -> float:
    """The phi whose multipliers are nearest to the variant's, in least squares of logarithms.

    Raises:
        ValueError: alpha, beta and gamma are all 1: every phi gives the same network.
    """
    scaling = scaling or CompoundScaling()
    bases = [math.log(c) for c in (scaling.alpha, scaling.beta, scaling.gamma)]
    if not any(bases):
        raise ValueError("alpha, beta and gamma are all 1: phi changes nothing")
    multipliers = (variant.depth, variant.width, variant.resolution / BASE_RESOLUTION)
    logs = [math.log(m) for m in multipliers]
    return sum(a * b for a, b in zip(bases, logs, strict=True)) / sum(a * a for a in bases)


def published(scaling: CompoundScaling | None = None) -> dict[str, tuple[Variant, Point]]:
    """Every network that was scaled from B0's table beside the formula's at the nearest phi: they
    were rounded by hand.

    Returns:
        by name, the published network and the formula's point.
    """
    scaling = scaling or CompoundScaling()
    return {
        name: (variant, scaling.at(fit_phi(variant, scaling), like=variant))
        for name, variant in VARIANTS.items()
        if variant.baseline == B0_STAGES
    }
