"""A training run: single steps held to stock's along the way, and where it ends.

Curves are not compared point by point: two layouts of stock itself part by 1e-2 of the loss within
ten steps from random weights. From the same state one step can be compared, and the end of a run
with the ends of stock's runs from weights that differ in the last bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from effnet_fast.models import VARIANTS, Variant
from networks import MINI, random_images
from tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_no_worse_than

RUNS = 5  # of stock, perturbed
BATCHES = 4  # over which a step is judged: errors of a few numbers are a matter of luck in one


@dataclass(frozen=True)
class Run:
    """A training run: SGD with momentum on one set of random images and labels.

    Attributes:
        device, variant, side, batch: of the network and its images.
        checked: the steps from whose state stock and ours are compared, the last being the end.
        amp: the dtype of autocast, None for fp32.
    """

    device: str
    variant: Variant
    side: int
    batch: int
    checked: tuple[int, ...]
    amp: torch.dtype | None = None
    rate: float = 0.02

    def __str__(self) -> str:
        kind = "fp32" if self.amp is None else str(self.amp).removeprefix("torch.")
        return f"{self.device}-{self.variant.name}-{kind}"

    @property
    def tested(self) -> torch.dtype:
        return self.amp or torch.float32

    def context(self, model: nn.Module) -> Any:
        """Autocast, but for the network in float64."""
        exact = next(model.parameters()).dtype is torch.float64
        if self.amp is None or exact:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.amp)

    def images(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images [N,3,side,side] and labels [N]."""
        x = random_images(self.batch, self.side, seed=seed).to(self.device)
        generator = torch.Generator().manual_seed(seed)
        return x, torch.randint(0, 1000, (self.batch,), generator=generator).to(self.device)


def runs() -> list[Any]:
    device = "cuda"
    b0 = Run(device, VARIANTS["b0"], 96, 16, (0, 10, 50))
    gpu = [
        b0,
        *(
            Run(device, b0.variant, 96, 16, b0.checked, amp)
            for amp in (torch.bfloat16, torch.float16)
        ),
    ]
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return [
        pytest.param(Run("cpu", MINI, 32, 8, (0, 3, 10), rate=0.1), id="cpu-mini-fp32"),
        *(pytest.param(run, id=str(run), marks=[pytest.mark.gpu, missing]) for run in gpu),
    ]


def trio(run: Run) -> networks.Trio:
    """Ours, stock and stock in float64 in training mode, without random draws."""
    three = networks.trio(run.variant, run.side).apply(lambda model: model.to(run.device)).train()
    for model in three.models:
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    return three


def losses_of(run: Run, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [N] of each image, in fp32 or float64."""
    dtype = next(model.parameters()).dtype
    with run.context(model):
        logits = model(x.to(dtype))
    return F.cross_entropy(logits.to(dtype), labels, reduction="none")


def train(run: Run, model: nn.Module) -> Iterator[float]:
    """Trains without end; the loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9)
    x, labels = run.images(1)
    while True:
        optimizer.zero_grad(set_to_none=True)
        loss = losses_of(run, model, x, labels).mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def advance(steps: Iterator[float], count: int) -> list[float]:
    return [next(steps) for _ in range(count)]


def steps_from(run: Run, model: nn.Module, state: dict[str, Tensor], layout: Any) -> dict:
    """Losses, gradients and statistics of one step from a state, for each of several batches."""
    results: dict[str, list[Tensor]] = {}
    for seed in range(10, 10 + BATCHES):
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        x, labels = run.images(seed)
        losses = losses_of(run, model, x.to(memory_format=layout), labels)
        losses.mean().backward()
        found = {"loss": losses.detach()}
        found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
        found |= {f"buffer {name}": b.clone() for name, b in model.named_buffers() if b.dim()}
        for name, tensor in found.items():
            results.setdefault(name, []).append(tensor)
    return {name: torch.stack(tensors) for name, tensors in results.items()}


def hold(run: Run, three: networks.Trio, state: dict[str, Tensor]) -> None:
    """Holds one step from the state to the rule of parity, stock in the worse of its layouts."""
    plain, last = torch.contiguous_format, torch.channels_last
    actual = steps_from(run, three.actual, state, plain)
    exact = steps_from(run, three.exact, state, plain)
    stock = steps_from(run, three.stock, state, plain)
    for name, tensor in steps_from(run, three.stock, state, last).items():
        if networks.rms(tensor - exact[name]) > networks.rms(stock[name] - exact[name]):
            stock[name] = tensor
    assert list(actual) == list(stock) == list(exact)
    for name, tensor in actual.items():
        factor = GRADIENT_FACTOR if name.startswith("grad ") else OUTPUT_FACTOR
        try:
            assert_no_worse_than(tensor, stock[name], exact[name], factor, dtype=run.tested)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("run", runs())
def test_single_steps_along_a_run(run: Run) -> None:
    three = trio(run)
    trained = copy.deepcopy(three.actual)
    steps, done, losses = train(run, trained), 0, []
    for step in run.checked:
        losses += advance(steps, step - done)
        done = step
        hold(run, three, {name: t.clone() for name, t in trained.state_dict().items()})
    assert losses[-1] < 0.9 * losses[0]  # it does train


@pytest.mark.slow
def test_single_steps_notice_a_fault() -> None:
    run = runs()[0].values[0]
    three = trio(run)
    state = copy.deepcopy(three.actual.state_dict())
    project = three.actual.features[2][0].block[-1][1]
    project.eps += 1e-3
    with pytest.raises(AssertionError, match="exceeds"):
        hold(run, three, state)


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose every weight is moved to a neighbouring number, up or down."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            towards = torch.where(up, float("inf"), float("-inf")).to(parameter.device)
            parameter.copy_(torch.nextafter(parameter, towards))
    return model


@pytest.mark.exhaustive
@pytest.mark.parametrize("run", runs())
def test_the_end_of_a_run_lies_where_stocks_do(run: Run) -> None:
    """Within the spread of stock's perturbed runs, and as much again on either side.

    Of six equals one in three is the least or the greatest, so their spread alone cannot be the
    bound.
    """
    three = trio(run)
    count = run.checked[-1]
    ends = [advance(train(run, perturbed(three.stock, s)), count)[-1] for s in range(RUNS)]
    spread = max(ends) - min(ends)
    assert 0 < spread < 0.5 * max(ends)
    [end] = advance(train(run, three.actual), count)[-1:]
    assert min(ends) - spread <= end <= max(ends) + spread, (end, ends)
