"""A whole MBConv for inference: expand, depthwise with the pool's sums, excite, project.

Computes: y = bn(project(gate * act(bn(depthwise(act(bn(expand(x)))))))) + x, perhaps without gate
Shapes:   x [N,Cin,H,W], y [N,Cout,Ho,Wo]
Dtypes:   x/y fp32|fp16|bf16, parameters x's or fp32
Layout:   channels_last
Tiling:   of the files that hold the passes
Bytes:    x, the expanded tensors written and read once each, y; where `expand_choice` finds that it
          pays, expand and depthwise are one kernel and the first of them never reaches memory
FLOPs:    of the passes
Source:   Tan & Le (arXiv 1905.11946), section 4
Truth:    the references of the parts
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import expand_choice
from .dwconv_bn_silu import launch_dwconv_fwd
from .expand_dwconv import launch_expand_dwconv_fwd, shape_of
from .pointwise_bn_act import launch_pointwise_fwd
from .squeeze_excite import excite

Layer = Sequence[Tensor]  # weight, bn_weight, bn_bias, mean, var; some None


def is_joined_quicker(
    x: Tensor, expand: Layer, depthwise: Layer, stride: int, padding: Sequence[int]
) -> bool:
    """Whether expansion and depthwise convolution are quicker as one kernel, by the model."""
    shape = shape_of(x, expand[0].shape[0], depthwise[0].shape[-1], stride, padding)
    return expand_choice.is_joined_quicker(shape, expand_choice.tile_of(x, shape)[1])


def spreads_everywhere(se_activation: str | None, gate: str | None) -> bool:
    """Whether a squeeze-and-excite makes NaN of an image that holds a NaN or an infinity.

    `expand_dwconv` may then spread them too. Names are None where there is none.
    """
    return se_activation == "silu" and gate == "sigmoid"


def mbconv_eval(
    x: Tensor,
    expand: Layer,
    depthwise: Layer,
    excite_layers: Layer,
    project: Layer,
    stride: int,
    padding: Sequence[int],
    eps: Sequence[float],
    residual: bool,
    activation: str,
    se_activation: str,
    gate_kind: str,
    backend: str,
    *,
    fused: bool | None = None,
) -> Tensor:
    """The op of this name.

    Args:
        fused: whether expansion and depthwise convolution are one kernel; None for what
            `expand_choice` makes of the shape, where the block lets them be one.
    """
    if fused is None:
        fused = (
            len(expand) > 0
            and len(excite_layers) > 0
            and spreads_everywhere(se_activation, gate_kind)
            and is_joined_quicker(x, expand, depthwise, stride, padding)
        )
    pooled: Tensor | None
    if fused:
        h, pooled = launch_expand_dwconv_fwd(x, expand, depthwise, stride, padding, eps, activation)
    else:
        h = x
        if expand:
            h, _ = launch_pointwise_fwd(
                h, expand[0], bn=expand[1:], eps=eps[0], activation=activation
            )
        h, _, pooled = launch_dwconv_fwd(
            h, depthwise[0], stride, padding, bn=depthwise[1:], eps=eps[1], activation=activation,
            pool=len(excite_layers) > 0,
        )  # fmt: skip
    gate = None
    if excite_layers:
        assert pooled is not None
        _, gate = excite(pooled, *excite_layers, se_activation, gate_kind, backend)
    return launch_pointwise_fwd(
        h, project[0], gate=gate, bn=project[1:], eps=eps[2], residual=x if residual else None
    )[0]
