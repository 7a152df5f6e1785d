"""Modes that intercept operators: they meet all of them, and change what they mean to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import effnet_fast
from edit_kinds import Scaling, ScalingBelow
from effnet_fast import use_backend
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.models import EfficientNet
from effnet_fast.modules import observed
from networks import MINI, assert_alike, calibrated_state, random_images, run_network

X = random_images(2, 32)


def network() -> Any:
    model = EfficientNet(MINI)
    model.load_state_dict(calibrated_state(MINI))
    return model.eval()


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [Scaling, ScalingBelow])
def test_a_mode_that_changes_operators_is_heard(kind: Any, training: bool) -> None:
    model = network().train(training)
    block = model.features[2][0]
    h = torch.randn(2, block.block[0][0].in_channels, 8, 8)
    plain = run_network(model, X, training)["y"]
    with kind():
        for module, x in ((model, X), (block, h)):
            ours = run_network(module, x, training)
            with use_backend("reference"):
                assert_alike(ours, run_network(module, x, training)) if not training else None
    with kind():
        assert not torch.allclose(run_network(model, X, training)["y"], plain, rtol=0.1)


@pytest.mark.parametrize("kind", [Scaling, ScalingBelow, Looking])
def test_deploy_refuses_a_mode_by_name(kind: Any) -> None:
    deployed = effnet_fast.deploy(network())
    y = deployed(X)
    with kind(), pytest.raises(RuntimeError, match=f"{kind.__name__}, a Torch"):
        deployed(X)
    assert torch.equal(deployed(X), y)


@contextlib.contextmanager
def default_device() -> Any:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("context", [default_device, lambda: torch.device("cpu")])
def test_a_default_device_costs_nothing(
    context: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = network(), []
    original = CpuEngine.__call__
    monkeypatch.setattr(CpuEngine, "__call__", lambda *args: runs.append(1) or original(*args))
    with context(), torch.no_grad():
        model(X)
        effnet_fast.deploy(model)(X)
        assert len(runs) == 2
        with Scaling():
            assert observed.interceptor() == "Scaling, a TorchFunctionMode, is active"
            model(X)
        assert observed.interceptor() is None
    assert len(runs) == 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_counted_operations_are_stocks(training: bool) -> None:
    model, counts = network().train(training), []
    for backend in ("auto", "reference"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            run_network(model, X, training)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_selective_checkpointing_gives_stocks_numbers() -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = (
            op is torch.ops.aten.sigmoid.default
        )  # others are overwritten in place, as stock's are
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            def contexts() -> Any:
                return create_selective_checkpoint_contexts(policy)

            return checkpoint(self.model, x, use_reentrant=False, context_fn=contexts)

    ours = run_network(Checkpointed(network()), X)
    with use_backend("reference"):
        assert_alike(ours, run_network(Checkpointed(network()), X))
