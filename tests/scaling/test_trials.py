"""The CSV file of trials, shared by searches that run at the same time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from effnet_fast import files
from effnet_fast.scaling import CompoundScaling, Trial, grid_search
from effnet_fast.scaling.trials import COLUMNS, FIRST_LINE, TrialFile

RULES = [CompoundScaling(1.0 + 0.1 * i, 1.05, 1.0) for i in range(6)]
SMALL = -14.0  # phi of networks that are built in no time


def trial(index: int, scorer: str = "s") -> Trial:
    return Trial(CompoundScaling(1 + index / 1e6, 1.1, 1.0), 1.0, scorer, 1.0, 1, 1, 1)


@pytest.mark.slow
def test_writers_in_several_processes_lose_no_row(tmp_path: Path) -> None:
    path, children = tmp_path / "trials.csv", []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                for i in range(20):
                    if i % 5 == 0:  # a search that starts, or resumes
                        file = TrialFile(path, "s")
                    file.append(trial(100 * child + i))
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == FIRST_LINE
    assert len(set(lines)) == len(lines) == 81
    assert len(TrialFile(path, "s").trials) == 80


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_searches_that_share_a_file_share_the_trials(tmp_path: Path, resumed: bool) -> None:
    path, ran, results = tmp_path / "trials.csv", Counter(), []
    if resumed:
        grid_search(lambda network: 1.0, scorer_name="s", scalings=RULES[:2], phi=SMALL, csv=path)

    def scorer(network: object) -> float:
        ran[network.variant] += 1
        time.sleep(0.05)  # the other searches come to their next trials meanwhile
        return float(network.variant.depth)

    def search() -> None:
        options = {"scorer_name": "s", "scalings": RULES, "phi": SMALL, "csv": path}
        told: list[Trial] = []
        results.append((grid_search(scorer, on_trial=told.append, **options), told))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ran.values()) == {1}
    assert len(ran) == len(RULES) - 2 * resumed
    assert len(results) == 3
    for trials, told in results:
        assert trials == results[0][0]
        assert len(trials) == len(told) == len(RULES)
    assert len(path.read_text().splitlines()) == 1 + len(RULES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trial_given_twice_is_run_once() -> None:
    ran = []
    trials = grid_search(
        lambda network: float(ran.append(network) or 1), scorer_name="s", scalings=RULES[:1] * 3,
        phi=SMALL,
    )  # fmt: skip
    assert len(ran) == len(trials) == 1


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    file = TrialFile(path, "s")
    key = (trial(0).scaling, 1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            other = TrialFile(path, "s")
            os.write(writer, b"taken" if other.claim(key) else b"free ")
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 5) == b"taken"
        assert not file.claim(key)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert file.claim(key)
    file.close()
    assert list(tmp_path.iterdir()) == [path]


def test_a_claim_is_given_back_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"

    def fail(network: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid_search(fail, scorer_name="s", scalings=RULES, phi=SMALL, csv=path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trial_whose_search_was_killed_is_run_by_the_one_that_waits(tmp_path: Path) -> None:
    path, ran = tmp_path / "trials.csv", []
    killed = TrialFile(path, "s")
    assert killed.claim((RULES[0], SMALL))

    def scorer(network: object) -> float:
        ran.append(network.variant)
        if len(ran) == 2:  # while the search has others to run
            killed.close()
        return 1.0

    found = grid_search(scorer, scorer_name="s", scalings=RULES[:3], phi=SMALL, csv=path)
    assert len(found) == len(ran) == 3
    assert ran[-1] == RULES[0].at(SMALL).variant


@pytest.mark.parametrize("tail", [b"1.2,1.1", b"\xff", b'"1.2'])
def test_a_line_cut_off_by_a_kill_is_no_part_of_the_next(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "trials.csv"
    file = TrialFile(path, "s")
    file.append(trial(0))
    with path.open("ab") as other:
        other.write(tail)
    file.append(trial(1))
    assert TrialFile(path, "s").trials == [trial(0), trial(1)] == file.trials


def test_a_first_line_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    for length in (0, 5, len(FIRST_LINE) - 1, len(FIRST_LINE)):
        path.write_bytes(FIRST_LINE[:length])
        TrialFile(path, "s").append(trial(0))
        assert TrialFile(path, "s").trials == [trial(0)]
    path.write_bytes(FIRST_LINE[:5] + b"x")
    with pytest.raises(ValueError, match="is not a file of trials"):
        TrialFile(path, "s")


def test_a_file_that_is_removed_or_replaced_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    file = TrialFile(path, "s")
    file.append(trial(0))
    path.unlink()
    file.append(trial(1))
    assert TrialFile(path, "s").trials == [trial(1)]
    path.write_bytes(FIRST_LINE)
    file.append(trial(2))
    assert TrialFile(path, "s").trials == [trial(2)] == file.trials


def test_what_another_scorer_appends_meanwhile_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    file = TrialFile(path, "s")
    with path.open("a") as other:
        other.write(",".join(trial(0, "t").row()) + "\n")
    with pytest.raises(ValueError, match=r"trials\.csv, line 2: scored by t, not by s"):
        file.append(trial(1))


def test_names_of_several_lines_are_refused(tmp_path: Path) -> None:
    for name in ("a\nb", "a\rb", "a\0b", "a\u2028b"):
        with pytest.raises(ValueError, match="one line of text"):
            TrialFile(tmp_path / "trials.csv", name)
    name = 'ü, "quoted"'
    TrialFile(tmp_path / "trials.csv", name).append(trial(0, name))
    assert TrialFile(tmp_path / "trials.csv", name).trials == [trial(0, name)]


def test_pipes_and_full_disks_are_told_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: a pipe, not a file"):
        TrialFile(tmp_path / "pipe", "s")
    with pytest.raises(OSError, match="No such file") as caught:
        TrialFile(tmp_path / "absent" / "trials.csv", "s")
    assert caught.value.filename == str(tmp_path / "absent" / "trials.csv")


def test_without_locks_one_search_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    path = tmp_path / "trials.csv"
    options = {"scorer_name": "s", "scalings": RULES[:2], "phi": SMALL, "csv": path}
    found = grid_search(lambda network: 1.0, **options)
    assert found == grid_search(None, **options)
    assert list(tmp_path.iterdir()) == [path]
    assert len(COLUMNS) == len(path.read_text().splitlines()[1].split(","))


def test_nobody_reads_or_writes_beside_who_holds_the_lock(tmp_path: Path) -> None:
    """Else the half of a row that another has written would be cut off."""
    path = tmp_path / "trials.csv"
    file = TrialFile(path, "s")
    row = ",".join(trial(0).row()) + "\n"
    threads = [
        threading.Thread(target=file.append, args=(trial(1),)),
        threading.Thread(target=TrialFile, args=(path, "s")),
    ]
    with path.open("a") as other:
        files.lock(other)
        other.write(row[:9])
        other.flush()
        for thread in threads:
            thread.start()
        time.sleep(0.3)  # long enough to reach the lock, which is not a condition
        assert path.read_bytes() == FIRST_LINE + row[:9].encode()
        other.write(row[9:])
        other.flush()
        files.unlock(other)
    for thread in threads:
        thread.join()
    assert TrialFile(path, "s").trials == [trial(0), trial(1)]
