"""The reader of this package's own FusedMBConv."""

from __future__ import annotations

from typing import Any

from torch import nn

from effnet_fast.modules import stock, structure
from effnet_fast.modules.dense_block import DenseBlock
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.readers import own
from effnet_fast.modules.stochastic_depth import StochasticDepth
from effnet_fast.modules.structure import DENSE, POINTWISE, Part, RefusedError

_BODIES = structure.children_of(own.body(own.CONV), own.body(own.CONV, own.CONV))
_BLOCK = structure.children_of((
    Part("block", {nn.Sequential: _BODIES}),
    Part("stochastic_depth", structure.one_of(StochasticDepth)),
))  # fmt: skip


def dense_block_of(module: FusedMBConv) -> DenseBlock:
    """Takes a FusedMBConv apart.

    Raises:
        RefusedError: it is not what its class makes, with the reason.
    """
    state = module.__dict__
    table = state["_modules"]
    children: dict[str, Any] = {name: table.get(name) for name in ("block", "stochastic_depth")}
    name = ""
    try:
        if not state.keys().isdisjoint(children):
            raise structure.hidden(state, children)
        structure.require_children(children, _BLOCK)
        layers, body = [], children["block"].__dict__["_modules"]
        for name in body:
            layers.append(own.layer(body[name]))
    except RefusedError as refused:
        place = own.behind(f"block.{name}", refused) if name else str(refused)[1:]
        raise RefusedError(place) from None
    dense, *rest = layers
    project = rest[0] if rest else None
    if dense.kind != DENSE or not dense.activates:
        raise RefusedError("block.0 is no dense convolution with an activation")
    if dense.geometry.kernel[0] != dense.geometry.kernel[1]:
        raise RefusedError(f"block.0 has kernel {dense.geometry.kernel}")
    if dense.geometry.stride not in ((1, 1), (2, 2)):
        raise RefusedError(f"block.0 has stride {dense.geometry.stride}")
    if project and (project.kind != POINTWISE or project.activates):
        raise RefusedError("block.1 is no pointwise layer without an activation")
    if project and project.conv.in_channels != dense.conv.out_channels:
        raise RefusedError(f"block.1 does not take {dense.conv.out_channels} channels")
    if project and project.tensors[0].dtype is not dense.tensors[0].dtype:
        dtypes = f"{dense.tensors[0].dtype} and {project.tensors[0].dtype}"
        raise RefusedError(f"block has weights in {dtypes}")
    drop_path = children["stochastic_depth"]
    probability = drop_path.p if drop_path.training else 0.0
    residual = bool(module.use_res_connect)
    found = DenseBlock(dense, project, residual, probability, drop_path.mode, module.memory)
    keeps_shape = dense.geometry.stride == (1, 1) and dense.geometry.is_centred
    if residual and not (keeps_shape and dense.conv.in_channels == found.last.conv.out_channels):
        raise RefusedError("it adds its input to an output of another shape")
    return found


structure.reads(FusedMBConv, dense_block_of, stock.BLOCK.require)
