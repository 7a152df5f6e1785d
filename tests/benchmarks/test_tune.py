"""The tool that refreshes the tuning table: choosing, and writing rows; measuring needs a GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from benchmarks import tune
from effnet_fast.triton_kernels import launching, tuning

SIZES = (("bytes", 2), ("m", 1000))
KEY = ("bn_act", SIZES)


def test_the_quickest_is_chosen_and_noise_is_not() -> None:
    default = {KEY: 1.0, ("squeeze", SIZES): 1.0}
    slow, quick, quicker = {"BP": 1}, {"BP": 2}, {"BP": 3}
    candidates = [
        ("bn_act", slow, {KEY: 0.99}),
        ("bn_act", quick, {KEY: 0.9}),
        ("bn_act", quicker, {KEY: 0.89}),
        ("bn_act", slow, {KEY: 0.95, ("squeeze", SIZES): 0.1}),  # another kernel's override
    ]
    assert tune.best(default, candidates) == {KEY: quicker}


def test_rows_go_in_front_and_replace_their_own(tmp_path: Path) -> None:
    table = tmp_path / "tuning.json"
    first = tune.rows_of({KEY: {"BP": 1}}, "Device", "0123456")
    assert first[0]["where"] == {"bytes": [2, 2], "m": [500, 2000]}
    tune.write(table, first)  # beside the package's rows, where the file is not there yet
    assert json.loads(table.read_text()) == [*first, *tuning.rows()]
    second = tune.rows_of({KEY: {"BP": 2}}, "Device", "abcdef0")
    tune.write(table, second)
    assert json.loads(table.read_text()) == [*second, *tuning.rows()]
    assert second[0]["source"] == "measured(Device, abcdef0)"


def test_launches_are_watched_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch after a kernel's configuration is that kernel's; folds have none."""
    started = []
    monkeypatch.setattr(launching, "start", lambda *args: started.append(args))
    x, ticks = torch.empty(0, 8, 3, 3), itertools.count()
    override = {"bn_act": {"BP": 7}}
    with tune.watched(override, lambda: next(ticks)) as seen:
        assert tuning.config("bn_act", x, c=8) == {"BP": 7}
        launching.start("kernel")
        launching.start("fold")
        assert tuning.config("bn_sums", x, c=8, m=1) != {"BP": 7}
        launching.start("sums")
    assert [(key[0], begin, end) for key, begin, end in seen] == [
        ("bn_act", 0, 1),
        ("bn_sums", 3, 4),
    ]
    assert len(started) == 3
    assert tuning.config("bn_act", x, c=8) != {"BP": 7}


def test_candidates_are_of_the_tables_kernels() -> None:
    """Each candidate names what the table's rows of its kernel name."""
    for kernel, configs in tune.CANDIDATES.items():
        rows = [row for row in tuning.rows() if row["kernel"] == kernel]
        assert rows
        assert {frozenset(c) for c in configs} == {frozenset(row["config"]) for row in rows}


class _Clock:
    """An event whose clock stands still but where a test moves it."""

    now = 0.0

    def __init__(self) -> None:
        self.at = _Clock.now

    def elapsed_time(self, other: _Clock) -> float:
        return other.at - self.at


def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which 32 channels a program are quick, and 32 rows on 8 warps do not fit."""
    x = torch.empty(0, 8, 3, 3)

    def launched(kernel: str, config: dict[str, int]) -> None:
        if config["BP"] == 32 and config["num_warps"] == 8:
            raise OutOfResources(300_000, 232_448, "shared memory")
        _Clock.now += 1.0 if config["BC"] == 32 else 2.0

    def step(model: object, images: object) -> None:
        for kernel, sizes in (("bn_act", {"c": 8}), ("bn_sums", {"c": 8, "m": 9})):
            launching.start(kernel, tuning.config(kernel, x, **sizes))

    rows = tune._ROWS
    monkeypatch.setattr(tune, "CANDIDATES", {"bn_act": rows, "bn_sums": rows})
    monkeypatch.setattr(launching, "start", launched)
    monkeypatch.setattr(tune, "_event", _Clock)
    monkeypatch.setattr(tune, "_step", step)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(1, 3, 1, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Device")


def test_what_does_not_fit_is_left_out_and_the_best_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _machine(monkeypatch)
    table = tmp_path / "tuning.json"
    assert tune.main(["--table", str(table), "--commit", "0123456"]) == 0
    new = json.loads(table.read_text())[: -len(tuning.rows())]
    assert {row["kernel"] for row in new} == {"bn_act", "bn_sums"}
    assert {row["config"]["BC"] for row in new} == {32}
    assert {row["source"] for row in new} == {"measured(Device, 0123456)"}
    assert "out of resource: shared memory" in capsys.readouterr().out


def test_rows_are_written_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured stays where the run is ended."""
    _machine(monkeypatch)
    kernels = iter([{KEY: {"BP": 1}}])

    def tuned(step: object) -> Iterator[dict]:
        yield from kernels
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", tuned)
    table = tmp_path / "tuning.json"
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--table", str(table), "--commit", "0123456"])
    assert json.loads(table.read_text())[0]["config"] == {"BP": 1}


@pytest.mark.parametrize("commit", ["", "abc", "0123456+", "0123456 ", "g123456", "0" * 41])
def test_what_is_no_commit_is_refused(
    commit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _machine(monkeypatch)
    with pytest.raises(SystemExit):
        tune.main(["--commit", commit, "--dry-run"])
    assert "7 to 40 hexadecimal digits" in capsys.readouterr().err
    monkeypatch.setattr(tune.records, "git_commit", lambda: commit)
    with pytest.raises(SystemExit, match="or give --commit"):
        tune.main(["--dry-run"])


def test_without_a_gpu_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tuning.FILE.read_bytes()
    assert tune.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert tuning.FILE.read_bytes() == before
