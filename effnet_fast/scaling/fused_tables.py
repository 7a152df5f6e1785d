"""What each way of running a FusedMBConv moves and keeps: rows for `passes` and `memory_plans`.

A "fused" block has the letters x, d (the output of its dense convolution) and y, a "dense" one, a
single convolution, x and y; others as in `memory_plans`, w and N of d.
"""

from __future__ import annotations

_STOCK_DENSE = """
dense           convolution     x    y
dense           bn              y    y
dense           silu            y    y
dense           residual        yx   y
"""
_STOCK_FUSED = """
fused           convolution     x    d
fused           bn              d    d
fused           silu            d    d
project         convolution     d    y
project         bn              y    y
project         residual        yx   y
"""
_STOCK_DENSE_TRAINING = """
dense           convolution     x    y
dense           statistics      y    -
dense           bn              y    y
dense           silu            y    y
dense           drop_path       y    y
dense           residual        yx   y
dense           drop_path_bwd   y    y
dense           silu_bwd        yy   y
dense           bn_sums         yy   -
dense           bn_bwd          yy   y
dense           data            y    x
dense           weight          yx   -
dense           residual_bwd    xx   x
"""
# Of the projection of either kind of block, which reads d.
STOCK_PROJECT_TRAINING = """
project         convolution     d    y
project         statistics      y    -
project         bn              y    y
project         drop_path       y    y
project         residual        yx   y
project         drop_path_bwd   y    y
project         bn_sums         yy   -
project         bn_bwd          yy   y
project         data            y    d
project         weight          yd   -
"""
_STOCK_FUSED_TRAINING = f"""
fused           convolution     x    d
fused           statistics      d    -
fused           bn              d    d
fused           silu            d    d
{STOCK_PROJECT_TRAINING}
fused           silu_bwd        dd   d
fused           bn_sums         dd   -
fused           bn_bwd          dd   d
fused           data            d    x
fused           weight          dx   -
project         residual_bwd    xx   x
"""
_LAYER_DENSE = "dense fused x y\ndense residual x -"
_LAYER_FUSED = """
fused           fused           x    d
project         fused           d    y
project         residual        x    -
"""
_BLOCK_FUSED = "project fused x y\nproject residual x -"
_FAST_DENSE = """
dense           convolution     x    y
dense           finish          y    y
dense           residual        x    -
dense           finish_bwd      yy   -
dense           data            yy   x
dense           weight          yyx  -
dense           residual_bwd    x    -
"""
_FAST_FUSED = """
fused           convolution     x    d
project         convolution     d    y
project         finish          y    y
project         residual        x    -
project         finish_bwd      yy   -
project         data            yyd  d
project         weight          yyd  -
fused           data            dd   x
fused           weight          ddx  -
project         residual_bwd    x    -
"""
_RECOMPUTE = "fused recompute x d"

# By mode and plan of `passes`: the passes of a fused and of a dense block.
PASSES = {
    ("inference", "stock"): (_STOCK_FUSED, _STOCK_DENSE),
    ("inference", "layer_fused"): (_LAYER_FUSED, _LAYER_DENSE),
    ("inference", "block_fused"): (_BLOCK_FUSED, _LAYER_DENSE),
    ("training", "stock"): (_STOCK_FUSED_TRAINING, _STOCK_DENSE_TRAINING),
    ("training", "fast"): (_FAST_FUSED, _FAST_DENSE),
    ("training", "lean"): (_FAST_FUSED + _RECOMPUTE, _FAST_DENSE),
}

# What a step takes and frees, as in `memory_plans`.
_SAVED_STOCK_PROJECT = "project conv_bn yyv -\nproject drop_path y y"
_SAVED_STOCK_PROJECT_BACKWARD = """
project         drop_path_bwd   y       -
project         bn_bwd          yy      yyyv
project         conv_bwd        d       yd
"""
_SAVED_STOCK = f"fused conv_bn_silu dddw -\n{_SAVED_STOCK_PROJECT}"
_SAVED_STOCK_BACKWARD = f"""
{_SAVED_STOCK_PROJECT_BACKWARD}
fused           silu_bwd        d       dd
fused           bn_bwd          dd      dddw
fused           conv_bwd        x       dx
fused           residual_bwd    -       y
"""
_SAVED_STOCK_DENSE = "dense conv_bn_silu yyyv -\ndense drop_path y y"
_SAVED_STOCK_DENSE_BACKWARD = """
dense           drop_path_bwd   y       -
dense           silu_bwd        y       yy
dense           bn_bwd          yy      yyyv
dense           conv_bwd        x       yx
dense           residual_bwd    -       y
"""
# This version's CPU kernels: as designed. What one pass hands to the next (of the size of d, of y
# without a projection) lies in shared buffers.
_SAVED_KERNELS = "fused convolution dN -\nproject convolution yV -\nproject finish y -"
_SAVED_KERNELS_BACKWARD = """
fused           backward        x       xdNyVy
"""
_SAVED_KERNELS_LEAN = f"{_SAVED_KERNELS}\nfused done - d"
_SAVED_KERNELS_LEAN_BACKWARD = f"fused recompute d -\n{_SAVED_KERNELS_BACKWARD}"
_SAVED_KERNELS_DENSE = "dense convolution yV -\ndense finish y -"
_SAVED_KERNELS_DENSE_BACKWARD = "dense backward x xyVy"
# The design: x, z1 = d and z3 = y are saved, lean computes d again.
_SAVED_FAST = "fused convolution dw -\nproject convolution yv -\nproject finish y -"
_SAVED_FAST_BACKWARD = """
project         data            d       yv
project         plain           -       y
fused           data            x       ddxw
project         residual_bwd    -       y
"""
_SAVED_LEAN = f"{_SAVED_FAST}\nfused done - d"
_SAVED_LEAN_BACKWARD = f"fused recompute d -\n{_SAVED_FAST_BACKWARD}"
_SAVED_FAST_DENSE = "dense convolution yv -\ndense finish y -"
_SAVED_FAST_DENSE_BACKWARD = """
dense           data            x       yxv
dense           plain           -       y
dense           residual_bwd    -       y
"""
_INFERENCE_STOCK = """
fused           convolution     d       -
fused           bn_silu         d       d
project         convolution     y       d
project         bn              y       y
project         done            -       x
"""
_INFERENCE_STOCK_DENSE = "dense convolution y -\ndense bn_silu y y\ndense done - x"
_INFERENCE_KERNELS = """
fused           convolution     d       -
project         convolution     y       -
project         finish          y       dy
project         done            -       x
"""
_INFERENCE_KERNELS_DENSE = "dense fused y -\ndense done - x"

# By mode and plan of `memory_plans`: the steps of a fused and of a dense block forward, then
# backward.
STEPS = {
    ("training", "stock"): (
        *(_SAVED_STOCK, _SAVED_STOCK_DENSE),
        *(_SAVED_STOCK_BACKWARD, _SAVED_STOCK_DENSE_BACKWARD),
    ),
    ("training", "fused"): (
        *(_SAVED_KERNELS, _SAVED_KERNELS_DENSE),
        *(_SAVED_KERNELS_BACKWARD, _SAVED_KERNELS_DENSE_BACKWARD),
    ),
    ("training", "fused_lean"): (
        *(_SAVED_KERNELS_LEAN, _SAVED_KERNELS_DENSE),
        *(_SAVED_KERNELS_LEAN_BACKWARD, _SAVED_KERNELS_DENSE_BACKWARD),
    ),
    ("training", "fast"): (
        *(_SAVED_FAST, _SAVED_FAST_DENSE),
        *(_SAVED_FAST_BACKWARD, _SAVED_FAST_DENSE_BACKWARD),
    ),
    ("training", "lean"): (
        *(_SAVED_LEAN, _SAVED_FAST_DENSE),
        *(_SAVED_LEAN_BACKWARD, _SAVED_FAST_DENSE_BACKWARD),
    ),
    ("inference", "stock"): (_INFERENCE_STOCK, _INFERENCE_STOCK_DENSE, "", ""),
    ("inference", "fused"): (_INFERENCE_KERNELS, _INFERENCE_KERNELS_DENSE, "", ""),
}
