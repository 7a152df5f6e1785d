"""The code that a module's stock forward runs, and whether it is still the code that it was.

The fused ops stand in for that code: for `forward` of torch's classes and of ours, for the methods
and functions that those call. Who replaces one of them, on its class or in its module, means what
runs below it: profilers that patch `torch.nn.functional`, instrumented layers, fake quantisation.
A module whose stock forward would meet the replacement is refused; a replaced `forward` of its own
class has been met by then, and is none of its concern.

This is the one table. It holds what other code may replace and forward reads at each call. Names
that begin with an underscore in `torch.nn.functional`, and what the operators are made of, are left
out: they are private to one version of PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import (
    _functions,
    activation,
    batchnorm,
    conv,
    dropout,
    linear,
    padding,
    pooling,
)

from effnet_fast.modules import layers, same_padding, stochastic_depth, structure
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.structure import RefusedError

_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_CALLS = "Module._wrapped_call_impl"  # which is `__call__`, too
_PATCHED = object()  # stands for the original of what had been replaced before this import

Owner = type | ModuleType
Row = tuple[Owner, str]  # who has the attributes, and their names with blanks in between


def _is_original(owner: Owner, name: str, value: object) -> bool:
    """Whether the attribute is what the module that makes its owner put there.

    `functools.wraps` copies the name and the module of what it wraps, but not its globals. Another
    function of the same module, as in `F.silu = F.hardswish`, is found there under its own name.
    """
    if isinstance(value, _BUILT_IN):
        return value.__name__ == name
    if isinstance(value, ModuleType):  # which torch imports under another name
        return value is F
    if not isinstance(value, FunctionType):
        return False
    path = name
    if isinstance(owner, type):
        owner = next(base for base in owner.__mro__ if name in base.__dict__)
        path = f"{owner.__qualname__}.{name}"
    home = sys.modules[owner.__module__ if isinstance(owner, type) else owner.__name__]
    if value.__globals__ is not vars(home):
        return False
    found: Any = home
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is not value or value.__qualname__ in (path, _CALLS)


def _name(owner: Owner) -> str:
    return owner.__qualname__ if isinstance(owner, type) else owner.__name__


def _value(owner: Owner, path: str) -> object:
    """What an owner has under a name or a path; `_PATCHED` for nothing."""
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return _PATCHED


def _comparison(expressions: Iterable[tuple[str, Any, Any]]) -> Callable[[], bool]:
    """A function that evaluates all of them; AttributeError where an attribute is gone.

    Written out and compiled: a loop or `operator.attrgetter` takes twice the time, and from Python
    3.12 on five times. It is asked for each block of a forward.

    Args:
        expressions: of `a` and `b`, and the two.
    """
    tests: list[str] = []
    scope: dict[str, object] = {"len": len}
    for index, (expression, a, b) in enumerate(expressions):
        tests.append(expression.format(a=f"a{index}", b=f"b{index}"))
        scope |= {f"a{index}": a, f"b{index}": b}
    return eval(f"lambda: {' and '.join(tests)}", scope)


class Stock:
    """Attributes of classes and modules, as they were when this package was imported.

    Args:
        rows: see `Row`.
        members: names that a class must not have, since its instances have them in their tables;
            a property of the class would come before these.
        below: tables that belong to this one.
        pinned: owners, names and values of attributes that are theirs, whoever made them; a name
            may be a path, as "apply.__func__".
    """

    def __init__(
        self,
        *rows: Row,
        members: Iterable[tuple[type, str]] = (),
        below: Iterable[Stock] = (),
        pinned: Iterable[tuple[Owner, str, object]] = (),
    ) -> None:
        self.originals: dict[tuple[Owner, str], object] = {}
        self._members: dict[type, tuple[str, ...]] = {}
        for table in below:
            self.originals |= table.originals
            self._members |= table._members
        for owner, names in rows:
            for name in names.split():
                value = getattr(owner, name)
                original = value if _is_original(owner, name, value) else _PATCHED
                self.originals[owner, name] = original
        for owner, name, value in pinned:
            self.originals.setdefault((owner, name), value)
        self._members |= {kind: (*names.split(),) for kind, names in members}
        # Reloaders replace the code of a function and leave the function.
        self._codes = {
            f: f.__code__ for f in self.originals.values() if isinstance(f, FunctionType)
        }
        self._holds = _comparison(self._expressions())

    def _expressions(self) -> Iterator[tuple[str, Any, Any]]:
        for (owner, name), original in self.originals.items():
            yield f"{{a}}.{name} is {{b}}", owner, original
        for function, code in self._codes.items():
            yield "{a}.__code__ is {b}", function, code
        for base in {base: None for kind in self._members for base in kind.__mro__[:-1]}:
            # A name can only come with one more entry; `in` for each takes three times as long.
            yield "len({a}) == {b}", vars(base), len(vars(base))

    def replaced(self) -> str | None:
        """The first that is no longer what it was, in words; None where all are. 2 to 5 us."""
        try:
            if self._holds():
                return None
        except AttributeError:
            pass  # deleted; the loop names it
        for (owner, name), original in self.originals.items():
            if _value(owner, name) is not original or original is _PATCHED:
                return f"{_name(owner)}.{name.partition('.')[0]} is replaced"
            if (
                isinstance(original, FunctionType)
                and original.__code__ is not self._codes[original]
            ):
                return f"the code of {_name(owner)}.{name} is replaced"
        for kind, names in self._members.items():
            for name in names:
                if any(name in vars(base) for base in kind.__mro__):
                    return f"{_name(kind)}.{name} hides what its instances have"
        self._holds = _comparison(
            self._expressions()
        )  # a class has another attribute, none of these
        return None

    def require(self) -> None:
        """Raises RefusedError where one is no longer what it was."""
        if (reason := self.replaced()) is not None:
            raise RefusedError(reason)


_CALL = "__call__ _call_impl"  # on the way from a call of a module to its forward
_FORWARD = f"{_CALL} forward"

# What fused ops themselves compute by, in backward too, and stock in part: a replacement would give
# the one another meaning than the other.
_OURS: tuple[Row, ...] = (
    (torch, "mm bmm sigmoid rsqrt"),
    (torch.Tensor, "__add__ __iadd__ __sub__ __mul__ __truediv__"),
    (F, "linear"),
)
# Below a layer's own forward: convolution, norm and activation.
LAYER = Stock(
    (nn.Conv2d, f"{_FORWARD} _conv_forward"),
    (same_padding.Conv2dSame, f"{_FORWARD} _conv_forward"),
    (nn.BatchNorm2d, f"{_FORWARD} _check_input_dim"),
    (nn.SiLU, _FORWARD),
    (nn.Module, "__getattr__"),
    (layers.Conv2dNormActivation, "forward_stock __iter__"),
    (F, "conv2d pad batch_norm silu"),
    (torch, "batch_norm"),
    *_OURS,
    (torch._C._nn, "silu silu_"),
    (same_padding, "same_padding F"),
    (conv, "F"),
    (batchnorm, "F"),
    (activation, "F"),
    members=(
        (nn.Conv2d, "weight bias"),
        (same_padding.Conv2dSame, "weight bias"),
        (nn.BatchNorm2d, "weight bias running_mean running_var num_batches_tracked"),
    ),
)
# Below a SyncBatchNorm, beside the code of a layer.
SYNC_BATCH_NORM = Stock(
    (nn.SyncBatchNorm, f"{_FORWARD} _check_input_dim _check_non_zero_input_channels"),
    (_functions.SyncBatchNorm, "forward backward"),
    members=((nn.SyncBatchNorm, "weight bias running_mean running_var num_batches_tracked"),),
    pinned=((batchnorm, "sync_batch_norm", _functions.SyncBatchNorm),),
)
CALLED_LAYER = Stock(
    (layers.Conv2dNormActivation, _FORWARD),
    (nn.Sequential, f"{_FORWARD} __iter__"),
    (layers.Sequential, f"{_FORWARD} __iter__"),
)
_POOL = Stock(
    (nn.AdaptiveAvgPool2d, _FORWARD),
    (pooling, "F"),
    (F, "adaptive_avg_pool2d"),
    (torch._C._nn, "adaptive_avg_pool2d"),
)
# Below a block's own forward.
BLOCK = Stock(
    (layers.MBConv, "forward_stock"),
    (FusedMBConv, "forward_stock"),
    (layers.SqueezeExcitation, f"{_FORWARD} gate"),
    (nn.Sigmoid, _FORWARD),
    (stochastic_depth.StochasticDepth, _FORWARD),
    (stochastic_depth, "stochastic_depth"),
    members=(
        (layers.SqueezeExcitation, "avgpool fc1 fc2 activation scale_activation"),
        (layers.MBConv, "block stochastic_depth"),
        (FusedMBConv, "block stochastic_depth"),
    ),
    below=(LAYER, CALLED_LAYER, _POOL),
)
# Below modules that other packages' blocks have beside these. Their code may name F by `nn`.
PAD = Stock(
    (nn.ConstantPad2d, _FORWARD),
    (nn.ZeroPad2d, _FORWARD),
    (nn, "functional"),
    (F, "pad"),
    (torch._C._nn, "pad"),
    (padding, "F"),
)
IDENTITY = Stock((nn.Identity, _FORWARD))
FLATTEN = Stock((nn.Flatten, _FORWARD))
DROPOUT = Stock((nn.Dropout, _FORWARD), (F, "dropout"), (dropout, "F"))
# Below an activation or a gate of this name; those of the tables above stand for SiLU and sigmoid.
# Fused ops differentiate ReLU6 a second time by its own function, which its module does not call.
ACTIVATIONS = {
    "identity": IDENTITY,
    "relu": Stock((nn.ReLU, _FORWARD), (F, "relu"), (torch, "relu relu_")),
    "relu6": Stock(
        (nn.ReLU6, _FORWARD),
        (F, "hardtanh relu6"),
        (torch._C._nn, "hardtanh hardtanh_ relu6"),
    ),
    "hardswish": Stock(
        (nn.Hardswish, _FORWARD), (F, "hardswish"), (torch._C._nn, "hardswish hardswish_")
    ),
    "hardsigmoid": Stock(
        (nn.Hardsigmoid, _FORWARD), (F, "hardsigmoid"), (torch._C._nn, "hardsigmoid hardsigmoid_")
    ),
}
# SiLU's and sigmoid's code is below every layer and block.
structure.activation_checks |= {name: table.require for name, table in ACTIVATIONS.items()}
# Below the forward of a network that pools its last layer's result at once.
HEAD = Stock((torch, "flatten"), below=(LAYER, CALLED_LAYER, _POOL))
# Below the forward of a network that runs in one call.
NETWORK = Stock(
    (layers.MBConv, _FORWARD),
    (FusedMBConv, _FORWARD),
    (nn.Linear, _FORWARD),
    (F, "linear"),
    (linear, "F"),
    members=((nn.Linear, "weight bias"),),
    below=(BLOCK, HEAD, DROPOUT, *ACTIVATIONS.values()),
)

# Which of these names an instance must not have in its place: those that are looked up on it.
assert {
    name
    for owner, name in NETWORK.originals
    if isinstance(owner, type) and issubclass(owner, nn.Module) and not name.startswith("__")
} <= structure.METHODS
