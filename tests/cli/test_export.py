"""export: files of every kind of network that the command takes, and bad input."""

from __future__ import annotations

import json

import pytest
import torch

import trained
from effnet_fast import EfficientNet, cli
from effnet_fast.integrations.export import CLASSES, MODEL, TRANSFORM
from effnet_fast.models import custom_variant
from effnet_fast.scaling import random_network, save_network
from networks import MINI, TINY


@pytest.fixture
def run_folder(tmp_path):
    """What a training run leaves: weights that tell the classes and the images."""
    variant = custom_variant(depth=0.3, width=0.25, resolution=48)
    model = random_network(variant, num_classes=3)
    model.class_names = ["ä", "b", "c"]
    (tmp_path / "run").mkdir()
    save_network(model, tmp_path / "run" / "model.safetensors")
    return tmp_path / "run"


def refused(argv, capsys):
    """The one line that bad input is answered with."""
    try:
        status = cli.main(["export", *map(str, argv)])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status == cli.BAD_INPUT
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def export(argv, capsys):
    assert cli.main(["export", "--json", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


@pytest.mark.exhaustive
def test_a_size(tmp_path, capsys):
    """Lite0 with the weights of its package, on a photograph."""
    path = tmp_path / "lite0.pt2"
    report = export(["lite0", "--to", "torch", "--out", path], capsys)
    assert (report["model"], report["resolution"], report["classes"]) == ("lite0", 224, 1000)
    assert report["weights"] == "EfficientNet_Lite0_Weights.IMAGENET1K_V1"
    assert report["error"] <= report["allowed"]
    entries = dict.fromkeys((MODEL, CLASSES, TRANSFORM), "")
    module = torch.export.load(path, extra_files=entries).module()
    names = json.loads(entries[CLASSES])
    best = module(trained.photographs()).argmax(1).tolist()
    assert [names[i] for i in best] == [name for *_, name in trained.PHOTOGRAPHS.values()]


@pytest.mark.slow
def test_a_run(run_folder, tmp_path, capsys):
    path = tmp_path / "run.pt2"
    argv = [run_folder, "--to", "torch", "--out", path, "--resolution", "64", "--batch", "2"]
    report = export(argv, capsys)
    assert (report["resolution"], report["batch"], report["classes"]) == (64, 2, 3)
    entries = {CLASSES: ""}
    torch.export.load(path, extra_files=entries)
    assert json.loads(entries[CLASSES]) == ["ä", "b", "c"]
    message = refused([run_folder, "--to", "torch", "--out", path], capsys)
    assert message.endswith(f"{path}: exists; --force replaces it")
    assert cli.main(["export", *map(str, argv), "--force"]) == 0
    text = capsys.readouterr().out
    assert "2 images of 64 pixels, 3 names of classes" in text
    assert "Compared by torch.export of torch" in text


@pytest.mark.exhaustive
def test_onnx(run_folder, tmp_path, capsys):
    path = tmp_path / "run.onnx"
    report = export([run_folder, "--to", "onnx", "--out", path, "--resolution", "64"], capsys)
    assert report["checked_by"].startswith("onnxruntime")
    assert path.stat().st_size == report["bytes"]


@pytest.mark.slow
def test_says_that_weights_are_random(tmp_path, capsys, monkeypatch):
    from effnet_fast.models.variants import VARIANTS

    small = {**VARIANTS, "b0": TINY}
    monkeypatch.setattr("effnet_fast.cli.networks.VARIANTS", small)
    monkeypatch.setattr(
        "effnet_fast.cli.common.build_model", lambda *args: EfficientNet(MINI).eval()
    )
    argv = ["export", "b0", "--to", "torch", "--out", str(tmp_path / "b0.pt2")]
    assert cli.main([*argv, "--resolution", "32"]) == 0
    assert "the weights are random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["b0", "--out", "x.onnx"], "required: --to"),
        (["b0", "--to", "onnx"], "required: --out"),
        (["lite0", "--to", "onnx", "--out", "x.pt2"], "x.pt2: the suffix of a file for onnx must"),
        (["b0", "--model", "b1", "--to", "onnx", "--out", "x.onnx"], "two sizes were given: b0"),
        (["no/such/file", "--to", "onnx", "--out", "x.onnx"], "no/such/file: No such file"),
        (["b0", "--to", "onnx", "--out", "/no/such/x.onnx"], "there is no folder /no/such"),
    ],
)
def test_bad_input(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    argv = [run_folder, "--to", "onnx", "--out", tmp_path / "x.onnx"]
    assert 'pip install "effnet-fast[onnx]"' in refused(argv, capsys)
