"""Results as rows of a CSV file per machine, to which runs only ever append."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.contest import Outcome
from benchmarks.limits import Limits

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """One contestant in one contest. Times in ms, memory in MB (1e6 bytes), rates in 1e9 a second.

    ratio: its median over the best peer's. floor_ms: what the work takes at this machine's limits;
    floor_share: that over the median. Empty where there is nothing to say.
    """

    date: str
    commit: str
    machine: str
    device: str
    threads: int
    what: str
    case: str
    mode: str
    dtype: str
    batch: int
    contestant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    calls: int
    best_peer: str
    ratio: float | None
    floor_ms: float | None
    floor_share: float | None
    peak_mb: float | None
    gbytes: float | None  # the work's bytes, flops and SiLUs, 1e9
    gflops: float | None
    gsilus: float | None
    limit_dense_gflops: float | None
    limit_fma_gflops: float | None
    limit_memory_gbs: float | None
    python: str
    torch: str
    triton: str
    cuda: str
    driver: str
    package: str  # version of the contestant's own package


FIELDS = tuple(field.name for field in fields(Row))
DIGITS = 5  # significant ones of every figure
PACKAGES = {
    "lukemelas": "efficientnet_pytorch",
    "timm": "timm",
    "torchvision": "torchvision",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "jax": "jax",
    "tensorrt": "tensorrt",
    "torch_tensorrt": "torch_tensorrt",
    "effnet_fast": "effnet-fast",
}


def rows_of(outcome: Outcome, limits: Limits | None, commit: str | None = None) -> list[Row]:
    """A contest's result as rows, the conditions included; `commit` None means git's."""
    contest, work = outcome.contest, outcome.contest.work
    floor = limits.floor_s(work, contest.dtype) * 1e3 if limits and work else None
    common = {
        **_conditions(contest.device),
        "commit": git_commit() if commit is None else commit,
        "what": contest.what,
        "case": contest.case,
        "mode": contest.mode,
        "dtype": contest.dtype,
        "batch": contest.batch,
        "floor_ms": floor,
        "gbytes": work.bytes / 1e9 if work else None,
        "gflops": work.flops / 1e9 if work else None,
        "gsilus": work.silus / 1e9 if work else None,
        "limit_dense_gflops": _dense(limits, contest.dtype),
        "limit_fma_gflops": limits.fma / 1e9 if limits else None,
        "limit_memory_gbs": limits.memory_rate / 1e9 if limits else None,
    }
    partial = contest.yardsticks  # the floor is of the whole
    rows = []
    for name, standing in outcome.standings.items():
        time, peak = standing.timing, standing.peak_bytes
        rows.append(
            Row(
                **common,
                contestant=name,
                p20_ms=time.p20,
                p50_ms=time.median,
                p80_ms=time.p80,
                calls=time.calls,
                best_peer=standing.best_peer or "",
                ratio=standing.ratio,
                floor_share=floor / time.median if floor and name not in partial else None,
                peak_mb=None if peak is None else peak / 1e6,
                package=_package_version(name),
            )
        )
    return rows


def append(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Adds rows to the file of their machine, which is made with a header when it is new.

    The rows of a file are written at once, so that an interrupted run leaves no half row.

    Raises:
        ValueError: the file's header is another one; nothing is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[Row]] = {}
    for row in rows:
        files.setdefault(folder / f"{slug(row.machine)}.csv", []).append(row)
    for path, own in files.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), [])
            if tuple(header) != FIELDS:
                raise ValueError(f"{path} has the columns {header}, not {list(FIELDS)}")
        else:
            writer.writerow(FIELDS)
        writer.writerows([_cell(value) for value in asdict(row).values()] for row in own)
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


def prepare(folder: Path) -> None:
    """Makes the folder of results and sees that rows can be added in it.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for path in folder.glob("*.csv"):
        path.open("a").close()


def read(path: Path) -> list[Row]:
    """The rows of a file, in order.

    Raises:
        ValueError: a column is missing or unknown, or a cell is no number; the message names it.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {list(FIELDS)}")
        return [_row(cells, f"{path}:{reader.line_num}") for cells in reader]


def _row(cells: dict[str, str], place: str) -> Row:
    values = {}
    for field in fields(Row):
        text, kind = cells[field.name], str(field.type)
        try:
            if kind == "str":
                values[field.name] = text
            elif not text and "None" in kind:
                values[field.name] = None
            else:
                values[field.name] = int(text) if kind == "int" else float(text)
        except (TypeError, ValueError):
            raise ValueError(f"{place}: {field.name} is {text!r}, not {kind}") from None
    return Row(**values)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def slug(name: str) -> str:
    """A machine's name as a file's: lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: str) -> str:
    """Name of the GPU, or of the CPU with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = torch.get_num_threads()
    return f"{_cpu_name()} {cores} threads"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _conditions(device: str) -> dict[str, object]:
    cuda = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": (torch.version.cuda or "") if cuda else "",
        "driver": _driver() if cuda else "",
    }


def git_commit() -> str:
    """The checkout's commit, with a plus where files differ from it; empty outside of git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, check=True, capture_output=True, text=True)
        return result.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def version(package: str) -> str:
    """A distribution's version, empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package_version(contestant: str) -> str:
    for prefix, package in PACKAGES.items():
        if contestant.startswith(prefix):
            return version(package)
    return torch.__version__


def _dense(limits: Limits | None, dtype: str) -> float | None:
    if limits is None:
        return None
    return (limits.dense.get(dtype) or limits.dense["fp32"]) / 1e9
