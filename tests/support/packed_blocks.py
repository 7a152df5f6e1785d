"""Blocks over packed weights, as the engine of launched kernels runs them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.inference import packed_passes
from effnet_fast.inference.fold import folded
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.layers import MBConvConfig
from effnet_fast.modules.structure import Geometry, structure_of
from mbconv_blocks import EPS, BlockCall, params_of, run
from one_block import randomise
from parity import assert_parity
from tolerances import assert_no_worse_than

LITE = {"activation": "relu6", "squeeze": False}
MOBILE = {"activation": "relu", "se_activation": "relu", "gate": "hardsigmoid"}
KINDS: list[dict[str, Any]] = [
    {},
    LITE,
    MOBILE,
    {"activation": "silu", "squeeze": False},
    {"activation": "relu6", "se_activation": "identity"},
]
# FusedMBConv with and without projection and residual, at both strides, of sizes that fill no tile.
FUSED = {
    "residual": MBConvConfig(4, 3, 1, 12, 12),
    "k5_stride_2": MBConvConfig(3, 5, 2, 10, 20),
    "same_relu6": MBConvConfig(4, 3, 2, 10, 18, padding="same", activation="relu6"),
    "no_project_residual": MBConvConfig(1, 3, 1, 16, 16, activation="relu6"),
    "no_project_stride_2": MBConvConfig(1, 3, 2, 16, 20),
}


def _folded(layer: Any, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and shift with the running statistics folded in, fp32."""
    weight, gamma, beta, mean, var = (t.double() for t in layer)
    scale = gamma / (var + eps).sqrt()
    return (weight * scale.view(-1, 1, 1, 1)).float(), (beta - mean * scale).float()


def packed_block(call: BlockCall, backend: str) -> packed_passes.MBConv:
    """The block's passes on a backend; parameters in x's dtype."""
    params, config, dtype = params_of(call.tensors), call.config, call.x.dtype
    passes = packed_passes.on(backend)

    def product(layer: Any, eps: float, activation: str) -> packed_passes.Product:
        weight, shift = _folded(layer, eps)
        return passes.Product(backend, weight.flatten(1).to(dtype), shift, activation)

    kernel = params.depthwise.weight.shape[-1]
    geometry = Geometry((kernel,) * 2, (config.stride,) * 2, ((kernel - 1) // 2,) * 4)
    excite = params.squeeze and passes.Excite(
        backend, params.squeeze, dtype, config.se_activation, config.gate
    )
    return packed_passes.MBConv(
        product(params.expand, EPS[0], config.activation) if params.expand else None,
        passes.Depthwise(
            backend, *_folded(params.depthwise, EPS[1]), geometry, dtype, config.activation
        ),
        excite,
        product(params.project, EPS[2], "identity"),
        config.residual,
    )


def check_packed(call: BlockCall, backend: str) -> None:
    """Holds the packed block to the rule of parity against the reference in eval mode."""
    with torch.no_grad():
        y = packed_block(call, backend)(call.x)
    stock, exact = (run(call, wanted=(), double=double)["y"] for double in (False, True))
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, call.x.dtype)


def check_packed_fused(name: str, dtype: torch.dtype, backend: str) -> None:
    """Holds a packed FusedMBConv, on images of even height and odd width, to the rule of parity."""
    torch.manual_seed(0)
    config = FUSED[name]
    block = randomise(FusedMBConv(config, 0.0, nn.BatchNorm2d))
    x = torch.randn(2, config.input_channels, 8, 11).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    layers, passes = structure_of(block), packed_passes.on(backend)
    weight, shift = folded(layers.dense)
    dense = passes.Convolution(
        backend, weight.to(dtype), shift, layers.spatial, layers.dense.activation
    )
    project = None
    assert (layers.project is None) == name.startswith("no_project")
    if layers.project:
        weight, shift = folded(layers.project)
        project = passes.Product(backend, weight.flatten(1).to(dtype), shift, "identity")
    with torch.no_grad():
        y = packed_passes.FusedMBConv(dense, project, layers.residual)(x.clone())
        stock = copy.deepcopy(block).to(dtype)(x)
        assert_no_worse_than(y, stock, block.double()(x.double()))
