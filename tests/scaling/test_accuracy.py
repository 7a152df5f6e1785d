"""The estimate of accuracies: what it was fitted to, and what it assumes."""

from __future__ import annotations

import pytest

from effnet_fast.models import VARIANTS, Stage, custom_variant
from effnet_fast.scaling import CompoundScaling, candidates, estimate_top1
from effnet_fast.scaling.accuracy import PAPER_TOP1, accuracy_model


@pytest.mark.parametrize("name", PAPER_TOP1)
def test_near_the_published_accuracies(name: str) -> None:
    assert estimate_top1(VARIANTS[name]) == pytest.approx(PAPER_TOP1[name], abs=0.6)


def test_error_is_stated() -> None:
    errors = [estimate_top1(VARIANTS[name]) - top1 for name, top1 in PAPER_TOP1.items()]
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    assert accuracy_model().rms == pytest.approx(rms)
    assert rms < 0.3


@pytest.mark.slow
def test_paper_constants_are_best_at_equal_work() -> None:
    model, paper = accuracy_model(), CompoundScaling()
    best = model.top1(paper.alpha, paper.beta, 224 * paper.gamma)
    for rule in candidates(0.02, 0.4):
        scale = (paper.growth / rule.growth) ** 0.2  # to the same work
        top1 = model.top1(rule.alpha * scale, rule.beta * scale, 224 * rule.gamma * scale)
        assert top1 <= best + 1e-9


@pytest.mark.parametrize("dimension", range(3))
def test_one_dimension_alone_saturates(dimension: int) -> None:
    model = accuracy_model()
    sizes = [1.0, 1.0, 224.0]
    sizes[dimension] *= 1e6
    assert model.top1(1.0, 1.0, 224.0) < model.top1(*sizes) < PAPER_TOP1["b3"]


def test_other_baselines_are_refused() -> None:
    own = custom_variant(stages=(Stage(1, 3, 1, 32, 16, 1),))
    with pytest.raises(ValueError, match="scaled from B0 alone"):
        estimate_top1(own)
