"""Which backend runs an op: the caller's choice, and what each backend can do.

"auto" picks a backend for each call and falls back to the reference; a backend named by the caller
never falls back, it raises the reason. "cpu:avx2" and the like force one instruction set.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from effnet_fast.backends import native, preference

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
TEST_BACKENDS = ("simt",)  # the CUDA kernels run on the CPU, where the tests have built that
OPS = (
    "dwconv_bn_silu",
    "mbconv",
    "pointwise_bn_act",
    "pointwise_bn_silu_pool",
    "squeeze_excite",
    "stem_conv_bn_silu",
)
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_KERNELS = (3, 5)  # sides of the depthwise kernels
CUDA_OPS = ("dwconv_bn_silu", "squeeze_excite")
# Of squeeze-and-excite: what a block's shared memory and the grid's second dimension hold.
CUDA_MAX_HIDDEN, CUDA_MAX_IMAGES = 6000, 4 * 65535
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_current: ContextVar[str] = ContextVar("effnet_fast_backend", default="auto")
# Whether any thread is inside `use_backend`: torch.compile can read and guard a plain global, but
# no ContextVar.
_chosen = False
_choices = 0
_lock = threading.Lock()


class OpArgs(NamedTuple):
    """What decides whether a backend can run a call.

    Attributes:
        x: input [N,C,H,W].
        others: the other floating tensors of the call (None where absent).
        kernel: spatial kernel size, 1 where there is none.
        stride: spatial stride.
        inference: whether BN is in eval mode and no gradient is wanted.
    """

    x: torch.Tensor
    others: tuple[torch.Tensor | None, ...] = ()
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    inference: bool = False


@functools.cache
def parse(name: str) -> tuple[str, str]:
    """Splits "cpu:avx2" into ("cpu", "avx2"); the second part is "" where not given.

    Raises:
        ValueError: the name is not a backend.
    """
    base, _, isa = name.partition(":")
    if base not in BACKENDS + TEST_BACKENDS or (isa and base != "cpu"):
        raise ValueError(
            f"unknown backend {name!r}; allowed are {', '.join(BACKENDS)}, and cpu:<instruction "
            f"set> to force one of the CPU's"
        )
    return base, isa


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops and models inside the block on one backend ("auto" lifts an outer choice).

    The choice belongs to the current thread or task.

    Raises:
        ValueError: the name is not a backend.
    """
    parse(name)
    token = _current.set(name)
    _count_choice(1)
    try:
        yield
    finally:
        _count_choice(-1)
        _current.reset(token)


def _count_choice(step: int) -> None:
    global _choices, _chosen
    with _lock:
        _choices += step
        _chosen = _choices > 0


def current_backend() -> str:
    """The backend of the innermost `use_backend`, "auto" outside of any."""
    if torch.compiler.is_compiling() and not _chosen:
        return "auto"
    return _current.get()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether C is the innermost dimension of x [N,C,H,W]; N, H and W may have any stride."""
    n, c, h, w = x.shape
    if c == 1 or x.numel() == 0:
        return True
    return x.stride(1) == 1 and (h * w == 1 or min(x.stride(2), x.stride(3)) >= 1)


def _cpu_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := native.unavailable_reason():
        return reason
    if isa and (missing := native.load().isa_unavailable_reason(isa)):
        return f"cpu:{isa}: {missing}"
    if args is None:
        return None
    if args.x.device.type != "cpu":
        return f"x is on {args.x.device}, the cpu backend takes CPU tensors"
    return _kernel_reason("cpu", NATIVE_DTYPES, op, args)


@functools.cache
def _triton_unavailable_reason() -> str | None:
    try:
        importlib.import_module("effnet_fast.triton_kernels.launching")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'effnet-fast[triton]'"
    return None


def _interprets() -> bool:
    return importlib.import_module("effnet_fast.triton_kernels.launching").INTERPRETS


def _triton_device_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        if _interprets():
            return None
        return (
            "x is on cpu, the triton backend takes CUDA tensors; CPU tensors only in a process "
            "started with TRITON_INTERPRET=1, for tests"
        )
    if device.type != "cuda":
        return f"x is on {device}, the triton backend takes CUDA tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has compute capability {major}.{minor}; 8.0 and newer is supported"
    return None


def _triton_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := _triton_unavailable_reason():
        return reason
    if args is None:
        if torch.cuda.is_available():
            return _triton_device_reason(torch.device("cuda", torch.cuda.current_device()))
        return None if _interprets() else "there is no CUDA device"
    if reason := _triton_device_reason(args.x.device):
        return reason
    if args.x.dtype is torch.bfloat16 and _interprets():
        return "x is torch.bfloat16, which Triton's interpreter computes wrongly"
    return _kernel_reason("triton", TRITON_DTYPES, op, args)


def _kernel_reason(
    backend: str, dtypes: tuple[torch.dtype, ...], op: str, args: OpArgs
) -> str | None:
    """Why a backend's kernels do not take these arguments, the device of x aside."""
    x = args.x
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[:-1])
        last = str(dtypes[-1]).removeprefix("torch.")
        return f"x is {x.dtype}, the {backend} backend takes {names} and {last}"
    allowed = (x.dtype, torch.float32)
    for tensor in args.others:
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"x is on {x.device}, but another argument is on {tensor.device}"
        if tensor.dtype not in allowed:
            return f"a parameter is {tensor.dtype}; allowed are {x.dtype} and torch.float32"
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
            f"x has strides {tuple(x.stride())}; the {backend} backend takes channels_last: "
            f"x.contiguous(memory_format=torch.channels_last)"
        )
    return None


def _cuda_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := native.unavailable_reason():
        return reason
    on_cuda = args is not None and args.x.device.type == "cuda"
    device = args.x.device.index if args is not None and on_cuda else 0
    if reason := _cuda_probe(device) or _cuda_op_reason(op):
        return reason
    if args is None:
        return None
    if not on_cuda:
        return f"x is on {args.x.device}, the cuda backend takes CUDA tensors"
    return _kernel_reason("cuda", CUDA_DTYPES, op, args) or _cuda_size_reason("cuda", op, args)


def _simt_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := native.simt_unavailable_reason() or _cuda_op_reason(op):
        return reason
    if args is None:
        return None
    if args.x.device.type != "cpu":
        return f"x is on {args.x.device}, the simt backend takes CPU tensors"
    return _kernel_reason("simt", CUDA_DTYPES, op, args) or _cuda_size_reason("simt", op, args)


_probes: dict[int, str] = {}  # what the extension said, by device


def _cuda_probe(device: int) -> str | None:
    if device not in _probes:
        _probes[device] = native.load().cuda_probe(device)
    return _probes[device] or None


def _cuda_op_reason(op: str) -> str | None:
    return None if op in CUDA_OPS else f"this version has no CUDA kernel for {op}"


def _cuda_size_reason(backend: str, op: str, args: OpArgs) -> str | None:
    if op == "dwconv_bn_silu":
        if args.kernel[0] in CUDA_KERNELS:
            return None
        sides = " and ".join(f"{k}x{k}" for k in CUDA_KERNELS)
        return f"the kernel is {args.kernel[0]}x{args.kernel[1]}; {backend} has {sides}"
    reduce_weight = args.others[0]
    assert reduce_weight is not None
    if reduce_weight.shape[0] > CUDA_MAX_HIDDEN:
        return f"R is {reduce_weight.shape[0]}; {backend} takes up to {CUDA_MAX_HIDDEN}"
    if args.x.shape[0] > CUDA_MAX_IMAGES:
        return f"N is {args.x.shape[0]}; {backend} takes up to {CUDA_MAX_IMAGES}"
    return None


_REASONS: dict[str, Callable[[str, OpArgs | None, str], str | None]] = {
    "cpu": _cpu_reason,
    "cuda": _cuda_reason,
    "simt": _simt_reason,
    "triton": _triton_reason,
}


def can_run(backend: str, op: str, args: OpArgs | None = None) -> str | None:
    """Why `backend` cannot run `op`, or None where it can.

    Args:
        backend: a name as `use_backend` takes it.
        op: one of OPS.
        args: the call in question; None asks about the backend in general.

    Raises:
        ValueError: unknown backend or op.
    """
    base, isa = parse(backend)
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; allowed are {', '.join(OPS)}")
    if base in ("auto", "reference"):
        return None
    return _REASONS[base](op, args, isa)


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: only the reference can."""
    # torch.compile follows this; with peek_interpreter_stack it believes to be in a transform.
    in_functorch = torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    return in_functorch or forward_ad._current_level >= 0


def resolve(backend: str, op: str, args: OpArgs) -> str:
    """The backend that runs this call: never "auto".

    A call's own `backend` comes before the surrounding `use_backend`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the named backend cannot run the call; the text gives the reason.
    """
    if backend == "auto":
        backend = current_backend()
    if backend == "auto":
        if in_transform():
            return "reference"
        for preferred in preference.order(args.x.device.type, op):
            if _REASONS[preferred](op, args, "") is None:
                return preferred
        return "reference"
    if reason := can_run(backend, op, args):
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
    if backend != "reference" and in_transform():
        raise RuntimeError(
            f"backend {backend!r} cannot run {op}: torch.func transforms and forward-mode "
            "differentiation go through the reference"
        )
    return backend
