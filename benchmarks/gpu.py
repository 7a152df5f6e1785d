"""One run on a machine with an NVIDIA GPU: `make gpu`, or `python -m benchmarks.gpu`.

Builds the package with CUDA (no network needed), holds the kernels to the reference on the device,
times ops and networks beside their peers, and reads hardware counters. Parts run in turn, each
within its share of the time that is left; one that fails does not stop the others. Two parts run
only where they are asked for: "compiled", networks beside torch.compile with CUDA graphs, each a
minute or more to compile, and "more", large shapes, B4's and B7's kernels and NVIDIA's sanitizer.
Everything goes to one folder: a log per step, the CSV file, and summary.txt, which is also printed
last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.contest import OURS
from benchmarks.records import ROOT, Row
from benchmarks.report import contests, published

BUDGET_S = 9 * 60.0
RESERVE_S = 15.0  # for the summary
INTERRUPTED = "interrupted"
PARTS = ("parity", "kernels", "networks", "tune")
# Only where they are asked for, since they take longer than all the others: peers that compile;
# large shapes, B4's and B7's kernels, NVIDIA's sanitizer.
COMPILED, MORE = "compiled", "more"
LONG_BUDGET_S = 60 * 60.0
# Counters of one launch of each kernel: time, bytes to and from memory, busy issue slots.
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
PROFILED = ("-m", "benchmarks.profiled")
OWN_KERNELS = "regex:^(dwconv_bn_silu|excite|fold|bn_act|gate|reduce)_"
NCU = ("ncu", "--clock-control", "none", "--csv", "--launch-count", "400")
NCU += ("--kernel-name-base", "function", "--kernel-name", OWN_KERNELS)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Args:
        part: which of `PARTS` it belongs to, `COMPILED`, `MORE`, or "build".
        name: names its log.
        command: with {out} for the folder of results and {commit} for the commit.
        share: of the time that is left when it starts.
        needs: a program without which it is left out.
    """

    part: str
    name: str
    command: tuple[str, ...]
    share: float
    needs: str | None = None


def _pytest(part: str, name: str, share: float, *options: str) -> Step:
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu")
    return Step(part, name, (*command, *options), share)


def _workers() -> tuple[str, ...]:
    """A few processes share the parity tests, where pytest-xdist is installed."""
    return ("-n", "4") if importlib.util.find_spec("xdist") else ()


def _bench(part: str, name: str, share: float, select: str, file: str = "") -> Step:
    options = (
        "--benchmark-only",
        "--full",
        "--record",
        "--results",
        "{out}",
        "--commit",
        "{commit}",
    )
    file = file or ("network" if part in ("networks", COMPILED) else name)
    return _pytest(
        *(part, name, share, f"benchmarks/bench_{file}.py"),
        *(*options, "--rounds", "2", "-k", select),
    )


KERNELS = "bf16 and b0_ and not torch_compile"
OTHER_KERNELS = "bf16 and (b4_ or b7_) and not torch_compile"
# By the CUDA kernels' own tests first; what takes long has a step of its own.
LONG = ("compute_sanitizer", "where_large", "more_than_2_31")
CUDA_TESTS = ("tests/csrc", "tests/ops", "-k", " and ".join(f"not {name}" for name in LONG))
INT64_TESTS = ("tests/ops/test_cuda_device.py", "-k", "more_than_2_31")  # one takes 26 GB
LARGE_TESTS = ("tests/ops", "-k", "where_large")
SANITIZER_TESTS = ("tests/ops/test_cuda_device.py", "-k", "compute_sanitizer")
# A contest that is cut off records nothing, and each compilation takes a minute or more: of the
# compiled peers only the one with CUDA graphs, and only in B0's contests.
NETWORKS = {
    "b0": "bf16 and b0_ and (torch_compile_graphs or not torch_compile)",
    "b4": "bf16 and b4_ and not torch_compile",
    "b7": "bf16 and b7_ and not torch_compile",
}
OTHER_TESTS = (
    *("tests/models", "tests/triton_kernels"),
    *("tests/test_deployment_device.py", "tests/test_deployment_launched.py"),
)
# Name, share of the time that is left, and what: B7 compiles the longest.
COMPILATIONS = tuple(
    (f"{COMPILED}_{size}", share, f"bf16 and {size}_ and (torch_compile_graphs or {OURS})")
    for size, share in (("b0", 0.2), ("b4", 0.4), ("b7", 0.9))
)
# In place, so that the checkout which the tests import is the one that was built.
INSTALL = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
STEPS = (
    Step("build", "build", (sys.executable, *INSTALL), 0.4),
    Step("build", "doctor", (sys.executable, "-m", "effnet_fast.cli", "doctor"), 0.1),
    _pytest("parity", "parity_cuda", 0.25, *_workers(), *CUDA_TESTS),
    _pytest("parity", "parity", 0.25, *_workers(), *OTHER_TESTS),
    _pytest("parity", "parity_int64", 0.1, *INT64_TESTS),
    _bench("kernels", "cuda", 0.4, KERNELS),
    _bench("kernels", "dwconv", 0.2, KERNELS),
    _bench("kernels", "squeeze_excite", 0.2, KERNELS),
    _bench("kernels", "pointwise", 0.2, KERNELS),
    _bench("kernels", "head", 0.2, KERNELS),
    _bench("kernels", "stem_conv_bn_silu", 0.2, KERNELS),
    _bench("kernels", "mbconv", 0.2, KERNELS),
    _bench("networks", "b0", 0.4, NETWORKS["b0"]),
    _bench("networks", "b4", 0.5, NETWORKS["b4"]),
    _bench("networks", "b7", 0.9, NETWORKS["b7"]),
    Step(
        *("tune", "tune"),
        (
            *(sys.executable, "-m", "benchmarks.tune"),
            *("--table", "{out}/tuning.json", "--commit", "{commit}"),
        ),
        0.6,
    ),
    Step(
        *("tune", "counters"),
        (*NCU, "--metrics", ",".join(COUNTERS), sys.executable, *PROFILED),
        *(1.0, "ncu"),
    ),
    *(_bench(COMPILED, *row) for row in COMPILATIONS),
    _pytest(MORE, "parity_large", 0.3, *_workers(), *LARGE_TESTS),
    _bench(MORE, "cuda_b4_b7", 0.7, OTHER_KERNELS, "cuda"),
    _pytest(MORE, "sanitizer", 1.0, *SANITIZER_TESTS),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a step ended: "ok", "failed (exit N)", "out of time", "interrupted", or why it is left
    out."""

    step: Step
    outcome: str
    seconds: float


def chosen(parts: Sequence[str]) -> list[Step]:
    """The steps of these parts, the build first."""
    return [step for step in STEPS if step.part in ("build", *parts)]


def run(steps: Sequence[Step], out: Path, budget_s: float, commit: str = "") -> list[Result]:
    """Runs the steps in turn, each with its share of the time that is left; logs go to `out`.

    Ctrl-C ends the step that runs, and the run.
    """
    end = time.monotonic() + budget_s - RESERVE_S
    results = []
    for step in steps:
        left = end - time.monotonic()
        if step.needs and shutil.which(step.needs) is None:
            results.append(Result(step, f"left out: there is no {step.needs}", 0.0))
        elif left <= 1.0:
            results.append(Result(step, "left out: no time left", 0.0))
        else:
            limit = left if step is steps[-1] else max(1.0, left * step.share)
            results.append(_run(step, _words(step, out, commit), out, limit))
        print(_line(results[-1]), flush=True)
        if results[-1].outcome == INTERRUPTED:
            break
    return results


def _words(step: Step, out: Path, commit: str) -> list[str]:
    return [
        word.replace("{out}", str(out)) if word != "{commit}" else commit for word in step.command
    ]


def _run(step: Step, command: list[str], out: Path, limit_s: float) -> Result:
    start = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # A session of its own, so that what the command started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
            outcome = "ok" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            outcome = f"out of time ({limit_s:.0f} s)"
        except KeyboardInterrupt:
            outcome = INTERRUPTED
        finally:
            with contextlib.suppress(ProcessLookupError):  # the command, or what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(step, outcome, time.monotonic() - start)


def _line(result: Result) -> str:
    return f"{result.step.part:9} {result.step.name:15} {result.seconds:6.1f} s  {result.outcome}"


def summary(results: Sequence[Result], out: Path) -> str:
    """What ran, and the medians of this package beside the best peers."""
    lines = [_line(result) for result in results]
    for path in sorted(out.glob("*.csv")):
        try:
            rows = published(records.read(path))
        except ValueError as error:
            lines.append(str(error))
            continue
        for mode in ("inference", "training"):
            groups = contests(rows, sorted({row.what for row in rows}), mode)
            lines += [line for group in groups.values() if (line := _standing(group))]
    return "\n".join(lines) + "\n"


def _standing(group: Sequence[Row]) -> str | None:
    own = [row for row in group if row.contestant.startswith(OURS)]
    peers = [row for row in group if row.contestant == row.best_peer]
    if not own or not peers:
        return None
    best, peer = min(own, key=lambda row: row.p50_ms), peers[0]
    return (
        f"{best.what:18} {best.case:28} {best.mode:9} {best.dtype} batch {best.batch:<4} "
        f"{best.p50_ms:9.3f} ms  {best.p50_ms / peer.p50_ms:5.2f} of {peer.contestant}  "
        f"{best.floor_share or 0:4.0%} of the floor"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts.

    Returns:
        0, or 1 where a step failed or ran out of time.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument(
        "--part", choices=(*PARTS, COMPILED, MORE), action="append",
        help="only this part (may be repeated; default: all but the last two)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float,
        help=f"seconds for everything (default: {BUDGET_S:.0f}, "
        f"with the part compiled or more {LONG_BUDGET_S:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--commit", default=records.git_commit(), help="for the records (default: git's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    arguments = parser.parse_args(argv)
    parts = arguments.part or PARTS
    steps, budget_s = chosen(parts), LONG_BUDGET_S if {COMPILED, MORE} & {*parts} else BUDGET_S
    out = arguments.out.resolve()
    if arguments.dry_run:
        for step in steps:
            command = shlex.join(_words(step, out, arguments.commit))
            print(f"{step.part:9} {step.name:15} {command}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    results = run(steps, out, arguments.budget or budget_s, arguments.commit)
    text = summary(results, out)
    (out / "summary.txt").write_text(text)
    print(text)
    bad = [r for r in results if not r.outcome.startswith(("ok", "left out"))]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
