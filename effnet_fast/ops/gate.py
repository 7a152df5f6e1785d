"""The one check before native code: what each argument of a call must be.

An op declares its arguments beside its schema, in the words of csrc/bindings/gate_rules.h, where
the check is: "image NCHW inner" is a plain tensor [N,C,H,W] in one of the backend's dtypes with C
innermost, "floats? C with mean" a vector of any floating dtype that is None where mean is. Letters
are sizes that must agree within the call. Wrong types and dtypes raise TypeError, wrong shapes,
strides and lengths ValueError, another device and a tensor without memory RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from effnet_fast.backends import native
from effnet_fast.reference.activations import ACTIVATIONS, GATES

# A list of tensors has a rule for each.
Rule = str | list[str]
Rules = Mapping[str, Rule]

# What arguments of these names are in every op.
NAMES: Rules = {
    "activation": f"name {' '.join(ACTIVATIONS)}",
    "se_activation": f"name {' '.join(ACTIVATIONS)}",
    "gate_kind": f"name {' '.join(GATES)}",
}
# The geometry of a depthwise convolution, and of any other.
DEPTHWISE: Rules = {"stride": "stride", "padding": "sides"}
CONVOLUTION: Rules = {"stride": "strides", "padding": "sides"}


def batch_norm(channels: str, by_batch: bool = False) -> dict[str, Rule]:
    """The vectors of a BatchNorm; by_batch: mean and var may be absent, both of them."""
    vector, statistic = f"floats? {channels}", "floats? " if by_batch else "floats "
    return {
        "bn_weight": vector,
        "bn_bias": vector,
        "mean": statistic + channels,
        "var": f"{statistic}{channels} with mean",
    }


def layer(weight: str, *before: str) -> list[str]:
    """A convolution's weight of this shape and the vectors of its BatchNorm, as a list."""
    channels = weight[0]
    vectors = [f"floats? {channels}"] * 2 + [f"floats {channels}"] * 2
    return [*before, f"floats {weight}", *vectors]


def gate(
    op: str, rules: Rules, devices: Iterable[str], dtypes: Iterable[torch.dtype]
) -> Callable[..., None]:
    """A function of the arguments in order that raises for what no kernel may see.

    Args:
        op: the name in front of an error.
        rules: of every argument, in order; "any" for those that are not looked at.
        devices: types of devices where the tensors may be.
        dtypes: that images may have.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return native.load().argument_gate(op, dict(rules), list(devices), names, Tensor, nn.Parameter)
