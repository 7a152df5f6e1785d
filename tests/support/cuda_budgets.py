"""Registers, shared memory, stack and spills of every CUDA kernel, held against a checked-in table.

    python tests/support/cuda_budgets.py            # prints what is wrong, for all architectures
    python tests/support/cuda_budgets.py --update   # writes csrc/cuda/budgets.json anew

The table belongs to one release of nvcc: with another, only what no release may do is an error.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import compiling

ROOT = compiling.ROOT
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = ROOT / "csrc/cuda/budgets.json"
CACHE = ROOT / "build/budgets"
FLAGS = compiling.setup_module().NVCC_FLAGS
ARCHS = ("80", "90", "100", "120")
MAX_INSTANCES = 110
JOBS = 2
# Loads of 16 bytes from global memory, to registers or straight to shared memory.
VECTOR_LOAD = re.compile(r"\bLDG(STS)?\.E\.(\S*\.)?128\b")
# Kernels without one, and why.
SCALAR = {
    "excite_reduce_kernel": "weights come from the L2 cache; neighbouring lanes share lines",
    "excite_expand_kernel": "as excite_reduce_kernel",
    "excite_bwd_expand_kernel": "as excite_reduce_kernel",
    "excite_bwd_hidden_kernel": "as excite_reduce_kernel",
    "excite_bwd_reduce_kernel": "as excite_reduce_kernel",
    "fold_sum_kernel": "partials are few, of any C; neighbouring lanes share lines",
    "merge_moments_kernel": "as fold_sum_kernel",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel instance takes on one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of a block, without the dynamic part
    stack: int  # bytes of a thread


@dataclass(frozen=True)
class Instance:
    """One compiled kernel."""

    kernel: str  # its name with template arguments
    arch: str
    usage: Usage
    spills: int  # bytes stored and loaded
    vector_loads: int | None  # instructions; None where nvdisasm is missing


def nvdisasm() -> str | None:
    """The disassembler: on PATH, or from the wheels of NVIDIA or Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    site = Path(sysconfig.get_path("purelib"))
    for pattern in ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
        for path in sorted(site.glob(pattern)):
            return str(path)
    return None


def nvcc_release() -> str | None:
    """As "13.0"; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\S+),", text)
    return match.group(1) if match else None


def _demangled(symbols: Iterable[str]) -> list[str]:
    """Kernel names with template arguments, without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = []
    for line in done.stdout.splitlines():
        plain = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", line)
        names.append(re.sub(r"\([^()]*\)$", "", re.sub(r"\((\w+)\)(?=\d)", "", plain)))
    return names


def _usages(text: str) -> Iterator[tuple[str, Usage, int]]:
    """(symbol, usage, spilled bytes) from what `ptxas -v` prints."""
    for part in text.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert stack, part
        assert registers, part
        shared = re.search(r"(\d+) bytes smem", part)
        usage = Usage(int(registers[1]), int(shared[1]) if shared else 0, int(stack[1]))
        yield symbol, usage, int(stack[2]) + int(stack[3])


def _vector_loads(cubin: Path) -> dict[str, int] | None:
    """Loads of 16 bytes in each function."""
    tool = nvdisasm()
    if tool is None:
        return None
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    counts: dict[str, int] = {}
    function = ""
    for line in done.stdout.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            function = match.group(1)
            counts[function] = 0
        elif VECTOR_LOAD.search(line):
            counts[function] += 1
    return counts


def compile_kernels(source: Path, arch: str, folder: Path) -> list[Instance]:
    """Compiles one file for one architecture.

    Raises:
        AssertionError: nvcc failed; the text is what it said.
    """
    cubin = folder / f"{source.stem}.{arch}.cubin"
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-gencode", code, "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = list(_usages(done.stderr))
    names = _demangled(symbol for symbol, _, _ in usages)
    loads = _vector_loads(cubin)
    return [
        Instance(name, arch, usage, spills, None if loads is None else loads[symbol])
        for name, (symbol, usage, spills) in zip(names, usages, strict=True)
    ]


@functools.cache
def _key() -> str:
    """Names a state of everything that the figures depend on."""
    digest = hashlib.sha256(repr((nvcc_release(), FLAGS, nvdisasm())).encode())
    files = (p for part in ("cuda", "common") for p in sorted((ROOT / "csrc" / part).iterdir()))
    for path in [*files, Path(__file__)]:
        if path != TABLE:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _measure(source: Path, arch: str) -> list[Instance]:
    """`compile_kernels`, once for all processes that see the same sources."""
    folder = CACHE / _key()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.stem}.{arch}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            found = [asdict(instance) for instance in compile_kernels(source, arch, folder)]
            path.with_suffix(".part").write_text(json.dumps(found))
            path.with_suffix(".part").rename(path)
    rows = json.loads(path.read_text())
    return [Instance(**row | {"usage": Usage(**row["usage"])}) for row in rows]


def measure(archs: Iterable[str] = ARCHS) -> list[Instance]:
    """Every kernel instance of csrc/cuda on these architectures."""
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [pool.submit(_measure, source, arch) for arch in archs for source in SOURCES]
        return [instance for job in jobs for instance in job.result()]


def read_table(path: Path = TABLE) -> tuple[str, dict[tuple[str, str], Usage]]:
    """The release of nvcc that the table belongs to, and the budget of each (kernel, arch)."""
    table = json.loads(path.read_text())
    return table["nvcc"], {
        (kernel, arch): Usage(*usage)
        for kernel, row in table["kernels"].items()
        for arch, usage in row.items()
    }


def format_table(instances: Iterable[Instance], release: str) -> str:
    """budgets.json: a line per kernel, (registers, shared, stack) for each architecture."""
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for instance in instances:
        rows.setdefault(instance.kernel, {})[instance.arch] = astuple(instance.usage)
    lines = [f"    {json.dumps(kernel)}: {json.dumps(rows[kernel])}" for kernel in sorted(rows)]
    head = f'{{\n  "nvcc": "{release}",\n  "columns": ["registers", "shared", "stack"],\n'
    return head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"


def faults(instances: Iterable[Instance]) -> list[str]:
    """What is wrong whatever the table says: spills, scalar loads, too many instances."""
    found = []
    kernels = set()
    for at in instances:
        kernels.add(at.kernel)
        if at.spills:
            found.append(f"{at.kernel} spills {at.spills} bytes on sm_{at.arch}")
        if at.vector_loads == 0 and at.kernel.split("<")[0] not in SCALAR:
            found.append(f"{at.kernel} loads nothing in 16 bytes on sm_{at.arch}")
    if len(kernels) > MAX_INSTANCES:
        found.append(f"{len(kernels)} kernel instances; at most {MAX_INSTANCES} are allowed")
    return found


def regressions(instances: Iterable[Instance], table: Mapping[tuple[str, str], Usage]) -> list[str]:
    """What takes more than the table grants, or is not in it, or in it alone."""
    found = []
    seen = {(at.kernel, at.arch): at.usage for at in instances}
    archs = {arch for _, arch in seen}
    for (kernel, arch), usage in seen.items():
        budget = table.get((kernel, arch))
        if budget is None:
            found.append(f"{kernel} on sm_{arch} is not in the table")
            continue
        for name, value in asdict(usage).items():
            if value > getattr(budget, name):
                found.append(
                    f"{kernel} on sm_{arch}: {name} {value}, the table grants "
                    f"{getattr(budget, name)}"
                )
    gone = [key for key in table if key[1] in archs and key not in seen]
    return found + [f"{kernel} on sm_{arch} is in the table alone" for kernel, arch in gone]


def main() -> int:
    """Prints what is wrong, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table anew")
    options = parser.parse_args()
    release = nvcc_release()
    if release is None:
        print("nvcc is not on PATH")
        return 2
    instances = measure()
    found = faults(instances)
    if not options.update:
        of, table = read_table()
        if of == release:
            found += regressions(instances, table)
        else:
            print(f"the table belongs to nvcc {of}, this is {release}: not compared")
    elif not found:
        TABLE.write_text(format_table(instances, release))
    print("\n".join(found) or f"{len({at.kernel for at in instances})} kernel instances")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
