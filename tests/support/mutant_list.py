"""The checked-in list of small faults: one file of rows for each area of the code.

A file tests/mutants/AREA.toml may name variables that its tests need. Each fault has:
  name, kind      what it is called, and of which kind it is
  file, find, put the file, a piece of its text that occurs once, and what replaces it
  breaks          what goes wrong, and for which input: the reason why it is no equivalent program
  tests           words for pytest: few and quick tests of the area, which see the fault
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under another name
    import tomli as tomllib  # type: ignore[no-redef]

FOLDER = Path(__file__).parents[1] / "mutants"
AREAS = {
    "csrc_cpu": ("csrc/cpu/ops/", "csrc/cpu/simd/", "csrc/cpu/training/", "csrc/common/"),
    "csrc_cpu_network": ("csrc/cpu/network/",),
    "csrc_cuda": ("csrc/cuda/",),
    "triton_kernels": ("triton_kernels/",),
    "ops": (
        "effnet_fast/ops/",
        "effnet_fast/backends/",
        "effnet_fast/reference/",
        "csrc/bindings/block",
        "csrc/bindings/buffers.cpp",
        "csrc/bindings/gate",
    ),
    "modules_models": ("effnet_fast/modules/", "effnet_fast/models/"),
    "training": ("effnet_fast/training/",),
    "inference": (
        "effnet_fast/inference/",
        "effnet_fast/deployment.py",
        "csrc/bindings/watch.cpp",
    ),
    "checkpoints_scaling_cli": (
        "effnet_fast/checkpoints/",
        "effnet_fast/scaling/",
        "effnet_fast/cli/",
        "effnet_fast/pretrained/",
        "effnet_fast/files.py",
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One small fault.

    Attributes:
        tests: the words for pytest: paths and options.
        environment: variables that the tests need.
    """

    name: str
    area: str
    kind: str
    file: str
    find: str
    put: str
    breaks: str
    tests: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @property
    def paths(self) -> list[str]:
        """The files and folders of tests."""
        return [word.split("::")[0] for word in self.tests if word.startswith("tests/")]

    def applied(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the piece does not occur exactly once.
        """
        if (times := text.count(self.find)) != 1:
            raise ValueError(f"{self.name}: found {times} times, not once, in {self.file}")
        return text.replace(self.find, self.put)


def _rows(area: str, table: dict[str, Any]) -> Iterator[Mutant]:
    environment = tuple(sorted(table.get("environment", {}).items()))
    for row in table["mutant"]:
        tests = tuple(shlex.split(row.pop("tests")))
        yield Mutant(area=area, tests=tests, environment=environment, **row)


def read_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Every mutant of the list, area by area."""
    return [
        mutant
        for path in sorted(folder.glob("*.toml"))
        for mutant in _rows(path.stem, tomllib.loads(path.read_text()))
    ]
