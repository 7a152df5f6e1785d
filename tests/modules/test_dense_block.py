"""FusedMBConv as a module: what runs as one block, and what is left to its layers or to stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from effnet_fast import doctor, use_backend
from effnet_fast.backends import CPU
from effnet_fast.models import EfficientNet
from effnet_fast.modules import fused_forward, structure
from effnet_fast.modules.dense_block import DenseBlock
from effnet_fast.modules.explain import explain
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.layers import MBConvConfig
from networks import TINY_V2, assert_alike, run_network

# ratio, stride, channels in and out, padding
ROWS = [(4, 1, 16, 16, "same"), (4, 2, 16, 24, "same"), (4, 1, 72, 72, "symmetric"),
        (1, 1, 16, 16, "symmetric"), (1, 2, 72, 24, "same")]  # fmt: skip
ANY_ROW = pytest.mark.parametrize("row", ROWS, ids=str)
CHANGES: dict[str, Callable[[FusedMBConv], object]] = {
    "hook": lambda m: m.block[0].register_forward_hook(lambda *_: None),
    "backward_hook": lambda m: m.block[1][0].register_full_backward_hook(lambda *_: None),
    "patched_forward": lambda m: setattr(m.block[0][0], "forward", m.block[0][0].forward),
    "parametrised": lambda m: parametrizations.weight_norm(m.block[0][0]),
    "instance_norm": lambda m: m.block[0].__setitem__(1, nn.InstanceNorm2d(64)),
    "another_child": lambda m: m.block.append(nn.Identity()),
    "layers_swapped": lambda m: setattr(m, "block", nn.Sequential(*reversed([*m.block]))),
    "activation_of_the_projection": lambda m: m.block[1].append(nn.SiLU()),
    "bias": lambda m: setattr(m.block[0][0], "bias", nn.Parameter(torch.zeros(64))),
    "padding_by_one_number": lambda m: setattr(m.block[0][0], "padding", 1),
    "stride_by_one_number": lambda m: setattr(m.block[0][0], "stride", 1),
    "padding_mode": lambda m: setattr(m.block[0][0], "padding_mode", "circular"),
}


def block(row: tuple[Any, ...] = ROWS[0], drop: float = 0.0) -> FusedMBConv:
    ratio, stride, channels, width, padding = row
    torch.manual_seed(0)
    config = MBConvConfig(ratio, 3, stride, channels, width, padding)
    module = FusedMBConv(config, drop, nn.BatchNorm2d)
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return module


def image(module: FusedMBConv, n: int = 4) -> Tensor:
    channels = module.block[0][0].in_channels
    return torch.randn(n, channels, 10, 8).to(memory_format=torch.channels_last)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the op has given so far."""
    given: list[Tensor] = []
    op = fused_forward.fused_mbconv

    def counted(*args: Any) -> Tensor:
        given.append(op(*args))
        return given[-1]

    monkeypatch.setattr(fused_forward, "fused_mbconv", counted)
    return given


def both(module: FusedMBConv, x: Tensor, change: Callable[[Any], object] | None = None) -> None:
    """Holds the fused run to the stock one, two steps each; changes both before."""
    stock = copy.deepcopy(module)
    for each in (module, stock):
        if change:
            change(each)
    for _ in range(2):
        with use_backend("reference"):
            expected = run_network(stock, x)
        assert_alike(run_network(module, x), expected)


@ANY_ROW
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_same_as_stock(
    row: tuple[Any, ...], training: bool, drop: float, fused: list[Tensor]
) -> None:
    module = block(row, drop).train(training)
    both(module, image(module))
    assert len(fused) == 2
    assert explain(module) is None
    assert isinstance(structure.structure_of(module), DenseBlock)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_recognised_runs_as_stock(name: str, fused: list[Tensor]) -> None:
    module = block().train()
    changed = copy.deepcopy(module)
    CHANGES[name](changed)
    with pytest.raises(structure.RefusedError):
        structure.structure_of(changed)
    if name in ("layers_swapped", "instance_norm"):  # it may not run at all, or gives NaN
        return
    both(module, image(module), CHANGES[name])
    assert not fused


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [setattr(bn, "momentum", None) for bn in (m.block[0][1], m.block[1][1])],
        lambda m: m.block[0][1].eval(),
        lambda m: m.block[1][1].eval(),
        lambda m: m.block[0].requires_grad_(False),
        lambda m: m.block[1].requires_grad_(False),
        lambda m: m.requires_grad_(False),
        lambda m: setattr(m.block[0][1], "track_running_stats", False),
        lambda m: setattr(m.stochastic_depth, "mode", "batch"),
        lambda m: setattr(m, "memory", "lean"),
        lambda m: setattr(m, "grad_checkpointing", True),
    ],
)
def test_switches(change: Callable[[FusedMBConv], object], fused: list[Tensor]) -> None:
    module = block(drop=0.5).train()
    both(module, image(module), change)
    assert len(fused) >= 2


def test_layouts(fused: list[Tensor]) -> None:
    for row in ROWS:
        module = block(row).train()
        both(module, image(module).contiguous())
        y = module(image(module).contiguous())
        assert y.is_contiguous()
        assert module(image(module)).is_contiguous(memory_format=torch.channels_last)
    assert len(fused) == 4 * len(ROWS)


def test_autocast(fused: list[Tensor]) -> None:
    module = block(ROWS[2]).train()
    x = image(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        with use_backend("reference"):
            stock = module(x)
    assert y.dtype is stock.dtype is torch.bfloat16
    assert len(fused) == 1
    y.float().sum().backward()
    assert module.block[0][0].weight.grad.dtype is torch.float32


def test_transforms_see_stock(fused: list[Tensor]) -> None:
    module = block().eval()
    x = image(module)
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    assert not fused


def test_a_backend_without_the_kernels_leaves_it_to_the_layers(
    monkeypatch: pytest.MonkeyPatch, fused: list[Tensor]
) -> None:
    module = block().train()
    monkeypatch.setattr(CPU, "launches", lambda op: False)
    both(module, image(module))
    assert not fused
    assert explain(module) == (
        "the cpu backend has no kernel for it as one block: its layers run by themselves"
    )


def test_the_report_has_it_as_one_block() -> None:
    model = EfficientNet(TINY_V2).train()
    kinds = [b.kind for b in doctor(model).blocks if b.reason is None]
    assert kinds.count("FusedMBConv") == 5
    inside = [b.name for b in doctor(model).blocks if ".block." in b.name]
    assert not inside


def test_small_images_raise_as_stock() -> None:
    module = block((4, 1, 16, 16, "symmetric")).train()
    module.block[0][0].padding = (0, 0)
    module.use_res_connect = False
    messages = []
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(RuntimeError) as caught:
            module(torch.randn(2, 16, 2, 2).to(memory_format=torch.channels_last))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_stock_trains_a_residual_behind_an_activation(activation: str) -> None:
    module = FusedMBConv(
        MBConvConfig(1, 3, 1, 16, 16, activation=activation), 0.0, nn.BatchNorm2d
    ).train()
    both(module, image(module))
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert module(image(module)).dtype is torch.bfloat16
    with use_backend("reference"):
        torch.jit.script(module)(image(module)).sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.block[0][1], "eps", 0.0),
        lambda m: m.block[1][1].running_mean.requires_grad_(),
        lambda m: setattr(m.block[0][0], "padding", (-1, -1)),
    ],
    ids=["eps", "gradient_of_a_statistic", "negative_padding"],
)
def test_errors_of_stock(change: Callable[[Any], object]) -> None:
    module = block().train()
    change(module)
    with use_backend("reference"), pytest.raises((ValueError, RuntimeError)) as stock:
        module(image(module))
    with pytest.raises(stock.type) as ours:
        module(image(module))
    assert str(ours.value) == str(stock.value)
