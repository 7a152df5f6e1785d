"""A deployed network as a module: copies, its state dict, its modes and what it prints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import nn

import effnet_fast
import networks
from networks import pair, random_images

X = random_images(8, 48)


def network() -> nn.Module:
    return pair().actual


class TestModule:
    COPIES: ClassVar[dict[str, Callable[[nn.Module], nn.Module]]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "torch_save": lambda m: saved_and_loaded(m),
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("name", COPIES)
    def test_copies(self, name: str) -> None:
        deployed = effnet_fast.deploy(network(), torch.bfloat16)
        y = deployed(X)
        other = self.COPIES[name](deployed)
        assert torch.equal(other(X), y)
        with torch.no_grad():
            other.source.classifier[1].bias.add_(1)
        assert torch.equal(deployed(X), y)
        assert not torch.equal(other(X), y)
        assert list(other.state_dict()) == list(deployed.state_dict())

    def test_state_dict_is_the_sources(self) -> None:
        model, other = network(), network()
        deployed = effnet_fast.deploy(model)
        assert list(deployed.state_dict()) == list(model.state_dict())
        assert deployed.state_dict()._metadata.keys() == model.state_dict()._metadata.keys()
        state = {k: 1.1 * v if v.is_floating_point() else v for k, v in other.state_dict().items()}
        whole = nn.Sequential(deployed)
        whole.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
        other.load_state_dict(state)
        networks.assert_alike({"y": deployed(X)}, {"y": other(X).detach()})
        assert {id(p) for p in whole.parameters()} == {id(p) for p in model.parameters()}

    def test_modes(self) -> None:
        deployed = effnet_fast.deploy(network())
        assert deployed.eval() is deployed.train(False) is deployed
        assert not deployed.training
        with pytest.raises(RuntimeError, match="only infers"):
            deployed.train()

    def test_repr(self) -> None:
        text = repr(effnet_fast.deploy(network(), torch.bfloat16, backend="cpu:generic"))
        assert text == (
            "DeployedEfficientNet(EfficientNet tiny, dtype=torch.bfloat16, instruction set generic)"
        )

    def test_contexts(self) -> None:
        """Neither autocast nor inference_mode nor a default device changes the result."""
        deployed = effnet_fast.deploy(network())
        y = deployed(X)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert torch.equal(deployed(X), y)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
