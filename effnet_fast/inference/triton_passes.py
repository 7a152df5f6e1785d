"""The packed passes on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.inference import packed_passes
from effnet_fast.triton_kernels import expand_dwconv, mbconv, squeeze_excite
from effnet_fast.triton_kernels.dwconv_backward import taps
from effnet_fast.triton_kernels.dwconv_bn_silu import launch_dwconv_fwd
from effnet_fast.triton_kernels.pointwise_bn_act import launch_pointwise_fwd
from effnet_fast.triton_kernels.stem_conv_bn_silu import launch_stem_fwd


class _Shifted(packed_passes.Pass):
    def pack(self, weight: Tensor, shift: Tensor) -> None:
        """The shift is the BatchNorm that is left when its scale is folded."""
        self.vectors = (None, self.keep(shift), self.keep(torch.zeros_like(shift)), None)
        self.weight = self.keep(weight.contiguous())


class Convolution(_Shifted, packed_passes.Convolution):
    """One kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        stride, sides = self.geometry.stride, self.geometry.sides(*x.shape[2:])
        return launch_stem_fwd(
            x, self.weight, stride, sides, bn=self.vectors, activation=self.activation
        )[0]


class Product(_Shifted, packed_passes.Product):
    """One kernel."""

    def __call__(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return launch_pointwise_fwd(
            x, self.weight, gate=gate, bn=self.vectors, activation=self.activation,
            residual=residual,
        )[0]  # fmt: skip


class Depthwise(_Shifted, packed_passes.Depthwise):
    """One kernel, or one with the expansion where that is quicker; the weight is fp32."""

    def pack(self, weight: Tensor, shift: Tensor) -> None:
        super().pack(weight, shift)
        self.taps = self.keep(taps(weight))

    def __call__(self, x: Tensor, pools: bool = True) -> tuple[Tensor, Tensor | None]:
        stride, sides = self.geometry.stride[0], self.geometry.sides(*x.shape[2:])
        y, _, pooled = launch_dwconv_fwd(
            x, self.weight, stride, sides, bn=self.vectors, activation=self.activation,
            pool=pools, packed=self.taps,
        )  # fmt: skip
        return y, pooled

    def after(
        self, expand: packed_passes.Product, excite: packed_passes.Excite | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        kinds = (None, None) if excite is None else (excite.activation, excite.gate)
        if isinstance(expand, Product) and mbconv.spreads_everywhere(*kinds):
            layers = (expand.weight, *expand.vectors), (self.weight, *self.vectors)
            stride, sides = self.geometry.stride[0], self.geometry.sides(*x.shape[2:])
            if mbconv.is_joined_quicker(x, *layers, stride, sides):
                return expand_dwconv.launch_expand_dwconv_fwd(
                    x, *layers, stride, sides, (0.0, 0.0), self.activation, packed=self.taps
                )
        return super().after(expand, excite, x)


class Excite(packed_passes.Excite):
    """Biases are fp32."""

    bias_dtype = torch.float32

    def __call__(self, pooled: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.layers
        kinds = (self.activation, self.gate)
        return squeeze_excite.excite(pooled, w1, b1, w2, b2, *kinds, self.backend)[1]


def pool(x: Tensor, backend: str) -> Tensor:
    """As `packed_passes.on` says."""
    return squeeze_excite.launch_squeeze(x)[0].div_(x.shape[2] * x.shape[3])
