"""A network as it was at one moment, packed for inference, and whether it is still that."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _RecordFunctionFast

from effnet_fast import backends
from effnet_fast.inference import staleness
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.inference.network_spec import CPU, LAST_MAP, LOGITS, TAPS, NetworkSpec, spec_of
from effnet_fast.inference.parts import Course, InferenceParts, changed_step, parts_of
from effnet_fast.inference.sizes import Sizes
from effnet_fast.locks import ForkLock
from effnet_fast.modules import in_turn, structure


def runs_in_one_call(device: torch.device, backend: str) -> bool:
    """Whether this backend runs a network on this device in one call into C++."""
    return device.type == "cpu" and backends.parse(backend)[0] in ("auto", "cpu")


class Engine(Protocol):
    """Packed weights of a network, and the call that runs it.

    Attributes:
        spec: what is packed; its modules may have changed since.
        sizes: of what is packed.
        device: of the weights, and of the images.
        nbytes: of the packed weights.
        captured: whether a CUDA graph that a caller captures reads the weights.
    """

    spec: NetworkSpec
    sizes: Sizes
    device: torch.device
    nbytes: int
    captured: bool

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """Logits or pooled features [N,C] where the network has them, and the maps [N,C,H,W].

        Args:
            x: images [N,C,H,W] on the engine's device, with any strides.
            dtype: of the results.

        Raises:
            ValueError: a convolution has no output.
        """

    def close(self) -> None:
        """Frees what only later calls would use; the engine can still be called."""


def run_network(
    model: Any,
    engine: Engine,
    x: Tensor,
    dtype: torch.dtype,
    caller: str,
    snapshot: Snapshot | None = None,
) -> Any:
    """The result of the network's forward: the engine's, and modules on it where those are left.

    A profiler sees it as a range of its own, with x's shape: the engine calls no operator by which
    it would show.

    Args:
        dtype: of the engine's results, which modules take; what they give is left as it is.
        caller: what calls it, by which the range is named.
        snapshot: the engine's, where stages may have hooks.
    """
    run = partial(_run_network, model, engine, x, dtype)
    if snapshot is not None and engine.spec.observed:
        run = partial(_run_observed, model, snapshot, engine, x, dtype)
    if not _profiler_enabled():
        return run()
    with _RecordFunctionFast(_range_name(model, caller), [x], {}):
        return run()


def _run_observed(model: Any, snapshot: Snapshot, engine: Engine, x: Tensor, dtype: Any) -> Any:
    """As `_run_network`, and calls the hooks of stages on the maps that they take and give.

    Where a hook changes the map, or the network, the modules behind that stage run one by one.
    """
    spec, given = engine.spec, parts_of(model)
    y, maps = engine(x, dtype)
    seen: dict[int, Any] = dict(zip(spec.shown, engine.sizes.as_stock(maps, x), strict=True))
    course = given.course()
    for number in spec.observed:
        module, map_ = course.stages[number - 1].module, seen[number]
        before = map_.clone()
        for hook in tuple(module._forward_hooks.values()):
            result = hook(module, (seen[number - 1],), seen[number])
            if result is not None:
                seen[number] = result
        is_same = seen[number] is map_ and torch.equal(before, map_)
        if not is_same or not snapshot.is_fresh(model):
            return _resume(given, course, seen, number)
    if spec.result == TAPS:
        return [seen[tap] for tap in given.taps]
    if spec.result == LOGITS:
        return y
    assert given.head is not None
    return given.head.run(seen[len(course.stages)]) if y is None else given.head.finish(y)


def _resume(given: InferenceParts, course: Course, seen: dict[int, Any], number: int) -> Any:
    """What the modules behind a stage of this number make of its map."""
    walk = in_turn.Walk(seen[number])
    for later, stage in enumerate(course.stages[number:], start=number + 1):
        walk.call(stage.module, **stage.arguments)
        if later in given.taps:
            seen[later] = walk.result()
    if given.head is None:
        return [seen[tap] for tap in given.taps]
    return given.head.run(walk.result())


def _range_name(model: Any, caller: str) -> str:
    """As "effnet_fast::plan EfficientNet b0"; other packages' networks have no variant."""
    names = type(model).__name__, getattr(getattr(model, "variant", None), "name", "")
    return f"effnet_fast::{caller} {' '.join(filter(None, names))}"


def _run_network(model: Any, engine: Engine, x: Tensor, dtype: torch.dtype) -> Any:
    spec = engine.spec
    if spec.result == LOGITS:
        y, _ = engine(x, dtype)
        assert y is not None
        return y
    if spec.result == TAPS:
        return engine.sizes.as_stock(engine(x, dtype)[1], x)
    y, maps = engine(x, dtype)
    head = parts_of(model).head
    assert head is not None
    if spec.result == LAST_MAP:
        return head.run(*(maps if head.hides else engine.sizes.as_stock(maps, x)))
    assert y is not None
    return head.finish(y)


class Snapshot:
    """What was read of a network, the watch over it, and its engines.

    Args:
        model: the network, which is not kept.
        device: where all that is packed has to be.
        graphs: CUDA graphs that an engine keeps at most.
        every_byte: whether `is_fresh` compares every byte of the weights, which on a CPU alone can
            be done, instead of a few values.
        observes: whether stages may have forward hooks, as in `spec_of`.

    Raises:
        RefusedError: no engine can run the network, with the reason.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device = CPU,
        graphs: int = 0,
        *,
        every_byte: bool = False,
        observes: bool = False,
    ) -> None:
        self.spec: NetworkSpec = spec_of(model, device, observes=observes)
        self.engines: dict[tuple[torch.dtype, str], Engine] = {}  # by dtype and backend
        self._kind, self._device, self._graphs = type(model), device, graphs
        self._parts = parts_of(model).identity
        stages = parts_of(model).course().stages if self.spec.observed else ()
        self._observed = [stages[number - 1].module for number in self.spec.observed]
        self._watch = staleness.watch(
            self.spec.modules, self.spec.tensors(), every_byte, self._observed
        )
        self._lock = ForkLock()

    def is_fresh(self, model: Any) -> bool:
        """Whether the network is still what was read, its weights still what was packed."""
        if type(model) is not self._kind or changed_step(model):
            return False
        if parts_of(model).identity != self._parts:
            return False
        if not all(structure.is_observed(module.__dict__) for module in self._observed):
            return False
        return bool(self._watch.holds(torch.get_num_threads()))

    def engine_for(self, dtype: torch.dtype, backend: str) -> Engine:
        """The engine, packed at its first use.

        Args:
            dtype: in which layers hand on their results.
            backend: "cpu" or "cpu:<instruction set>", or those of `LaunchedEngine`.

        Raises:
            RuntimeError: a backend cannot run the network.
        """
        engine = self.engines.get((dtype, backend))
        if engine is None:
            with self._lock:  # another thread may have packed by now
                if not self.engines:  # what is written while they are packed is seen next time
                    self._watch.remember(torch.get_num_threads())
                engine = self.engines.get((dtype, backend)) or self._pack(dtype, backend)
                self.engines[dtype, backend] = engine
        return engine

    def _pack(self, dtype: torch.dtype, backend: str) -> Engine:
        base, isa = backends.parse(backend)
        if runs_in_one_call(self._device, backend):
            return CpuEngine(self.spec, dtype is torch.bfloat16, isa)
        # Imported here: the launchers for GPUs would be an eighth of `import effnet_fast.models`.
        from effnet_fast.inference.launched_engine import LaunchedEngine

        return LaunchedEngine(self.spec, dtype, base, self._graphs)


class SnapshotKeeper:
    """The latest snapshot of one network; copies and pickles of a keeper hold none."""

    def __init__(self) -> None:
        self._lock = ForkLock()
        self.snapshot: Snapshot | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def current(self, model: Any) -> Snapshot | None:
        """A snapshot of the network as it is; None where `_renew` gives none."""
        snapshot = self.snapshot
        if snapshot is None or not snapshot.is_fresh(model):
            with self._lock:  # another thread may have renewed it by now
                stale, snapshot = snapshot, self.snapshot
                if snapshot is stale or snapshot is None or not snapshot.is_fresh(model):
                    snapshot = self.snapshot = self._renew(model)
        return snapshot

    def refresh(self, model: Any) -> None:
        """Takes a snapshot whether or not the latest is fresh."""
        with self._lock:
            self.snapshot = self._renew(model)

    def _renew(self, model: Any) -> Snapshot | None:
        """The snapshot in the place of the latest; the lock is held."""
        raise NotImplementedError
