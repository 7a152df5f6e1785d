"""The passes of a FusedMBConv on the CPU's kernels against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiers
from activated import SPREAD
from allocations import poisoned
from effnet_fast import reference
from effnet_fast.ops import fused_mbconv
from effnet_fast.ops.call import Norm, call_of
from effnet_fast.ops.fused_mbconv import DenseLayers
from effnet_fast.ops.stem_conv_bn_silu import output_shape
from effnet_fast.reference.stem_conv_bn_silu import compose
from parity import (
    BF16,
    DTYPES,
    FP32,
    Dtypes,
    Results,
    assert_parity,
    assert_same,
    channels_last,
    matrix,
    nchw_copy,
    random_like,
)

FIELDS = ("weight", "bn_weight", "bn_bias", "mean", "var")
EPS, MOMENTUM = (1e-3, 1e-5), (0.1, 0.3)
TRAINING = {"train": (True, True), "eval": (False, False), "mixed": (False, True)}


@dataclass(frozen=True)
class Case:
    """out is 0 for a block without a projection; padding as (left, right, top, bottom)."""

    name: str
    n: int
    c: int
    width: int  # channels that come out of the dense convolution
    out: int
    h: int
    w: int
    k: int = 3
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    residual: bool = False


CASES = [
    pytest.param(Case("own_product", 3, 16, 64, 16, 9, 12, residual=True), id="own_product"),
    pytest.param(Case("library", 3, 72, 144, 72, 9, 12, residual=True), id="library"),
    pytest.param(Case("odd_channels", 2, 67, 53, 19, 7, 5), id="odd_channels"),
    pytest.param(Case("stride_2", 2, 65, 70, 24, 11, 9, stride=2), id="stride_2"),
    pytest.param(
        Case("same", 2, 66, 66, 21, 12, 8, stride=2, padding=(0, 1, 0, 1)), id="same"
    ),
    pytest.param(
        Case("same_k5", 2, 9, 33, 12, 10, 8, k=5, stride=2, padding=(1, 2, 1, 2)), id="same_k5"
    ),
    pytest.param(Case("h_gt_part", 2, 64, 40, 64, 31, 33, residual=True), id="h_gt_part"),
    pytest.param(Case("lone", 3, 24, 24, 0, 9, 12, residual=True), id="lone"),
    pytest.param(Case("lone_library", 2, 65, 45, 0, 7, 9, stride=2), id="lone_library"),
    pytest.param(Case("batch_0", 0, 64, 48, 16, 7, 9), id="batch_0"),
]  # fmt: skip
BY_NAME = {param.values[0].name: param.values[0] for param in CASES}


@dataclass(frozen=True)
class BlockCall:
    """One call; tensors by "x", "row_scale", "dense.FIELD" and "project.FIELD"."""

    case: Case
    tensors: dict[str, Tensor | None]
    training: tuple[bool, bool]
    activation: str = "silu"
    memory: str = "fast"

    @property
    def differentiable(self) -> tuple[str, ...]:
        ends = (*FIELDS[:3], "x")
        return tuple(k for k, t in self.tensors.items() if t is not None and k.endswith(ends))

    def with_tensors(self, **tensors: Tensor | None) -> BlockCall:
        """Replaces tensors; "__" stands for the dot."""
        new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        return replace(self, tensors=self.tensors | new)


def block_call(
    case: Case,
    dtypes: Dtypes = FP32,
    training: tuple[bool, bool] = (True, True),
    *,
    dropped: bool = False,
    **options: Any,
) -> BlockCall:
    """Random values; every z has a variance of about 1."""
    generator = torch.Generator().manual_seed(0)
    spread = SPREAD.get(options.get("activation", "silu"), 1.0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = channels_last(normal(case.n, case.c, case.h, case.w).to(dtypes.x))
    tensors: dict[str, Tensor | None] = {"x": x, "row_scale": None}
    shapes = {"dense": (case.width, case.c, case.k, case.k)}
    if case.out:
        shapes["project"] = (case.out, case.width, 1, 1)
    for name, shape in shapes.items():
        positive = torch.rand(2, shape[0], generator=generator) + 0.5
        weight = normal(*shape) / (shape[1] * shape[2] ** 2) ** 0.5
        scale = positive[0] * (spread if name == "dense" else 1.0)
        vectors = (weight, scale, 0.3 * normal(shape[0]), 0.3 * normal(shape[0]), positive[1])
        for field, tensor in zip(FIELDS, vectors, strict=True):
            tensors[f"{name}.{field}"] = tensor.to(dtypes.parameters)
    if dropped:
        tensors["row_scale"] = torch.full((case.n,), 1.25)
        tensors["row_scale"][:1] = 0.0
    return BlockCall(case, tensors, training, **options)


def _by_reference(call: BlockCall, t: dict[str, Any]) -> Tensor:
    case, modes = call.case, call.training
    layer = [t[f"dense.{field}"] for field in FIELDS]
    stride = (case.stride, case.stride)
    y = compose(t["x"], layer, stride, case.padding, modes[0], MOMENTUM[0], EPS[0], call.activation)
    if case.out:
        y = reference.pointwise_bn_act(
            y, *(t[f"project.{field}"] for field in FIELDS),
            act=None, training=modes[1], momentum=MOMENTUM[1], eps=EPS[1],
        )  # fmt: skip
    if t["row_scale"] is not None:
        y = y * t["row_scale"].to(y.dtype).reshape(-1, 1, 1, 1)
    return y + t["x"] if case.residual else y


def _by_op(call: BlockCall, t: dict[str, Any], backend: str) -> Tensor:
    case = call.case
    parts = ("dense", "project") if case.out else ("dense",)
    layers = [tuple(t[f"{part}.{field}"] for field in FIELDS) for part in parts]
    norms = tuple(map(Norm, call.training, MOMENTUM, EPS))[: len(parts)]
    tensors = (t["x"], *(tensor for layer in layers for tensor in layer))
    described = call_of(
        norms, tensors, backend, (case.stride, case.stride), case.padding, case.residual,
        call.memory, call.activation,
    )  # fmt: skip
    project = layers[1] if case.out else None
    return fused_mbconv.apply(t["x"], t["row_scale"], DenseLayers(layers[0], project), described)


def run(
    call: BlockCall,
    backend: str | None = None,
    *,
    double: bool = False,
    wanted: tuple[str, ...] | None = None,
    grad_y: Tensor | None = None,
) -> Results:
    """Output, gradients and running statistics; of the reference without a backend."""
    wanted = call.differentiable if wanted is None else wanted
    tensors: dict[str, Any] = {}
    for name, tensor in call.tensors.items():
        if tensor is not None:
            tensor = tensor.detach().double() if double else tensor.detach()
            tensor = tensor.clone() if name.endswith(FIELDS[3:]) else tensor
            tensor.requires_grad_(name in wanted)
        tensors[name] = tensor
    with poisoned(backend is not None), torch.set_grad_enabled(bool(wanted)):
        y = _by_op(call, tensors, backend) if backend else _by_reference(call, tensors)
        results = {"y": y.detach()}
        if wanted:
            grad_y = random_like(y) if grad_y is None else grad_y.to(y.dtype)
            grads = torch.autograd.grad(y, [tensors[name] for name in wanted], grad_y)
            results |= {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}
    statistics = {k: t for k, t in tensors.items() if k.endswith(FIELDS[3:]) and t is not None}
    return results | statistics


def check(call: BlockCall, backend: str = "cpu", **options: Any) -> Results:
    """Holds one call to the rule of parity; returns what the backend gave."""
    x = call.tensors["x"]
    assert x is not None
    actual = run(call, backend, **options)
    assert_parity(actual, run(call, **options), run(call, double=True, **options), x.dtype)
    return actual


@matrix(CASES, DTYPES, tiers.PRODUCT_SETS)
@pytest.mark.parametrize("mode", TRAINING)
def test_matches_reference(mode: str, case: Case, dtypes: Dtypes, backend: str) -> None:
    call = block_call(case, dtypes, TRAINING[mode], dropped=True)
    actual = check(call, backend)
    if case.out or call.training[0]:
        assert_same(run(call, backend, wanted=()), actual)
    else:  # without gradients convolution, norm and activation are one kernel
        check(call, backend, wanted=())


@pytest.mark.parametrize("name", ["own_product", "library", "lone", "lone_library"])
def test_inference(name: str) -> None:
    for dtypes in (FP32, BF16):
        check(block_call(BY_NAME[name], dtypes, (False, False), dropped=True), wanted=())


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("name", ["library", "lone"])
def test_activations(name: str, activation: str) -> None:
    for dtypes in (FP32, BF16):
        check(block_call(BY_NAME[name], dtypes, activation=activation))


@pytest.mark.parametrize("name", ["own_product", "library", "same", "lone"])
def test_what_is_wanted_changes_no_bits(name: str) -> None:
    call = block_call(BY_NAME[name])
    full = run(call, "cpu")
    for wanted in call.differentiable:
        assert_same(run(call, "cpu", wanted=(wanted,)), full)


@pytest.mark.parametrize("name", ["own_product", "library"])
def test_lean_saves_less_and_gives_the_same_bits(name: str) -> None:
    sizes = []
    for memory in ("fast", "lean"):
        call, saved = block_call(BY_NAME[name], memory=memory), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            results = run(call, "cpu")
        sizes.append((sum(saved), results))
    case = BY_NAME[name]
    assert sizes[0][0] - sizes[1][0] == case.n * case.width * case.h * case.w
    assert_same(sizes[1][1], sizes[0][1])


@pytest.mark.parametrize("name", ["own_product", "library", "lone"])
@pytest.mark.parametrize("absent", ["affine", "statistics", "one_bias"])
def test_absent_vectors(name: str, absent: str) -> None:
    call = block_call(BY_NAME[name])
    fields = {"affine": FIELDS[1:3], "statistics": FIELDS[3:], "one_bias": FIELDS[2:3]}[absent]
    parts = ("dense", "project") if call.case.out else ("dense",)
    parts = parts[:1] if absent == "one_bias" else parts
    check(call.with_tensors(**{f"{p}__{field}": None for p in parts for field in fields}))


@pytest.mark.parametrize("mode", TRAINING)
@pytest.mark.parametrize("name", ["own_product", "library", "same", "lone"])
def test_layouts_are_those_of_stock(name: str, mode: str) -> None:
    """Of gradients and of the kept input, whatever the layout of x, the weight and grad_y."""
    call = block_call(BY_NAME[name], training=TRAINING[mode])
    x, weight = call.tensors["x"], call.tensors["dense.weight"]
    assert x is not None
    assert weight is not None
    grad_y = torch.randn_like(run(call, wanted=())["y"])
    expected = run(call, "cpu", grad_y=grad_y)
    for images in (x, nchw_copy(x)):
        for weights in (weight, channels_last(weight)):
            laid = call.with_tensors(x=images, dense__weight=weights)
            for grad in (grad_y, nchw_copy(grad_y)):
                actual, stock = run(laid, "cpu", grad_y=grad), run(laid, grad_y=grad)
                assert_same(actual, expected)
                if grad.stride() != stock["y"].stride():
                    continue
                for key in ("grad x", "grad dense.weight"):
                    assert actual[key].stride() == stock[key].stride(), key
    with torch.autograd.graph.saved_tensors_hooks(nchw_copy, lambda t: t):
        assert_same(run(call, "cpu", grad_y=grad_y), expected)


@pytest.mark.parametrize("name", ["own_product", "library", "lone", "lone_library"])
@pytest.mark.parametrize(("dtypes", "mean"), [(FP32, 1000.0), (BF16, 8.0)], ids=str)
def test_statistics_far_from_zero(name: str, dtypes: Dtypes, mean: float) -> None:
    call = block_call(replace(BY_NAME[name], padding=(0, 0, 0, 0), residual=False), dtypes)
    x, weight = call.tensors["x"], call.tensors["dense.weight"]
    assert x is not None
    assert weight is not None
    weight = weight.abs() + 0.1
    weight /= weight.sum((1, 2, 3), keepdim=True)
    x = (x * weight[0].numel() ** 0.5 + mean).to(dtypes.x)
    actual = check(call.with_tensors(x=x, dense__weight=weight), wanted=())
    assert actual["dense.mean"].mean() > 0.09 * mean


@pytest.mark.parametrize("name", ["library", "lone_library"])
def test_nan_in_x(name: str) -> None:
    call = block_call(BY_NAME[name])
    x = call.tensors["x"]
    assert x is not None
    spoiled = x.clone()
    spoiled[1, 1, 2, 2] = float("nan")
    check(call.with_tensors(x=spoiled))


@pytest.mark.parametrize("name", ["library", "lone"])
@pytest.mark.parametrize("mode", TRAINING)
def test_gradients_of_gradients(name: str, mode: str) -> None:
    """A penalty on the gradients is that of the reference, and moves no statistics again."""
    call = block_call(BY_NAME[name], training=TRAINING[mode], dropped=True)
    results = []
    for backend in ("cpu", None):
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        leaves = [tensors[k].requires_grad_() for k in call.differentiable]
        y = _by_op(call, tensors, backend) if backend else _by_reference(call, tensors)
        moved = tensors["dense.mean"].clone()
        first = torch.autograd.grad(y.square().mean(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert torch.equal(tensors["dense.mean"], moved)
        results.append((*first, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_backward_twice() -> None:
    call = block_call(BY_NAME["library"])
    leaf = call.tensors["dense.weight"].requires_grad_()
    y = _by_op(call, dict(call.tensors), "cpu")
    first, second = (
        torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_one_value_per_channel() -> None:
    call = block_call(Case("one_value", 1, 65, 40, 16, 3, 3, padding=(0, 0, 0, 0)))
    for wanted in (None, ()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            run(call, "cpu", wanted=wanted)


def test_shapes_of_the_cases() -> None:
    """What adds its input keeps its shape."""
    for case in BY_NAME.values():
        x, weight = torch.empty(1, case.c, case.h, case.w), torch.empty(1, 1, case.k, case.k)
        size = output_shape(x, weight, (case.stride, case.stride), case.padding)[2:]
        kept = size == (case.h, case.w) and case.c == (case.out or case.width)
        assert kept or not case.residual, case.name
