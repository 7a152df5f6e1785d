"""What the launchers return has the shapes, dtypes and strides that the ops' fakes promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cases import (
    DWCONV_CASES,
    HEAD_CASES,
    MBCONV_CASES,
    POINTWISE_CASES,
    SQUEEZE_EXCITE_CASES,
    find,
)
from effnet_fast.ops.mbconv import mbconv
from mbconv_blocks import block_call
from mbconv_blocks import run as run_block
from parity import (
    FP32,
    Dtypes,
    dwconv_call,
    head_call,
    pointwise_call,
    run,
    squeeze_excite_call,
)
from tiers import some

FP16 = Dtypes(torch.float16, torch.float16)
DTYPES = pytest.mark.parametrize("dtypes", some((FP32, FP16), (FP32,)))


class Fakes(TorchDispatchMode):
    """Runs every op of the package on meta tensors too, and holds its results to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "effnet_fast" and func._opname != "move_statistics":
            self.seen.add(func._opname)
            expected = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
            pairs = zip(tree_leaves(results), tree_leaves(expected), strict=True)
            for actual, fake in pairs:
                assert actual.shape == fake.shape, func
                assert actual.dtype == fake.dtype, func
                assert actual.stride() == fake.stride(), func
        return results


@DTYPES
def test_ops(dtypes: Dtypes) -> None:
    with Fakes() as fakes:
        run(dwconv_call(find(DWCONV_CASES, "c_one"), dtypes, True), "triton")
        run(dwconv_call(find(DWCONV_CASES, "c_one"), dtypes), "triton", wanted=("weight",))
        run(dwconv_call(find(DWCONV_CASES, "c_one"), dtypes), "triton", wanted=())
        run(squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "c_odd"), dtypes), "triton")
        run(pointwise_call(find(POINTWISE_CASES, "c_odd"), dtypes), "triton", wanted=())
        run(head_call(find(HEAD_CASES, "c_odd"), dtypes, True), "triton")
        run(head_call(find(HEAD_CASES, "c_odd"), dtypes), "triton", wanted=("weight",))
        run(head_call(find(HEAD_CASES, "c_odd"), dtypes), "triton", wanted=())
    assert len(fakes.seen) == 11, fakes.seen


@DTYPES
@pytest.mark.parametrize(
    "name",
    some(("c_odd_k3_stride_2", "no_expansion_residual", "batch_0"), ("c_odd_k3_stride_2",)),
)
def test_passes(name: str, dtypes: Dtypes) -> None:
    with Fakes() as fakes:
        run_block(block_call(find(MBCONV_CASES, name), dtypes), mbconv, backend="triton")
        call = block_call(find(MBCONV_CASES, name), dtypes, False)
        run_block(call, mbconv, backend="triton", wanted=())
    passes = 8 if name == "no_expansion_residual" else 10
    assert len(fakes.seen) == passes + 2, fakes.seen  # excite, and the block for inference
