"""The passes of inference over weights packed ahead: BatchNorm folded in, nothing cast per call.

Each pass holds its weights as the launchers of its backend read them: `on(backend)` has the classes
of these names that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effnet_fast import backends
from effnet_fast.backends import preference
from effnet_fast.modules.structure import Geometry

DTYPES = backends.CUDA_DTYPES


def choose(
    op: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernel: tuple[int, int] = (1, 1),
    stride: int = 1,
    hidden: int = 1,
    activations: tuple[str, ...] = (),
    gate: str = "sigmoid",
) -> str:
    """The backend that runs a pass: the one named, or the first that can of those preferred.

    Args:
        op: one of `backends.OPS`.
        backend: "auto", "cuda", "triton" or "simt".
        dtype, device: of the images.
        kernel, stride: of a depthwise convolution.
        hidden: R of a squeeze-and-excite.
        activations: that the pass applies.
        gate: of a squeeze-and-excite.

    Raises:
        RuntimeError: none can, with the reason of each.
    """
    x = torch.empty((1, 1, 1, 1), dtype=dtype, device=device)
    others = (x.new_empty((hidden, 0)),)
    args = backends.OpArgs(x, others, kernel, stride, True, activations, gate)
    names = preference.order(device.type, op) if backend == "auto" else (backend,)
    reasons = []
    for name in names:
        reason = backends.can_run(name, backends.backend_of(name).packed_as.get(op, op), args)
        if reason is None:
            return name
        reasons.append(f"backend {name!r} cannot run {op}: {reason}")
    raise RuntimeError("; ".join(reasons) or f"there are no kernels for {device}")


def on(backend: str) -> Any:
    """The module with the passes on a backend that `choose` gave; it has `pool`, too.

    pool(x, backend): the mean [N,C] in fp32 over the pixels of x [N,C,H,W], NHWC without gaps.
    """
    return backends.backend_of(backend).packed_passes()


class Pass:
    """One pass on a backend that `choose` gave, and its packed tensors."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.tensors: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, counted as packed."""
        self.tensors.append(tensor)
        return tensor

    def pack(self, weight: Tensor, shift: Tensor) -> None:
        """Keeps a convolution's tensors as the kernels read them; shift [C] fp32."""
        raise NotImplementedError


class Convolution(Pass):
    """act(conv(x) + shift): the stem, and the dense convolution of a FusedMBConv.

    Args:
        weight: [Cout,Cin,K,K] with BatchNorm's scale, in the images' dtype.
        shift: [Cout] fp32.
        geometry: of the convolution.
        activation: see `reference.activations`, here and below.
    """

    def __init__(
        self, backend: str, weight: Tensor, shift: Tensor, geometry: Geometry, activation: str
    ) -> None:
        super().__init__(backend)
        self.geometry, self.activation = geometry, activation
        self.pack(weight, shift)

    def __call__(self, x: Tensor) -> Tensor:
        """y [N,Cout,Ho,Wo]."""
        raise NotImplementedError


class Product(Pass):
    """act(conv1x1(x * gate) + shift) + residual.

    Args:
        weight: [Cout,Cin] with BatchNorm's scale, in the images' dtype.
        shift: [Cout] fp32.
        activation: "identity" for none.
    """

    def __init__(self, backend: str, weight: Tensor, shift: Tensor, activation: str) -> None:
        super().__init__(backend)
        self.activation = activation
        self.pack(weight, shift)

    def __call__(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y [N,Cout,H,W]; gate [N,Cin] fp32."""
        raise NotImplementedError


class Depthwise(Pass):
    """y = act(conv_dw(x) + shift), and y's mean over the pixels.

    Args:
        weight: [C,1,K,K] fp32 with BatchNorm's scale.
        shift: [C] fp32.
        geometry: of the convolution.
        dtype: of the images.
    """

    def __init__(
        self,
        backend: str,
        weight: Tensor,
        shift: Tensor,
        geometry: Geometry,
        dtype: torch.dtype,
        activation: str,
    ) -> None:
        super().__init__(backend)
        self.geometry, self.dtype, self.activation = geometry, dtype, activation
        self.pack(weight, shift)

    def __call__(self, x: Tensor, pools: bool = True) -> tuple[Tensor, Tensor | None]:
        """y [N,C,Ho,Wo], pooled [N,C] fp32; None for the latter where nothing `pools`."""
        raise NotImplementedError

    def after(
        self, expand: Product, excite: Excite | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The pass over what the expansion gives, before `excite`."""
        return self(expand(x), excite is not None)


class Excite(Pass):
    """gate = sigmoid(W2 silu(W1 pooled + b1) + b2).

    Args:
        layers: W1 [R,C,1,1], b1 [R], W2 [C,R,1,1], b2 [C]; a bias may be None.
        dtype: of the images, and of the weights as the kernel reads them.
        activation: in the place of SiLU.
        gate: in the place of the sigmoid, see `reference.activations`.
    """

    bias_dtype: torch.dtype | None = None  # None for the weights'

    def __init__(
        self,
        backend: str,
        layers: tuple[Tensor | None, ...],
        dtype: torch.dtype,
        activation: str,
        gate: str,
    ) -> None:
        super().__init__(backend)
        self.activation, self.gate = activation, gate
        self.layers: list[Any] = [
            None if layer is None else self.keep(layer.detach().to(to, copy=True).contiguous())
            for layer, to in zip(layers, (dtype, self.bias_dtype or dtype) * 2, strict=True)
        ]

    def __call__(self, pooled: Tensor) -> Tensor:
        """gate [N,C] fp32 of pooled [N,C] fp32."""
        raise NotImplementedError


class MBConv:
    """A whole block: [expand ->] depthwise -> [excite ->] project."""

    def __init__(
        self,
        expand: Product | None,
        depthwise: Depthwise,
        excite: Excite | None,
        project: Product,
        residual: bool,
    ) -> None:
        self.expand, self.depthwise = expand, depthwise
        self.excite, self.project = excite, project
        self.residual = residual

    def passes(self) -> Iterator[Pass]:
        """Every pass in order."""
        passes = (self.expand, self.depthwise, self.excite, self.project)
        yield from (each for each in passes if each is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """y [N,Cout,Ho,Wo] of x [N,Cin,H,W]."""
        if self.expand:
            h, pooled = self.depthwise.after(self.expand, self.excite, x)
        else:
            h, pooled = self.depthwise(x, self.excite is not None)
        gate = None if self.excite is None or pooled is None else self.excite(pooled)
        return self.project(h, gate, x if self.residual else None)


class FusedMBConv:
    """A whole block: dense [-> project]."""

    def __init__(self, dense: Convolution, project: Product | None, residual: bool) -> None:
        self.dense, self.project, self.residual = dense, project, residual

    def passes(self) -> Iterator[Pass]:
        """Every pass in order."""
        yield self.dense
        if self.project is not None:
            yield self.project

    def __call__(self, x: Tensor) -> Tensor:
        """y [N,Cout,Ho,Wo] of x [N,Cin,H,W]."""
        h = self.dense(x)
        if self.project is not None:
            return self.project(h, None, x if self.residual else None)
        return h.add_(x) if self.residual else h
