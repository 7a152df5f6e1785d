"""The table at the end of a run: what a plain run holds, and how it is said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import figures, records, report, table
from benchmarks.network_contests import SHOWN, SHOWN_IN_BRIEF
from benchmarks.peers import Peer
from benchmarks.records import ROOT, Row
from outcomes import LIMITS, outcome

ROWS = records.rows_of(outcome(), LIMITS, "abc")


def test_one_line_for_each_contest_with_its_best_peer() -> None:
    lines = table.lines(table.Held(ROWS), full=True)
    own, peer = report.ours(ROWS), ROWS[0].best_peer
    assert own is not None
    [line] = [line for line in lines if line.startswith(own.what)]
    assert own.case in line
    assert peer in line
    assert f"{own.ratio:.2f}" in line
    assert not any("--full" in line for line in lines)


def test_a_limit_stands_where_there_is_no_peer() -> None:
    alone: Row = replace(ROWS[0], what="scale", case="fit", best_peer="", ratio=None)
    alone = replace(alone, contestant="effnet_fast")
    [line] = [
        line for line in table.lines(table.Held([alone]), full=True) if line.startswith("scale")
    ]
    assert line.endswith("1000 ms")


def test_who_is_not_installed_is_named_and_who_fails_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = Peer("there", lambda setup: lambda: None)
    peers = (there, Peer("gone", there.build, requires=("no_such_module",)))
    monkeypatch.setattr(table, "PEERS", peers)
    absent = {"gone": "no_such_module is not installed", "there": "RuntimeError: refuses"}
    lines = table.lines(table.Held(ROWS, absent), full=False)
    [missing] = [line for line in lines if "Not installed" in line]
    assert missing == (
        "Not installed, so not among the peers: gone; pip install '.[bench]' brings those of a CPU"
    )
    assert [line for line in lines if "did not take part" in line] == [
        "there did not take part: RuntimeError: refuses"
    ]
    assert any("--full" in line for line in lines)


@pytest.mark.exhaustive
def test_a_plain_run_holds_each_op_block_and_network_once() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    command += ["-p", "no:cacheprovider", "-k", "effnet_fast and not deploy and not amp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    for op in ("dwconv", "squeeze_excite", "head", "stem_conv_bn_silu"):
        held = [t for t in tests if f"bench_{op}.py" in t]
        assert sorted("training" in t for t in held) == [False, True], held
    assert sum("bench_pointwise.py" in t for t in tests) == 1
    blocks = [t for t in tests if "bench_mbconv.py" in t]
    kinds = {t.split("[")[1].rpartition("_k")[2][:4] for t in blocks}
    assert kinds == {"3_s1", "3_s2", "5_s1", "5_s2"}
    networks = [t for t in tests if "bench_network.py" in t]
    assert len(networks) == len(SHOWN | SHOWN_IN_BRIEF)
    for name in ("bench_import.py", "command", "fit", "hundred_points"):
        assert any(name in t for t in tests)


def test_no_figure_of_peers_alone() -> None:
    rows = [replace(row, peak_mb=1.0) for row in ROWS]
    assert figures.memory(rows) is not None
    assert figures.memory([r for r in rows if not r.contestant.startswith("effnet")]) is None
