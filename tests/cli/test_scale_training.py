"""`scale grid --train` and `scale fit --out`: from a search to networks that training takes."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effnet_fast import EfficientNet, cli
from effnet_fast.scaling import count
from effnet_fast.training.runs import trainer

SMALL = ["--phi", "-14", "--step", "0.2", "--tolerance", "0.02"]  # networks of a few thousand MAC


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes that one pixel tells apart."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 8), ("val", 2)):
        for label, colour in enumerate(((30, 40, 200), (210, 200, 20))):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = (rng.normal(0, 20, (16, 16, 3)) + colour).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "data"


def scale(argv: list[Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["scale", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(argv: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = cli.main(["scale", *map(str, argv)])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == cli.BAD_INPUT
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_trains_every_candidate(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["grid", *SMALL, "--train", "data", "--batch", 4, "--seed", 1]
    report = scale([*argv, "--csv", "trials.csv"], capsys)
    assert report["scorer"] == "train data batch=4 epochs=1 seed=1"
    assert report["note"] is None
    scores = [trial["score"] for trial in report["trials"]]
    assert len(scores) > 1
    assert all(score in (0.0, 0.25, 0.5, 0.75, 1.0) for score in scores)
    assert not Path("trials-runs").exists()
    with open("trials.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(scores)
    again = scale([*argv, "--csv", "trials.csv"], capsys)
    assert again["trials"] == report["trials"]


@pytest.mark.exhaustive
def test_same_seed_same_scores_and_runs_are_kept(data, tmp_path, capsys, monkeypatch) -> None:
    """The losses are compared, too: scores of four images are coarse."""
    argv = ["grid", *SMALL, "--train", data, "--batch", 4]
    found = []
    for name in ("first", "second"):
        report = scale([*argv, "--runs", tmp_path / name], capsys)
        runs = sorted(p for p in (tmp_path / name).iterdir() if p.is_dir())
        assert len(runs) == len(report["trials"])
        columns = ("train_loss", "loss", "top1")
        rows = [next(csv.DictReader((run / "metrics.csv").open())) for run in runs]
        found.append([[row[column] for column in columns] for row in rows])
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_stopped_search_continues_the_run(data, tmp_path, capsys, monkeypatch) -> None:
    """SIGTERM comes in the second epoch of the first trial."""
    monkeypatch.chdir(tmp_path)
    argv = ["grid", *SMALL, "--train", "data", "--batch", 4, "--epochs", 2, "--csv", "t.csv"]
    steps: list[int] = []
    stops = [6]

    def stop(self: Any, *arguments: Any) -> Any:
        steps.append(self.epoch)
        if len(steps) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    step = trainer.Trainer._step
    monkeypatch.setattr(trainer.Trainer, "_step", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["scale", *map(str, argv)])
    assert ended.value.code == 128 + signal.SIGTERM
    (run,) = Path("t-runs").iterdir()
    assert (run / "state.pt").exists()
    steps.clear()
    stops.clear()
    report = scale(argv, capsys)
    assert steps[0] == 1  # the first epoch is not repeated
    assert len(steps) == 8 * len(report["trials"]) - 6
    assert not Path("t-runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grid", "--epochs", "2"], "--epochs belongs to --train"),
        (["grid", "--runs", "x"], "--runs belongs to --train"),
        (["grid", "--train", "/no/such/data"], "/no/such/data: No such file or directory"),
        (["grid", "--train", "x", "--scorer", "a:b"], "not allowed with argument"),
        (["fit", "--macs", "9M", "--out", "/no/such/x.safetensors"], "there is no folder /no/such"),
        (["fit", "--macs", "9M", "--out", "x.pth"], "x.pth: the suffix must be .safetensors"),
        (
            ["fit", "--memory", "1GB", "--max-batch", "--model", "b0", "--out", "x.safetensors"],
            "--out writes the network of the limits",
        ),
    ],
)
def test_bad_input(argv, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_fit_writes_the_network(tmp_path: Path, capsys) -> None:
    path = tmp_path / "network.safetensors"
    report = scale(["fit", "--macs", "5M", "--out", path, "--seed", 2], capsys)
    assert report["out"] == str(path)
    network = EfficientNet.from_checkpoint(path)
    assert count(network.variant).macs == report["macs"] > 0.95 * 5e6
    assert network.variant.resolution == report["resolution"]
    first = path.read_bytes()
    scale(["fit", "--macs", "5M", "--out", path, "--seed", 2], capsys)
    assert path.read_bytes() == first
