"""A network of any size in a file: built again with its layers, weights and images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from effnet_fast import EfficientNet
from effnet_fast.models import VARIANTS, Stage, custom_variant
from effnet_fast.scaling import CompoundScaling, fit, random_network, save_network

OWN = (Stage(1, 3, 2, 16, 24, 1), Stage(4, 5, 2, 24, 40, 2))


@pytest.mark.parametrize(
    "variant",
    [
        CompoundScaling().at(-6.0).variant,
        fit(target_macs=5e6).point.variant,
        custom_variant(depth=1.5, width=0.3, resolution=40, stages=OWN),
    ],
    ids=["rule", "refined", "own"],
)
def test_is_built_again(variant, tmp_path: Path) -> None:
    network = random_network(variant, seed=3, num_classes=7)
    network.class_names = [f"class {i}" for i in range(7)]
    path = tmp_path / "network.safetensors"
    save_network(network, path)
    again = EfficientNet.from_checkpoint(path)
    assert again.variant.stages == variant.stages
    for name in ("resolution", "resize", "crop", "head_channels", "mean", "padding", "bn_eps"):
        assert getattr(again.variant, name) == getattr(variant, name), name
    assert again.class_names == network.class_names
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(again.eval()(x), network.eval()(x))
    save_network(again, path)  # as what trains it does
    assert EfficientNet.from_checkpoint(path).variant == again.variant


def test_seeds() -> None:
    variant = CompoundScaling().at(-8.0).variant
    state = torch.get_rng_state()
    first, same, other = (random_network(variant, seed=s).state_dict() for s in (1, 1, 2))
    name = "features.0.0.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals(tmp_path: Path) -> None:
    variant = CompoundScaling().at(-8.0).variant
    with pytest.raises(ValueError, match=r"the suffix must be .safetensors"):
        save_network(EfficientNet(variant), tmp_path / "network.pth")
    with torch.device("meta"):
        networks = [EfficientNet(VARIANTS[name]) for name in ("lite0", "v2_s")]
        networks.append(EfficientNet(dataclasses.replace(variant, padding="same")))
    for network in networks:
        with pytest.raises(ValueError, match="is no network of MBConv with SiLU"):
            save_network(network, tmp_path / "network.safetensors")
    assert list(tmp_path.iterdir()) == []
