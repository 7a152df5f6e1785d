"""torch.compile of a network where it runs: results and gradients against eager, by value.

On a CPU the same code goes through a small network and a compiler that generates nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
from effnet_fast.models import VARIANTS, Variant
from networks import MINI, random_images
from tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_no_worse_than

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Case:
    """A network, its images, the compiler and autocast's dtype, None for fp32."""

    device: str
    variant: Variant
    batch: int
    side: int
    compiler: str
    amp: torch.dtype | None = None

    @property
    def tested(self) -> torch.dtype:
        return self.amp or torch.float32


def cases() -> list[Any]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    found = [pytest.param(Case("cpu", MINI, 4, 32, "aot_eager"), id="cpu-fp32")]
    for amp in (None, torch.bfloat16, torch.float16):
        case = Case("cuda", VARIANTS["b0"], 8, 97, "inductor", amp)
        found.append(pytest.param(case, id=f"cuda-{case.tested}", marks=[pytest.mark.gpu, skip]))
    return found


CASES = pytest.mark.parametrize("case", cases())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(case: Case, model: nn.Module, batches: list[Tensor], backward: bool) -> dict[str, Tensor]:
    """Logits, and gradients of a fixed weighting of them, stacked over the batches."""
    exact = next(model.parameters()).dtype is torch.float64
    amp = None if exact else case.amp
    context = torch.autocast(case.device, amp) if amp else contextlib.nullcontext()
    results: dict[str, list[Tensor]] = {}
    for x in batches:
        model.zero_grad(set_to_none=True)
        x = x.detach().clone().to(next(model.parameters()).dtype).requires_grad_(backward)
        with torch.set_grad_enabled(backward), context:
            y = model(x)
        found = {"y": y.detach()}
        if backward:
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            y.backward(weights.to(y))
            found |= {"grad x": x.grad}
            found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
        for name, tensor in found.items():
            results.setdefault(name, []).append(tensor.detach().clone())
    return {name: torch.stack(tensors) for name, tensors in results.items()}


def check(case: Case, training: bool) -> None:
    """Holds the compiled network to the rule of parity, stock in the worse of its two layouts."""
    three = networks.trio(case.variant, case.side).apply(lambda model: model.to(case.device))
    for model in three.models:
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    three.train(training)
    batches = [random_images(case.batch, case.side, seed=s).to(case.device) for s in range(2, 6)]
    last = [x.to(memory_format=torch.channels_last) for x in batches]
    exact = run(case, three.exact, batches, training)
    eager = run(case, three.stock, batches, training)
    for name, tensor in run(case, three.stock, last, training).items():
        if networks.rms(tensor - exact[name]) > networks.rms(eager[name] - exact[name]):
            eager[name] = tensor
    three.actual.compile(backend=case.compiler, fullgraph=True)
    actual = run(case, three.actual, batches, training)
    assert list(actual) == list(eager)
    for name, tensor in actual.items():
        factor = GRADIENT_FACTOR if name.startswith("grad ") else OUTPUT_FACTOR
        try:
            assert tensor.dtype is eager[name].dtype
            assert_no_worse_than(tensor, eager[name], exact[name], factor, dtype=case.tested)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
@CASES
def test_inference(case: Case) -> None:
    check(case, training=False)


@pytest.mark.slow
@CASES
def test_training_step(case: Case) -> None:
    check(case, training=True)
