"""MBConv in training as a sequence of passes: what each computes, their order, what is kept.

BN and activation are never written: a producer gives its raw output z and its norm, the consumer
applies them as it loads. The caller gives the passes: a backend's, or in tests the reference's.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from effnet_fast.ops.call import Call, Norm
from effnet_fast.ops.norms import MEAN, VAR
from effnet_fast.reference.arguments import Layer, Sides
from effnet_fast.reference.mbconv import SqueezeExciteParams

Vectors = tuple[Tensor | None, ...]
PER_LAYER = 5  # tensors of a convolution: weight, bn_weight, bn_bias, mean, var
NO_LAYER = (None,) * PER_LAYER  # in the place of one that is absent


class Passes(Protocol):
    """The passes on one backend.

    Symbols: z raw convolution output, zh = (z - mean) * rstd, u = weight * zh + bias, a = act(u),
    where act is one of `reference.activations`; 1, 2, 3 the expansion, the depthwise convolution,
    the projection; g the gate; C the expanded channels; du, dz the gradients of u, z.

    Images are [N,C,H,W] in their input's dtype, channels_last without gaps; vectors and sums are
    fp32. norm is [5,C] as `norms` says, by the batch where mean and var are None. sums are [2,C]:
    sum du and sum du * zh, which are also the gradients of BatchNorm's bias and weight; None where
    it does not normalise by the batch. A result that is not wanted is [0].

    Source: original; Ioffe & Szegedy (arXiv 1502.03167), section 3, for BatchNorm's gradient.
    """

    def expand(
        self,
        x: Tensor,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """z1 = conv(x, weight [C,Cin,1,1]), norm1."""

    def depthwise(
        self,
        x: Tensor,
        x_norm: Tensor | None,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        stride: int,
        padding: Sides,
        eps: float,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """z2 = conv_dw(a, weight [C,1,K,K]), norm2; a = act(bn(x)), or x without x_norm."""

    def squeeze(self, z: Tensor, norm: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """pooled [N,C] = mean a2; slopes [2,N,C] = sum act'(u2) and sum act'(u2) * zh2."""

    def excite(
        self,
        pooled: Tensor,
        reduce_weight: Tensor,
        reduce_bias: Tensor | None,
        expand_weight: Tensor,
        expand_bias: Tensor | None,
        activation: str,
        gate_kind: str,
    ) -> tuple[Tensor, Tensor]:
        """hidden [N,R] = W1 pooled + b1, gate [N,C] = sigmoid(W2 silu(hidden) + b2).

        activation stands for the SiLU and gate_kind for the sigmoid.
        """

    def project(
        self,
        z2: Tensor,
        norm2: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """z3 = conv(g * a2, weight [Cout,C,1,1]), norm3; g = 1 without a gate."""

    def finish(
        self, z: Tensor, norm: Tensor, row_scale: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """y = u3 * row_scale [N] + residual."""

    def finish_backward(
        self, grad_y: Tensor, row_scale: Tensor | None, z: Tensor, norm: Tensor
    ) -> Tensor:
        """sums3 [2,Cout]."""

    def project_backward(
        self,
        grad_y: Tensor,
        row_scale: Tensor | None,
        z3: Tensor,
        norm3: Tensor,
        sums3: Tensor | None,
        weight: Tensor,
        z2: Tensor,
        norm2: Tensor,
        gate: Tensor | None,
        wanted: list[bool],
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """e [N,C,H,W] = dz3 W3, sums [3,N,C], dW3; wanted: e with its sums, and dW3.

        sums: sum e * a2, sum e * act'(u2), sum e * act'(u2) * zh2.
        """

    def excite_backward(
        self,
        sums: Tensor,
        slopes: Tensor,
        pooled: Tensor,
        hidden: Tensor,
        gate: Tensor,
        reduce_weight: Tensor,
        expand_weight: Tensor,
        pixels: int,
        activation: str,
        gate_kind: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [N,C] = dpooled / pixels, sums2 [2,C], and the gradients of the four parameters.

        sums as of `project_backward`, slopes as of `squeeze`; pixels = H * W. The weights'
        gradients are [R,C] and [C,R].
        """

    def depthwise_backward(
        self,
        e: Tensor,
        gate: Tensor | None,
        q: Tensor | None,
        z2: Tensor,
        norm2: Tensor,
        sums2: Tensor | None,
        x: Tensor,
        x_norm: Tensor | None,
        weight: Tensor,
        residual: Tensor | None,
        stride: int,
        padding: Sides,
        wanted: list[bool],
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f [N,C,H,W] = da1 * act'(u1), dW2, sums1; wanted: f with its sums, and dW2.

        du2 = (e * g + q) * act'(u2), e * act'(u2) without gate and q. Without x_norm f is dx, the
        residual's gradient included, and has no sums.
        """

    def expand_backward(
        self,
        f: Tensor,
        z1: Tensor,
        norm1: Tensor,
        sums1: Tensor | None,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """dx, the residual's gradient included, and dW1."""


class Layers(NamedTuple):
    """expand, depthwise, project: weight, bn_weight, bn_bias, mean, var.

    expand and excite are None where the block has none.
    """

    expand: tuple[Any, ...] | None
    depthwise: tuple[Any, ...]
    excite: SqueezeExciteParams | None
    project: tuple[Any, ...]


class Saved(NamedTuple):
    """What backward needs beside the parameters; z1 is None where it is to be computed again.

    pooled, slopes, hidden and gate are None in a block without squeeze-and-excite.
    """

    x: Tensor
    z1: Tensor | None
    z2: Tensor
    z3: Tensor
    norm1: Tensor | None
    norm2: Tensor
    norm3: Tensor
    pooled: Tensor | None
    slopes: Tensor | None
    hidden: Tensor | None
    gate: Tensor | None
    row_scale: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of what `Layers` has, mean and var left out."""

    x: bool
    expand: tuple[bool, bool, bool]
    depthwise: tuple[bool, bool, bool]
    excite: tuple[bool, bool, bool, bool]
    project: tuple[bool, bool, bool]


ALL = Needs(True, (True,) * 3, (True,) * 3, (True,) * 4, (True,) * 3)


class Grads(NamedTuple):
    """As `Needs`; None for what is not wanted."""

    x: Tensor | None
    expand: Vectors
    depthwise: Vectors
    excite: Vectors
    project: Vectors


def normalised_by(layer: Layer, training: bool) -> tuple[Any, Any, Any, Any, Any]:
    """The layer with no statistics where it normalises by the batch's."""
    weight, bn_weight, bn_bias, mean, var = layer
    return weight, bn_weight, bn_bias, None if training else mean, None if training else var


def forward(
    passes: Passes, x: Tensor, row_scale: Tensor | None, layers: Layers, call: Call
) -> tuple[Tensor, Saved]:
    """y [N,Cout,Ho,Wo] of x [N,Cin,H,W], and what backward needs."""
    first, second, third = call.norms
    activation = call.activation
    z1 = norm1 = pooled = slopes = hidden = gate = None
    h = x
    if layers.expand is not None:
        h, norm1 = passes.expand(x, *normalised_by(layers.expand, first.training), first.eps)
        z1 = h
        if first.exchange:
            norm1 = first.exchange.merge(norm1, z1, first.eps, *layers.expand[1:3])
    depthwise = normalised_by(layers.depthwise, second.training)
    z2, norm2 = passes.depthwise(
        h, norm1, *depthwise, call.stride[0], call.padding, second.eps, activation
    )
    if second.exchange:
        norm2 = second.exchange.merge(norm2, z2, second.eps, *layers.depthwise[1:3])
    if layers.excite is not None:
        pooled, slopes = passes.squeeze(z2, norm2, activation)
        hidden, gate = passes.excite(pooled, *layers.excite, call.se_activation, call.gate)
    project = normalised_by(layers.project, third.training)
    z3, norm3 = passes.project(z2, norm2, gate, *project, third.eps, activation)
    if third.exchange:
        norm3 = third.exchange.merge(norm3, z3, third.eps, *layers.project[1:3])
    y = passes.finish(z3, norm3, row_scale, x if call.residual else None)
    saved = Saved(x, z1, z2, z3, norm1, norm2, norm3, pooled, slopes, hidden, gate, row_scale)
    return y, saved


def sums_of_images(sums: Tensor) -> Tensor:
    """sums2 [2,C] of du2 = e * act'(u2) from the sums [3,N,C] of `Passes.project_backward`.

    They are added up in float64, so that no order of theirs shows.
    """
    return sums[1:].double().sum(1).to(sums.dtype)


def _excite_backward(
    passes: Passes, sums: Tensor, saved: Saved, excite: SqueezeExciteParams | None, call: Call
) -> tuple[Tensor | None, Tensor, Vectors]:
    """As `Passes.excite_backward`: q, sums2, and the gradients of the four parameters.

    Without squeeze-and-excite du2 is e * act'(u2), whose sums over an image `sums` holds.
    """
    if excite is None:
        return None, sums_of_images(sums), (None,) * 4
    pooled, slopes, hidden, gate = saved.pooled, saved.slopes, saved.hidden, saved.gate
    assert pooled is not None and slopes is not None and hidden is not None and gate is not None
    q, sums2, *grads = passes.excite_backward(
        sums, slopes, pooled, hidden, gate, excite.reduce_weight, excite.expand_weight,
        saved.z2.shape[2] * saved.z2.shape[3], call.se_activation, call.gate,
    )  # fmt: skip
    return q, sums2, tuple(grads)


def inner_sums(norm: Norm, sums: Tensor, rows: Tensor | None, wanted: bool) -> Tensor | None:
    """What dz has of the sums [2,C] of a BatchNorm; None where its statistics are constants.

    rows: its norm [5,C]; wanted: whether anything depends on dz.
    """
    if not norm.training:
        return None
    if norm.exchange is None or rows is None or not wanted:
        return sums
    return norm.exchange.sums(sums, rows)


class Reach(NamedTuple):
    """How far back gradients are wanted: behind these layers, or of them."""

    excite: bool
    depthwise: bool
    expand: bool


def reach_of(needs: Needs, layers: Layers) -> Reach:
    """Which passes something that is wanted depends on."""
    expand = needs.x or (layers.expand is not None and any(needs.expand))
    depthwise = expand or any(needs.depthwise)
    excite = depthwise or (layers.excite is not None and any(needs.excite))
    return Reach(excite, depthwise, expand)


def pick(needs: tuple[bool, ...], *grads: Tensor | None) -> Vectors:
    """The gradients that are wanted, None for the others."""
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=True))


def backward(
    passes: Passes,
    grad_y: Tensor,
    saved: Saved,
    layers: Layers,
    call: Call,
    needs: Needs = ALL,
) -> Grads:
    """The gradients; passes that nothing wanted depends on are left out."""
    first, second, third = call.norms
    x, z1, z2, z3, norm1, norm2, norm3, *_, gate, row_scale = saved
    added = grad_y if call.residual else None
    to_excite, to_depthwise, to_expand = reach_of(needs, layers)
    expand: Vectors = (None,) * 3
    depthwise: Vectors = (None,) * 3
    excite: Vectors = (None,) * 4
    sums3 = passes.finish_backward(grad_y, row_scale, z3, norm3)
    inner = inner_sums(third, sums3, norm3, to_excite or needs.project[0])
    e, sums, grad_weight = passes.project_backward(
        grad_y, row_scale, z3, norm3, inner, layers.project[0],
        z2, norm2, gate, [to_excite, needs.project[0]], call.activation,
    )  # fmt: skip
    project = pick(needs.project, grad_weight, sums3[1], sums3[0])
    if not to_excite:
        return Grads(None, expand, depthwise, excite, project)
    q, sums2, layer_grads = _excite_backward(passes, sums, saved, layers.excite, call)
    excite = pick(needs.excite, *layer_grads)
    if not to_depthwise:
        return Grads(None, expand, depthwise, excite, project)
    h = x
    if layers.expand is not None:
        if z1 is None:
            assert norm1 is not None
            layer = (*layers.expand[:2], None, norm1[MEAN], norm1[VAR])  # z1 needs no bias
            z1 = passes.expand(x, *normalised_by(layer, False), first.eps)[0]
        h = z1
    inner = inner_sums(second, sums2, norm2, True)
    f, grad_weight, sums1 = passes.depthwise_backward(
        e, gate, q, z2, norm2, inner, h, norm1, layers.depthwise[0],
        added if layers.expand is None else None, call.stride[0], call.padding,
        [to_expand, needs.depthwise[0]], call.activation,
    )  # fmt: skip
    depthwise = pick(needs.depthwise, grad_weight, sums2[1], sums2[0])
    if layers.expand is None or not to_expand:
        return Grads(f if needs.x else None, expand, depthwise, excite, project)
    assert z1 is not None and norm1 is not None
    inner = inner_sums(first, sums1, norm1, needs.x or needs.expand[0])
    grad_x, grad_weight = passes.expand_backward(
        f, z1, norm1, inner, x, layers.expand[0], added,
        [needs.x, needs.expand[0]],
    )  # fmt: skip
    expand = pick(needs.expand, grad_weight, sums1[1], sums1[0])
    return Grads(grad_x if needs.x else None, expand, depthwise, excite, project)
