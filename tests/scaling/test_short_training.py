"""The scorer that trains: folders of runs, what is resumed, processes, names of trials.

The training itself is a stand-in, which counts its steps and may be interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_fast import EfficientNet
from effnet_fast.scaling import CompoundScaling, ShortTraining, grid_search

RULES = [CompoundScaling(1.0 + 0.1 * i, 1.05, 1.0) for i in range(3)]
SMALL = -14.0  # phi of networks that are built in no time


def train(
    network: EfficientNet, data: str, out: Path, *, resume: bool, **options: Any
) -> dict[str, float]:
    """Adds the network's first weight once an epoch, and keeps the sum in the run's folder."""
    assert resume == out.exists()
    out.mkdir(exist_ok=True)
    state = out / "state"
    done = [float(line) for line in state.read_text().split()] if resume else []
    for _ in range(len(done), options["epochs"]):
        if options.get("stop") == len(done) and not (out.parent / "resumed").exists():
            raise KeyboardInterrupt
        done.append(next(network.parameters()).flatten()[0].item() + options["seed"])
        state.write_text(" ".join(map(repr, done)))
    return {"top1": sum(done), "loss": 0.0}


def scorer(tmp_path: Path, **options: Any) -> ShortTraining:
    options = {"epochs": 3, "seed": 0, **options}
    return ShortTraining(train, "data", str(tmp_path / "runs"), options)


def search(scorer: ShortTraining, **options: Any) -> list[float]:
    trials = grid_search(scorer, scorer_name=scorer.name, scalings=RULES, phi=SMALL, **options)
    return [trial.score for trial in sorted(trials, key=lambda trial: trial.scaling.alpha)]


def test_scores_every_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores = search(scorer(tmp_path))
    assert scores == search(scorer(tmp_path))
    assert scores != search(scorer(tmp_path), seed=1)
    assert scores != search(scorer(tmp_path, epochs=2))
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_interrupted_trial_continues(tmp_path: Path) -> None:
    csv = tmp_path / "trials.csv"
    whole = search(scorer(tmp_path / "other", stop=5))
    with pytest.raises(KeyboardInterrupt):
        search(scorer(tmp_path, stop=2), csv=csv)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len((folder / "state").read_text().split()) == 2
    (tmp_path / "runs" / "resumed").touch()
    assert search(scorer(tmp_path, stop=2), csv=csv) == whole
    assert len(csv.read_text().splitlines()) == 1 + len(RULES)


@pytest.mark.exhaustive
def test_in_processes(tmp_path: Path) -> None:
    assert search(scorer(tmp_path), workers=2) == search(scorer(tmp_path))


def test_another_schedule_is_refused_in_the_same_file(tmp_path: Path) -> None:
    csv = tmp_path / "trials.csv"
    search(scorer(tmp_path), csv=csv)
    with pytest.raises(ValueError, match=r"scored by train data epochs=3 seed=0, not by train"):
        search(scorer(tmp_path, epochs=4), csv=csv)


def test_keeps_runs_where_told(tmp_path: Path) -> None:
    kept = ShortTraining(train, "data", str(tmp_path), {"epochs": 1, "seed": 0}, keep=True)
    networks = [EfficientNet(rule.at(SMALL).variant) for rule in RULES]
    folders = {kept.folder(network) for network in networks}
    assert len(folders) == len(RULES)
    for network in networks:
        kept(network)
    assert set(tmp_path.iterdir()) == folders


def test_refuses_a_training_without_the_metric(tmp_path: Path) -> None:
    other = ShortTraining(train, "data", str(tmp_path), {"epochs": 1, "seed": 0}, metric="f1")
    with pytest.raises(ValueError, match="returned no 'f1', but top1, loss"):
        other(EfficientNet(RULES[0].at(SMALL).variant))
