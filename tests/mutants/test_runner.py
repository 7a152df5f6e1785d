"""`make mutants` on a program of two functions, of which one is tested."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutants
from mutant_copy import Copy
from mutant_list import Mutant

pytestmark = pytest.mark.exhaustive

CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
from code_under_test import double, half


def test_double():
    assert double(3) == 6


def test_half():
    half(4)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "code_under_test.py").write_text(CODE)
    (root / "tests/test_code.py").write_text(TESTS)
    (root / "Makefile").write_text('test:\n\tpython -m pytest -m "not gpu"\n')
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def runner(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mutants.Runner]:
    monkeypatch.setattr(mutants, "ROOT", root)
    copy = Copy(root, tmp_path / "copy", 1)
    copy.update_files()
    yield mutants.Runner([copy], mutants.Results(tmp_path / "results.jsonl"), fresh=False)
    copy.close()


def mutant(name: str, find: str, put: str, tests: str = "tests/test_code.py") -> Mutant:
    return Mutant(name, "area", "kind", "code_under_test.py", find, put, "why", (tests,), ())


def test_states(runner: mutants.Runner, root: Path) -> None:
    killed = runner.run(mutant("killed", "2 * x", "3 * x"))
    survivor = runner.run(mutant("survivor", "x / 2", "x / 3"))
    unusable = runner.run(mutant("unusable", "x / 2", "x / 3", "tests/test_code.py::test_missing"))
    assert (killed["state"], survivor["state"]) == ("killed", "SURVIVES")
    assert killed["by"] == "tests/test_code.py::test_double"
    assert unusable["state"] == "unusable"
    assert (root / "code_under_test.py").read_text() == CODE


def test_options_of_the_outer_run_are_not_handed_on(
    runner: mutants.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p a_plugin_of_the_outer_run")
    assert runner.run(mutant("killed", "2 * x", "3 * x"))["state"] == "killed"


def test_results_are_kept_until_a_file_changes(
    runner: mutants.Runner, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = runner.run(mutant("killed", "2 * x", "3 * x"))
    kept = mutants.Results(tmp_path / "results.jsonl").rows
    assert kept[row["key"]] == row
    monkeypatch.setattr(runner, "judge", lambda *_: pytest.fail("tried again"))
    assert runner.run(mutant("killed", "2 * x", "3 * x")) == row
    (root / "tests/test_code.py").write_text(TESTS + "\n")
    assert mutants.mutant_key(mutant("killed", "2 * x", "3 * x")) != row["key"]


def test_a_test_without_an_end_kills(
    runner: mutants.Runner, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "limit_of", lambda seconds: 5.0)
    row = runner.run(mutant("hang", "return 2 * x", "while True: pass"))
    assert row["state"] == "killed"
    assert "no end within" in row["by"]
