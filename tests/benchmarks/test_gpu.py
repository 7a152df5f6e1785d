"""The run on a GPU, as far as it goes without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, records
from benchmarks.gpu import Step
from benchmarks.records import ROOT
from outcomes import LIMITS, outcome


def _python(part: str, name: str, code: str, share: float = 0.5, needs: str | None = None) -> Step:
    return Step(part, name, (sys.executable, "-c", code), share, needs)


def test_dry_run_lists_every_part() -> None:
    command = ["make", "--no-print-directory", "-s", "gpu", "DRY_RUN=1", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        [*command, "OUT=/nowhere", "COMMIT=abc"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [step.part for step in gpu.STEPS]
    assert {"build", *gpu.PARTS} == {step.part for step in gpu.STEPS}
    assert "--results /nowhere --commit abc" in done.stdout
    assert not Path("/nowhere").exists()


def test_part_selects_its_steps() -> None:
    assert {step.part for step in gpu.chosen(["tune"])} == {"build", "tune"}
    with pytest.raises(SystemExit):
        gpu.main(["--part", "nonsense"])


def test_benchmarks_of_a_dry_run_exist(tmp_path: Path) -> None:
    """Every pytest step selects something, with options that pytest knows."""
    for step in gpu.STEPS:
        if "pytest" in step.command:
            command = [*gpu._words(step, tmp_path, "abc"), "--collect-only"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_failing_step_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        _python("build", "good", "print('built')"),
        _python("parity", "bad", "raise SystemExit(3)"),
        _python("kernels", "slow", "import time; time.sleep(60)", share=0.1),
        _python("kernels", "absent", "", needs="no-such-program"),
        _python("networks", "last", "print('reached')"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    records.append(records.rows_of(outcome(), LIMITS, "abc"), tmp_path)
    assert gpu.main(["--out", str(tmp_path), "--budget", str(gpu.RESERVE_S + 12)]) == 1
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
