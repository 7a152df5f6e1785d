"""Where the engine that launches kernels can be tested: on a GPU, and on a CPU by stand-ins."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast import use_backend
from effnet_fast.backends import can_run
from effnet_fast.inference import cuda_graphs
from recorder import FakeRecorder
from tolerances import assert_no_worse_than

DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(torch.float16, id="float16", marks=pytest.mark.exhaustive),
    ],
)


@dataclass(frozen=True)
class Target:
    """A device and what `deploy` is told of the backend there."""

    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"

    @property
    def reason(self) -> str | None:
        """Why it cannot be used here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        name = "cuda" if self.backend == "auto" else self.backend
        return can_run(name, "dwconv_bn_silu")

    def param(self) -> Any:
        marks = [pytest.mark.gpu] if self.device == "cuda" else []
        if reason := self.reason:
            marks.append(pytest.mark.skip(reason=reason))
        return pytest.param(self, id=str(self), marks=marks)

    def deploy(self, model: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> Any:
        return effnet_fast.deploy(model, dtype, backend=self.backend, **options)


SIMT = Target("cpu", "simt")
ON_GPU = [Target("cuda", backend) for backend in ("auto", "cuda", "triton")]
TARGETS = pytest.mark.parametrize("target", [target.param() for target in (SIMT, *ON_GPU)])
GPU_TARGETS = pytest.mark.parametrize("target", [target.param() for target in ON_GPU])


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Lets CPUs capture too, and lists the stand-ins that did, the latest last."""
    made: list[FakeRecorder] = []
    original = cuda_graphs.recorder_of

    def recorder_of(device: torch.device) -> Any:
        if device.type != "cpu":
            return original(device)
        made.append(FakeRecorder())
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "recorder_of", recorder_of)
    return made


def engine_of(deployed: Any) -> Any:
    """What a deployed network was last run by."""
    (engine,) = deployed._packed.snapshot.engines.values()
    return engine


def stock_in(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
    """Stock PyTorch's result with weights and images in a dtype."""
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad(), use_backend("reference"):
        return model(x.to(dtype))


def listed(results: Any) -> list[Tensor]:
    return results if isinstance(results, list) else [results]


def assert_parity(
    target: Target, model: nn.Module, x: Tensor, dtype: torch.dtype, calls: int = 2
) -> None:
    """Holds the deployed network's first call to the rule of parity.

    Those after it, which replay a graph where one is captured, must be equal bit by bit.
    """
    model, x = model.to(target.device), x.to(target.device)
    exact, stock = stock_in(model, x, torch.float64), stock_in(model, x, dtype)
    deployed = target.deploy(model, dtype)
    first, *others = (listed(deployed(x)) for _ in range(calls))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for y, stock_y, exact_y in zip(first, listed(stock), listed(exact), strict=True):
        assert y.dtype is x.dtype
        assert_no_worse_than(y.to(dtype), stock_y, exact_y)
