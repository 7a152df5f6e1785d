"""Contests in which every contestant is held to one instruction set, so that a newer CPU shows what
an older one does: `pytest benchmarks/bench_network.py --benchmark-only --isa avx2`.

oneDNN, which OpenVINO and PyTorch compute with, and PyTorch's own kernels obey variables of the
environment. A peer that cannot be held, as ONNX Runtime, does not take part. There is no limit
beside these contests: the limits of the machine are those of its newest instruction set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.contest import UnavailableError


@dataclass(frozen=True)
class InstructionSet:
    """One that contestants are held to.

    Args:
        title: as in the report.
        capability: as PyTorch names it.
        newer: parts of the names of kernels that need more.
        environment: what holds the peers.
    """

    title: str
    capability: str
    newer: tuple[str, ...]
    environment: dict[str, str]


ISAS = {
    "avx2": InstructionSet(
        title="AVX2",
        capability="AVX2",
        newer=("avx512", "amx"),
        environment={
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    )
}
_chosen: list[str] = []


def hold(isa: str) -> None:
    """Holds this process to an instruction set from now on.

    Raises:
        RuntimeError: an engine that reads its environment once has done so already.
    """
    os.environ |= ISAS[isa].environment
    actual = torch.backends.cpu.get_cpu_capability()
    if actual != ISAS[isa].capability or "openvino" in sys.modules:
        raise RuntimeError(f"too late to hold engines to {isa}: PyTorch uses {actual}")
    _chosen.append(isa)


def isa() -> str:
    """The instruction set that contestants are held to, "" where they choose for themselves."""
    return _chosen[-1] if _chosen else ""


def what(name: str) -> str:
    """Name of a contest in the results: "network", or "network_avx2" where it is held."""
    return f"{name}_{isa()}" if isa() else name


def backend() -> str:
    """This package's."""
    return f"cpu:{isa()}" if isa() else "auto"


def require(kernels: Iterable[str]) -> None:
    """Passes where an engine's kernels, by their names, are of the set that it is held to.

    Raises:
        UnavailableError: one needs more.
    """
    newer = ISAS[isa()].newer if isa() else ()
    for name in sorted(set(kernels)):
        if any(part in name for part in newer):
            raise UnavailableError(f"runs {name}, though it is held to {ISAS[isa()].title}")
