"""The caller's choice of a backend, and the backend that runs a call.

"auto" picks a backend for each call and falls back to the reference; a backend named by the caller
never falls back, it raises the reason. "cpu:avx2" and the like force one instruction set.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

from effnet_fast.backends import native, preference
from effnet_fast.backends.base import OPS, Backend, Launcher, OpArgs
from effnet_fast.backends.cpu import CPU
from effnet_fast.backends.cuda import CUDA, SIMT
from effnet_fast.backends.triton import TRITON
from effnet_fast.locks import ForkLock

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
TEST_BACKENDS = (SIMT.name,)
WITH_KERNELS = {backend.name: backend for backend in (CPU, CUDA, SIMT, TRITON)}

_current: ContextVar[str] = ContextVar("effnet_fast_backend", default="auto")
# Whether any thread is inside `use_backend`: torch.compile can read and guard a plain global, but
# no ContextVar.
_chosen = False
_choices = 0
_lock = ForkLock()


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


def backend_of(name: str) -> Backend:
    """The backend that a resolved name other than "reference" stands for.

    Raises:
        ValueError: the name is of no backend with kernels.
    """
    base, _ = parse(name)
    if base not in WITH_KERNELS:
        raise ValueError(f"{name!r} has no kernels; allowed are {', '.join(WITH_KERNELS)}")
    return WITH_KERNELS[base]


@functools.cache
def launcher_of(backend: str, op: str) -> Launcher:
    """The function that launches a registered op on a resolved backend other than the reference."""
    return backend_of(backend).launcher(op)


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
    return WITH_KERNELS[base].reason(op, args, isa)


def explain(backend: str, op: str, args: OpArgs) -> str | None:
    """Why no kernel runs this call on a backend; None where one does.

    Args:
        backend: as `can_run` takes it; "auto" gives the reason of each backend that it tries.
    """
    if backend != "auto":
        return can_run(backend, op, args)
    row = preference.preferred(args.x.device.type, op, args.x.shape[1])
    reasons = [WITH_KERNELS[name].reason(op, args, "") for name in row.order]
    if None in reasons:
        return None
    return "; ".join(dict.fromkeys(map(str, reasons))) or row.reason


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
        RuntimeError: the named backend cannot run the call; the message has the reason.
    """
    if backend == "auto":
        backend = current_backend()
    transformed = in_transform()
    if transformed and backend == "auto":
        return "reference"
    chosen = choose(backend, op, args)
    if transformed and chosen != "reference":
        raise RuntimeError(
            f"backend {backend!r} cannot run {op}: torch.func transforms and forward-mode "
            "differentiation go through the reference"
        )
    return chosen


def module_backend() -> str:
    """The backend of a module's call: in a transform the reference, whatever is named."""
    return "reference" if in_transform() else current_backend()


def choose(backend: str, op: str, args: OpArgs) -> str:
    """As `resolve` for a call that is known to be in no transform, on the caller's choice."""
    if backend == "auto":
        for preferred in preference.order(args.x.device.type, op, args.x.shape[1]):
            if WITH_KERNELS[preferred].reason(op, args, "") is None:
                return preferred
            native.warn_if_missing()
        return "reference"
    if reason := can_run(backend, op, args):
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
    return backend
