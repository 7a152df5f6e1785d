"""`effnet-fast train` and `plot`, as users call them."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from effnet_fast.cli import main
from effnet_fast.training import extras
from training_runs import make_data

FAST = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("images") / "two words and ümlauts")


def command(data, run, *more):
    """The documented command, on images of 32 pixels."""
    return [
        *("train", str(data), "--model", "lite0", "--weights", "DEFAULT", "--resolution", "32"),
        *("--batch", "6", "--epochs", "1", "--seed", "5", "--out", str(run), *FAST, *more),
    ]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a run"
    assert main(command(data, run)) == 0
    return run


def test_json_has_the_metrics(data, tmp_path, capsys):
    assert main(command(data, tmp_path / "run", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    names = {"epochs", "top1", "top5", "loss", "images_per_second", "seconds", "out"}
    assert names <= report.keys()
    assert report["epochs"] == 1
    assert report["out"] == str(tmp_path / "run")


def test_a_table_of_the_epochs(data, run, capsys):
    assert main(command(data, run, "--resume")) == 0  # it is finished
    head, row, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["epoch", "train", "loss"]
    assert row.split()[0] == "1"
    assert row.count("%") == 2
    assert last == f"{run / 'model.safetensors'}: lite0, 3 classes"


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_errors_are_one_line(data, run, tmp_path, capsys):
    assert main(command(data, run)) == 2
    assert "holds a run: --resume continues it" in one_line(capsys)
    assert main(command(data, run, "--resume", "--epochs", "2", "--rate", "0.5")) == 2
    error = one_line(capsys)
    assert "epochs was 1, now 2" in error
    assert "rate was 0.001, now 0.5" in error
    assert main(command(tmp_path / "nowhere", tmp_path / "run")) == 2
    assert "nowhere" in one_line(capsys)
    assert main(command(data, tmp_path / "run", "--recipe", "unknown")) == 2
    assert "one of finetune, paper, quick" in one_line(capsys)
    assert main(command(data, tmp_path / "run", "--momentum", "2")) == 2
    assert "momentum must be at least 0 and below 1" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_options_that_argparse_refuses(data, tmp_path, capsys):
    for option in (("--freeze", "some"), ("--epochs", "x"), ("--optimizer", "lion")):
        with pytest.raises(SystemExit, match="2"):
            main(command(data, tmp_path / "run", *option))
        assert option[0] in capsys.readouterr().err


def test_help_has_an_example(capsys):
    for name in ("train", "plot"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "example" in capsys.readouterr().out


def test_a_missing_extra_is_named(data, tmp_path, capsys, monkeypatch):
    plain = importlib.import_module

    def without_accelerate(name, *rest):
        if name.partition(".")[0] == "accelerate":
            raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
        return plain(name, *rest)

    monkeypatch.setattr(extras.importlib, "import_module", without_accelerate)
    assert main(command(data, tmp_path / "run")) == 2
    assert "needs accelerate: pip install 'effnet-fast[train]'" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_plot_draws_curves(run, tmp_path, capsys):
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    figure = tmp_path / "both.svg"
    assert main(["plot", str(run), str(run), "--out", str(figure)]) == 0
    assert "<svg" in figure.read_text()
    capsys.readouterr()
    assert main(["plot", str(run), "--out", str(tmp_path / "x.gif")]) == 2
    assert "must end in .png or .svg" in one_line(capsys)
    assert main(["plot", str(tmp_path)]) == 2
    assert "metrics.csv" in one_line(capsys)


@pytest.mark.slow
def test_sigterm_ends_with_143_and_a_line(data, tmp_path):
    run = tmp_path / "run"
    arguments = command(data, run, "--epochs", "1000", "--no-progress")
    process = subprocess.Popen(
        [sys.executable, "-m", "effnet_fast.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    while not (run / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume continues" in error.splitlines()[-1]
    assert (run / "state.pt").exists()
