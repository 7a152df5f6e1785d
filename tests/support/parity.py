"""Runs an op, its reference in the tested dtype (stock) and in float64 (exact); compares them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import activated
import tiers
import tolerances
from allocations import poisoned
from cases import (
    DWCONV_CASES,
    HEAD_CASES,
    POINTWISE_CASES,
    SQUEEZE_EXCITE_CASES,
    STEM_CASES,
    DwconvCase,
    PointwiseCase,
    SqueezeExciteCase,
    StemCase,
    find,
)
from effnet_fast import ops, reference
from effnet_fast.backends import can_run, native

RUNNING = ("running_mean", "running_var")
VECTOR = 128  # numbers that the smallest vector has over the draws of `check_over_draws`
Results = dict[str, Tensor]
assert_parity = functools.partial(tolerances.assert_parity, strides=True)


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    reason = can_run(backend, "dwconv_bn_silu")
    skips = [pytest.mark.skip(reason=reason)] if reason else []
    return [*skips, *([pytest.mark.gpu] if backend == "cuda" else [])]


# The CUDA kernels: run on the CPU, and on a GPU. Results come back to the CPU.
CUDA_NAMES = ("simt", "cuda")
_NO_SIMT = native.simt_unavailable_reason()
NEEDS_SIMT = pytest.mark.skipif(bool(_NO_SIMT), reason=_NO_SIMT or "")


@dataclass(frozen=True)
class Dtypes:
    """Dtype of x, and of the parameters."""

    x: torch.dtype
    parameters: torch.dtype

    def __str__(self) -> str:
        x, own = (str(d).removeprefix("torch.") for d in (self.x, self.parameters))
        return x if x == own else f"{x}_with_{own}"


FP32 = Dtypes(torch.float32, torch.float32)
BF16 = Dtypes(torch.bfloat16, torch.bfloat16)
FP16 = Dtypes(torch.float16, torch.float16)
DTYPES = (FP32, BF16, Dtypes(torch.bfloat16, torch.float32))
CUDA_DTYPES = (*DTYPES, FP16, Dtypes(torch.float16, torch.float32))
BACKENDS = [
    pytest.param(name, marks=[*_marks(name), *tiers.marks(name, FP32)])
    for name in tiers.INSTRUCTION_SETS
]
CUDA_BACKENDS = [
    pytest.param(name, marks=[*_marks(name), *tiers.marks(name, FP32)]) for name in CUDA_NAMES
]


def runs(
    dtypes: Sequence[Dtypes] = (FP32, BF16, FP16),
    names: Sequence[str] = (*tiers.INSTRUCTION_SETS, *CUDA_NAMES),
) -> pytest.MarkDecorator:
    """Parameters `dtypes` and `backend`: all that run here, fp16 on the CUDA kernels alone."""
    rows = [
        pytest.param(
            each, name, marks=[*_marks(name), *tiers.marks(name, each)], id=f"{each}-{name}"
        )
        for each in dtypes
        for name in names
        if _takes(name, each)
    ]
    return pytest.mark.parametrize(("dtypes", "backend"), rows)


def matrix(
    cases: Iterable[Any],
    dtypes: Sequence[Dtypes] = CUDA_DTYPES,
    names: Sequence[str] = (*tiers.INSTRUCTION_SETS, *CUDA_NAMES),
    takes: Callable[[str, Any], bool] = lambda name, case: True,
) -> pytest.MarkDecorator:
    """Parameters `case`, `dtypes` and `backend`, each in its tier.

    Args:
        cases: pytest's parameters, as the lists of cases.py.
        takes: whether a backend has a kernel for a case.
    """
    rows = [
        pytest.param(
            case, each, name,
            marks=[*_marks(name), *tiers.marks(name, each, case)],
            id=f"{case.name}-{each}-{name}",
        )
        for case in (param.values[0] for param in cases)
        for each in dtypes
        for name in names
        if _takes(name, each) and takes(name, case)
    ]  # fmt: skip
    return pytest.mark.parametrize(("case", "dtypes", "backend"), rows)


def threaded(cases: Iterable[Any], six: Sequence[str]) -> pytest.MarkDecorator:
    """Parameters `case`, `dtypes` and `backend` of tests with other numbers of threads.

    Shape alone splits work: `make test` has six shapes on the best set, `make test-all` the rest.
    """
    rows = []
    for case in (param.values[0] for param in cases):
        names = ("cpu",) if tiers.network_of(case) else ("cpu", *tiers.AVAILABLE[:-1])
        for each, name in itertools.product((FP32, BF16), names):
            tested = case.name in six and name == "cpu"
            marks = [pytest.mark.slow if tested else pytest.mark.exhaustive]
            rows.append(
                pytest.param(case, each, name, marks=marks, id=f"{case.name}-{each}-{name}")
            )
    return pytest.mark.parametrize(("case", "dtypes", "backend"), rows)


def _takes(name: str, dtypes: Dtypes) -> bool:
    if name == "cpu:amx":  # nothing but products of bf16 differs from avx512_bf16
        return dtypes.x is torch.bfloat16
    return name in CUDA_NAMES or dtypes.x is not torch.float16


MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: its name.
        tensors: its tensor arguments by name; they are left as they are by `run`.
        options: its other keyword arguments, without `backend`.
    """

    op: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def with_tensors(self, **tensors: Tensor | None) -> Call:
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Call:
        return replace(self, options=self.options | options)

    def activated(self, **kinds: str) -> Call:
        """With another activation or gate, whose bounds many values meet."""
        tensors, options = activated.activated(self.tensors, self.options, kinds)
        return replace(self, tensors=tensors, options=options)

    @property
    def x(self) -> Tensor:
        x = self.tensors["x"]
        assert x is not None
        return x

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors that have a gradient."""
        return tuple(k for k, v in self.tensors.items() if v is not None and k not in RUNNING)


def run(
    call: Call,
    backend: str | None = None,
    *,
    double: bool = False,
    wanted: Sequence[str] | None = None,
    grad_y: Tensor | None = None,
) -> Results:
    """Output, gradients and running statistics of one call, under poisoned allocations.

    Args:
        backend: None for the reference, whose allocations are as they are.
        double: compute in float64.
        wanted: tensors whose gradients are asked for, None for all; () runs without autograd.
        grad_y: gradient of the output; None for a fixed random one, channels_last.

    Returns:
        "y", "grad NAME", "running_mean" and "running_var".
    """
    wanted = call.differentiable if wanted is None else wanted
    device = device_of(backend, call.x)
    tensors = {}
    for name, tensor in call.tensors.items():
        if tensor is not None:
            tensor = tensor.double() if double else on_device(tensor.detach(), device)
            tensor = tensor.clone() if name in RUNNING else tensor
            tensors[name] = tensor.requires_grad_(name in wanted)
        else:
            tensors[name] = None
    function = getattr(reference if backend is None else ops, call.op)
    options = call.options if backend is None else call.options | {"backend": backend}
    with poisoned(backend not in (None, "cuda")):
        with torch.set_grad_enabled(bool(wanted)):
            y = function(**tensors, **options)
        results = {"y": y.detach()}
        if wanted:
            grad_y = random_like(y) if grad_y is None else on_device(grad_y, device).to(y.dtype)
            grads = torch.autograd.grad(y, [tensors[name] for name in wanted], grad_y)
            results |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    results |= {k: v for k, v in tensors.items() if k in RUNNING and v is not None}
    return {name: on_device(tensor, call.x.device) for name, tensor in results.items()}


def device_of(backend: str | None, x: Tensor) -> torch.device:
    """Where a backend computes on x: a call on the CPU is taken to the GPU for "cuda"."""
    takes = backend == "cuda" and torch.cuda.is_available()
    return torch.device("cuda") if takes else x.device


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with the strides and the offset against 16 bytes that it has."""
    if tensor.device.type == device.type:
        return tensor
    memory = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=device).copy_(
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    )
    alike = torch.empty(0, dtype=tensor.dtype, device=device).set_(memory.untyped_storage())
    return alike.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def random_like(y: Tensor) -> Tensor:
    """A fixed normal tensor like y (rounded to bf16 first), images in channels_last."""
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return channels_last(values) if y.dim() == 4 else values


def channels_last(x: Tensor) -> Tensor:
    """A copy of x with the strides of channels_last, also where sizes of 1 leave a choice."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def nchw_copy(x: Tensor) -> Tensor:
    """A copy in the order of its dimensions, as a hook on saved tensors may make it."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def check(
    call: Call, backend: str, *, wanted: Sequence[str] | None = None, grad_y: Tensor | None = None
) -> Results:
    """Holds one call to the rule of parity; returns what the backend gave."""
    actual = run(call, backend, wanted=wanted, grad_y=grad_y)
    stock = run(call, wanted=wanted, grad_y=grad_y)
    exact = run(call, double=True, wanted=wanted, grad_y=grad_y)
    assert_parity(actual, stock, exact, call.x.dtype)
    return actual


def check_over_draws(call: Call, backend: str, numbers: int) -> None:
    """Holds a call to the rule of parity, its results over several random images stacked.

    Of a vector with few independent `numbers`, stock's largest error is chance.
    """
    generator = torch.Generator().manual_seed(2)
    rows: tuple[list[Results], ...] = ([], [], [])
    for _ in range(-(-VECTOR // numbers)):
        x = torch.randn(call.x.shape, generator=generator).to(call.x.dtype)
        drawn = call.with_tensors(x=channels_last(x))
        for row, results in zip(
            rows, (run(drawn, backend), run(drawn), run(drawn, double=True)), strict=True
        ):
            row.append(results)
    stacked = ({name: torch.stack([r[name] for r in row]) for name in row[0]} for row in rows)
    assert_parity(*stacked, call.x.dtype)


def assert_same(actual: Results, expected: Results) -> None:
    """Asserts that the results which both have are bitwise equal, NaN included."""
    names = actual.keys() & expected.keys()
    assert names
    for name in names:
        a, b = actual[name], expected[name]
        assert a.dtype == b.dtype, name
        assert torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)), name
        assert torch.equal(a.isnan(), b.isnan()), name


def _bn(channels: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "bn_weight": (torch.rand(channels, generator=generator) + 0.5).to(dtype),
        "bn_bias": (0.3 * torch.randn(channels, generator=generator)).to(dtype),
        "running_mean": (0.3 * torch.randn(channels, generator=generator)).to(dtype),
        "running_var": (torch.rand(channels, generator=generator) + 0.5).to(dtype),
    }


def _image(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return channels_last(torch.randn(shape, generator=generator).to(dtype))


def dwconv_call(case: DwconvCase, dtypes: Dtypes = FP32, training: bool = False) -> Call:
    """dwconv_bn_silu on random values; z has a variance of about 1.

    No weight is near 0: in training a channel of few small ones would have all of the error.
    """
    generator = torch.Generator().manual_seed(0)
    x = _image((case.n, case.c, case.h, case.w), dtypes.x, generator)
    sizes = (case.c, 1, case.k, case.k)
    weight = torch.randn(sizes, generator=generator).sign() / case.k
    weight *= 0.5 + torch.rand(sizes, generator=generator)
    bn = _bn(case.c, dtypes.parameters, generator)
    options = {"stride": case.stride, "padding": case.padding, "training": training}
    return Call("dwconv_bn_silu", {"x": x, "weight": weight.to(dtypes.parameters), **bn}, options)


def squeeze_excite_call(case: SqueezeExciteCase, dtypes: Dtypes = FP32) -> Call:
    """squeeze_excite on random values of mean 0.5; the gate varies between about 0.2 and 0.8."""
    generator = torch.Generator().manual_seed(0)
    x = _image((case.n, case.c, case.h, case.w), torch.float32, generator) + 0.5
    parameters = {
        "reduce_weight": torch.randn(case.r, case.c, 1, 1, generator=generator) / case.c**0.5,
        "reduce_bias": 0.3 * torch.randn(case.r, generator=generator),
        "expand_weight": torch.randn(case.c, case.r, 1, 1, generator=generator) / case.r**0.5,
        "expand_bias": 0.3 * torch.randn(case.c, generator=generator),
    }
    cast = {name: value.to(dtypes.parameters) for name, value in parameters.items()}
    return Call("squeeze_excite", {"x": x.to(dtypes.x), **cast})


def pointwise_call(case: PointwiseCase, dtypes: Dtypes = FP32, training: bool = False) -> Call:
    """pointwise_bn_act on random values; z has a variance of about 1."""
    generator = torch.Generator().manual_seed(0)
    x = _image((case.n, case.c, case.h, case.w), dtypes.x, generator)
    weight = torch.randn(case.out, case.c, 1, 1, generator=generator) / case.c**0.5
    bn = _bn(case.out, dtypes.parameters, generator)
    gate = torch.rand(case.n, case.c, 1, 1, generator=generator).to(dtypes.x)
    residual = _image((case.n, case.out, case.h, case.w), dtypes.x, generator)
    tensors = {"x": x, "weight": weight.to(dtypes.parameters), **bn}
    tensors |= {"gate": gate if case.gate else None}
    tensors |= {"residual": residual if case.residual else None}
    return Call("pointwise_bn_act", tensors, {"act": case.act, "training": training})


def head_call(case: PointwiseCase, dtypes: Dtypes = FP32, training: bool = False) -> Call:
    """pointwise_bn_silu_pool on random values, as `pointwise_call`."""
    given = pointwise_call(case, dtypes).tensors
    given = {k: v for k, v in given.items() if k not in ("gate", "residual")}
    return Call("pointwise_bn_silu_pool", given, {"training": training})


def stem_call(case: StemCase, dtypes: Dtypes = FP32, training: bool = False) -> Call:
    """stem_conv_bn_silu on random values; z has a variance of about 1."""
    generator = torch.Generator().manual_seed(0)
    x = _image((case.n, case.c, case.h, case.w), dtypes.x, generator)
    weight = torch.randn(case.out, case.c, case.k, case.k, generator=generator)
    weight = (weight / (case.k * case.c**0.5)).to(dtypes.parameters)
    tensors = {"x": x, "weight": weight, **_bn(case.out, dtypes.parameters, generator)}
    options = {"stride": case.stride, "padding": case.padding, "training": training}
    return Call("stem_conv_bn_silu", tensors, options)


SAMPLES = (
    "dwconv_eval",
    "dwconv_train",
    "squeeze_excite",
    "stem_eval",
    "stem_train",
    "pointwise_eval",
    "head_train",
)


def sample(name: str, dtypes: Dtypes = FP32) -> Call:
    """A small call of each op and mode that has a kernel, for what does not depend on shapes."""
    if name == "squeeze_excite":
        return squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "c_odd"), dtypes)
    if name == "pointwise_eval":
        return pointwise_call(find(POINTWISE_CASES, "gate_residual_no_act"), dtypes)
    if name.startswith("head"):
        return head_call(find(HEAD_CASES, "c_odd"), dtypes, training=name == "head_train")
    if name.startswith("stem"):
        return stem_call(find(STEM_CASES, "out_odd"), dtypes, training=name == "stem_train")
    case = find(DWCONV_CASES, "c_odd")
    return dwconv_call(case, dtypes, training=name == "dwconv_train")


def with_gradients(call: Call) -> tuple[str, ...] | None:
    """What `run` is to differentiate where a kernel is wanted; () for an inference op."""
    return () if call.op == "pointwise_bn_act" else None
