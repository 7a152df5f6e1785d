"""The engine of a CPU: the whole network in one call into C++."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.inference import cpu_packing
from effnet_fast.inference.network_spec import CPU, NetworkSpec
from effnet_fast.inference.sizes import sizes_of
from effnet_fast.modules.dense_block import DenseBlock


class CpuEngine:
    """An `Engine` that is one call into C++.

    Args:
        bf16: in bf16, where the instruction set multiplies it; otherwise, and where it does not,
            in fp32.
        isa: the instruction set, "" for the best.
    """

    device = CPU
    captured = False

    def __init__(self, spec: NetworkSpec, bf16: bool, isa: str) -> None:
        extension = native.load()
        self.spec, self.sizes = spec, sizes_of(spec)
        bf16 = bf16 and extension.network_has_bf16(isa)
        packed = cpu_packing.Packed(cpu_packing.Format(bf16, extension.network_tile_units(isa)))
        with torch.inference_mode():
            cpu_packing.pack_stem(packed, spec.stem)
            for block in spec.blocks:
                if isinstance(block.layers, DenseBlock):
                    cpu_packing.pack_dense_block(packed, block.layers, block.tap)
                else:
                    cpu_packing.pack_block(packed, block.layers, block.tap)
            if spec.head:
                cpu_packing.pack_head(packed, spec.head)
            if spec.linear is not None:
                cpu_packing.pack_classifier(packed, spec.linear.weight, spec.linear.bias)
        self.nbytes = packed.nbytes
        self._native = extension.Network(
            *(isa, bf16, packed.nbytes, packed.stem, spec.stem_tap),
            *(packed.blocks, packed.head, packed.classifier),
        )

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """As `Engine.__call__` says; x is fp32 or bf16, the results are computed in fp32."""
        n, channels, height, width = x.shape
        maps = [
            torch.empty((n, h, w, c), dtype=torch.float32, device="cpu")
            for c, h, w in self.sizes.maps(height, width)
        ]
        y = None
        if self.sizes.outputs:
            y = torch.empty((n, self.sizes.outputs), dtype=torch.float32, device="cpu")
        if n:
            self._native.run(
                *((n, channels, height, width), x.data_ptr(), x.dtype is torch.bfloat16),
                *(x.stride(), (0, 0) if y is None else _place(y), [_place(m) for m in maps]),
                torch.get_num_threads(),
            )
        return None if y is None else y.to(dtype), [m.permute(0, 3, 1, 2).to(dtype) for m in maps]

    def close(self) -> None:
        """Does nothing: there is nothing beside the weights."""


def _place(result: Tensor) -> tuple[int, int]:
    """Address and bytes, which C++ compares with what it writes."""
    return result.data_ptr(), result.nbytes
