"""The network's inference in JAX, as a user would write it: NHWC, jitted, stock's weights.

Source: the network as effnet_fast/models has it; BN in evaluation mode is folded by XLA.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.modules.layers import MBConv

JAX_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def runner(model: nn.Module, x: Tensor, dtype: str, device: str) -> Callable[[], Tensor]:
    """Runs an EfficientNet in evaluation mode on x [N,3,H,W]; returns the logits as fp32.

    Raises:
        RuntimeError: this JAX has no such device ("cpu" or "cuda").
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else most of the GPU's memory
    import jax
    import jax.numpy as jnp
    import numpy as np

    kind = JAX_DTYPES[dtype]
    layers = _layers(model)
    place = jax.devices({"cpu": "cpu", "cuda": "gpu"}[device])[0]

    def array(t: Tensor) -> Any:
        return jax.device_put(jnp.asarray(t.detach().cpu().numpy(), kind), place)

    weights = jax.tree.map(array, _tensors(layers))
    pixels = array(x.permute(0, 2, 3, 1).contiguous())

    def conv_norm(p: dict[str, Any], layer: dict[str, Any], x: Any) -> Any:
        x = jax.lax.conv_general_dilated(
            x,
            p["weight"].transpose(2, 3, 1, 0),
            layer["stride"],
            [(side, side) for side in layer["padding"]],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer["groups"],
        )
        scale = p["gamma"] * jax.lax.rsqrt(p["var"] + layer["eps"])
        x = x * scale + (p["beta"] - p["mean"] * scale)
        return jax.nn.silu(x) if layer["silu"] else x

    def block(p: Any, layer: dict[str, Any], x: Any) -> Any:
        y = x
        for index, inner in enumerate(layer["layers"]):
            if inner is layer["layers"][-1]:
                pooled = y.mean((1, 2), dtype=jnp.float32).astype(y.dtype)
                hidden = jax.nn.silu(pooled @ p["se"][0].T + p["se"][1])
                gate = jax.nn.sigmoid(hidden @ p["se"][2].T + p["se"][3])
                y = y * gate[:, None, None, :]
            y = conv_norm(p["layers"][index], inner, y)
        return x + y if layer["residual"] else y

    @jax.jit
    def forward(weights: Any, x: Any) -> Any:
        x = conv_norm(weights[0], layers[0], x)
        for p, layer in zip(weights[1:-2], layers[1:-2], strict=True):
            x = block(p, layer, x)
        x = conv_norm(weights[-2], layers[-2], x)
        pooled = x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
        return (pooled @ weights[-1][0].T + weights[-1][1]).astype(jnp.float32)

    def run() -> Tensor:
        return torch.from_numpy(np.array(forward(weights, pixels).block_until_ready()))

    run()
    return run


def _layers(model: nn.Module) -> list[Any]:
    """The network as data: stem, blocks, head and classifier."""
    stem, *stages, head = model.features
    blocks = [_block(block) for stage in stages for block in stage]
    linear = model.classifier[-1]
    return [_conv_norm(stem), *blocks, _conv_norm(head), {"tensors": (linear.weight, linear.bias)}]


def _conv_norm(module: nn.Module) -> dict[str, Any]:
    conv, bn = module[0], module[1]
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "groups": conv.groups,
        "eps": bn.eps,
        "silu": len(module) > 2,
        "tensors": {
            "weight": conv.weight,
            "gamma": bn.weight,
            "beta": bn.bias,
            "mean": bn.running_mean,
            "var": bn.running_var,
        },
    }


def _block(module: MBConv) -> dict[str, Any]:
    *first, squeeze, project = module.block
    convs = [_conv_norm(layer) for layer in (*first, project)]
    layers = (squeeze.fc1, squeeze.fc2)
    excite = tuple(t for conv in layers for t in (conv.weight.flatten(1), conv.bias))
    return {
        "layers": convs,
        "residual": module.use_res_connect,
        "tensors": {"layers": [conv["tensors"] for conv in convs], "se": excite},
    }


def _tensors(layers: list[Any]) -> list[Any]:
    return [layer["tensors"] for layer in layers]
