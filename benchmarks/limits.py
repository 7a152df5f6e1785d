"""What this machine can do at most, measured in the same run as what is held against it.

Rates are the best of several tries: whatever else runs can only make them smaller. A floor is the
larger of a computation's arithmetic and of its bytes over these rates; nothing runs faster.

A SiLU counts as 11.5 slots of a fused multiply-add for 16 elements with AVX-512: a floor, for this
package's kernels take 12 in bf16 and 17 in fp32 (docs/performance.md).
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import device_clock
from effnet_fast import timing

SOURCE = Path(__file__).with_name("native") / "peaks.cpp"
COMPILER = "g++"
OPTIONS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC", "-pthread")
CPUINFO = Path("/proc/cpuinfo")
CPUINFO_LINES = (b"model name", b"flags", b"CPU part", b"Features")  # x86, aarch64
TRIES = 30
TRY_S = 0.02  # seconds that one try takes: short, so that some fall between what else runs
COPY_SIZES = tuple(2**n for n in range(16, 29, 2))  # bytes read and written: 64 KiB to 256 MiB
CPU_MATRIX_SIDE = 1024
MATRIX_SIDE = 8192  # of the square matrices whose product is timed on a GPU
SILU_FLOPS = 23.0  # 11.5 slots of two operations a lane, for one element a lane
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What a computation must do at the least.

    Args:
        bytes: read and written, inputs and outputs once each.
        dense_flops: two per multiply-add of products that the matrix or dot units could do.
        other_flops: two per multiply-add of depthwise convolutions.
        silus: elements that SiLU is taken of, forward or backward.
    """

    bytes: float
    dense_flops: float = 0.0
    other_flops: float = 0.0
    silus: float = 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations without SiLU's."""
        return self.dense_flops + self.other_flops


@dataclass(frozen=True)
class Limits:
    """Rates of a device.

    Args:
        device: "cpu" or "cuda".
        dense: operations a second of products, by dtype ("fp32", "bf16", "fp16").
        fma: operations a second of fp32 multiply-adds outside products.
        copies: (bytes read and written, bytes a second), for growing sizes.
    """

    device: str
    dense: dict[str, float]
    fma: float
    copies: tuple[tuple[int, float], ...]

    def copy_rate(self, size: float) -> float:
        """Bytes a second of a copy that moves `size` bytes, in the cache where that fits."""
        sizes = [s for s, _ in self.copies]
        rates = [r for _, r in self.copies]
        at = bisect.bisect_left(sizes, size)
        if at in (0, len(sizes)):
            return rates[min(at, len(sizes) - 1)]
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return rates[at - 1] + share * (rates[at] - rates[at - 1])

    @property
    def memory_rate(self) -> float:
        """Bytes a second of the largest copy."""
        return self.copies[-1][1]

    def floor_s(self, work: Work, dtype: str) -> float:
        """Seconds that `work` takes at the least in a dtype."""
        dense = self.dense.get(dtype) or self.dense["fp32"]
        vector = work.other_flops + SILU_FLOPS * work.silus
        return max(
            work.bytes / self.copy_rate(work.bytes), work.dense_flops / dense + vector / self.fma
        )


@functools.cache
def measure(device: str = "cpu") -> Limits:
    """The rates of this machine, measured once a process.

    Raises:
        RuntimeError: the CPU's peak needs g++, and there is none.
    """
    return _cpu() if device == "cpu" else _cuda()


def _cpu() -> Limits:
    library = _library()
    threads = torch.get_num_threads()
    fma = _best(lambda n: library.run_fma(threads, n))
    # A product of matrices stands in for units that no chain here drives, such as AMX tiles.
    dense = {"fp32": max(fma, _cpu_product_rate(torch.float32))}
    dense["bf16"] = max(dense["fp32"], _cpu_product_rate(torch.bfloat16))
    if library.run_dot(1, 1):
        dense["bf16"] = max(dense["bf16"], _best(lambda n: library.run_dot(threads, n)))
    return Limits("cpu", dense, fma, _copies())


def _best(run: Callable[[int], float]) -> float:
    """The highest rate of `run`, which does a number of rounds and returns the operations."""
    rounds, best = 1000, 0.0
    while True:
        start = time.perf_counter()
        run(rounds)
        if time.perf_counter() - start > TRY_S:
            break
        rounds *= 2
    for _ in range(TRIES):
        start = time.perf_counter()
        operations = run(rounds)
        best = max(best, operations / (time.perf_counter() - start))
    return best


def _cpu_product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices."""
    side = CPU_MATRIX_SIDE
    a = torch.randn(side, side).to(dtype)
    times = timing.call_for_seconds(lambda: torch.mm(a, a), TRY_S, TRIES)
    return 2e3 * side**3 / min(times)


def _copies() -> tuple[tuple[int, float], ...]:
    found = []
    for size in COPY_SIZES:
        source = torch.rand(size // 8)
        target = torch.empty_like(source)
        calls = max(1, int(2**26 / size))
        best = 0.0
        for _ in range(TRIES):
            start = time.perf_counter()
            for _ in range(calls):
                target.copy_(source)
            best = max(best, calls * size / (time.perf_counter() - start))
        found.append((size, best))
    return tuple(found)


def _library() -> ctypes.CDLL:
    """The compiled peaks.cpp, from the cache where it is there."""
    path = _path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path)
    library = ctypes.CDLL(str(path))
    for function in (library.run_fma, library.run_dot):
        function.restype = ctypes.c_double
        function.argtypes = (ctypes.c_int, ctypes.c_int64)
    return library


def _path() -> Path:
    """Where the library lies: named by all that decides about its code."""
    key = hashlib.sha256(SOURCE.read_bytes() + _processor() + _run(COMPILER, "--version"))
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effnet-fast"
    return folder / f"peaks-{key.hexdigest()[:16]}.so"


def _processor() -> bytes:
    """The model and the instruction sets of this machine, for which `OPTIONS` compile."""
    lines = CPUINFO.read_bytes().splitlines() if CPUINFO.exists() else []
    return b"\n".join(sorted({line for line in lines if line.startswith(CPUINFO_LINES)}))


def _compile(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "peaks.so"
        _run(COMPILER, *OPTIONS, str(SOURCE), "-o", str(built))
        built.replace(path)


def _run(*command: str) -> bytes:
    """What the compiler prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise RuntimeError("g++ is needed to measure the peak rates of the CPU") from None
    except subprocess.CalledProcessError as error:
        text = error.stderr.decode(errors="replace")
        raise RuntimeError(f"g++ cannot compile {SOURCE.name}: {text}") from error


def _cuda() -> Limits:
    """Rates by the device's own clock, each call from a flushed cache, as contestants are timed."""
    dense = {name: _product_rate(dtype, tf32=True) for name, dtype in DTYPES.items()}
    fma = _product_rate(torch.float32, tf32=False)
    copies = []
    for size in COPY_SIZES:
        source = torch.rand(size // 8, device="cuda")
        target = torch.empty_like(source)
        copies.append((size, size / _shortest(functools.partial(target.copy_, source))))
    return Limits("cuda", dense, fma, tuple(copies))


def _product_rate(dtype: torch.dtype, tf32: bool) -> float:
    """Of two square matrices; with TF32, which convolutions of fp32 use, where that is faster."""
    side = MATRIX_SIDE
    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32 and torch.backends.cudnn.allow_tf32
    try:
        return 2 * side**3 / _shortest(lambda: torch.mm(a, b))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _shortest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    function()
    return min(device_clock.call_for(function, TRY_S, TRIES)) * 1e-3
