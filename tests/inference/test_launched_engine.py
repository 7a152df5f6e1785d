"""The plan that launches kernels: its numbers, and what a call does to its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import networks
from effnet_fast import use_backend
from effnet_fast.inference import packed_passes
from effnet_fast.inference.launched_engine import LaunchedEngine
from effnet_fast.inference.network_spec import spec_of
from effnet_fast.models import VARIANTS, EfficientNet, EfficientNetFeatures
from launched import DTYPES, SIMT, TARGETS, Target, assert_parity, recorders
from networks import TINY, TINY_V2, random_images
from tiers import some
from tolerances import assert_no_worse_than

__all__ = ["recorders"]  # a fixture
X = random_images(8, 48)
NEEDS_SIMT = pytest.mark.skipif(bool(SIMT.reason), reason=SIMT.reason or "")


def network() -> nn.Module:
    return networks.pair().actual


@pytest.mark.slow
@TARGETS
@DTYPES
def test_b0(target: Target, dtype: torch.dtype, recorders: list) -> None:
    model = networks.pair(VARIANTS["b0"], 65).actual
    assert_parity(target, model, random_images(4, 65), dtype)


@pytest.mark.slow
@TARGETS
@DTYPES
@pytest.mark.parametrize(
    "options",
    some(
        (
            {"num_classes": 0},
            {"num_classes": 7},
            {"num_classes": 0, "global_pool": ""},
            {"num_classes": 5, "global_pool": "catavgmax"},
            {"in_chans": 5},
        ),
        ({"num_classes": 0, "global_pool": ""}, {"in_chans": 5}),
    ),
)
def test_heads(target: Target, options: dict, dtype: torch.dtype, recorders: list) -> None:
    model = calibrated(EfficientNet(TINY, **options))
    assert_parity(target, model, random_images(8, 48, options.get("in_chans", 3), seed=3), dtype)


@pytest.mark.slow
@TARGETS
@DTYPES
@pytest.mark.parametrize("out_indices", [None, (0,), (1, 3)], ids=str)
def test_encoders(
    target: Target, out_indices: tuple[int, ...] | None, dtype: torch.dtype, recorders: list
) -> None:
    model = EfficientNetFeatures(TINY, out_indices=out_indices)
    model.load_state_dict(networks.calibrated_state(TINY))
    assert_parity(target, model.eval(), X, dtype)


@pytest.mark.slow
@TARGETS
@DTYPES
@pytest.mark.parametrize("side", [48, 51])
def test_same_padding(target: Target, side: int, dtype: torch.dtype, recorders: list) -> None:
    """On oblong images, whose rows and columns are padded differently."""
    model = calibrated(EfficientNet(replace(TINY, padding="same")), side)
    images = random_images(8, side, seed=4)[..., :-1]
    images = images.contiguous(memory_format=torch.channels_last)
    assert_parity(target, model, images, dtype)


@pytest.mark.slow
@TARGETS
@DTYPES
def test_fused_blocks(target: Target, dtype: torch.dtype, recorders: list) -> None:
    """Of each kind in one network, the dense convolutions before MBConv."""
    assert_parity(target, networks.pair(TINY_V2).actual, X, dtype)


def calibrated(model: EfficientNet, side: int = 48) -> EfficientNet:
    """With statistics of random images of its own."""
    for module in model.modules():
        if isinstance(module, networks.nn.BatchNorm2d):
            module.momentum = 1.0
    for name, module in model.named_modules():
        if name.endswith("block"):
            module[-1][1].weight.data.mul_(0.25)
    for module in model.train().modules():
        if hasattr(module, "p"):
            module.p = 0.0
    with torch.no_grad(), use_backend("reference"):  # the same network whatever the kernels
        model(random_images(8, side, model.in_chans, seed=1))
    return model.eval()


@pytest.mark.slow
@TARGETS
def test_no_bias_in_the_classifier(target: Target) -> None:
    model = network()
    model.classifier[1].bias = None
    assert_parity(target, model, X, torch.float32)


@pytest.mark.slow
@TARGETS
@DTYPES
def test_planted_fault_is_noticed(target: Target, dtype: torch.dtype) -> None:
    """Two channels swapped in one weight, after it was packed."""
    model, x = network().to(target.device), X.to(target.device)
    with torch.no_grad():
        exact = networks.copy.deepcopy(model).double()(x.double())
        weight = model.features[5][1].block[0][0].weight
        weight[[0, 1]] = weight[[1, 0]]
        y = target.deploy(model, dtype)(x)
        weight[[0, 1]] = weight[[1, 0]]
        stock = networks.copy.deepcopy(model).to(dtype)(x.to(dtype))
    with pytest.raises(AssertionError):
        assert_no_worse_than(y.to(dtype), stock, exact)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


CONVERSIONS = {"_to_copy", "copy_", "clone", "contiguous", "rsqrt", "mul", "add", "sub"}


@pytest.mark.slow
@NEEDS_SIMT
@DTYPES
def test_nothing_is_converted_at_a_call(dtype: torch.dtype) -> None:
    """But the pooled features, which become the classifier's operand."""
    model = network()
    plan = LaunchedEngine(spec_of(model), dtype, "simt", 0)
    x = X.to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Operators() as operators:
        plan.run(x)
    found = [name for name in operators.names if name in CONVERSIONS]
    assert found == (["_to_copy"] if dtype is not torch.float32 else [])
    with torch.no_grad(), Operators() as operators:
        model.backend = "reference"
        model(X)
    assert CONVERSIONS & set(operators.names)


@NEEDS_SIMT
@DTYPES
def test_packed_weights(dtype: torch.dtype) -> None:
    """Weights in the dtype, vectors in fp32; their bytes are told; the source keeps its own."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = LaunchedEngine(spec_of(model), dtype, "simt", 0)
    matrices = [tensor for tensor in plan._tensors if tensor.dim() > 1]
    assert {tensor.dtype for tensor in matrices} == {dtype}
    assert {tensor.dtype for tensor in plan._tensors} <= {dtype, torch.float32}
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.nbytes >= parameters * dtype.itemsize
    assert not any(tensor.requires_grad for tensor in plan._tensors)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert owned.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in plan._tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.slow
@TARGETS
def test_fp16_that_does_not_hold_a_weight(target: Target) -> None:
    model = network().to(target.device)
    with torch.no_grad():
        model.features[2][0].block[0][1].weight.mul_(1e7)
    with pytest.raises(RuntimeError, match=r"beyond torch\.float16's largest value"):
        target.deploy(model, torch.float16)
    assert target.deploy(model, torch.bfloat16)(X.to(target.device)).shape == (8, 1000)


@pytest.mark.parametrize("op", ["dwconv_bn_silu", "squeeze_excite", "pointwise_bn_act"])
def test_no_backend_is_an_error_with_each_reason(op: str) -> None:
    if torch.cuda.is_available():
        # What is said where none is there.
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run {op}: "):
        packed_passes.choose(op, "cuda", torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="there are no kernels for meta"):
        packed_passes.choose(op, "auto", torch.float32, torch.device("meta"))


def test_preference_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on Triton, the rest on CUDA; each falls to the other where it cannot."""
    reasons: dict[tuple[str, str], str] = {}
    device = torch.device("cuda")
    monkeypatch.setattr(
        packed_passes.backends, "can_run", lambda name, op, args: reasons.get((name, op))
    )
    monkeypatch.setattr(packed_passes.torch, "empty", lambda *_, **__: X)
    ops = ("pointwise_bn_act", "dwconv_bn_silu", "squeeze_excite")

    def chosen() -> list[str]:
        return [packed_passes.choose(op, "auto", torch.float32, device) for op in ops]

    assert chosen() == ["triton", "cuda", "cuda"]
    reasons["cuda", "dwconv_bn_silu"] = "its kernel is 7x7"
    assert chosen() == ["triton", "triton", "cuda"]
    reasons.clear()
    reasons.update({("triton", op): "no Triton" for op in ops})
    assert chosen() == ["cuda", "cuda", "cuda"]


def test_backends_that_a_device_has_not() -> None:
    for backend in ("reference", "gpu"):
        with pytest.raises(ValueError, match=backend):
            Target("cpu", backend).deploy(network())


@pytest.mark.slow
@NEEDS_SIMT
@pytest.mark.parametrize("shape", [(0, 3, 48, 48), (2, 3, 1, 1), (1, 3, 2, 65)], ids=str)
def test_odd_sizes(shape: tuple[int, ...]) -> None:
    for model in (network(), EfficientNetFeatures(TINY).eval()):
        x: Tensor = torch.randn(shape)
        results, stock = SIMT.deploy(model)(x), model(x)
        pairs = zip(results, stock, strict=True) if isinstance(stock, list) else [(results, stock)]
        for y, expected in pairs:
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
            torch.testing.assert_close(y, expected.detach(), rtol=1e-3, atol=1e-3)
