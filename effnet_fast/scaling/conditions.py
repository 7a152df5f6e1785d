"""The conditions of a run: everything beside the network that memory and latency depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from effnet_fast import backends
from effnet_fast.models.variants import Variant
from effnet_fast.scaling.checks import whole
from effnet_fast.scaling.memory import OPTIMIZER_TENSORS, Memory, count_memory
from effnet_fast.scaling.memory_plans import plans

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a network runs.

    Args:
        batch: images per call.
        dtype: torch.float32, torch.bfloat16 or torch.float16, of parameters and activations.
            A name among "fp32", "bf16" and "fp16" is taken too.
        training: a training step instead of a forward pass.
        device: "cpu" or "cuda", or a torch.device of these types.
        plan: how blocks are computed, as for `count_memory`; None means "fused" where this package
            has kernels that run here, else "stock".
        optimizer_tensors: tensors that the optimizer keeps for each parameter.

    Raises:
        ValueError: a field outside what is allowed.
    """

    batch: int = 1
    dtype: torch.dtype = torch.float32
    training: bool = False
    device: str = "cpu"
    plan: str | None = None
    optimizer_tensors: int = OPTIMIZER_TENSORS

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("optimizer_tensors", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if not isinstance(self.training, bool):
            raise ValueError(f"training must be True or False, got {self.training!r}")
        object.__setattr__(self, "dtype", DTYPES.get(str(self.dtype), self.dtype))
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", self.device.type)
        if self.dtype not in DTYPE_NAMES:
            allowed = ", ".join(map(str, DTYPE_NAMES))
            raise ValueError(f"dtype must be one of {allowed}, got {self.dtype!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.plan is None:
            object.__setattr__(self, "plan", "fused" if self._has_kernels() else "stock")
        elif self.plan not in plans(self.mode):
            raise ValueError(
                f"plan must be one of {', '.join(plans(self.mode))} for {self.mode}, "
                f"got {self.plan!r}"
            )
        elif self.plan == "fused" and not self._could_fuse():
            raise ValueError(
                f"plan 'fused' describes the CPU's kernels in fp32 and bf16, not {self.device} in "
                f"{DTYPE_NAMES[self.dtype]}"
            )

    @property
    def mode(self) -> str:
        """ "training" or "inference"."""
        return "training" if self.training else "inference"

    def _could_fuse(self) -> bool:
        return self.dtype in backends.NATIVE_DTYPES and self.device == "cpu"

    def _has_kernels(self) -> bool:
        return self._could_fuse() and backends.can_run("cpu", "dwconv_bn_silu") is None

    def memory(self, variant: Variant, *, num_classes: int = 1000, in_chans: int = 3) -> Memory:
        """The memory of a network under these conditions, bytes."""
        assert self.plan is not None
        return count_memory(
            variant,
            self.mode,
            self.plan,
            batch=self.batch,
            dtype=self.dtype,
            device=self.device,
            optimizer_tensors=self.optimizer_tensors,
            num_classes=num_classes,
            in_chans=in_chans,
        )


def to_json(conditions: Conditions) -> dict[str, Any]:
    """The fields, the dtype by its name."""
    return {**vars(conditions), "dtype": DTYPE_NAMES[conditions.dtype]}
