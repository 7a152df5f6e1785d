"""What each way of running a block takes and frees, step by step: the tables behind
`count_memory`.

A row is a step: what it belongs to, its name, the tensors that it takes and those that it frees
when it is done. Rows of "expand" exist where a block expands, of "narrow" where it does not, of
"squeeze_excite" where it has that; rows named "residual" and "drop_path" where it has a residual,
those named "plain" where it has none.

    x e d y   the block's input, the tensors before and after the depthwise convolution, the output
    i         what the depthwise convolution reads: e, or x where nothing expands
    k l m     copies of e, d and y that SiLU in place keeps of its input; other activations keep none
    c r       a value per image and channel, expanded (the head's) or squeezed; C R in fp32
    u w v     mean and variance of the BatchNorm over e, d and y
    N V       its five vectors in fp32, over e or d, and over y
    f         an fp32 copy of d (the head's y), which PyTorch makes to average 16-bit values
    o         what oneDNN takes for the weight gradient of a depthwise convolution
    g         the weight with its gate applied, per image, or d where that is smaller

What a training plan takes forward and does not free is what it saves for backward, and y. The
stock rows are what PyTorch 2.13 does on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Step(NamedTuple):
    """One row: what it belongs to, its name, letters of the tensors it takes, then frees."""

    op: str
    name: str
    takes: str
    frees: str


Steps = tuple[Step, ...]


def _steps(table: str) -> Steps:
    rows = (line.split() for line in table.splitlines() if line)
    return tuple(Step(op, name, *(t.replace("-", "") for t in ends)) for op, name, *ends in rows)


# In-place SiLU keeps a copy of its input, the convolution behind it keeps its output.
_STOCK_EXPAND = "expand conv_bn_silu eeku -"
_STOCK_EXPAND_BACKWARD = """
expand          silu_bwd        e       ek
expand          bn_bwd          ee      eeeu
expand          conv_bwd        x       ex
expand          residual_bwd    -       y
narrow          residual_bwd    -       y
"""
_STOCK_PROJECT = """
project         conv_bn         yyv     -
project         drop_path       y       y
"""
_STOCK_PROJECT_BACKWARD = """
project         drop_path_bwd   y       -
project         bn_bwd          yy      yyyv
project         conv_bwd        d       yd
"""
_STOCK = f"""
{_STOCK_EXPAND}
depthwise       conv_bn_silu    ddlw    -
squeeze_excite  squeeze         fc      f
squeeze_excite  excite          rrc     -
squeeze_excite  scale           d       -
{_STOCK_PROJECT}
"""
_STOCK_BACKWARD = f"""
{_STOCK_PROJECT_BACKWARD}
squeeze_excite  scale_bwd       dd      ddd
squeeze_excite  excite_bwd      -       ccrr
squeeze_excite  squeeze_bwd     d       d
depthwise       silu_bwd        d       dl
depthwise       bn_bwd          dd      dddw
depthwise       conv_bwd        io      oid
{_STOCK_EXPAND_BACKWARD}
"""
# This version's CPU kernels in training: all as designed. What one pass hands to the next (of the
# size of d, of e) lies in shared buffers. Lean computes z1 = e again.
_FUSED = """
expand          convolution     eN      -
depthwise       convolution     dN      -
squeeze_excite  squeeze         CCCRC   -
project         convolution     yV      -
project         finish          y       -
"""
_FUSED_BACKWARD = """
expand          backward        x       xeN
narrow          backward        x       x
project         done            -       yyVdNCCCRC
"""
_FUSED_LEAN = f"{_FUSED}expand done - e"
_FUSED_LEAN_BACKWARD = f"expand recompute e -\n{_FUSED_BACKWARD}"
# The design: x, z1 = e, z2 = d, z3 = y and vectors are saved.
_FAST = """
expand          convolution     eu      -
depthwise       convolution     dw      -
squeeze_excite  squeeze         CCCRC   -
project         convolution     yv      -
project         finish          y       -
"""
_FAST_BACKWARD = """
project         data            d       yv
project         plain           -       y
squeeze_excite  excite_bwd      -       CCCRC
depthwise       backward        i       ddw
narrow          done            -       x
expand          data            x       eexu
project         residual_bwd    -       y
"""
_LEAN = _FAST.replace("squeeze_excite", "expand          done            -       e\nsqueeze_excite")
_LEAN_BACKWARD = _FAST_BACKWARD.replace(
    "depthwise       backward",
    "expand          recompute       e       -\ndepthwise       backward",
)
_STOCK_EDGE = "edge conv_bn_silu yymv -"
# BatchNorm sums 16-bit gradients in fp32 copies.
_STOCK_EDGE_BACKWARD = "edge silu_bwd y ym\nedge bn_sums yf f\nedge bn_bwd y yyyv"
_FAST_EDGE = "edge convolution yv -\nedge finish y -"
_FAST_EDGE_BACKWARD = "edge bn_silu_bwd y yyv"
_FUSED_STEM, _FUSED_STEM_BACKWARD = "edge convolution yV -\nedge finish y -", "edge backward - yyV"
# The head's output ends in the pool, whose gradient has its size; the classifier keeps its input
# and dropout's mask. The stem's input needs no gradient.
_POOL, _POOL_BACKWARD = "edge pool_dropout fcc fy", "edge pool_bwd y cc"
# z = y is saved, with two sums per image and channel; nothing else has its size.
_FUSED_HEAD = "edge convolution yV -\nedge squeeze CCC C\nedge dropout cc -"
_FUSED_HEAD_BACKWARD = "edge pool_bwd C cc\nedge backward x xyVCCC"


@dataclass(frozen=True)
class MemoryPlan:
    """Steps forward and, in training, backward, of a block, of the stem and of the head."""

    block: Steps
    stem: Steps
    head: Steps
    block_backward: Steps = ()
    stem_backward: Steps = ()
    head_backward: Steps = ()
    # Whether two buffers, of the sizes of e and d, serve all blocks and outlast the pass: in
    # inference the forward pass, in training the backward pass.
    shared: bool = False


def _training(block: str, backward: str, edge: str, edge_backward: str) -> MemoryPlan:
    return MemoryPlan(
        _steps(block),
        _steps(edge),
        _steps(f"{edge}\n{_POOL}"),
        _steps(backward),
        _steps(f"{edge_backward}\nedge conv_bwd - y"),
        _steps(f"{_POOL_BACKWARD}\n{edge_backward}\nedge conv_bwd x yx"),
    )


def _fused_training(block: str, backward: str) -> MemoryPlan:
    return replace(
        _training(block, backward, _STOCK_EDGE, _STOCK_EDGE_BACKWARD),
        stem=_steps(_FUSED_STEM),
        stem_backward=_steps(_FUSED_STEM_BACKWARD),
        head=_steps(_FUSED_HEAD),
        head_backward=_steps(_FUSED_HEAD_BACKWARD),
        shared=True,
    )


_STOCK_INFERENCE = """
expand          convolution     e       -
expand          bn_silu         e       e
depthwise       convolution     d       -
depthwise       bn_silu         d       d
expand          done            -       e
squeeze_excite  squeeze         fc      f
squeeze_excite  excite          rc      cr
squeeze_excite  scale           d       dc
project         convolution     y       -
project         bn              y       y
project         done            -       dx
"""
_FUSED_INFERENCE = """
block           depthwise       yC      -
block           excite          RC      R
block           project         g       gCC
block           done            -       x
"""
_EDGE_INFERENCE = "edge convolution y -\nedge bn_silu y y"
_EDGE_DONE = "edge done - x\nedge pool f fy"
PLANS = {
    ("training", "stock"): _training(_STOCK, _STOCK_BACKWARD, _STOCK_EDGE, _STOCK_EDGE_BACKWARD),
    ("training", "fused"): _fused_training(_FUSED, _FUSED_BACKWARD),
    ("training", "fused_lean"): _fused_training(_FUSED_LEAN, _FUSED_LEAN_BACKWARD),
    ("training", "fast"): _training(_FAST, _FAST_BACKWARD, _FAST_EDGE, _FAST_EDGE_BACKWARD),
    ("training", "lean"): _training(_LEAN, _LEAN_BACKWARD, _FAST_EDGE, _FAST_EDGE_BACKWARD),
    ("inference", "stock"): MemoryPlan(
        _steps(_STOCK_INFERENCE),
        _steps(_EDGE_INFERENCE),
        _steps(f"{_EDGE_INFERENCE}\n{_EDGE_DONE}"),
    ),
    ("inference", "fused"): MemoryPlan(
        _steps(_FUSED_INFERENCE),
        _steps("edge fused y -"),
        _steps(f"edge fused y -\n{_EDGE_DONE}"),
        shared=True,
    ),
}
MODES = ("inference", "training")


def plans(mode: str) -> tuple[str, ...]:
    """Names of the plans of "inference" or "training"."""
    return tuple(name for m, name in PLANS if m == mode)
