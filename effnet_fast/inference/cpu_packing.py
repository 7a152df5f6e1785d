"""A network's weights as the CPU's inference kernels read them: BatchNorm folded in, packed once.

The layouts are those of csrc/cpu/network/args.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.inference.fold import folded
from effnet_fast.modules import structure
from effnet_fast.reference.activations import kernel_activation, kernel_gate

UNIT = 16  # channels


@dataclass(frozen=True)
class Format:
    """How weights are packed."""

    bf16: bool  # pairs of bf16 instead of fp32
    tile_units: int  # units of 16 output channels in a panel

    def padded(self, channels: int) -> int:
        """Channels with those that fill the last block of a cache line."""
        block = 2 * UNIT if self.bf16 else UNIT
        return -(-channels // block) * block


@dataclass
class Packed:
    """Layers for `_C.Network`, and the tensors that they point to."""

    format: Format
    stem: Any = None
    blocks: list[Any] = field(default_factory=list)
    head: Any = None
    classifier: Any = None
    tensors: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor) -> tuple[int, int]:
        """The address and bytes of a tensor that lives as long as this."""
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr(), tensor.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights, each from a cache line on."""
        return sum(-(-tensor.nbytes // 64) * 64 for tensor in self.tensors)


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor with zeros appended up to these sizes."""
    widths: list[int] = []
    for have, want in zip(reversed(tensor.shape), reversed(sizes), strict=True):
        widths += [0, want - have]
    return F.pad(tensor, widths)


def _panels(rows: Tensor, tile_units: int) -> Tensor:
    """[K, units * 16, ...] by panels of output channels, one after another.

    Each has tile_units units, the last what is left over as well.
    """
    width = tile_units * UNIT
    whole = max(0, rows.shape[1] // width - 1) * width
    parts = [*rows[:, :whole].split(width, 1), rows[:, whole:]]
    return torch.cat([part.reshape(-1) for part in parts])


def _product_words(weight: Tensor, layout: Format) -> Tensor:
    """A product's weight [Cout,Cin] in panels, still fp32."""
    outputs = layout.padded(weight.shape[0])
    if not layout.bf16:
        return _panels(_pad(weight.t(), weight.shape[1], outputs), layout.tile_units)
    inputs = layout.padded(weight.shape[1])
    pairs = _pad(weight.t(), inputs, outputs).reshape(inputs // 2, 2, outputs)
    return _panels(pairs.transpose(1, 2), layout.tile_units)


def _product_fields(packed: Packed, weight: Tensor, shift: Tensor) -> dict[str, Any]:
    outputs, inputs = weight.shape[:2]
    words = _product_words(weight.reshape(outputs, inputs), packed.format)
    return {
        "in_channels": inputs,
        "out_channels": outputs,
        "weight": packed.keep(words.bfloat16() if packed.format.bf16 else words),
        "shift": packed.keep(_pad(shift, packed.format.padded(outputs))),
    }


def _product(packed: Packed, weight: Tensor, shift: Tensor) -> Any:
    return native.load().Product(**_product_fields(packed, weight, shift))


def _units(rows: Tensor, channels: int) -> Tensor:
    """[C, n] as [units][n][16], zeros beyond C."""
    return _pad(rows, channels, rows.shape[1]).reshape(-1, UNIT, rows.shape[1]).transpose(1, 2)


def _padding(layer: structure.Layer) -> tuple[int, int, int, int] | None:
    """The sides, or None where they depend on each image's size and are computed there."""
    return None if layer.geometry.padding is None else layer.geometry.sides(0, 0)


def pack_stem(packed: Packed, layer: structure.Layer) -> None:
    """Adds the first convolution."""
    weight, shift = folded(layer)
    out_channels, in_channels, *kernel = weight.shape
    outputs = packed.format.padded(out_channels)
    packed.stem = native.load().StemLayer(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_h=kernel[0],
        kernel_w=kernel[1],
        stride=layer.geometry.stride[0],
        padding=_padding(layer),
        activation=kernel_activation(layer.activation),
        weight=packed.keep(_units(weight.flatten(1), outputs)),
        shift=packed.keep(_pad(shift, outputs)),
    )


def _excite_fields(
    packed: Packed, block: structure.Block, project_weight: Tensor
) -> dict[str, Any]:
    """What a block with squeeze-and-excite has besides; project_weight [Cout,C,1,1] is folded."""
    if block.excite is None:
        return {}
    channels = project_weight.shape[1]
    padded = packed.format.padded(channels)
    reduce_weight, reduce_bias, expand_weight, expand_bias = (
        None if t is None else t.detach().float() for t in block.excite
    )
    assert reduce_weight is not None
    assert expand_weight is not None
    hidden = reduce_weight.shape[0]
    reduce_bias = reduce_weight.new_zeros(hidden) if reduce_bias is None else reduce_bias
    expand_bias = reduce_weight.new_zeros(channels) if expand_bias is None else expand_bias
    fields: dict[str, Any] = {
        "se_channels": hidden,
        "se_activation": kernel_activation(block.se_activation),
        "gate_kind": kernel_gate(block.gate),
        "se_reduce_weight": packed.keep(_pad(reduce_weight.flatten(1), hidden, padded)),
        "se_reduce_bias": packed.keep(reduce_bias),
        "se_expand_weight": packed.keep(_units(expand_weight.flatten(1), padded)),
        "se_expand_bias": packed.keep(_pad(expand_bias, padded)),
    }
    if packed.format.bf16:
        words = _product_words(project_weight.flatten(1), packed.format)
        fields["project_master"] = packed.keep(words)
    return fields


def pack_block(packed: Packed, block: structure.Block, tap: int) -> None:
    """Adds an MBConv; tap: which output shows its result, -1 for none."""
    depthwise, layout = block.depthwise, packed.format
    weight, shift = folded(depthwise)
    channels = weight.shape[0]
    padded = layout.padded(channels)
    project_weight, project_shift = folded(block.project)
    in_channels, optional = channels, _excite_fields(packed, block, project_weight)
    if block.expand:
        expand_weight, expand_shift = folded(block.expand)
        in_channels = expand_weight.shape[1]
        optional["expand"] = _product(packed, expand_weight, expand_shift)
    layer = native.load().BlockLayer(
        in_channels=in_channels,
        channels=channels,
        out_channels=project_weight.shape[0],
        kernel=weight.shape[-1],
        stride=depthwise.geometry.stride[0],
        padding=_padding(depthwise),
        residual=block.residual,
        activation=kernel_activation(block.activation),
        filter=packed.keep(_units(weight.flatten(1), padded)),
        filter_shift=packed.keep(_pad(shift, padded)),
        project=_product(packed, project_weight, project_shift),
        tap=tap,
        **optional,
    )
    packed.blocks.append(layer)


def pack_head(packed: Packed, layer: structure.Layer) -> None:
    """Adds the last convolution, after which the pixels' mean is taken."""
    packed.head = native.load().HeadLayer(
        **_product_fields(packed, *folded(layer)), activation=kernel_activation(layer.activation)
    )


def pack_classifier(packed: Packed, weight: Tensor, bias: Tensor | None) -> None:
    """Adds the linear layer, weight [classes, features]."""
    weight = weight.detach().float()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float()
    packed.classifier = _product(packed, weight, bias)
