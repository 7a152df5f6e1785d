"""The passes of inference over weights packed ahead: BatchNorm folded in, nothing cast per call.

Each pass holds its weights as the launchers of its backend read them. "cuda" and "simt" have no
kernel for 1x1 convolutions: there the product is PyTorch's own, and shift, SiLU and residual are
one kernel over it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast import backends
from effnet_fast.backends import preference
from effnet_fast.modules.structure import Geometry
from effnet_fast.ops.cuda import dwconv_bn_silu as cuda_dwconv
from effnet_fast.ops.cuda import squeeze_excite as cuda_excite
from effnet_fast.ops.cuda import statistics as cuda_statistics
from effnet_fast.ops.cuda.launching import Bn
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.registration import empty_nhwc, nhwc

DTYPES = backends.CUDA_DTYPES
TRITON = "triton"
Vectors = tuple[Tensor | None, Tensor, Tensor, Tensor | None]  # weight, bias, mean, var [C]


@functools.cache
def _triton(file: str) -> ModuleType:
    return importlib.import_module(f"effnet_fast.triton_kernels.{file}")


def choose(
    op: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernel: tuple[int, int] = (1, 1),
    stride: int = 1,
    hidden: int = 1,
) -> str:
    """The backend that runs a pass: the one named, or the first that can of those preferred.

    Args:
        op: one of `backends.OPS`.
        backend: "auto", "cuda", "triton" or "simt".
        dtype, device: of the images.
        kernel, stride: of a depthwise convolution.
        hidden: R of a squeeze-and-excite.

    Raises:
        RuntimeError: none can, with the reason of each.
    """
    x = torch.empty((1, 1, 1, 1), dtype=dtype, device=device)
    args = backends.OpArgs(x, (x.new_empty((hidden, 0)),), kernel, stride, inference=True)
    names = preference.order(device.type, op) if backend == "auto" else (backend,)
    reasons = []
    for name in names:
        # A 1x1 convolution there is PyTorch's product, and a kernel that every build has after it.
        by_product = op == "pointwise_bn_act" and name != TRITON
        reason = backends.can_run(name, "squeeze_excite" if by_product else op, args)
        if reason is None:
            return name
        reasons.append(f"backend {name!r} cannot run {op}: {reason}")
    raise RuntimeError("; ".join(reasons) or f"there are no kernels for {device}")


class Pass:
    """One pass and its packed tensors.

    Args:
        backend: what `choose` gave.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.tensors: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, counted as packed."""
        self.tensors.append(tensor)
        return tensor

    def _shift(self, shift: Tensor) -> None:
        """Prepares `shift` [C] fp32 as the BatchNorm that is left when the scale is folded."""
        zeros, ones = self.keep(torch.zeros_like(shift)), self.keep(torch.ones_like(shift))
        shift = self.keep(shift)
        if self.backend == TRITON:
            self.vectors: Vectors = (None, shift, zeros, None)
        else:
            self.bn = Bn((None, shift, zeros, ones))


class Convolution(Pass):
    """silu(conv(x) + shift): the stem.

    Args:
        weight: [Cout,Cin,K,K] with BatchNorm's scale, in the images' dtype.
        shift: [Cout] fp32.
        geometry: of the convolution.
    """

    def __init__(self, backend: str, weight: Tensor, shift: Tensor, geometry: Geometry) -> None:
        super().__init__(backend)
        self.weight = self.keep(weight.contiguous() if backend == TRITON else nhwc(weight))
        self.geometry = geometry
        self._shift(shift)

    def __call__(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.geometry.sides(*x.shape[2:])
        stride = self.geometry.stride
        if self.backend == TRITON:
            return _triton("stem_conv_bn_silu").launch_stem_fwd(
                x, self.weight, stride, (left, right, top, bottom), bn=self.vectors
            )[0]
        if (left, top) != (right, bottom):  # PyTorch pads alike on both sides
            x, left, top = F.pad(x, (left, right, top, bottom)), 0, 0
        z = nhwc(F.conv2d(x, self.weight, None, stride, (top, left)))
        return cuda_dwconv.bn_act(z, self.bn, self.backend, silu=True)


class Product(Pass):
    """act(conv1x1(x * gate) + shift) + residual.

    Args:
        weight: [Cout,Cin] with BatchNorm's scale, in the images' dtype.
        shift: [Cout] fp32.
        silu: whether SiLU follows.
    """

    def __init__(self, backend: str, weight: Tensor, shift: Tensor, silu: bool) -> None:
        super().__init__(backend)
        self.weight = self.keep(weight.contiguous())
        self.silu = silu
        self._shift(shift)

    def __call__(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y [N,Cout,H,W]; gate [N,Cin] fp32."""
        if self.backend == TRITON:
            return _triton("pointwise_bn_act").launch_pointwise_fwd(
                x, self.weight, gate=gate, bn=self.vectors, silu=self.silu, residual=residual
            )[0]
        if gate is not None:
            x = cuda_excite.apply_gate(x, gate, None, empty_nhwc(x, x.shape), self.backend)
        n, c, h, w = x.shape
        z = F.linear(x.permute(0, 2, 3, 1).reshape(n * h * w, c), self.weight)
        z = z.view(n, h, w, -1).permute(0, 3, 1, 2)
        return cuda_dwconv.bn_act(z, self.bn, self.backend, silu=self.silu, residual=residual)


class Depthwise(Pass):
    """y = silu(conv_dw(x) + shift), and y's mean over the pixels.

    Args:
        weight: [C,1,K,K] fp32 with BatchNorm's scale.
        shift: [C] fp32.
        geometry: of the convolution.
        dtype: of the images. Triton's kernel reads fp32 weights, the others those of this dtype.
    """

    def __init__(
        self,
        backend: str,
        weight: Tensor,
        shift: Tensor,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(backend)
        self.geometry = geometry
        self._shift(shift)
        if backend == TRITON:
            self.taps = self.keep(_triton("dwconv_backward").taps(weight))
        else:
            weight = weight.to(dtype)
        self.weight = self.keep(weight.contiguous())

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [N,C,Ho,Wo], pooled [N,C] fp32."""
        stride, sides = self.geometry.stride[0], self.geometry.sides(*x.shape[2:])
        if self.backend == TRITON:
            y, _, pooled = _triton("dwconv_bn_silu").launch_dwconv_fwd(
                x, self.weight, stride, sides, bn=self.vectors, pool=True, packed=self.taps
            )
            return y, pooled
        y = empty_nhwc(x, output_shape(x, self.geometry.kernel[0], stride, sides))
        (pooled,) = cuda_dwconv.forward(
            y, x, self.weight, stride, sides, self.backend, after=self.bn
        )
        return y, pooled


class Excite(Pass):
    """gate = sigmoid(W2 silu(W1 pooled + b1) + b2).

    Args:
        layers: W1 [R,C,1,1], b1 [R], W2 [C,R,1,1], b2 [C]; a bias may be None.
        dtype: of the packed weights. Triton's kernel reads fp32 biases, the others those of this
            dtype.
    """

    def __init__(self, backend: str, layers: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
        super().__init__(backend)
        dtypes = (dtype, torch.float32) * 2 if backend == TRITON else (dtype,) * 4
        self.layers = [
            None if layer is None else self.keep(layer.detach().to(to, copy=True).contiguous())
            for layer, to in zip(layers, dtypes, strict=True)
        ]

    def __call__(self, pooled: Tensor) -> Tensor:
        """gate [N,C] fp32 of pooled [N,C] fp32."""
        launcher = _triton("squeeze_excite") if self.backend == TRITON else cuda_excite
        return launcher.excite(pooled, *self.layers, self.backend)[1]


def pool(x: Tensor, backend: str) -> Tensor:
    """Mean [N,C] in fp32 over the pixels of x [N,C,H,W], NHWC without gaps."""
    pixels = x.shape[2] * x.shape[3]
    if backend == TRITON:
        return _triton("squeeze_excite").launch_squeeze(x)[0].div_(pixels)
    return cuda_statistics.image_sums(backend, cuda_statistics.SUM, x, factor=1.0 / pixels)[0]


class MBConv:
    """A whole block: [expand ->] depthwise -> excite -> project."""

    def __init__(
        self,
        expand: Product | None,
        depthwise: Depthwise,
        excite: Excite,
        project: Product,
        residual: bool,
    ) -> None:
        self.expand, self.depthwise = expand, depthwise
        self.excite, self.project = excite, project
        self.residual = residual

    def passes(self) -> Iterator[Pass]:
        """Every pass in order."""
        if self.expand:
            yield self.expand
        yield from (self.depthwise, self.excite, self.project)

    def _filtered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the depthwise pass gives; in one kernel with the expansion where that pays."""
        expand, depthwise = self.expand, self.depthwise
        if expand is None:
            return depthwise(x)
        if expand.backend == depthwise.backend == TRITON:
            layers = (expand.weight, *expand.vectors), (depthwise.weight, *depthwise.vectors)
            stride, sides = depthwise.geometry.stride[0], depthwise.geometry.sides(*x.shape[2:])
            if _triton("mbconv").pays(x, *layers, stride, sides):
                return _triton("expand_dwconv").launch_expand_dwconv_fwd(
                    x, *layers, stride, sides, (0.0, 0.0), packed=depthwise.taps
                )
        return depthwise(expand(x))

    def __call__(self, x: Tensor) -> Tensor:
        """y [N,Cout,Ho,Wo] of x [N,Cin,H,W]."""
        h, pooled = self._filtered(x)
        return self.project(h, self.excite(pooled), x if self.residual else None)
