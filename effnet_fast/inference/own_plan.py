"""The engines that a network's own forward uses in eval mode on a CPU."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.inference import images
from effnet_fast.inference.network_spec import CPU
from effnet_fast.inference.parts import parts_of
from effnet_fast.inference.sizes import WrongSizeError
from effnet_fast.inference.snapshot import (
    Snapshot,
    SnapshotKeeper,
    run_network,
    runs_in_one_call,
)
from effnet_fast.modules import observed, structure
from effnet_fast.modules.structure import RefusedError

LONGEST_WAIT = 31  # forwards until a network that was refused is looked at again
WASTED = 2  # snapshots in a row, each used once, after which weights must be seen twice


_plans: weakref.WeakKeyDictionary[nn.Module, OwnPlan] = weakref.WeakKeyDictionary()


def plan_of(model: nn.Module) -> OwnPlan:
    """The plan of a module that cannot hold it: its class, and its state, are another's."""
    plan = _plans.get(model)
    return _plans.setdefault(model, OwnPlan()) if plan is None else plan


def forget_plan(model: nn.Module) -> None:
    """Frees what the plan of such a module has packed."""
    if (plan := _plans.get(model)) is not None:
        plan.forget()


class OwnPlan(SnapshotKeeper):
    """The snapshot that a network's own forward uses; it belongs to the network.

    A snapshot is taken at the first forward. Where two in a row were of use to a single call each,
    as in a forward after every step of training, unchanged weights must first be seen twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._served = self._wasted = 0
        self._wait = self._next_wait = 0
        self._unproven: Snapshot | None = None  # whose weights have been seen once

    def forget(self) -> None:
        """Frees what is packed."""
        if self.snapshot is not None or self._next_wait:
            with self._lock:
                self._let_go()
                self._wait = self._next_wait = 0

    def run(self, model: Any, x: Tensor, backend: str) -> Any:
        """The network's forward from packed weights; None where its blocks must run one by one."""
        if not model.plan:
            self.forget()
        if obstacle(model, x, backend) is not None:
            return None
        x = x.resolve_neg()
        dtype = _dtype_of(x)
        snapshot = self._snapshot(model, dtype)
        if snapshot is None:
            return None
        engine = snapshot.engine_for(dtype, _name_of(backend))
        # None for PyTorch's own errors, and its empty results.
        if x.shape[1] != engine.sizes.in_channels or min(x.shape) == 0:
            return None
        try:
            with backends.use_backend(backend) if engine.spec.observed else nullcontext():
                return run_network(model, engine, x, dtype, "plan", snapshot)
        except WrongSizeError:
            return None

    def _snapshot(self, model: Any, dtype: torch.dtype) -> Snapshot | None:
        """That of the weights as they are; None for a forward block by block."""
        snapshot = self.current(model)
        if snapshot is None:
            return None
        if snapshot is self._unproven:
            self._unproven = None
            return None
        if is_autocast() and snapshot.spec.has_frozen_norm:
            return None  # which gives the dtype of its buffers
        if not (is_autocast() or snapshot.spec.dtype is dtype):
            return None
        self._served += 1
        return snapshot

    def _renew(self, model: Any) -> Snapshot | None:
        if self._wait > 0:
            self._wait -= 1
            return None
        self._let_go()
        try:
            snapshot = Snapshot(model, every_byte=True, observes=True)
        except RefusedError:
            self._wait = self._next_wait
            self._next_wait = min(2 * self._next_wait + 1, LONGEST_WAIT)
            return None
        self._wait = self._next_wait = self._served = 0
        self._unproven = snapshot if self._wasted >= WASTED else None
        return snapshot

    def _let_go(self) -> None:
        if self.snapshot and self.snapshot.engines:
            self._wasted = self._wasted + 1 if self._served < 2 else 0
        self.snapshot = self._unproven = None


def is_training(model: nn.Module) -> bool:
    """Whether a network is in training mode; a slice of a sequence is not told, its parts are."""
    if type(model) in structure.SEQUENCES:
        return any(child is not None and child.training for child in model._modules.values())
    return model.training


def is_autocast() -> bool:
    """Whether autocast is on for CPUs."""
    return torch.is_autocast_enabled("cpu")


def _dtype_of(x: Tensor) -> torch.dtype:
    """In which layers hand on their results."""
    return torch.get_autocast_dtype("cpu") if is_autocast() else x.dtype


def _name_of(backend: str) -> str:
    return "cpu" if backend == "auto" else backend


def obstacle(model: Any, x: Any, backend: str) -> str | None:
    """Why a forward on x may not run from packed weights, whatever the layers are; None if it may.

    Code that was replaced is asked for here: the snapshot stays, for when the replacement is gone.
    """
    if torch.is_grad_enabled():
        return "a gradient may be wanted: call it under torch.no_grad() or inference_mode()"
    if is_training(model):
        return "it is in training mode"
    if not model.plan:
        return "its `plan` is False"
    if not runs_in_one_call(CPU, backend):
        return f"the backend is {backend!r}"
    return (
        _image_obstacle(x)
        or backends.can_run(_name_of(backend), backends.OPS[0])
        or parts_of(model).code.replaced()
    )


def _image_obstacle(x: Any) -> str | None:
    """Why images do not lie in memory as the engine reads them, or somebody watches; else None."""
    if not isinstance(x, Tensor) or observed.has_observer(x):
        return observed.recorder() or f"the images are {type(x).__name__}, no plain tensor"
    if x.device.type != "cpu":
        return f"the images are on {x.device}, and one call is for CPUs"
    try:
        images.checked(x, "cpu", backends.NATIVE_DTYPES)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    dtype = _dtype_of(x)
    return None if dtype in backends.NATIVE_DTYPES else f"no kernel takes {dtype}"
