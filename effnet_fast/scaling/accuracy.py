"""An estimate of ImageNet top-1 accuracy from depth, width and resolution. Nothing is trained.

    top1 = limit - scale * (a * depth**-k + b * width**-k + c * resolution**-k)

with the resolution in units of 224 pixels. Each dimension alone saturates, since the other two
terms stay, as figure 3 of the paper shows. a, b and c are such that at phi = 1, among all networks
of the same work, depth * width**2 * resolution**2, the paper's constants 1.2, 1.1 and 1.15 are
best: its grid search is assumed, not found again. limit, scale and k are fitted to the top-1 of
B0 to B7 in its table 2, eight numbers. The estimate is therefore fair between B0 and B7 near the
paper's rule, a guess elsewhere, and does not hold for other baselines.

Source: Tan & Le (arXiv 1905.11946).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy

from effnet_fast.models.variants import B0_STAGES, VARIANTS, Variant
from effnet_fast.scaling.compound import BASE_RESOLUTION, CompoundScaling

LABEL = "estimate"
NOTE = (
    "Top-1 is an estimate: a formula fitted to the eight published accuracies of B0 to B7, which "
    "takes the paper's alpha, beta and gamma for the best. Nothing was trained."
)
PAPER_TOP1 = {  # percent, table 2
    "b0": 77.1,
    "b1": 79.1,
    "b2": 80.1,
    "b3": 81.6,
    "b4": 82.9,
    "b5": 83.6,
    "b6": 84.0,
    "b7": 84.3,
}
WORK_EXPONENTS = (1, 2, 2)  # of depth, width and resolution in the multiply-adds
EXPONENTS = numpy.arange(1, 121) / 20  # tried for k


@dataclass(frozen=True)
class AccuracyModel:
    """The fitted constants of the formula."""

    limit: float  # top-1 of an infinite network, percent
    scale: float  # percent
    exponent: float  # k
    rms: float  # error of the fit over the eight published numbers, percent

    def top1(self, depth: float, width: float, resolution: float) -> float:
        """Estimated top-1 in percent; resolution in pixels."""
        return self.limit - self.scale * _deficit(
            (depth, width, resolution / BASE_RESOLUTION), self.exponent
        )


def _deficit(multipliers: tuple[float, float, float], exponent: float) -> float:
    paper = CompoundScaling()
    best = (paper.alpha, paper.beta, paper.gamma)
    # At the best point, each term's share is that of its dimension in the work.
    terms = zip(multipliers, best, WORK_EXPONENTS, strict=True)
    return sum(share * (m / b) ** -exponent for m, b, share in terms)


@functools.cache
def accuracy_model() -> AccuracyModel:
    """The formula with its constants fitted to the published accuracies."""
    variants = [VARIANTS[name] for name in PAPER_TOP1]
    top1 = numpy.array(list(PAPER_TOP1.values()))
    found = []
    for exponent in EXPONENTS.tolist():
        multipliers = [(v.depth, v.width, v.resolution / BASE_RESOLUTION) for v in variants]
        deficits = [_deficit(m, exponent) for m in multipliers]
        matrix = numpy.stack([numpy.ones(len(variants)), -numpy.array(deficits)], axis=1)
        (limit, scale), *_ = numpy.linalg.lstsq(matrix, top1, rcond=None)
        rms = float(numpy.sqrt(numpy.mean((matrix @ (limit, scale) - top1) ** 2)))
        found.append((rms, AccuracyModel(float(limit), float(scale), exponent, rms)))
    return min(found, key=lambda pair: pair[0])[1]


def is_scaled_b0(variant: Variant) -> bool:
    """Whether the network is B0 with other multipliers alone, as the formula knows them."""
    kind = (variant.activation, variant.squeeze, variant.fixed_ends, variant.head)
    return variant.baseline == B0_STAGES and kind == ("silu", True, False, None)


def estimate_top1(variant: Variant) -> float:
    """Estimated ImageNet top-1 in percent; the module's docstring says how far to trust it.

    Raises:
        ValueError: the network is not scaled from B0.
    """
    if not is_scaled_b0(variant):
        raise ValueError("accuracies are estimated for networks scaled from B0 alone")
    return accuracy_model().top1(variant.depth, variant.width, variant.resolution)
