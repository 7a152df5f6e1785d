"""Blocks over packed weights, as the engine of launched kernels runs them, from calls of mbconv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.inference import packed_passes
from effnet_fast.modules.structure import Geometry
from mbconv_blocks import EPS, BlockCall, params_of, run
from parity import assert_parity

LITE = {"activation": "relu6", "squeeze": False}
MOBILE = {"activation": "relu", "se_activation": "relu", "gate": "hardsigmoid"}
KINDS: list[dict[str, Any]] = [
    {},
    LITE,
    MOBILE,
    {"activation": "silu", "squeeze": False},
    {"activation": "relu6", "se_activation": "identity"},
]


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
    geometry = Geometry((kernel,) * 2, (config.stride,) * 2, ((kernel - 1) // 2,) * 2)
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
