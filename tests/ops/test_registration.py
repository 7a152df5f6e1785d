"""The registered ops: schema, fake and kernel agree, for every op that the package defines."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

import effnet_fast.ops
from cases import MBCONV_CASES, find
from effnet_fast.backends import CPU, CUDA, SIMT, TRITON, Backend
from effnet_fast.ops import mbconv_passes
from mbconv_blocks import block_call
from mbconv_blocks import run as run_block
from parity import BF16, FP32, Call, Dtypes, sample

SAMPLE_OF = {
    "bn_silu": "dwconv_train",
    "dwconv_bn_silu_backward": "dwconv_train",
    "dwconv_bn_silu_eval": "dwconv_eval",
    "dwconv_statistics": "dwconv_train",
    "excite": "squeeze_excite",
    "mbconv_eval": "dwconv_eval",
    "move_statistics": "dwconv_train",
    "norm_silu": "stem_train",
    "norm_silu_backward": "stem_train",
    "norm_silu_sums": "stem_train",
    "norm_statistics": "stem_train",
    "pointwise_bn_act_eval": "pointwise_eval",
    "pointwise_bn_silu_pool_backward": "head_train",
    "pointwise_bn_silu_pool_eval": "head_train",
    "squeeze_excite": "squeeze_excite",
    "squeeze_excite_backward": "squeeze_excite",
    "stem_conv": "stem_train",
    "stem_conv_bn_silu_eval": "stem_eval",
    "stem_weight_backward": "stem_train",
}
PASSES = list(vars(mbconv_passes.passes("cpu")))
PASSES_OF_MBCONV = [f"mbconv_{name}" for name in PASSES if name != "excite"]
PADDING = (2, 2, 2, 2)  # of the sample's 5x5 kernel


def registered_ops() -> set[str]:
    for module in pkgutil.iter_modules(effnet_fast.ops.__path__, "effnet_fast.ops."):
        importlib.import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("effnet_fast::")}


def test_every_op_is_here() -> None:
    assert registered_ops() == set(SAMPLE_OF) | set(PASSES_OF_MBCONV)


LAUNCHED_BY_CUDA = {
    "bn_silu", "dwconv_bn_silu_backward", "dwconv_bn_silu_eval", "dwconv_statistics",
    "excite", "squeeze_excite", "squeeze_excite_backward",
}  # fmt: skip
LAUNCHED_BY_CPU_ALONE = {"norm_statistics"}


@pytest.mark.parametrize("backend", [CPU, CUDA, SIMT, TRITON], ids=lambda b: b.name)
def test_launchers(backend: Backend) -> None:
    """Every op that a backend launches has its function; for another the backend says so."""
    every = registered_ops() - {"move_statistics"}  # it is asked for no backend
    launched = LAUNCHED_BY_CUDA if backend in (CUDA, SIMT) else every
    launched = launched if backend is CPU else launched - LAUNCHED_BY_CPU_ALONE
    for op in launched:
        assert backend.launches(op)
        assert callable(backend.launcher(op))
    for op in every - launched | {"conv"}:
        with pytest.raises(
            RuntimeError, match=f"the {backend.name} backend has no kernel for {op}"
        ):
            backend.launcher(op)
        assert not backend.launches(op)


def stem_arguments(op: str, x: Tensor, others: list[Any]) -> tuple[Any, ...]:
    geometry = ((2, 2), (0, 1, 0, 1))
    if op == "stem_conv_bn_silu_eval":
        return (x, *others, *geometry, 1e-5, "silu", "cpu")
    given = (x, *others[:3], None, None, *geometry, 1e-5, "cpu")
    if op == "stem_conv":
        return given
    z, norm = torch.ops.effnet_fast.stem_conv(*given)
    if op == "norm_silu":
        return (z, norm, "silu", "cpu")
    if op == "norm_statistics":
        return (z, *others[1:3], None, None, 1e-5, "cpu")
    sums = torch.ops.effnet_fast.norm_silu_sums(z, z, norm, "silu", "cpu")
    if op == "norm_silu_sums":
        return (z, z, norm, "silu", "cpu")
    if op == "norm_silu_backward":
        return (z, z, norm, sums, "silu", "cpu")
    return (z, z, norm, sums, x, others[0], *geometry, "silu", "cpu")


def arguments(op: str, call: Call) -> tuple[Any, ...]:
    """The op's positional arguments for a call, what earlier ops compute included."""
    tensors = call.tensors
    x, others = call.x, list(tensors.values())[1:]
    if op == "dwconv_bn_silu_eval":
        return (x, *others, 1, PADDING, 1e-5, "silu", "cpu")
    if call.op == "stem_conv_bn_silu":
        return stem_arguments(op, x, others)
    if op == "mbconv_eval":
        c = x.shape[1]
        expand = [others[0].new_ones(c, c, 1, 1), *others[1:]]
        squeeze = [others[0].new_ones(3, c), None, others[0].new_ones(c, 3), None]
        layers = (expand, others, squeeze, expand)
        return (x, *layers, 1, PADDING, [1e-5] * 3, True, "silu", "silu", "sigmoid", "cpu")
    if op == "dwconv_statistics":
        return (x, tensors["weight"], 1, PADDING, "cpu")
    if op == "pointwise_bn_act_eval":
        return (x, *others, 1e-5, "identity", "cpu")
    if op == "pointwise_bn_silu_pool_eval":
        return (x, *others, 1e-5, "silu", "cpu")
    if op == "pointwise_bn_silu_pool_backward":
        weight, gamma, beta = others[:3]
        z, norm = torch.ops.effnet_fast.mbconv_expand(
            x, weight, gamma, beta, None, None, 1e-5, "cpu"
        )
        q, sums = torch.ones(z.shape[:2]), torch.ones(2, norm.shape[1])
        return (q, z, norm, sums, x, weight, [True, True], "silu", "cpu")
    kinds = ("silu", "sigmoid", "cpu")
    if op == "squeeze_excite":
        return (x, *others, *kinds)
    if call.op == "squeeze_excite":
        y, pooled, hidden, gate = torch.ops.effnet_fast.squeeze_excite(x, *others, *kinds)
        if op == "excite":
            return (pooled, *others, *kinds)
        return (y, x, others[0], others[2], pooled, hidden, gate, *kinds)
    z, mean, var = torch.ops.effnet_fast.dwconv_statistics(x, tensors["weight"], 1, PADDING, "cpu")
    if op == "move_statistics":
        return (torch.zeros_like(mean), torch.ones_like(var), mean, var, 1.5, 0.25)
    bn = (tensors["bn_weight"], tensors["bn_bias"], mean, var)
    if op == "bn_silu":
        return (z, *bn, 1e-5, "silu", "cpu")
    wanted = [True, True, True]
    return (z, x, z, tensors["weight"], *bn, 1, PADDING, 1e-5, True, wanted, "silu", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
@pytest.mark.parametrize("op", SAMPLE_OF)
def test_opcheck(op: str, dtypes: Dtypes) -> None:
    call = sample(SAMPLE_OF[op], dtypes)
    torch.library.opcheck(getattr(torch.ops.effnet_fast, op).default, arguments(op, call))


def test_opcheck_without_optional_tensors() -> None:
    for op, sample_name in SAMPLE_OF.items():
        call = sample(sample_name)
        optional = ("bn_weight", "bn_bias", "reduce_bias", "expand_bias", "gate", "residual")
        absent = dict.fromkeys(call.tensors.keys() & set(optional))
        args = arguments(op, call.with_tensors(**absent))
        torch.library.opcheck(
            getattr(torch.ops.effnet_fast, op).default, args, test_utils="test_faketensor"
        )


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False] * 3])
def test_opcheck_of_pruned_gradients(wanted: list[bool]) -> None:
    args = list(arguments("dwconv_bn_silu_backward", sample("dwconv_train")))
    args[-3] = wanted
    torch.library.opcheck(torch.ops.effnet_fast.dwconv_bn_silu_backward.default, tuple(args))


@pytest.mark.parametrize("wanted", [[True, False], [False, True], [False, False]])
def test_opcheck_of_pruned_gradients_of_the_head(wanted: list[bool]) -> None:
    op = "pointwise_bn_silu_pool_backward"
    *args, _, activation, backend = arguments(op, sample("head_train"))
    args[3] = None  # sums: of a BatchNorm that does not normalise by the batch
    torch.library.opcheck(
        getattr(torch.ops.effnet_fast, op).default, (*args, wanted, activation, backend)
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("op", SAMPLE_OF)
def test_opcheck_of_batches_0_and_1(op: str, batch: int) -> None:
    call = sample(SAMPLE_OF[op])
    shorter = {k: v[:batch] for k, v in call.tensors.items() if k in ("x", "gate", "residual")}
    args = arguments(op, call.with_tensors(**shorter))
    torch.library.opcheck(
        getattr(torch.ops.effnet_fast, op).default, args, test_utils="test_faketensor"
    )


def test_opcheck_can_fail() -> None:
    """A kernel whose output has other strides than its fake's is caught."""
    library = torch.library.Library("effnet_fast_test", "FRAGMENT")
    library.define("copy(Tensor x) -> Tensor")
    library.impl("copy", lambda x: x.contiguous(memory_format=torch.channels_last).clone(), "CPU")

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape)

    torch.library.register_fake("effnet_fast_test::copy", fake, lib=library)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(torch.ops.effnet_fast_test.copy.default, (sample("dwconv_eval").x,))


@pytest.mark.parametrize("op", SAMPLE_OF)
def test_meta_tensors(op: str) -> None:
    """Shapes and dtypes without data, as torch.export and the meta device need them."""
    args = arguments(op, sample(SAMPLE_OF[op]))
    function = getattr(torch.ops.effnet_fast, op)
    expected = function(*args)
    on_meta = function(*torch.utils._pytree.tree_map_only(Tensor, lambda a: a.to("meta"), args))
    if not isinstance(expected, tuple):
        expected, on_meta = (expected,), (on_meta,)
    if expected == (None,):  # the op only writes to its arguments
        assert on_meta == (None,)
        return
    for a, b in zip(on_meta, expected, strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def passes_arguments(
    dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch, **kinds: Any
) -> dict[str, tuple[Any, ...]]:
    """The arguments that one step of a block calls each pass with."""
    seen: dict[str, tuple[Any, ...]] = {}
    module = importlib.import_module("effnet_fast.ops.mbconv")  # under that name is the op
    monkeypatch.setattr(module, "_in_one_call", lambda *_: None)  # one by one
    passes = mbconv_passes.passes("cpu")
    for name, op in list(vars(passes).items()):

        def record(*args: Any, name: str = name, op: Any = op) -> Any:
            seen[f"mbconv_{name}"] = (
                *(a.detach().clone() if isinstance(a, Tensor) else a for a in args),
                "cpu",
            )
            return op(*args)

        monkeypatch.setattr(passes, name, record)
    call = block_call(find(MBCONV_CASES, "c_odd_stride_2"), dtypes, dropped=True, **kinds)
    run_block(call, effnet_fast.ops.mbconv, backend="cpu")
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
@pytest.mark.parametrize("op", PASSES_OF_MBCONV)
def test_opcheck_of_passes(op: str, dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    args = passes_arguments(dtypes, monkeypatch)[op]
    torch.library.opcheck(getattr(torch.ops.effnet_fast, op).default, args)


@pytest.mark.slow
def test_opcheck_of_passes_without_squeeze_excite(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes_arguments(FP32, monkeypatch, squeeze=False, activation="relu6")
    assert set(seen) == {
        op for op in PASSES_OF_MBCONV if "squeeze" not in op and "excite" not in op
    }
    for op, args in seen.items():
        torch.library.opcheck(getattr(torch.ops.effnet_fast, op).default, args)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [[True, False], [False, True], [False, False]])
@pytest.mark.parametrize("op", [op for op in PASSES_OF_MBCONV if op.endswith("_backward")])
def test_opcheck_of_pruned_passes(
    op: str, wanted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = passes_arguments(FP32, monkeypatch)[op]
    pruned = tuple(wanted if isinstance(a, list) and type(a[0]) is bool else a for a in args)
    torch.library.opcheck(getattr(torch.ops.effnet_fast, op).default, pruned)
