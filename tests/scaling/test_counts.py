"""Counts from the table against the published ones, the modules and torch's own counter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import effnet_fast
from effnet_fast.models import VARIANTS, Variant, custom_variant
from effnet_fast.models.variants import B0_STAGES, Stage
from effnet_fast.scaling import (
    CompoundScaling,
    convolutions,
    count,
    count_memory,
    counts,
    groups,
    published,
)
from effnet_fast.scaling.counts import unrounded_macs
from networks import LITES, PARAMETERS

# Billions of multiply-adds, to three decimals: the meta data of torchvision 0.28's weights.
# Stem, head, channels and repeats of the stages: tables of the public implementations.
PUBLISHED = {
    "b0": (0.386, 32, 1280, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "b1": (0.687, 32, 1280, (16, 24, 40, 80, 112, 192, 320), (2, 3, 3, 4, 4, 5, 2)),
    "b2": (0.994, 32, 1408, (16, 24, 48, 88, 120, 208, 352), (2, 3, 3, 4, 4, 5, 2)),
    "b3": (1.827, 40, 1536, (24, 32, 48, 96, 136, 232, 384), (2, 3, 3, 5, 5, 6, 2)),
    "b4": (4.394, 48, 1792, (24, 32, 56, 112, 160, 272, 448), (2, 4, 4, 6, 6, 8, 2)),
    "b5": (10.266, 48, 2048, (24, 40, 64, 128, 176, 304, 512), (3, 5, 5, 7, 7, 9, 3)),
    "b6": (19.068, 56, 2304, (32, 40, 72, 144, 200, 344, 576), (3, 6, 6, 8, 8, 11, 3)),
    "b7": (37.746, 64, 2560, (32, 48, 80, 160, 224, 384, 640), (4, 7, 7, 10, 10, 13, 4)),
}
# What unrounded networks lack of depth * width**2 * resolution**2 times B0, by phi.
SHORTFALL = {1: 0.0254, 2: 0.0463, 3: 0.0637, 5: 0.0905, 7: 0.1098}
OWN_TABLE = (Stage(1, 3, 2, 20, 12, 2), Stage(3, 7, 1, 12, 28, 3), Stage(4, 3, 2, 28, 36, 1))


def points() -> list[Variant]:
    draws = random.Random(0)
    return [
        custom_variant(
            depth=draws.uniform(0.1, 1.4),
            width=draws.uniform(0.1, 1.6),
            resolution=draws.randrange(9, 260),
            stages=stages,
        )
        for stages in (B0_STAGES, OWN_TABLE)
        for _ in range(25)
    ] + [replace(VARIANTS[name], resolution=97) for name in LITES]


def measured(variant: Variant, **options: int) -> tuple[int, int, int]:
    """Parameters, FLOPs and elements of all outputs of convolutions and the classifier."""
    with torch.device("meta"):
        model = effnet_fast.EfficientNet(variant, **options).eval()
        x = torch.empty(1, options.get("in_chans", 3), variant.resolution, variant.resolution)
    elements = 0

    def add(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops(), elements


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    variant, counts = VARIANTS[name], count(VARIANTS[name])
    billions, stem, head, channels, repeats = PUBLISHED[name]
    assert counts.parameters == PARAMETERS[name]
    assert round(counts.macs / 1e9, 3) == billions
    assert counts.flops == 2 * counts.macs
    assert (variant.stem_channels, variant.head_channels) == (stem, head)
    assert tuple(stage.out_channels for stage in variant.stages) == channels
    assert tuple(stage.repeats for stage in variant.stages) == repeats


def test_rule_is_the_published_b0_and_nothing_else() -> None:
    for name, (variant, point) in published().items():
        same = count(variant) == count(point.variant)
        assert same == (name in ("b0", "lite0"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", points(), ids=lambda v: f"{v.resolution}")
def test_against_the_modules(variant: Variant) -> None:
    counts = count(variant)
    assert (counts.parameters, counts.flops, counts.activations) == measured(variant)


@pytest.mark.slow
def test_classes_and_channels_of_the_images() -> None:
    variant = custom_variant(width=0.5, depth=0.5, resolution=64)
    counts = count(variant, num_classes=7, in_chans=5)
    expected = measured(variant, num_classes=7, in_chans=5)
    assert (counts.parameters, counts.flops, counts.activations) == expected


def test_resolution_may_differ_from_the_variants() -> None:
    variant = VARIANTS["b2"]
    assert count(variant, 65) == count(replace(variant, resolution=65))


def test_rows_stand_for_all_convolutions() -> None:
    variant = VARIANTS["b7"]
    model = effnet_fast.efficientnet_b0()
    convs = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert sum(row.repeats for row in convolutions(VARIANTS["b0"])) == len(convs)
    depthwise = [row for row in convolutions(variant) if row.kind == "depthwise"]
    assert sum(row.repeats for row in depthwise) == variant.blocks


@pytest.mark.parametrize("option", ["resolution", "num_classes", "in_chans"])
def test_bad_sizes(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be an int of at least 1"):
        count(VARIANTS["b0"], **{option: 0})


def growth(phi: float) -> tuple[float, float]:
    """Of the unrounded multiply-adds over B0's, and depth * width**2 * resolution**2."""
    point = CompoundScaling().at(phi)
    sizes = {"depth": point.depth, "width": point.width, "resolution": point.exact_resolution}
    return unrounded_macs(**sizes) / unrounded_macs(), CompoundScaling().growth ** phi


def test_unrounded_baselines_are_b0_and_lite0() -> None:
    assert unrounded_macs() == count(VARIANTS["b0"]).macs
    lite = {"squeeze": False, "fixed_ends": True, "head": 1280}
    assert unrounded_macs(**lite) == count(VARIANTS["lite0"]).macs


def test_what_lite_fixes_does_not_grow() -> None:
    """Twice as wide: the stem and its stage's input stay, one side of the next ones doubles."""
    stages = B0_STAGES[:1]
    lite = {"stages": stages, "squeeze": False, "fixed_ends": True, "head": 10, "num_classes": 1}
    pixels, stem = 112**2, 9 * 3 * 32
    for width in (1.0, 2.0):
        expected = pixels * (stem + 32 * (9 + 16 * width)) + pixels * 16 * width * 10 + 10
        assert unrounded_macs(width=width, depth=3.0, **lite) == expected


@settings(deadline=None)
@given(st.floats(0.0, 7.0))
def test_work_before_rounding_never_passes_the_rule(phi: float) -> None:
    macs, rule = growth(phi)
    assert macs <= rule * (1 + 1e-12)


@pytest.mark.parametrize("phi", SHORTFALL)
def test_work_before_rounding_falls_short_of_the_rule(phi: int) -> None:
    macs, rule = growth(phi)
    assert 1 - macs / rule == pytest.approx(SHORTFALL[phi], abs=5e-5)


@pytest.mark.parametrize("phi", range(7))
def test_each_unit_of_phi_falls_short_by_less_than_four_percent(phi: int) -> None:
    (small, small_rule), (large, large_rule) = growth(phi), growth(phi + 1)
    assert 0.96 < (large / small) / (large_rule / small_rule) < 1.0


def test_one_dimension_of_the_1x1_convolutions_grows_exactly() -> None:
    wide = replace(B0_STAGES[1], kernel=1)
    one = {"stages": (replace(wide, repeats=1),), "num_classes": 1, "in_chans": 1}
    two = {"stages": (wide,), "num_classes": 1, "in_chans": 1}
    assert unrounded_macs(**two) > unrounded_macs(**one)
    edges = unrounded_macs(depth=1e-12, **two)
    blocks = unrounded_macs(**two) - edges
    assert unrounded_macs(depth=3.0, **two) - edges == pytest.approx(3.0 * blocks)


def test_rounding_adds_work() -> None:
    """Repeats are rounded up, so networks between the published ones cost up to 40% more."""
    excess = []
    for step in range(1, 71):
        point = CompoundScaling().at(step / 10)
        sizes = {"depth": point.depth, "width": point.width, "resolution": point.exact_resolution}
        excess.append(count(point.variant).macs / unrounded_macs(**sizes) - 1)
    assert 0.35 < max(excess) < 0.65
    assert min(excess) > -0.05


def test_a_point_forms_its_rows_once() -> None:
    """For counts and memory together, and as many rows for a deep network as for a shallow one."""
    scaling, rows = CompoundScaling(), set()
    counts._groups.cache_clear()
    for phi in range(8):
        variant = scaling.at(float(phi)).variant
        count(variant)
        count_memory(variant, "inference", "fused")
        count_memory(variant, "training", "fused")
        assert counts._groups.cache_info().misses == phi + 1
        rows.add(len(list(groups(variant))))
    assert max(rows) <= 2 * len(B0_STAGES) + 3  # of a stage the first block and the others


def test_groups_hold_every_convolution() -> None:
    variant = VARIANTS["b3"]
    rows = list(groups(variant))
    assert sum(g.repeats * g.parameters for g in rows) == count(variant).parameters
    assert [row for g in rows for row in g.convs.values()] == list(convolutions(variant))
    assert [g.kind for g in rows][:: len(rows) - 1] == ["stem", "head"]
    assert sum(g.repeats for g in rows if g.kind == "block") == variant.blocks
    residual = sum(g.repeats for g in rows if g.residual)
    assert residual == variant.blocks - len(variant.stages)
