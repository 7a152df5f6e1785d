"""Contests of whole networks, and which of them are held where."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import work
from benchmarks.contest import OURS, Contest, UnavailableError
from benchmarks.limits import DTYPES
from benchmarks.peers import PEERS, Peer, Runner, Setup, network_step
from effnet_fast.cli.bench import calibrate, random_images
from effnet_fast.models import VARIANTS, EfficientNet, Variant
from effnet_fast.scaling import CompoundScaling
from tolerances import assert_no_worse_than

CALIBRATION_IMAGES = 4
CHECKED_IMAGES = 4  # of the batch, in float64
PEER_FACTOR = 10.0  # a peer's error over stock's in the same dtype, beyond which it is left out
PHI = "phi"
PEER_FLOOR = 1e-4  # relative rms of an error that is nobody's fault


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
    ("inference", "cpu"): (Case("b0", 1), Case("b0", 8), Case("b4", 1), Case("b7", 1)),
    ("training", "cpu"): (SMALL, Case("b0", 8)),
    ("inference", "cuda"): (
        *(Case("b0", 1), Case("b0", 256), Case("b4", 1), Case("b4", 64)),
        *(Case("b7", 1), Case("b7", 16)),
    ),
    ("training", "cuda"): (Case("b0", 256), Case("b4", 64), Case("b7", 16)),
}
QUICK = (Case("b0", 1), SMALL)  # in fp32
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
                        if peer.compiles or dtype != "fp32" or case not in QUICK:
                            marks.append(pytest.mark.full)
                        name = f"{device}-{case.id}-{dtype}-{peer.name}"
                        found.append(
                            pytest.param(case, dtype, device, peer.name, id=name, marks=marks)
                        )
    return found


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
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    setup = _setup(case, mode, dtype, device)
    peers = [p for p in PEERS if _takes_part(p, mode, device, dtype)]
    return Contest(
        *(what, case.name, mode, dtype, device, case.batch),
        build={p.name: _builder(p, setup) for p in peers if names is None or p.name in names},
        check=lambda: _check(setup),
        work=work.network(case.variant, case.resolution, case.batch, mode, dtype),
        engines=True,
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


def _builder(peer: Peer, setup: Setup) -> Callable[[], Runner]:
    """The peer's runner, once it has been seen to compute what stock does."""

    def build() -> Runner:
        runner = peer.runner(setup)
        if peer.same_numbers and not peer.name.startswith(OURS) and setup.mode == "inference":
            result = runner()
            assert isinstance(result, Tensor)
            stock, exact = _logits(setup)
            error, allowed = _error(result, exact), PEER_FACTOR * _error(stock, exact) + PEER_FLOOR
            if not error <= allowed:
                raise UnavailableError(
                    f"computes other logits: relative error {error:.1e}, stock's is "
                    f"{_error(stock, exact):.1e}"
                )
        return runner

    return build


def _logits(setup: Setup) -> tuple[Tensor, Tensor]:
    """Stock's in the contest's dtype, and in float64, of the first images."""
    x = setup.x[:CHECKED_IMAGES]
    low = network_step(
        copy.deepcopy(setup.model).to(setup.torch_dtype), x.to(setup.torch_dtype), setup.mode
    )
    exact = network_step(copy.deepcopy(setup.model).double(), x.double(), setup.mode)
    stock, truth = low(), exact()
    assert isinstance(stock, Tensor)
    assert isinstance(truth, Tensor)
    return stock, truth


def _error(actual: Tensor, exact: Tensor) -> float:
    """Relative rms of the first images' logits."""
    exact = exact.double().cpu()
    difference = actual[: len(exact)].double().cpu() - exact
    return (difference.norm() / exact.norm()).item()


def _check(setup: Setup) -> None:
    """The rule of parity on this package's logits, or its loss, of the first images."""
    stock, exact = _logits(setup)
    fused = copy.deepcopy(setup.model).to(setup.torch_dtype)
    fused.backend = "auto"
    x = setup.x[:CHECKED_IMAGES].to(setup.torch_dtype)
    actual = network_step(fused, x, setup.mode)()
    assert isinstance(actual, Tensor)
    # A loss is one number: its error is luck, so it is held to the dtype's own resolution.
    if setup.mode == "training":
        eps = torch.finfo(DTYPES[setup.dtype]).eps
        assert abs(actual.item() - exact.item()) <= 8 * eps * abs(exact.item()) + 3 * abs(
            stock.item() - exact.item()
        ), f"the loss is {actual.item()}, in float64 {exact.item()}"
    else:
        assert_no_worse_than(actual, stock, exact, dtype=setup.torch_dtype)
