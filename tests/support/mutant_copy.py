"""A copy of the checkout in which mutants are compiled and tested."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import inner_pytest
from mutant_list import Mutant

# The tests of `make test`, as the Makefile selects them.
SELECTION = re.compile(r"^test:(?:.*\n\t)+?.*-m \"([^\"]+)\"", re.MULTILINE)
ENVIRONMENT = threading.Lock()  # copies are prepared side by side, and setup.py reads CXX
NAMES = {"_C": "", "_C_simt": "simt"}  # extensions, and their folders of objects
# Lightly optimised, which compiles several times faster; the second flag of AVX2 brings in FMA.
LIGHT = ["-O1", "-fexpensive-optimizations"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Instruction sets by the flags of /proc/cpuinfo that they need, the best last.
NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "neon": {"asimd"},
}


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Attributes:
        status: pytest's exit status; None where it ran out of time.
        failed: the first test that failed, or the last line of output.
    """

    status: int | None
    failed: str
    seconds: float


def tracked_files(root: Path) -> list[str]:
    """Files that git knows or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return sorted(name for name in done.stdout.split("\0") if name and (root / name).is_file())


def best_isa(isas: Sequence[str]) -> str:
    """The best of these instruction sets that runs here."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    runs, found = True, isas[0]
    for isa in isas:
        runs = runs and NEEDS[isa] <= flags
        found = isa if runs else found
    return found


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Copy:
    """The files of `root` in a folder of their own, with the extensions built from them.

    One instruction set is compiled, the best that runs here; the others' names lead to it. So a
    fault in csrc/ costs one object. The objects as they were before lie in a second folder.
    """

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.root, self.folder, self.tree, self.jobs = root, folder, folder / "tree", jobs
        self.work, self.clean = folder / "objects", folder / "objects-clean"
        self._workers: dict[tuple[tuple[str, str], ...], subprocess.Popen[str]] = {}

    def prepare(self) -> None:
        """Brings files and extensions up to date."""
        self._restore_objects()
        self.update_files()
        link = self.tree / "effnet_fast/triton_kernels"  # where an installation has it
        if not link.is_symlink():
            link.symlink_to("../triton_kernels")
        self._write_ninja()
        if message := self.build():
            raise SystemExit(f"the copy does not compile:\n{message}")
        shutil.rmtree(self.clean, ignore_errors=True)
        shutil.copytree(self.work, self.clean)

    def update_files(self) -> None:
        """Copies what differs, and takes away what is gone."""
        names = tracked_files(self.root)
        for name in names:
            self._update(name)
        for path in [p for p in self.tree.rglob("*") if p.is_file() and not p.is_symlink()]:
            if str(path.relative_to(self.tree)) not in names and path.suffix != ".so":
                path.unlink()

    def _update(self, name: str) -> None:
        source, to = self.root / name, self.tree / name
        if not to.is_file() or source.read_bytes() != to.read_bytes():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)  # its time is now, for ninja
            shutil.copymode(source, to)

    def _write_ninja(self) -> None:
        with ENVIRONMENT:
            self._write_ninja_alone()

    def _write_ninja_alone(self) -> None:
        setup = _load(self.tree / "setup.py")
        isas = list(setup.ISAS)
        best = best_isa(isas)
        aliases = [f"--defsym={_kernels(isa)}={_kernels(best)}" for isa in isas if isa != best]
        setup.ISAS = {best: setup.ISAS[best]}
        for flags in (setup.CXX_FLAGS, setup.SIMT_FLAGS):
            flags[:] = [f for f in flags if not f.startswith("-O")] + LIGHT
        setup.CXX_FLAGS += (f"-DEFFNET_HAS_{isa.upper()}=1" for isa in isas)  # all names are there
        words = [os.environ.get("CXX", "g++"), *(f"-Wl,{alias}" for alias in aliases)]
        before = dict(os.environ)
        for name, folder in NAMES.items():
            out = self.work / folder / "build.ninja"
            out.parent.mkdir(parents=True, exist_ok=True)
            to = self.work / folder / f"{name}{SUFFIX}"
            with open(out, "w") as stream:
                if name == "_C":
                    os.environ["CXX"] = " ".join(words)
                    setup.write_ninja(stream, to, None)
                elif nvcc := setup.nvcc_here():
                    os.environ["CXX"] = before.get("CXX", "g++")
                    setup.write_simt_ninja(stream, to, nvcc)
        os.environ.clear()
        os.environ.update(before)

    def build(self) -> str:
        """Compiles what has changed, and links; what the compiler says where that fails."""
        for name, folder in NAMES.items():
            work = self.work / folder
            if not (work / "build.ninja").stat().st_size:
                continue
            command = [sys.executable, "-m", "ninja", "-C", str(work), f"-j{self.jobs}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return done.stdout[-3000:]
            shutil.copy2(work / f"{name}{SUFFIX}", self.tree / "effnet_fast")
        return ""

    def _restore_objects(self) -> None:
        if not self.clean.is_dir():
            return
        for path in (p for p in self.clean.rglob("*") if p.is_file()):
            to = self.work / path.relative_to(self.clean)
            if not to.is_file() or to.stat().st_mtime_ns != path.stat().st_mtime_ns:
                shutil.copy2(path, to)
        for name, folder in NAMES.items():
            library = self.work / folder / f"{name}{SUFFIX}"
            if library.is_file():
                shutil.copy2(library, self.tree / "effnet_fast")

    @contextlib.contextmanager
    def with_fault(self, mutant: Mutant) -> Iterator[str]:
        """The copy with the fault in it; gives what the compiler says where that fails."""
        path = self.tree / mutant.file
        text, stat = path.read_text(), path.stat()
        try:
            path.write_text(mutant.applied(text))
            yield self.build() if mutant.file.startswith("csrc/") else ""
        finally:
            path.write_text(text)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            self._restore_objects()

    def test(self, mutant: Mutant, limit_s: float) -> Outcome:
        """Runs the mutant's tests in the copy as it is, up to the first failure."""
        selection = SELECTION.search((self.tree / "Makefile").read_text())
        assert selection is not None
        words = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", selection[1], *mutant.tests]
        output = self.folder / "output.txt"
        request = {"words": words, "output": str(output), "limit_s": limit_s}
        begin = time.monotonic()
        worker = self._worker(mutant.environment)
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        status = json.loads(worker.stdout.readline())
        seconds = time.monotonic() - begin
        if status is None:
            return Outcome(None, f"no end within {limit_s:.0f} s", seconds)
        return Outcome(status, _failed(output.read_text(errors="replace")), seconds)

    def _worker(self, environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
        """The process whose forks run the tests that need these variables."""
        if environment not in self._workers:
            variables = {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}
            self._workers[environment] = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("mutant_worker.py"))],
                cwd=self.tree,
                env=inner_pytest.environment() | variables | dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._workers[environment]

    def close(self) -> None:
        """Ends the processes that run tests."""
        for worker in self._workers.values():
            worker.communicate()
        self._workers.clear()

    def digest(self) -> str:
        """Of every file that the tests can read, the list of mutants excepted."""
        total = hashlib.sha256()
        for name in tracked_files(self.root):
            if not name.startswith(("docs/", "benchmarks/", "tests/mutants/", "tests/support/mut")):
                total.update(name.encode() + (self.root / name).read_bytes())
        return total.hexdigest()[:16]


def _kernels(isa: str) -> str:
    """The mangled name of effnet::ISA::kernels."""
    return f"_ZN6effnet{len(isa)}{isa}7kernelsE"


def _failed(output: str) -> str:
    lines = output.strip().splitlines()
    found = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if not found:
        return lines[-1] if lines else "no output"
    return found[0].removeprefix("FAILED ").split(" - ")[0]


def machine() -> str:
    """The processor, in words."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
