"""What files say beside tensors: it stays with a network, and is checked."""

import pytest
import torch

import effnet_fast
from effnet_fast import EfficientNet, checkpoints
from effnet_fast.checkpoints.facts import FACTS_ENTRY, Facts, facts_of


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_network_of_64_pixels_stays_one(tmp_path, suffix):
    model = effnet_fast.efficientnet(resolution=64, num_classes=2)
    path = tmp_path / f"a{suffix}"
    checkpoints.save(model.state_dict(), path)
    variant = EfficientNet.from_checkpoint(path).variant
    assert (variant.name, variant.crop, variant.resize) == ("b0", 64, 73)
    torch.save(EfficientNet.from_checkpoint(path).state_dict(), tmp_path / "b.pth")
    assert EfficientNet.from_checkpoint(tmp_path / "b.pth").variant == variant


def test_text_and_back():
    facts = Facts(("a", "ü"), {"crop": 3, "mean": (0.1, 0.2, 0.3)}, {"padded_as": 7})
    assert facts_of(facts.as_text()) == facts
    assert not Facts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "something other than facts"),
        ('{"more": 1}', "something other than facts"),
        ('{"classes": [1]}', "classes must be a list of names"),
        ('{"images": 3}', "images must be a mapping"),
        ('{"images": {"crop": 0}}', "images cannot have 'crop' of 0"),
        ('{"images": {"std": [1, 1, 0]}}', "images cannot have 'std'"),
        ('{"network": {"name": "x"}}', "network cannot have 'name'"),
        ('{"network": {"bn_eps": NaN}}', "network cannot have 'bn_eps'"),
    ],
)
def test_refuses_other_facts(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        facts_of(text)
    state = {"features.0.0.weight": torch.ones(1)}
    checkpoints.save(state, tmp_path / "a.safetensors", {FACTS_ENTRY: text})
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
        checkpoints.load(tmp_path / "a.safetensors")
