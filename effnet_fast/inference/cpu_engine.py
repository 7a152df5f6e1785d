"""A network packed for inference: what every plan is, that of the CPU, and a network's own plans.

See `packing` for what is packed, `watching` for how changes are noticed, and `launch_plan` for the
plan for GPUs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from effnet_fast import backends
from effnet_fast.backends import native
from effnet_fast.inference import cpu_packing, staleness
from effnet_fast.inference.network_spec import LOGITS, METHODS, POOLED, Network, recognise
from effnet_fast.modules.structure import PLAIN, RefusedError

if TYPE_CHECKING:
    from effnet_fast.models.backbone import Backbone

LONGEST_WAIT = 31  # forwards until a network that was refused is looked at again
WASTED = 2  # plans in a row, each used once, after which weights must be seen twice


class Plan(Protocol):
    """Packed weights of a network, and the call that runs it.

    Attributes:
        network: what is packed.
        device: of the weights, and of the images.
        nbytes: of the packed weights.
        captured: whether a CUDA graph that a caller captures reads the weights.
    """

    network: Network
    device: torch.device
    nbytes: int
    captured: bool

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """Logits or pooled features [N,C] where the network has them, and the maps [N,C,H,W].

        Args:
            x: images [N,C,H,W] on the plan's device, with any strides.
            dtype: of the results.

        Raises:
            ValueError: a convolution has no output.
        """

    def close(self) -> None:
        """Frees what only calls to come would use; the plan can still be called."""


class CpuPlan:
    """The network in one call into C++.

    Args:
        network: what is packed.
        bf16: in bf16, where the instruction set multiplies it; otherwise, and where it does not,
            in fp32.
        isa: the instruction set, "" for the best.

    Attributes:
        network, device, nbytes, captured: as `Plan` has them.
    """

    device = torch.device("cpu")
    captured = False

    def __init__(self, network: Network, bf16: bool, isa: str) -> None:
        extension = native.load()
        self.network = network
        bf16 = bf16 and extension.network_has_bf16(isa)
        packed = cpu_packing.Packed(cpu_packing.Format(bf16, extension.network_tile_units(isa)))
        with torch.inference_mode():
            cpu_packing.pack_stem(packed, network.stem)
            for block in network.blocks:
                cpu_packing.pack_block(packed, block.layers, block.tap)
            if network.head:
                cpu_packing.pack_head(packed, network.head)
            if network.linear is not None:
                cpu_packing.pack_classifier(packed, network.linear.weight, network.linear.bias)
        self.nbytes = packed.nbytes
        self._native = extension.Network(
            *(isa, bf16, packed.nbytes, packed.stem, network.stem_tap),
            *(packed.blocks, packed.head, packed.classifier),
        )

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """As `Plan.__call__` says; x is fp32 or bf16, the results are computed in fp32."""
        n, _, height, width = x.shape
        maps = [
            torch.empty((n, h, w, c), dtype=torch.float32, device="cpu")
            for c, h, w in self.network.maps(height, width)
        ]
        y = None
        if self.network.outputs:
            y = torch.empty((n, self.network.outputs), dtype=torch.float32, device="cpu")
        if n:
            self._native.run(
                *(n, height, width, x.data_ptr(), x.dtype is torch.bfloat16, x.stride()),
                *(0 if y is None else y.data_ptr(), [m.data_ptr() for m in maps]),
                torch.get_num_threads(),
            )
        return None if y is None else y.to(dtype), [m.permute(0, 3, 1, 2).to(dtype) for m in maps]

    def close(self) -> None:
        """Does nothing: there is nothing beside the weights."""


def complete(model: Any, plan: Plan, x: Tensor, dtype: torch.dtype) -> Any:
    """What the network's forward gives: the plan's result, and what is left for modules to do.

    Args:
        model: the network that the plan is of.
        plan: its plan.
        x: images [N,C,H,W].
        dtype: of the result.
    """
    network = plan.network
    if network.result == LOGITS:
        y, _ = plan(x, dtype)
        assert y is not None
        return y
    if hasattr(model, "_taken"):
        return plan(x, dtype)[1]
    y, maps = plan(x, network.dtype)
    if network.result == POOLED:
        return model.classifier(y).to(dtype)
    with model._execution():
        y = model.features[-1](maps[0])
    return model.forward_head(y).to(dtype)


class _Seen:
    """A network as it was last seen, and the plans made of it."""

    def __init__(self, model: Backbone) -> None:
        self.kind = type(model)
        self.network = recognise(model)
        self.watch = staleness.watch(model, self.network.modules, self.network.tensors())
        self.plans: dict[tuple[bool, str], CpuPlan] = {}
        self.served = 0

    def holds(self, model: Backbone) -> bool:
        unpatched = type(model) is self.kind and METHODS.isdisjoint(model.__dict__)
        return unpatched and self.watch.holds()


class OwnPlans:
    """The plans that a network's own forward uses; copies and pickles of it start without.

    A plan is made at the first forward. Where two plans in a row were of use to a single call each,
    as in a forward after every step of training, unchanged weights must first be seen twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: _Seen | None = None
        self._wasted = 0
        self._wait = self._next_wait = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnPlans:
        return OwnPlans()

    def __reduce__(self) -> tuple[type[OwnPlans], tuple[()]]:
        return OwnPlans, ()

    def forget(self) -> None:
        """Frees what is packed."""
        with self._lock:
            self._let_go()
            self._wait = self._next_wait = 0

    def find(self, model: Backbone, bf16: bool, isa: str) -> CpuPlan | None:
        """The plan for the weights as they are, or None for a forward block by block."""
        seen = self._seen
        if seen is None or not seen.holds(model):
            with self._lock:
                seen = self._look_again(model)
            if seen is None:
                return None
        plan = seen.plans.get((bf16, isa))
        if plan is None:
            with self._lock:
                plan = seen.plans.get((bf16, isa)) or CpuPlan(seen.network, bf16, isa)
                seen.plans[bf16, isa] = plan
        seen.served += 1
        return plan

    def _look_again(self, model: Backbone) -> _Seen | None:
        if self._seen is not None and self._seen.holds(model):  # another thread has
            return self._seen
        if self._wait > 0:
            self._wait -= 1
            return None
        self._let_go()
        try:
            self._seen = _Seen(model)
        except RefusedError:
            self._wait = self._next_wait
            self._next_wait = min(2 * self._next_wait + 1, LONGEST_WAIT)
            return None
        self._wait = self._next_wait = 0
        return self._seen if self._wasted < WASTED else None

    def _let_go(self) -> None:
        if self._seen and self._seen.plans:
            self._wasted = self._wasted + 1 if self._seen.served < 2 else 0
        self._seen = None


def run_own_plan(model: Any, x: Tensor) -> Any:
    """The network's forward by its own plan; None where its blocks must do it one by one."""
    if torch.is_grad_enabled() or model.training or not isinstance(x, Tensor):
        return None
    if not model.plan:
        model.__dict__.pop("_own_plans", None)
        return None
    backend = backends.current_backend() if model.backend == "auto" else model.backend
    base, isa = backends.parse(backend)
    if base not in ("auto", "cpu") or not _is_plain(x):
        return None
    if backends.can_run(f"cpu:{isa}" if isa else "cpu", backends.OPS[0]):
        return None
    dtype = x.dtype
    autocast = torch.is_autocast_enabled("cpu")
    if autocast:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in backends.NATIVE_DTYPES:
        return None
    plans = model.__dict__.get("_own_plans") or model.__dict__.setdefault("_own_plans", OwnPlans())
    plan = plans.find(model, dtype is torch.bfloat16, isa)
    if plan is None or not (autocast or plan.network.dtype is dtype):
        return None
    if x.shape[1] != plan.network.in_channels or min(x.shape) == 0:
        return None  # PyTorch's own errors, and its empty results
    return complete(model, plan, x, dtype)


def _is_plain(x: Tensor) -> bool:
    """Whether x [N,C,H,W] lies in memory, and nothing records the operators."""
    return (
        type(x) in PLAIN
        and x.device.type == "cpu"
        and x.dtype in backends.NATIVE_DTYPES
        and x.dim() == 4
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # exported implicitly
        and torch._C._len_torch_dispatch_stack() == 0
        and not backends.in_transform()
    )
