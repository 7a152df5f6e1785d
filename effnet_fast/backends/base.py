"""What a backend is, what a call asks of it, and the reasons that several backends share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

OPS = (
    "dwconv_bn_silu",
    "mbconv",
    "pointwise_bn_act",
    "pointwise_bn_silu_pool",
    "squeeze_excite",
    "stem_conv_bn_silu",
)
Launcher = Callable[..., Any]
PLAIN = (torch.Tensor, torch.nn.Parameter)  # whose memory kernels read


class OpArgs(NamedTuple):
    """What decides whether a backend can run a call."""

    x: torch.Tensor  # input [N,C,H,W]
    others: tuple[torch.Tensor | None, ...] = ()  # the other floating tensors, None where absent
    kernel: tuple[int, int] = (1, 1)  # spatial kernel size, 1 where there is none
    stride: int = 1  # spatial
    inference: bool = False  # whether BN is in eval mode and no gradient is wanted
    activations: tuple[str, ...] = ("silu",)  # all that the call applies, see `reference`
    gate: str | None = "sigmoid"  # of a squeeze-and-excite; None for a block that has none


# Why a backend cannot run (op, args, instruction set), None where it can. Without args it is asked
# about the op in general.
Reason = Callable[[str, OpArgs | None, str], str | None]


class Backend:
    """One backend with kernels.

    Attributes:
        name: as `use_backend` takes it.
        dtypes: of the images that its kernels take.
        devices: types of the devices whose memory they read.
        reason: see `Reason`.
        activations: that its kernels apply.
        gates: of a squeeze-and-excite; None among them for an MBConv without one.
        packed_as: ops that run over packed weights wherever another op does.
    """

    def __init__(
        self,
        name: str,
        dtypes: tuple[torch.dtype, ...],
        devices: tuple[str, ...],
        reason: Reason,
        packed_as: Mapping[str, str] | None = None,
        *,
        activations: tuple[str, ...],
        gates: tuple[str | None, ...],
    ) -> None:
        self.name, self.dtypes, self.devices, self.reason = name, dtypes, devices, reason
        self.activations, self.gates = activations, gates
        self.packed_as = packed_as or {}
        self._packed_passes = ""
        self._launchers: dict[str, Launcher] = {}
        self._modules: dict[str, str] = {}

    def add_launchers(self, module: str, ops: Iterable[str]) -> None:
        """Tells a module whose functions launch the registered ops that bear their names.

        The module is imported when one of them runs for the first time.
        """
        self._modules.update(dict.fromkeys(ops, module))

    def launches(self, op: str) -> bool:
        """Whether it has a kernel for a registered op."""
        return op in self._modules

    def launcher(self, op: str) -> Launcher:
        """The function that launches a registered op.

        Raises:
            RuntimeError: there is none.
        """
        if op not in self._launchers:
            if op not in self._modules:
                raise RuntimeError(f"the {self.name} backend has no kernel for {op}")
            module = importlib.import_module(self._modules[op])
            self._launchers[op] = getattr(module, op)
        return self._launchers[op]

    def pack_passes_by(self, module: str) -> None:
        """Tells the module that has the passes over packed weights; imported when they are used."""
        self._packed_passes = module

    def packed_passes(self) -> ModuleType:
        """The module that `pack_passes_by` told."""
        return importlib.import_module(self._packed_passes)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether C is the innermost dimension of x [N,C,H,W]; N, H and W may have any stride."""
    n, c, h, w = x.shape
    if c == 1 or x.numel() == 0:
        return True
    return x.stride(1) == 1 and (h * w == 1 or min(x.stride(2), x.stride(3)) >= 1)


def _reaches_kernels(kind: type) -> bool:
    """Whether a kernel would take a tensor of this class, or the class sees to it by itself."""
    own: Any = kind
    return kind in PLAIN or own.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _kinds_reason(backend: Backend, args: OpArgs) -> str | None:
    """Why a backend's kernels do not know the activations or the gate of a call."""
    for activation in args.activations:
        if activation not in backend.activations:
            known = " and ".join(backend.activations)
            return f"the activation is {activation}; the {backend.name} backend has {known}"
    if args.gate in backend.gates:
        return None
    if args.gate is None:
        return f"the {backend.name} backend has no kernel for blocks without squeeze-excite"
    known = " and ".join(gate for gate in backend.gates if gate)
    return f"the gate is {args.gate}; the {backend.name} backend has {known}"


def kernel_reason(backend: Backend, op: str, args: OpArgs) -> str | None:
    """Why a backend's kernels do not take these arguments, the device of x aside."""
    dtypes, x, device, dtype = backend.dtypes, args.x, args.x.device, args.x.dtype
    for tensor in (x, *args.others):
        if tensor is not None and not _reaches_kernels(type(tensor)):
            return f"a tensor is a {type(tensor).__name__}, kernels take torch.Tensor alone"
    if dtype not in dtypes:
        names = ", ".join(str(taken).removeprefix("torch.") for taken in dtypes[:-1])
        last = str(dtypes[-1]).removeprefix("torch.")
        return f"x is {dtype}, the {backend.name} backend takes {names} and {last}"
    allowed = (dtype, torch.float32)
    for tensor in args.others:
        if tensor is None:
            continue
        if tensor.device != device:
            return f"x is on {device}, but another argument is on {tensor.device}"
        if tensor.dtype not in allowed:
            return f"a parameter is {tensor.dtype}; allowed are {dtype} and torch.float32"
    if reason := _kinds_reason(backend, args):
        return reason
    if args.kernel[0] != args.kernel[1] or args.kernel[0] % 2 == 0:
        return f"the kernel is {args.kernel[0]}x{args.kernel[1]}; square and odd is supported"
    if op == "pointwise_bn_act" and not args.inference:
        return "this version has an inference kernel alone: no training, no gradients"
    if op == "stem_conv_bn_silu":  # of any kernel, stride and layout
        return None
    if args.stride not in (1, 2):
        return f"the stride is {args.stride}; 1 and 2 are supported"
    if not is_channels_last(x):
        return (
            f"x has strides {tuple(x.stride())}; the {backend.name} backend takes channels_last: "
            f"x.contiguous(memory_format=torch.channels_last)"
        )
    return None
