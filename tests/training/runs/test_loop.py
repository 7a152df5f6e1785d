"""A whole run, its folder, and how it is interrupted and continued."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal

import pytest
import torch

from effnet_fast.cli import main
from effnet_fast.models import EfficientNet
from effnet_fast.training.runs import run_folder, state, steps
from effnet_fast.training.runs.loop import train
from effnet_fast.training.runs.processes import StoppedError
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.settings import Settings, described
from effnet_fast.training.runs.trainer import LossError
from networks import TINY
from training_runs import CLASSES, SIDE, SMALL

# Everything that draws or remembers something.
RICH = {**SMALL, "ema": 0.9, "accumulate": 2, "batch": 3, "drop_path": 0.3, "flip": 0.5}


class CrashError(Exception):
    """What a test raises in the middle of a run."""


def crash_after(count):
    """An `on_step` that ends the run at its step number `count`."""

    def on_step(step, loss):
        if step == count:
            raise CrashError

    return on_step


def weights_of(run):
    return EfficientNet.from_checkpoint(run).state_dict()


def losses_of(run):
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [(row["epoch"], row["train_loss"], row["loss"], row["top1"]) for row in rows]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An unbroken run: its folder, losses by step, and metrics."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    losses = {}
    metrics = train(data, run, on_step=losses.__setitem__, **RICH)
    return run, losses, metrics


def test_the_folder_holds_the_run(finished, data):
    run, losses, metrics = finished
    assert len(losses) == 6  # 18 images, 3 to a batch, 2 batches to a step, 2 epochs
    assert {"run.json", "metrics.csv", "model.safetensors"} <= set(os.listdir(run))
    assert len(list(run.rglob("*.safetensors"))) == 1
    assert not (run / "state.pt").exists()
    described = json.loads((run / "run.json").read_text())
    assert described["classes"] == list(CLASSES)
    assert described["images"] == {"train": 18, "val": 6}
    assert described["fields"]["ema"] == 0.9
    assert described["arguments"]["seed"] == 5
    assert described["metrics"] == {**metrics}
    assert metrics["epochs"] == 2
    assert metrics["steps"] == 6
    assert 0 <= metrics["top1"] <= metrics["top5"] == 1
    assert metrics["images_per_second"] > 0
    assert len(losses_of(run)) == 2


def test_the_folder_is_a_network(finished):
    run, *_ = finished
    model, preset, classes = run_folder.load_run(run)
    assert classes == model.class_names == CLASSES
    assert not model.training
    assert (preset.crop_size, preset.resize_size) == ([SIDE], [round(SIDE * 256 / 224)])
    assert model.variant.stages == TINY.stages  # of no published size
    assert model(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 3)


def test_classify_takes_the_folder(finished, data, capsys):
    run, *_ = finished
    image = data / "val" / "red" / "0.png"
    assert main(["classify", str(image), "--weights", str(run), "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["images"]
    assert {entry["label"] for entry in result["top"]} == set(CLASSES)


def test_a_folder_in_use_or_full_is_refused(finished, data):
    run, *_ = finished
    with pytest.raises(FileExistsError, match="holds a run: --resume continues it"):
        train(data, run, **RICH)


def test_a_finished_run_is_left_alone(finished, data):
    run, _, metrics = finished
    before = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    steps = []
    again = train(data, run, resume=True, on_step=lambda *step: steps.append(step), **RICH)
    assert again == metrics
    assert steps == []
    assert before == {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"}


def test_other_arguments_are_refused_by_name(finished, data):
    run, *_ = finished
    with pytest.raises(ValueError, match=r"epochs was 2, now 3; flip was 0.5, now 0.0|flip was"):
        train(data, run, resume=True, **{**RICH, "epochs": 3, "flip": 0.0})
    with pytest.raises(ValueError, match=r"seed was 5, now 6"):
        train(data, run, resume=True, **{**RICH, "seed": 6})
    assert train(data, run, resume=True, **{**RICH, "save_minutes": 1.0})["epochs"] == 2


def test_weights_are_those_of_the_folder_in_which_a_run_began(tmp_path, monkeypatch):
    text = "begin.safetensors"
    (tmp_path / text).touch()
    monkeypatch.chdir(tmp_path)
    found = described("x", None, Settings(weights=text), "quick", Recipe(), 1, {})["arguments"]
    assert found["weights"] == str(tmp_path / text)
    found = described("x", None, Settings(weights="DEFAULT"), "quick", Recipe(), 1, {})["arguments"]
    assert found["weights"] == "DEFAULT"


@pytest.mark.parametrize("step", [1, 4])  # in the middle of the first and of the second epoch
def test_a_crashed_run_continues_bit_for_bit(finished, data, tmp_path, step):
    unbroken, expected, _ = finished
    run = tmp_path / "run"
    losses = {}

    def on_step(number, loss):
        losses[number] = loss
        crash_after(step + 1)(number, loss)

    with pytest.raises(CrashError):
        train(data, run, on_step=on_step, save_minutes=0.0, **RICH)
    assert not (run / "model.safetensors").exists()
    torch.manual_seed(1)  # a new process has other random states
    later = {}
    train(data, run, resume=True, on_step=later.__setitem__, **RICH)
    assert min(later) == step + 1  # what was done is not done again
    assert {**losses, **later} == expected
    assert losses_of(run) == losses_of(unbroken)
    other = weights_of(unbroken)
    for name, tensor in weights_of(run).items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("model", [None, pytest.param(TINY, marks=pytest.mark.exhaustive)])
def test_a_resumed_run_needs_no_file_of_weights(finished, data, tmp_path, monkeypatch, model):
    """The state has the network and its weights: the file may be gone, relative names too."""
    given = {**SMALL, "weights": "begin.safetensors", "model": model, "ema": 0.5}
    begin = tmp_path / "begin.safetensors"
    content = (finished[0] / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    begin.write_bytes(content)
    train(data, tmp_path / "unbroken", **given)
    with pytest.raises(CrashError):
        train(data, tmp_path / "run", on_step=crash_after(4), **given)
    begin.unlink()
    train(data, tmp_path / "run", resume=True, **given)
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("unbroken", "run")]
    assert files[0] == files[1]
    begin.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"weights was '.*begin.safetensors', now 'other'"):
        train(data, tmp_path / "run", resume=True, **{**given, "weights": "other"})


def test_a_run_that_crashed_before_its_first_state_begins_anew(finished, data, tmp_path):
    _, expected, _ = finished
    run = tmp_path / "run"
    with pytest.raises(CrashError):
        train(data, run, on_step=crash_after(1), **RICH)
    assert (run / "run.json").exists()
    losses = {}
    train(data, run, resume=True, on_step=losses.__setitem__, **RICH)
    assert losses == expected


def test_a_signal_ends_the_run_after_a_whole_step(finished, data, tmp_path):
    _, expected, _ = finished
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    losses = {}

    def on_step(number, loss):
        losses[number] = loss
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="--resume continues") as caught:
        train(data, run, on_step=on_step, **RICH)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    last = max(losses)
    assert last in (2, 3)  # the step in which it came, or the next
    later = {}
    train(data, run, resume=True, on_step=later.__setitem__, **RICH)
    assert min(later) == last + 1
    assert {**losses, **later} == expected


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    plain = steps.Steps.losses
    calls = []

    def losses(self, batch):
        calls.append(batch)
        return plain(self, batch) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(steps.Steps, "losses", losses)
    with pytest.raises(LossError, match=r"the loss is nan at epoch 2, step 5.*failed_batch.pt"):
        train(data, run, **SMALL)
    content = torch.load(run / "failed_batch.pt", weights_only=True)
    [batch] = content["batches"]
    assert torch.equal(batch["images"], calls[4].images)
    assert len(batch["paths"]) == 6
    assert all(os.path.exists(path) for path in batch["paths"])
    saved = state.load(run / "state.pt")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_full_disk_leaves_the_last_good_state(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    plain, calls = state.save, []

    def save(content, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(content, path)

    monkeypatch.setattr(state, "save", save)
    arguments = ["train", str(data), "--out", str(run), "--device", "cpu", "--workers", "0"]
    arguments += ["--model", "lite0", "--resolution", "32", "--batch", "9", "--epochs", "2"]
    assert main(arguments) == 2
    assert state.load(run / "state.pt")["epoch"] == 1
    monkeypatch.setattr(state, "save", plain)
    assert main([*arguments, "--resume"]) == 0
    assert len(losses_of(run)) == 2


def test_changed_images_are_refused(data, tmp_path):
    from training_runs import make_data

    own, run = make_data(tmp_path / "data", train=3, val=1), tmp_path / "run"
    with pytest.raises(CrashError):
        train(own, run, on_step=crash_after(2), save_minutes=0.0, **SMALL)
    image = own / "train" / "red" / "0.png"
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(ValueError, match=r"images have changed .*: as many, of other names"):
        train(own, run, resume=True, **SMALL)
    image.with_name("renamed.png").unlink()
    with pytest.raises(ValueError, match=r"images have changed .*'train': 9.*'train': 8"):
        train(own, run, resume=True, **SMALL)


def test_a_run_without_readable_images_ends_with_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\nx.png,cat\ny.png,dog\n")
    with pytest.raises(ValueError, match=r"no training image can be read .*png: No such file"):
        train(tmp_path / "a.csv", tmp_path / "run", **SMALL)
    assert not (tmp_path / "run" / "model.safetensors").exists()
