"""1x1 convolution, BatchNorm, activation, gate and residual.

Training, and eval with gradients, run the reference composition.
"""

from __future__ import annotations

from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, resolve
from effnet_fast.ops.call import wants_gradient
from effnet_fast.ops.gate import batch_norm
from effnet_fast.ops.registration import autocast, empty_nhwc, register
from effnet_fast.reference.pointwise_bn_act import Act, activation_of, check_arguments


def empty_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """y [N,Cout,H,W], unwritten."""
    return empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


eval_op = register(
    "pointwise_bn_act_eval",
    empty_eval,
    {
        "x": "image NCHW",
        "weight": "floats OC11",
        **batch_norm("O"),
        "gate": "floats? NC*",
        "residual": "floats? NOHW",
    },
)


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    act: Act = ...,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """y = act(bn(conv(x * gate, weight))) + residual.

    Args:
        x: [N,Cin,H,W], fp32 or bf16, channels_last for the "cpu" backend. Under autocast it is cast
            as a convolution's input is.
        weight: [Cout,Cin,1,1] in x's dtype or fp32.
        bn_weight, bn_bias: [Cout] in x's dtype or fp32, or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        act: "silu", "identity", "relu", "relu6", "hardswish", or None for "identity"; where it is
            not given, `activation`.
        activation: the name that the other ops have for `act`; None to take `act`. Where neither
            is given, "silu".
        gate: [N,Cin,1,1] or None.
        residual: [N,Cout,H,W] or None.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits,
            and "cpu" has no kernel for training or gradients yet.

    Returns:
        y [N,Cout,H,W] in x's dtype, channels_last.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.pointwise_bn_act`; ValueError for an
            unknown backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), section 4.
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    activation = activation_of(act, activation)
    check_arguments(x, layer, gate, residual, training)
    x, _ = autocast(x)
    tensors = (*layer, gate, residual)
    inference = not (training or wants_gradient(x, *tensors))
    named = () if activation == "identity" else (activation,)  # every kernel can do without one
    args = OpArgs(x, tensors, inference=inference, activations=named)
    chosen = resolve(backend, "pointwise_bn_act", args)
    if chosen == "reference":
        return reference.pointwise_bn_act(
            x, *layer, activation=activation, gate=gate, residual=residual,
            training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    return eval_op(x, *layer, gate, residual, eps, activation, chosen)
