"""The ops under autograd's further modes, autocast, torch.func and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from effnet_fast import ops, reference, use_backend
from parity import (
    SAMPLES,
    Call,
    assert_parity,
    assert_same,
    random_like,
    run,
    sample,
    with_gradients,
)
from second_derivatives import second_derivatives

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because"),
]
ANY_SAMPLE = pytest.mark.parametrize("name", SAMPLES)
DIFFERENTIABLE = pytest.mark.parametrize("name", [n for n in SAMPLES if n != "pointwise_eval"])


def function_of_x(call: Call, backend: str | None) -> Callable[[Tensor], Tensor]:
    """The call as a function of x alone; None is the reference."""
    options = call.options if backend is None else call.options | {"backend": backend}
    function = getattr(reference if backend is None else ops, call.op)
    return lambda x: function(**{**call.tensors, "x": x}, **options)


@pytest.mark.parametrize("penalty", [False, True])
@DIFFERENTIABLE
def test_second_derivative(name: str, penalty: bool) -> None:
    """As the reference's, also where the fused op was the one that ran forward."""
    call = sample(name)
    actual, stock = (second_derivatives(call, b, penalty) for b in ("cpu", "reference"))
    double = call.with_tensors(**{k: v.double() for k, v in call.tensors.items()})
    exact = second_derivatives(double, "reference", penalty)
    assert all(stock[key].abs().sum() > 0 for key in stock)
    assert_parity(actual, stock, exact, call.x.dtype)


@DIFFERENTIABLE
def test_second_derivative_where_grad_y_is_a_constant(name: str) -> None:
    """torch's once_differentiable would let this pass with gradients that are constants."""
    call = sample(name)
    x = call.x.clone().requires_grad_()
    y = function_of_x(call, "cpu")(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert grad.requires_grad
    assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


def test_second_derivative_of_inputs_that_depend_on_each_other() -> None:
    call = sample("squeeze_excite")
    results = []
    for backend in ("cpu", "reference"):
        x = call.x.clone().requires_grad_()
        bias = x.mean((0, 2, 3)) ** 2
        tensors = call.tensors | {"x": x, "expand_bias": bias}
        y = ops.squeeze_excite(**tensors, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@DIFFERENTIABLE
def test_backward_twice(name: str) -> None:
    call = sample(name)
    x = call.x.clone().requires_grad_()
    y = function_of_x(call, "cpu")(x)
    first, second = (
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@DIFFERENTIABLE
def test_editing_a_saved_tensor_is_noticed(name: str) -> None:
    call = sample(name)
    x = call.x.clone().requires_grad_()
    y = function_of_x(call, "cpu")(x)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.slow
def test_later_updates_of_running_statistics_do_not_reach_backward() -> None:
    """In eval mode backward uses the statistics that forward saw."""
    call = sample("dwconv_eval")
    mean = call.tensors["running_mean"].clone()
    x = call.x.clone().requires_grad_()
    y = function_of_x(call.with_tensors(running_mean=mean), "cpu")(x)
    mean += 1
    (grad,) = torch.autograd.grad(y, x, random_like(y))
    assert torch.equal(grad, run(call, "cpu", wanted=["x"])["grad x"])


@ANY_SAMPLE
def test_inference_mode(name: str) -> None:
    call = sample(name)
    with torch.inference_mode():
        tensors = {k: v.clone() for k, v in call.tensors.items()}
        y = getattr(ops, call.op)(**tensors, **call.options, backend="cpu")
    assert y.is_inference()
    assert torch.equal(y, run(call, "cpu", wanted=())["y"])


def stock_under_autocast(call: Call) -> Tensor:
    """What nn.Conv2d, BatchNorm2d and the like give: the functions that those modules call."""
    t = call.tensors
    x = t["x"]
    if call.op == "squeeze_excite":
        gate = F.conv2d(F.adaptive_avg_pool2d(x, 1), t["reduce_weight"], t["reduce_bias"])
        gate = F.conv2d(F.silu(gate), t["expand_weight"], t["expand_bias"]).sigmoid()
        return gate * x
    if call.op == "pointwise_bn_act":
        z = F.conv2d(x * t["gate"], t["weight"])
    elif call.op == "pointwise_bn_silu_pool":
        z = F.conv2d(x, t["weight"])
    elif call.op == "stem_conv_bn_silu":
        z = F.conv2d(x, t["weight"], stride=2, padding=1)
    else:
        z = F.conv2d(x, t["weight"], padding=2, groups=x.shape[1])
    bn = (t["running_mean"].clone(), t["running_var"].clone(), t["bn_weight"], t["bn_bias"])
    y = F.batch_norm(z, *bn, training=call.options["training"])
    if call.op == "pointwise_bn_act":
        y += t["residual"]  # in place, as MBConv adds it
        return y
    y = F.silu(y)
    return F.adaptive_avg_pool2d(y, 1).flatten(1) if call.op == "pointwise_bn_silu_pool" else y


@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
@ANY_SAMPLE
def test_autocast(name: str, backend: str) -> None:
    """fp32 tensors give what stock gives, in dtype and in value, and fp32 gradients."""
    call = sample(name)
    wanted = with_gradients(call)
    exact = run(call, double=True, wanted=())
    with torch.autocast("cpu", torch.bfloat16):
        stock = stock_under_autocast(call)
        actual = run(call, backend, wanted=wanted)
    results = ({"y": actual["y"]}, {"y": stock.detach()}, {"y": exact["y"]})
    assert_parity(*results, torch.bfloat16)
    for key, tensor in actual.items():
        if key.startswith("grad "):
            assert tensor.dtype == torch.float32, key


@ANY_SAMPLE
def test_autocast_leaves_float64_alone(name: str) -> None:
    call = sample(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = function_of_x(call, "auto")(call.x.double())
    assert y.dtype == torch.float64


@pytest.mark.slow
@ANY_SAMPLE
def test_torch_func_goes_through_the_reference(name: str) -> None:
    call = sample(name)
    if call.options.get("training"):  # vmap refuses in-place updates of what is not batched
        call = call.with_tensors(running_mean=None, running_var=None)
    ours, stock = function_of_x(call, "auto"), function_of_x(call, None)
    batch = torch.stack([call.x, call.x.flip(0)])
    tangent = torch.ones_like(call.x)
    for transform in (
        lambda f: torch.func.vmap(f)(batch),
        lambda f: torch.func.grad(lambda x: f(x).sum())(call.x),
        lambda f: torch.func.jvp(f, (call.x,), (tangent,))[1],
        lambda f: torch.func.vjp(f, call.x)[1](torch.ones_like(f(call.x)))[0],
    ):
        torch.testing.assert_close(transform(ours), transform(stock), rtol=0, atol=0)


@ANY_SAMPLE
def test_named_backend_refuses_torch_func(name: str) -> None:
    call = sample(name)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms .*reference"):
        torch.func.vmap(function_of_x(call, "cpu"))(call.x[None])


@ANY_SAMPLE
def test_forward_mode_goes_through_the_reference(name: str) -> None:
    call = sample(name)
    tangents = []
    for backend in ("auto", None):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(call.x, torch.ones_like(call.x))
            y = function_of_x(call, backend)(x)
            tangents.append(forward_ad.unpack_dual(y).tangent.clone())
    assert torch.equal(*tangents)


@pytest.mark.slow
@ANY_SAMPLE
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled(name: str) -> None:
    """By value: a wrong fake or a wrong mutation would show as other numbers."""
    call = sample(name)
    wanted = with_gradients(call)
    torch._dynamo.reset()
    function = torch.compile(getattr(ops, call.op), backend="aot_eager", fullgraph=True)
    tensors = {k: v.clone().requires_grad_(wanted is None) for k, v in call.tensors.items()}
    for key in ("running_mean", "running_var"):
        if key in tensors:
            tensors[key] = tensors[key].detach()
    y = function(**tensors, **call.options)
    results = {"y": y.detach()}
    if wanted is None:
        leaves = [tensors[k] for k in call.differentiable]
        grads = torch.autograd.grad(y, leaves, random_like(y))
        results |= {f"grad {k}": g for k, g in zip(call.differentiable, grads, strict=True)}
    if "running_mean" in tensors:
        results |= {k: tensors[k] for k in ("running_mean", "running_var")}
    expected = run(call, "auto", wanted=wanted)
    assert results.keys() == expected.keys()
    assert_same(results, expected)


def operators(call: Call, function: Callable[..., Tensor], **options: bool) -> list[set[str]]:
    """What torch.compile captures of the call, per graph."""
    graphs: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=record, **options)(**call.tensors, **call.options)
    return graphs


@pytest.mark.slow
@ANY_SAMPLE
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_calls_are_fused(name: str) -> None:
    """One graph, with our op in it unless torch.func is at work inside."""
    call = sample(name)
    (graph,) = operators(call, getattr(ops, call.op), fullgraph=True)
    assert any(target.startswith("effnet_fast.") for target in graph)

    def under_vmap(x: Tensor, **rest: object) -> Tensor:
        function = getattr(ops, call.op)
        return torch.func.vmap(lambda x: function(x=x, **rest))(x[None])[0]

    if not call.options.get("training"):
        (graph,) = operators(call, under_vmap, fullgraph=True)
        assert not any(target.startswith("effnet_fast.") for target in graph)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_compiling_an_op_warns_of_nothing() -> None:
    """A functools.cache on what is asked while tracing would."""
    call = sample("dwconv_eval")
    assert operators(call, ops.dwconv_bn_silu, fullgraph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_call_follows_the_surrounding_backend() -> None:
    """A choice made after compilation counts, in its own thread alone."""
    call = sample("dwconv_eval").with_tensors(x=sample("dwconv_eval").x.contiguous())
    torch._dynamo.reset()
    function = torch.compile(ops.dwconv_bn_silu, backend="eager")
    expected = function(**call.tensors, **call.options)  # NCHW: the reference
    for _ in range(2):
        with use_backend("cpu"), pytest.raises(RuntimeError, match="takes channels_last"):
            function(**call.tensors, **call.options)
        assert torch.equal(function(**call.tensors, **call.options), expected)
    with use_backend("cpu"):
        thread = ThreadPoolExecutor(1).submit(function, **call.tensors, **call.options)
        assert torch.equal(thread.result(), expected)


def test_running_statistics_move_in_a_traced_graph() -> None:
    """make_fx records the update, and fake tensors are not written to."""
    call = sample("dwconv_train")
    names = ("running_mean", "running_var")

    def step(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        tensors = call.tensors | {"x": x, "running_mean": mean, "running_var": var}
        return ops.dwconv_bn_silu(**tensors, **call.options)

    def fresh() -> list[Tensor]:
        return [call.tensors[name].clone() for name in names]

    graph = make_fx(step)(call.x, *fresh())
    eager, traced = fresh(), fresh()
    step(call.x, *eager)
    graph(call.x, *traced)
    assert not torch.equal(eager[0], fresh()[0])
    for a, b in zip(traced, eager, strict=True):
        assert torch.equal(a, b)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step(mode.from_tensor(call.x), *(mode.from_tensor(t) for t in fresh()))
