"""What the ops share: registration with torch.library and the way from tensors to the extension."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast import backends
from effnet_fast.backends import native
from effnet_fast.ops.gate import NAMES, Rule, Rules, gate
from effnet_fast.ops.norms import NORM_ROWS

Ints = Sequence[int]
LIBRARY = torch.library.Library("effnet_fast", "DEF")
BF16 = torch.bfloat16
RULES: dict[str, dict[str, Rule]] = {}  # what each op's arguments must be, in order, by its name

# Annotations of a kernel's arguments, as schemas write them.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Layer": "Tensor?[]",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "Ints": "int[]",
    "Sides": "int[4]",
    "list[bool]": "bool[]",
    "list[float]": "float[]",
}


def _arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The kinds of a function's arguments by name, without the backend."""
    return {k: v for k, v in function.__annotations__.items() if k not in ("return", "backend")}


def schema_of(name: str, function: Callable[..., Any]) -> str:
    """The schema of an op of this name with a function's annotated arguments, then the backend."""
    results = function.__annotations__["return"].removeprefix("tuple[").removesuffix("]")
    kinds = _arguments(function).items()
    arguments = ", ".join(f"{_TYPES[kind]} {argument}" for argument, kind in kinds)
    return f"{name}({arguments}, str backend) -> ({results})"


def register(
    name: str, fake: Callable[..., Any], rules: Rules, contract: Any = None
) -> Callable[..., Any]:
    """Registers `effnet_fast::<name>`, which the backend launches that it is given; returns the op.

    Args:
        name: see `launchers` for what launches it.
        fake: makes the results, unwritten.
        rules: what the arguments must be, see `gate`; every tensor has one, and NAMES has those of
            activations and gates.
        contract: whose arguments and results the op has, where that is not the fake.
    """
    arguments = [*_arguments(contract or fake), "backend"]
    rules = {**NAMES, **rules}
    RULES[name] = {argument: rules.get(argument, "any") for argument in arguments}
    lists = frozenset(i for i, rule in enumerate(RULES[name].values()) if isinstance(rule, list))

    @functools.cache
    def steps(backend: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        launch, owner = backends.launcher_of(backend, name), backends.backend_of(backend)
        isa = isa_of(backend)
        if isa and (missing := native.load().isa_unavailable_reason(isa)):
            raise ValueError(f"{name}: backend {backend!r}: {missing}")
        return gate(name, RULES[name], owner.devices, owner.dtypes), launch

    def run(*args: Any) -> Any:
        check, launch = steps(args[-1])
        check(*args)
        if lists:
            return launch(*(_in_memory(a) if i in lists else a for i, a in enumerate(args)))
        return launch(*args)

    LIBRARY.define(schema_of(name, contract or fake))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"effnet_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.effnet_fast, name).default


def _in_memory(tensors: list[Any]) -> list[Any]:
    """A list's tensors without negative bits, which PyTorch takes from single tensors alone."""
    if any(t is not None and t.is_neg() for t in tensors):
        return [None if t is None else t.resolve_neg() for t in tensors]
    return tensors


@functools.cache
def isa_of(backend: str) -> str:
    """The instruction set that a resolved backend names, "" for the best one."""
    return backends.parse(backend)[1]


# x [N,C,H,W] with its values in NHWC order and no gaps; x itself where they are.
nhwc = functools.partial(Tensor.contiguous, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """x [N,C,H,W] itself where C is innermost, whatever the other strides; else as `nhwc`."""
    return x if backends.is_channels_last(x) else nhwc(x)


def empty_nhwc(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised channels_last tensor of `shape` with the dtype and device of `like`."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def empty_normed(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A convolution's output z as by `empty_nhwc`, and its norm [5,C], see `norms`; unwritten."""
    z = empty_nhwc(like, shape)
    return z, z.new_empty((len(NORM_ROWS), shape[1]), dtype=torch.float32)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor without gaps in `dtype`; itself where it is that already."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def fp32(vector: Tensor | None) -> Tensor | None:
    """A vector [C] as the kernels read it, fp32 without gaps; None stays None."""
    return None if vector is None else dense(vector, torch.float32)


def address(tensor: Tensor | None) -> int:
    """The tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """The address of each."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def native_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A weight without gaps in x's dtype or fp32, whichever it has; fp32 otherwise."""
    if weight.dtype is not torch.float32 and weight.dtype is not x.dtype:
        weight = weight.float()
    return weight if weight.is_contiguous() else weight.contiguous()


def native_vectors(bn: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """The vectors [C] as the kernels read them, to be kept alive, and their addresses."""
    vectors = [None if vector is None else dense(vector, torch.float32) for vector in bn]
    return vectors, addresses(*vectors)


def native_layer(
    weight: Tensor, bn: Sequence[Tensor | None], x: Tensor
) -> tuple[Tensor, list[Tensor | None], list[int]]:
    """`native_weight` and `native_vectors`."""
    return native_weight(weight, x), *native_vectors(bn)


def native_layers(
    parameters: Sequence[Any], dtypes: Container[torch.dtype] = backends.NATIVE_DTYPES
) -> tuple[list[Any], list[int]]:
    """The parameters without gaps in one dtype, to be kept alive, and their addresses.

    The dtype is the first one's if all and the kernels have it, else fp32.
    """
    dtype = parameters[0].dtype
    if dtype not in dtypes or any(p is not None and p.dtype is not dtype for p in parameters):
        dtype = torch.float32
    kept = [None if p is None else dense(p, dtype) for p in parameters]
    return kept, addresses(*kept)


def autocast(x: Tensor) -> tuple[Tensor, bool]:
    """x as a convolution takes it, cast under autocast, and whether autocast is on."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, False
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x, True
    return x.to(torch.get_autocast_dtype(device)), True
