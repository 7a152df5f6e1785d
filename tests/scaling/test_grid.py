"""Grid search: which constants are tried, trials that are not repeated, processes, Ray."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effnet_fast
from effnet_fast.scaling import (
    CompoundScaling,
    candidates,
    count,
    estimate_top1,
    grid_search,
)
from effnet_fast.scaling.accuracy import LABEL
from effnet_fast.scaling.trials import COLUMNS, TrialFile

RULES = [CompoundScaling(1.0 + 0.1 * i, 1.05, 1.0) for i in range(5)]
SMALL = -14.0  # phi of networks that are built in no time


def size(network: effnet_fast.EfficientNet) -> float:
    return float(sum(p.numel() for p in network.parameters()))


def first_weight(network: effnet_fast.EfficientNet) -> float:
    return next(network.parameters()).flatten()[0].item()


def fail(network: effnet_fast.EfficientNet) -> float:
    raise ZeroDivisionError("no data")


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.sampled_from([0.05, 0.1, 0.25]), st.floats(0.02, 0.3))
def test_candidates(step: float, tolerance: float) -> None:
    found = candidates(step, tolerance)
    constants = {(s.alpha, s.beta, s.gamma) for s in found}
    assert len(constants) == len(found)
    axis = [1 + i * step for i in range(int(1.5 / step))]
    expected = sum(
        abs(a * b * b * c * c - 2) <= tolerance - 1e-9 for a in axis for b in axis for c in axis
    )
    assert (
        expected
        <= len(found)
        <= expected + sum(abs(abs(s.growth - 2) - tolerance) <= 2e-9 for s in found)
    )
    for rule in found:
        assert abs(rule.growth - 2) <= tolerance
        assert min(rule.alpha, rule.beta, rule.gamma) >= 1


def test_paper_constants_are_among_them() -> None:
    assert CompoundScaling(1.2, 1.1, 1.15) in candidates()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1), "step and tolerance must be positive"),
        ((0.1, math.nan), "step and tolerance must be positive"),
        ((0.6, 0.01), "no alpha, beta and gamma on a grid of 0.6"),
        ((1e-3, 0.1), "more than a million points"),
        ((1e-9, 0.1), "more than a million points"),  # at once, without a list of them
        ((1e-320, 0.1), "more than a million points"),
        ((0.05, 1e300), "more than a million points"),
        ((math.inf, 0.1), "step and tolerance must be positive and finite"),
        ((0.1, math.inf), "step and tolerance must be positive and finite"),
    ],
)
def test_bad_grids(arguments: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(*arguments)


def test_built_in_scorer_is_labelled_as_an_estimate() -> None:
    trials = grid_search(scalings=RULES)
    assert {trial.scorer for trial in trials} == {LABEL} == {"estimate"}
    for trial in trials:
        variant = trial.scaling.at(1.0).variant
        assert trial.score == estimate_top1(variant)
        assert (trial.parameters, trial.macs) == (count(variant).parameters, count(variant).macs)
    assert [t.score for t in trials] == sorted((t.score for t in trials), reverse=True)


def test_own_scorer_gets_the_network() -> None:
    seen = []

    def scorer(network: effnet_fast.EfficientNet) -> float:
        seen.append(network.variant)
        return size(network)

    trials = grid_search(scorer, scalings=RULES, phi=SMALL)
    assert [trial.score for trial in trials] == [float(t.parameters) for t in trials]
    assert seen == [rule.at(SMALL).variant for rule in RULES]
    assert trials[0].scorer.endswith("scorer")


@pytest.mark.slow
def test_seed_fixes_the_weights() -> None:
    def scores(seed: int) -> list[float]:
        return [t.score for t in grid_search(first_weight, scalings=RULES, phi=SMALL, seed=seed)]

    state = torch.get_rng_state()
    assert scores(0) == scores(0)
    assert not set(scores(0)) & set(scores(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_interrupted_search_repeats_no_trial(stop_after: int, tmp_path: Path) -> None:
    path, scored = tmp_path / "trials.csv", []

    def scorer(network: effnet_fast.EfficientNet) -> float:
        if len(scored) == stop_after and not path.with_suffix(".resumed").exists():
            raise KeyboardInterrupt
        scored.append(network.variant)
        return size(network)

    with pytest.raises(KeyboardInterrupt):
        grid_search(scorer, scalings=RULES, phi=SMALL, csv=path)
    assert len(path.read_text().splitlines()) == 1 + stop_after
    kept = path.read_bytes()
    path.with_suffix(".resumed").touch()
    told = []
    trials = grid_search(scorer, scalings=RULES, phi=SMALL, csv=path, on_trial=told.append)
    assert path.read_bytes().startswith(kept)  # append-only
    assert scored == [rule.at(SMALL).variant for rule in RULES]
    assert len(told) == len(trials) == len(RULES)
    assert trials == grid_search(size, scorer_name=trials[0].scorer, scalings=RULES, phi=SMALL)
    again = grid_search(fail, scorer_name=trials[0].scorer, scalings=RULES, phi=SMALL, csv=path)
    assert again == trials


def test_line_cut_off_by_a_kill_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    whole = grid_search(scalings=RULES, csv=path)
    content = path.read_text()
    path.write_text(content[:-7])
    assert grid_search(scalings=RULES, csv=path) == whole
    assert path.read_text() == content


def test_file_that_cannot_be_written_is_refused_before_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trials.csv"
    grid_search(size, scalings=RULES[:1], phi=SMALL, csv=path)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if mode not in ("r", "rb"):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    scored = []
    with pytest.raises(PermissionError):
        grid_search(scored.append, scorer_name=f"{__name__}:size", scalings=RULES, csv=path)
    assert scored == []


def test_trials_at_another_phi_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    grid_search(scalings=RULES, csv=path)
    other = grid_search(scalings=RULES, phi=2.0, csv=path)
    assert {trial.phi for trial in other} == {2.0}
    assert len(TrialFile(path, LABEL).trials) == 2 * len(RULES)


def test_trials_of_another_scorer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    grid_search(scalings=RULES, csv=path)
    with pytest.raises(ValueError, match=r"line 2: scored by estimate, not by .*size"):
        grid_search(size, scalings=RULES, csv=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.2,1.1", "2 fields instead of 9"),
        ("1.2,1.1,x,1.0,estimate,80.0,1,1,224", "could not convert"),
        ("1.2,1.1,0.5,1.0,estimate,80.0,1,1,224", "gamma must be a finite number"),
        ("1.2,1.1,1.1,1.0,estimate,nan,1,1,224", "no finite number"),
    ],
)
def test_damaged_files(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{line}\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        grid_search(scalings=RULES, csv=path)
    path.write_text("a photograph\n")
    with pytest.raises(ValueError, match="not a file of trials"):
        grid_search(scalings=RULES, csv=path)
    assert path.read_text() == "a photograph\n"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="not a file of trials"):
        grid_search(scalings=RULES, csv=path)


def test_failed_trial_loses_none_that_ended(tmp_path: Path) -> None:
    path, calls = tmp_path / "trials.csv", []

    def scorer(network: effnet_fast.EfficientNet) -> float:
        calls.append(network)
        return math.nan if len(calls) == 3 else size(network)

    message = "alpha=1.2, beta=1.05, gamma=1 failed: ValueError: its score is nan, which is no"
    with pytest.raises(RuntimeError, match=message):
        grid_search(scorer, scalings=RULES, phi=SMALL, csv=path)
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(RuntimeError, match="failed: ZeroDivisionError: no data"):
        grid_search(fail, scalings=RULES, phi=SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be an int of at least 1"),
        ({"workers": 1.5}, "workers must be an int of at least 1"),
        ({"engine": "mpi"}, "one of process, ray"),
        ({"phi": math.nan}, "phi must be a finite number"),
        ({"phi": 1e6}, "phi = 1e\\+06 is too far from 0"),
        ({"scorer": functools.partial(size)}, "no name .* give scorer_name"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    with pytest.raises(ValueError, match=message):
        grid_search(**{"scalings": RULES, "csv": path} | options)
    assert not path.exists()


def test_scorers_without_a_name_are_given_one(tmp_path: Path) -> None:
    scorer, path = functools.partial(size), tmp_path / "trials.csv"
    trials = grid_search(scorer, scorer_name="own", scalings=RULES[:1], phi=SMALL, csv=path)
    assert trials == TrialFile(path, "own").trials


@pytest.mark.exhaustive
def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer travels by its name, so it stands in a module of its own."""
    (tmp_path / "own_scorer.py").write_text(
        "import os\n"
        "def size(network):\n"
        "    with open(os.environ['PROCESSES'], 'a') as file:\n"
        "        file.write(f'{os.getpid()}\\n')\n"
        "    import torch\n"
        "    with open(os.environ['THREADS'], 'a') as file:\n"
        "        file.write(f'{torch.get_num_threads()}\\n')\n"
        "    return float(sum(p.numel() for p in network.parameters()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))
    monkeypatch.setenv("THREADS", str(tmp_path / "threads"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    scorer = importlib.import_module("own_scorer").size
    path = tmp_path / "trials.csv"
    beside = grid_search(scorer, scalings=RULES, phi=SMALL, workers=2, csv=path)
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == len(RULES)
    assert str(os.getpid()) not in processes
    assert set((tmp_path / "threads").read_text().split()) == {"3"}
    assert beside == grid_search(scorer, scalings=RULES, phi=SMALL)
    assert len(path.read_text().splitlines()) == 1 + len(RULES)


@pytest.mark.exhaustive
def test_trials_beside_a_failed_one_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_scorer.py").write_text(
        "import time\n"
        "def score(network):\n"
        "    if network.variant.depth == 1.1 ** -14:\n"
        "        raise OSError('no data')\n"
        "    time.sleep(0.5)\n"
        "    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    scorer = importlib.import_module("failing_scorer").score
    path = tmp_path / "trials.csv"
    with pytest.raises(RuntimeError, match=r"alpha=1.1, .* failed: OSError: no data"):
        grid_search(scorer, scalings=RULES, phi=SMALL, workers=2, csv=path)
    assert len(path.read_text().splitlines()) >= 2  # the one that ran beside it, at least


class FakeRay(types.ModuleType):
    """Runs tasks when they are waited for, the last one first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.tasks = 0
        self.most = 0

    def remote(self, function):
        def submit(job):
            self.tasks += 1
            return types.SimpleNamespace(run=lambda: function(job)).run

        return types.SimpleNamespace(remote=submit)

    def wait(self, references):
        self.most = max(self.most, len(references))
        return references[-1:], references[:-1]

    def get(self, reference):
        return reference()


@pytest.mark.slow
def test_ray_runs_the_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a stand-in: the package itself is not among what the tests need."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    path = tmp_path / "trials.csv"
    grid_search(size, scalings=RULES[:2], phi=SMALL, csv=path)
    found = grid_search(size, scalings=RULES, phi=SMALL, csv=path, engine="ray")
    assert found == grid_search(size, scalings=RULES, phi=SMALL)
    assert fake.tasks == fake.most == 3


@pytest.mark.slow
def test_ray_runs_as_many_as_told_and_stops_at_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    found = grid_search(size, scalings=RULES, phi=SMALL, engine="ray", workers=2)
    assert found == grid_search(size, scalings=RULES, phi=SMALL)
    assert (fake.tasks, fake.most) == (len(RULES), 2)
    with pytest.raises(RuntimeError, match="no data"):
        grid_search(fail, scalings=RULES, phi=SMALL, engine="ray", workers=2)
    assert fake.tasks == len(RULES) + 2


def test_ray_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="needs the package ray"):
        grid_search(scalings=RULES, engine="ray")
