"""Contests of whole networks, and which of them are held where."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks import held, work
from benchmarks.contest import OURS, Contest, UnavailableError
from benchmarks.params import require
from benchmarks.peers import PEERS, Peer
from benchmarks.setups import Runner, Setup, network_step
from effnet_fast.cli.bench import calibrate, random_images
from effnet_fast.models import VARIANTS, EfficientNet, Variant
from effnet_fast.scaling import CompoundScaling
from tolerances import GRADIENT_FACTOR, assert_no_worse_than

CALIBRATION_IMAGES = 4
CHECKED_IMAGES = 4  # of the batch, in float64
PEER_FACTOR = 10.0  # a peer's error over stock's in the same dtype, beyond which it is left out
PEER_FLOOR = 1e-4  # relative rms of an error that is nobody's fault
LOSS_EPS = 8  # a loss is one number, whose error is luck: so many eps of the dtype are allowed
PHI = "phi"


@dataclass(frozen=True)
class Case:
    """A network at a batch and a resolution, its own unless told another."""

    size: str
    batch: int
    side: int | None = None

    @property
    def variant(self) -> Variant:
        """A published one, or "phi3": the scaling rule's at phi = 3."""
        if self.size.startswith(PHI):
            return CompoundScaling().at(float(self.size.removeprefix(PHI))).variant
        return VARIANTS[self.size]

    @property
    def resolution(self) -> int:
        return self.side or self.variant.resolution

    @property
    def name(self) -> str:
        return f"{self.size}_{self.resolution}"

    @property
    def id(self) -> str:
        return f"{self.name}_batch{self.batch}"


SMALL = Case("b0", 2, 128)
CASES = {
    ("inference", "cpu"): (
        *(Case("b0", 1), Case("b0", 8), Case("b4", 1), Case("b7", 1)),
        *(Case("lite0", 1), Case("lite4", 1), Case("v2_s", 1)),
        *(Case("b0", 1, 64), Case("b0", 32, 64)),
    ),
    ("training", "cpu"): (
        *(SMALL, Case("b0", 8), Case("b4", 2), Case("lite0", 8), Case("v2_s", 8, 224)),
        *(Case("b0", 4, 64), Case("b0", 32, 64)),
    ),
    ("inference", "cuda"): (
        *(Case("b0", 1), Case("b0", 256), Case("b4", 1), Case("b4", 64)),
        *(Case("b7", 1), Case("b7", 16)),
    ),
    ("training", "cuda"): (Case("b0", 256), Case("b4", 64), Case("b7", 16)),
}
# What is held without --full: with every peer that does not compile, and with these alone.
SHOWN = {("inference", Case("b0", 1), "fp32")}
SHOWN_IN_BRIEF = {
    *(("inference", Case("b0", 1), "bf16"), ("inference", Case("b0", 8), "fp32")),
    *(("inference", Case("b4", 1), "fp32"), ("inference", Case("b7", 1), "fp32")),
    ("training", Case("b0", 8), "fp32"),
}
# The quickest of each kind: torchvision's network takes what channels_last does, within 8%.
BRIEF = {
    "inference": (OURS, f"{OURS}_deploy", "torch_channels_last", "onnxruntime", "openvino"),
    "training": (OURS, "torch_channels_last", "torchvision"),
}
DTYPES_ON = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def entries(mode: str) -> list[pytest.param]:
    """Every (case, dtype, device, contestant) of a mode, as pytest's parameters."""
    found = []
    for device, dtypes in DTYPES_ON.items():
        for case in CASES[mode, device]:
            for dtype in dtypes:
                for peer in PEERS:
                    if _takes_part(peer, mode, device, dtype):
                        marks = [pytest.mark.gpu] if device == "cuda" else []
                        if not _is_shown(peer, mode, case, dtype):
                            marks.append(pytest.mark.full)
                        name = f"{device}-{case.id}-{dtype}-{peer.name}"
                        found.append(
                            pytest.param(case, dtype, device, peer.name, id=name, marks=marks)
                        )
    return found


def _is_shown(peer: Peer, mode: str, case: Case, dtype: str) -> bool:
    """Whether the contestant takes part without --full."""
    contest = (mode, case, dtype)
    return not peer.compiles and (
        contest in SHOWN or (contest in SHOWN_IN_BRIEF and peer.name in BRIEF[mode])
    )


def _takes_part(peer: Peer, mode: str, device: str, dtype: str) -> bool:
    return mode in peer.modes and device in peer.devices and dtype in peer.dtypes


def contest(
    case: Case,
    mode: str,
    dtype: str,
    device: str,
    *,
    what: str = "network",
    names: Iterable[str] | None = None,
) -> Contest:
    """One network under one batch, mode, dtype and device.

    Args:
        what: name in the results.
        names: contestants; None means all that can take part.
    """
    require(device)
    setup = _setup(case, mode, dtype, device)
    peers = [p for p in PEERS if _takes_part(p, mode, device, dtype)]
    expected = functools.cache(lambda: expect(setup))
    return Contest(
        *(held.what(what), case.name, mode, dtype, device, case.batch),
        build={
            p.name: lambda p=p: build(p, setup, expected())
            for p in peers
            if names is None or p.name in names
        },
        check=lambda: check(setup),
        work=None
        if held.isa()
        else work.network(case.variant, case.resolution, case.batch, mode, dtype),
        engines=True,
        keeps_memory=frozenset(p.name for p in peers if p.keeps_memory),
    )


@functools.lru_cache(maxsize=1)
def _state(variant: Variant, resolution: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = EfficientNet(variant, backend="reference").eval()
    model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    calibrate(model, random_images(CALIBRATION_IMAGES, resolution, generator))
    return model.state_dict()


def _setup(case: Case, mode: str, dtype: str, device: str) -> Setup:
    model = EfficientNet(case.variant, backend="reference", stochastic_depth_prob=0.0, dropout=0.0)
    model.load_state_dict(_state(case.variant, case.resolution))
    model = model.to(device, memory_format=torch.channels_last).train(mode == "training")
    x = random_images(case.batch, case.resolution, torch.Generator().manual_seed(1)).to(device)
    return Setup(case.variant, model, x, dtype, device, mode)


@dataclass(frozen=True)
class Expected:
    """What stock computes.

    Args:
        result: logits of the first images, or the loss of the whole batch.
        allowed: relative rms of a contestant's error.
    """

    result: Tensor
    allowed: float


def expect(setup: Setup) -> Expected:
    """Stock's logits in float64, or its loss in fp32 (BN makes it one of all images)."""
    if setup.mode == "training":
        loss = _result(copy.deepcopy(setup.model), setup.x, setup.mode)
        return Expected(loss, PEER_FLOOR + LOSS_EPS * _eps(setup))
    stock, exact = _stock_and_exact(setup)
    return Expected(exact, PEER_FLOOR + PEER_FACTOR * relative_error(stock, exact))


@functools.lru_cache(maxsize=1)
def _stock_and_exact(setup: Setup) -> tuple[Tensor, Tensor]:
    """Stock's logits of the first images, in the contest's dtype and in float64."""
    x = setup.x[:CHECKED_IMAGES]
    stock, exact = (
        _result(copy.deepcopy(setup.model).to(dtype), x.to(dtype), setup.mode)
        for dtype in (setup.torch_dtype, torch.float64)
    )
    return stock, exact


def build(peer: Peer, setup: Setup, expected: Expected) -> Runner:
    """The peer's runner, once it has been seen to compute what stock does.

    Raises:
        AssertionError: this package's own does not.
        UnavailableError: another's does not, or it cannot run.
    """
    runner = peer.runner(setup)
    if peer.same_numbers:
        result = runner()
        assert isinstance(result, Tensor)
        error = relative_error(result, expected.result)
        if not error <= expected.allowed:
            kind = AssertionError if peer.name.startswith(OURS) else UnavailableError
            raise kind(
                f"{peer.name} computes something else: relative error {error:.1e}, of which "
                f"{expected.allowed:.1e} is allowed"
            )
    return runner


def _eps(setup: Setup) -> float:
    """Of the dtype; cuDNN's convolutions of fp32 round to TF32 unless told otherwise."""
    if setup.device == "cuda" and setup.dtype == "fp32":
        return 2.0**-10
    return torch.finfo(setup.torch_dtype).eps


def _result(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    result = network_step(model, x, mode)()
    assert isinstance(result, Tensor)
    return result


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative rms of a loss, or of the first images' logits."""
    exact = exact.double().cpu()
    actual = actual.double().cpu()
    difference = (actual[: len(exact)] if exact.dim() else actual) - exact
    return (difference.norm() / exact.norm()).item()


def check(setup: Setup) -> None:
    """Holds this package's logits, or its loss and gradients, of the first images to stock's.

    The gradients are judged as one vector: those of a single layer may be near zero.
    """
    fused, stock, exact = (copy.deepcopy(setup.model) for _ in range(3))
    fused.backend = held.backend()
    x = setup.x[:CHECKED_IMAGES]
    low = setup.torch_dtype
    if setup.mode == "inference":
        actual = _result(fused.to(low), x.to(low), setup.mode)
        assert_no_worse_than(actual, *_stock_and_exact(setup), dtype=low)
        return
    results = [
        _result(model.to(dtype), x.to(dtype), setup.mode)
        for model, dtype in ((fused, low), (stock, low), (exact, torch.float64))
    ]
    error, stock_error = (relative_error(result, results[2]) for result in results[:2])
    assert error <= LOSS_EPS * _eps(setup) + GRADIENT_FACTOR * stock_error, (
        f"the loss is {results[0].item()}, in float64 {results[2].item()}"
    )
    gradients = [
        torch.cat([p.grad.double().flatten() for p in model.parameters()])
        for model in (fused, stock, exact)
    ]
    assert_no_worse_than(*(g.to(low) for g in gradients[:2]), gradients[2], GRADIENT_FACTOR)
