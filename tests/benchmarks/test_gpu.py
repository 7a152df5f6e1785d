"""The run on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu, profiled, records
from benchmarks.gpu import Step
from benchmarks.records import ROOT
from cases import DWCONV_CASES, SQUEEZE_EXCITE_CASES, find
from outcomes import LIMITS, outcome
from parity import NEEDS_SIMT

BEGUN = "print('begun', flush=True)"


def _python(part: str, name: str, code: str, share: float = 0.5, needs: str | None = None) -> Step:
    return Step(part, name, (sys.executable, "-c", code), share, needs)


@pytest.mark.slow
def test_dry_run_lists_every_part() -> None:
    command = ["make", "--no-print-directory", "-s", "gpu", "DRY_RUN=1", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        [*command, "OUT=/nowhere", "COMMIT=abc"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = gpu.chosen(gpu.PARTS)
    assert [line.split()[0] for line in lines] == [step.part for step in steps]
    assert {"build", *gpu.PARTS} == {step.part for step in steps}
    assert {"build", *gpu.PARTS, gpu.COMPILED, gpu.MORE} == {step.part for step in gpu.STEPS}
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)  # a log each
    assert "--results /nowhere --commit abc" in done.stdout
    assert "benchmarks.tune --table /nowhere/tuning.json --commit abc" in done.stdout
    assert not Path("/nowhere").exists()


def test_part_selects_its_steps() -> None:
    assert {step.part for step in gpu.chosen(["tune"])} == {"build", "tune"}
    assert len(gpu.chosen([gpu.COMPILED])) == 2 + 3
    with pytest.raises(SystemExit):
        gpu.main(["--part", "nonsense"])


# One process for all: most of the time goes into importing what the tests import.
COLLECT = """
import json, sys, pytest
for arguments in json.load(sys.stdin):
    print("\\f", *arguments)
    code = pytest.main([*arguments, "--collect-only"])
    assert code == 0, code
"""


@pytest.mark.exhaustive
def test_benchmarks_of_a_dry_run_exist(tmp_path: Path) -> None:
    """Every pytest step selects something, with options that pytest knows."""
    steps = [step for step in gpu.STEPS if "pytest" in step.command]
    assert len(steps) == 19
    arguments = [gpu._words(step, tmp_path, "abc")[3:] for step in steps]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=ROOT,
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lists = dict(zip((step.name for step in steps), done.stdout.split("\f")[1:], strict=True))
    selected = "".join(lists[step.name] for step in steps if step.part != gpu.COMPILED)
    assert "cuda-b0_224_batch1-bf16-torch_compile_graphs" in selected
    assert "bf16-torch_compile]" not in selected  # each takes a minute or more to compile
    assert "b7_600_batch16-bf16-torch_compile" not in selected
    assert "test_primitives.py::test_intrinsics" in selected  # alone holds the PTX to its promises
    for large in ("b4_c", "b7_c"):
        assert f"bench_cuda.py::test_dwconv_backward[{large}" in selected
    for case in ("b0_224_batch256", "b4_380_batch64", "b7_600_batch16"):
        compiled = lists[f"compiled_{case[:2]}"]
        for mode in ("inference", "training_step"):
            for contestant in ("torch_compile_graphs", "effnet_fast"):
                assert f"test_{mode}[cuda-{case}-bf16-{contestant}]" in compiled
        assert "-torch]" not in compiled


def test_the_sanitizer_and_large_shapes_are_a_run_of_their_own() -> None:
    """Neither may eat the time of what every run needs."""
    for word in ("compute_sanitizer", "where_large"):
        run = [step for step in gpu.STEPS if word in step.command]
        assert [step.part for step in run] == [gpu.MORE]
    assert gpu.STEPS[-1].command[-1] == "compute_sanitizer"


@NEEDS_SIMT
def test_what_is_profiled_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiled, "dwconv_of", lambda *_, **__: [find(DWCONV_CASES, "c_odd")])
    excite = find(SQUEEZE_EXCITE_CASES, "c_odd")
    monkeypatch.setattr(profiled, "squeeze_excite_of", lambda *_, **__: [excite])
    assert profiled.main(backend="simt") == 3


def test_an_interrupt_ends_the_step_and_the_run(tmp_path: Path) -> None:
    steps = (
        _python("build", "long", f"import time; {BEGUN}; time.sleep(300); print('ended')"),
        _python("parity", "next", "print()"),
    )
    log = tmp_path / "long.log"

    def interrupt() -> None:
        while not (log.exists() and "\nbegun" in log.read_text()):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of shells ignore it
    try:
        thread.start()
        [result] = gpu.run(steps, tmp_path, gpu.RESERVE_S + 120)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.outcome == gpu.INTERRUPTED
    assert "\nended" not in log.read_text()


def test_summary_names_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("date,what\n")
    records.append(records.rows_of(outcome(), LIMITS, "abc"), tmp_path)
    text = gpu.summary([], tmp_path)
    assert f"{tmp_path / 'a.csv'} has the columns" in text
    assert "0.50 of torch" in text


@pytest.mark.slow
def test_a_failing_step_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        _python("build", "good", "print('built')"),
        _python("parity", "bad", "raise SystemExit(3)"),
        _python("kernels", "slow", "import time; time.sleep(300)", share=0.01),
        _python("kernels", "absent", "", needs="no-such-program"),
        _python("networks", "last", "print('reached')"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    records.append(records.rows_of(outcome(), LIMITS, "abc"), tmp_path)
    assert gpu.main(["--out", str(tmp_path), "--budget", str(gpu.RESERVE_S + 120)]) == 1
    out = capsys.readouterr().out
    words = [" ".join(line.split()) for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [line.split(" s ")[-1] for line in words[:5]] == [
        "ok",
        "failed (exit 3)",
        "out of time (1 s)",
        "left out: there is no no-such-program",
        "ok",
    ]
    assert words[5].startswith("network b0_224 inference fp32 batch 1 20.000 ms 0.50 of torch")
    assert out.endswith((tmp_path / "summary.txt").read_text() + "\n")
    assert (tmp_path / "last.log").read_text().endswith("reached\n")


def test_no_time_left(tmp_path: Path) -> None:
    [result] = gpu.run([_python("build", "late", "print()")], tmp_path, gpu.RESERVE_S)
    assert result.outcome == "left out: no time left"
