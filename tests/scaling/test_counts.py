"""Counts from the table against the published ones, the modules and torch's own counter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effnet_fast
from effnet_fast.models import VARIANTS, Variant, custom_variant
from effnet_fast.models.variants import B0_STAGES, Stage
from effnet_fast.scaling import convolutions, count
from networks import PARAMETERS

# Billions of multiply-adds, to three decimals: the meta data of torchvision 0.28's weights.
GMAC = {
    "b0": 0.386,
    "b1": 0.687,
    "b2": 0.994,
    "b3": 1.827,
    "b4": 4.394,
    "b5": 10.266,
    "b6": 19.068,
    "b7": 37.746,
}
OWN_TABLE = (Stage(1, 3, 2, 20, 12, 2), Stage(3, 7, 1, 12, 28, 3), Stage(4, 3, 2, 28, 36, 1))


def points() -> list[Variant]:
    draws = random.Random(0)
    return [
        custom_variant(
            depth=draws.uniform(0.3, 1.8),
            width=draws.uniform(0.3, 1.6),
            resolution=draws.randrange(33, 260),
            stages=stages,
        )
        for stages in (B0_STAGES, OWN_TABLE)
        for _ in range(8)
    ]


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


@pytest.mark.parametrize("name", GMAC)
def test_published(name: str) -> None:
    counts = count(VARIANTS[name])
    assert counts.parameters == PARAMETERS[name]
    assert round(counts.macs / 1e9, 3) == GMAC[name]
    assert counts.flops == 2 * counts.macs


@pytest.mark.parametrize("variant", points(), ids=lambda v: f"{v.resolution}")
def test_against_the_modules(variant: Variant) -> None:
    counts = count(variant)
    assert (counts.parameters, counts.flops, counts.activations) == measured(variant)


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
    with pytest.raises(ValueError, match="must be at least 1"):
        count(VARIANTS["b0"], **{option: 0})
