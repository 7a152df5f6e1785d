"""The packed passes on the CUDA kernels, and on their run on the CPU.

There is no kernel for dense and 1x1 convolutions: the product is PyTorch's own, and shift,
activation and residual are one kernel over it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.inference import packed_passes
from effnet_fast.ops.cuda import dwconv_bn_silu as dwconv
from effnet_fast.ops.cuda import squeeze_excite, statistics
from effnet_fast.ops.cuda.launching import Bn
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.registration import empty_nhwc, nhwc


class _Shifted(packed_passes.Pass):
    def pack(self, weight: Tensor, shift: Tensor) -> None:
        """The shift is the BatchNorm that is left when its scale is folded."""
        zeros, ones = self.keep(torch.zeros_like(shift)), self.keep(torch.ones_like(shift))
        self.bn = Bn((None, self.keep(shift), zeros, ones))
        self.weight = self.keep(weight)


class Convolution(_Shifted, packed_passes.Convolution):
    """PyTorch's convolution, then one kernel."""

    def pack(self, weight: Tensor, shift: Tensor) -> None:
        super().pack(nhwc(weight), shift)

    def __call__(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.geometry.sides(*x.shape[2:])
        if (left, top) != (right, bottom):  # PyTorch pads alike on both sides
            x, left, top = F.pad(x, (left, right, top, bottom)), 0, 0
        z = nhwc(F.conv2d(x, self.weight, None, self.geometry.stride, (top, left)))
        return dwconv.bn_act(z, self.bn, self.activation, self.backend)


class Product(_Shifted, packed_passes.Product):
    """PyTorch's product, a kernel for the gate before it and one after it."""

    def pack(self, weight: Tensor, shift: Tensor) -> None:
        super().pack(weight.contiguous(), shift)

    def __call__(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if gate is not None:
            x = squeeze_excite.apply_gate(x, gate, None, empty_nhwc(x, x.shape), self.backend)
        n, c, h, w = x.shape
        z = F.linear(x.permute(0, 2, 3, 1).reshape(n * h * w, c), self.weight)
        z = z.view(n, h, w, -1).permute(0, 3, 1, 2)
        return dwconv.bn_act(z, self.bn, self.activation, self.backend, residual=residual)


class Depthwise(_Shifted, packed_passes.Depthwise):
    """One kernel; the weight has the images' dtype."""

    def pack(self, weight: Tensor, shift: Tensor) -> None:
        super().pack(weight.to(self.dtype).contiguous(), shift)

    def __call__(self, x: Tensor, pools: bool = True) -> tuple[Tensor, Tensor | None]:
        stride, sides = self.geometry.stride[0], self.geometry.sides(*x.shape[2:])
        y = empty_nhwc(x, output_shape(x, self.geometry.kernel[0], stride, sides))
        pooled = dwconv.forward(
            y, x, self.weight, stride, sides, self.activation, self.backend,
            after=self.bn, pools=pools,
        )  # fmt: skip
        return y, pooled[0] if pools else None


class Excite(packed_passes.Excite):
    """Biases have the weights' dtype."""

    def __call__(self, pooled: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.layers
        kinds = (self.activation, self.gate)
        return squeeze_excite.excite(pooled, w1, b1, w2, b2, *kinds, self.backend)[1]


def pool(x: Tensor, backend: str) -> Tensor:
    """As `packed_passes.on` says."""
    factor = 1.0 / (x.shape[2] * x.shape[3])
    return statistics.image_sums(backend, statistics.SUM, x, factor=factor)[0]
