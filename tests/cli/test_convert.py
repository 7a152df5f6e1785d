"""convert: every family and both formats, what is said, and that OUT is whole or untouched."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from effnet_fast import EfficientNet, checkpoints, cli
from effnet_fast.cli.convert import TARGETS

CLASSES = 3


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return EfficientNet("b0", num_classes=CLASSES).state_dict()


def convert(*argv):
    return cli.main(["convert", *(str(word) for word in argv)])


def refused(capsys, *argv):
    assert convert(*argv) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("suffixes", [(".pth", ".safetensors"), (".safetensors", ".pth")])
def test_there_and_back(tmp_path, state, to, suffixes, capsys):
    before, there, back = (tmp_path / f"{i}{s}" for i, s in enumerate([*suffixes, suffixes[0]]))
    checkpoints.save(state, before)
    assert convert(before, there, "--to", to) == 0
    written = load_file(there) if there.suffix == ".safetensors" else torch.load(there)
    assert_same(written, checkpoints.convert(state, to))
    assert convert(there, back, "--to", "torchvision", "--from", "auto") == 0
    assert_same(checkpoints.load(back), state)
    assert f"{there}: 360 tensors, 4,011,391 parameters of " in capsys.readouterr().out


@pytest.mark.slow
def test_json(tmp_path, state, capsys):
    source, output = tmp_path / "a.pth", tmp_path / "b.safetensors"
    torch.save({"state_dict": checkpoints.convert(state, "lukemelas"), "epoch": 3}, source)
    assert convert(source, output, "--to", "timm", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    notes = report.pop("notes")
    assert report == {
        "input": str(source),
        "output": str(output),
        "family": "lukemelas",
        "naming": "lukemelas",
        "to": "timm",
        "variant": "b0",
        "tensors": 360,
        "parameters": sum(p.numel() for p in EfficientNet("b0", num_classes=3).parameters()),
        "bytes": output.stat().st_size,
    }
    assert len(notes) == 1
    assert "padding=same, bn_eps=0.001, which is not what timm's own b0 has" in notes[0]
    assert notes[0].endswith("its metadata say so")
    assert EfficientNet.from_checkpoint(output).variant.padding == "same"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "to", "output", "note"),
    [
        ("lukemelas", "timm_tf", "b.pth", None),
        ("lukemelas", "torchvision", "b.pth", 'give family="lukemelas"'),
        ("nvidia", "torchvision", "b.safetensors", "bn_eps=0.001, which is not what torchvision"),
        ("torchvision", "timm", "b.pth", None),
    ],
)
def test_says_what_names_do_not(tmp_path, state, capsys, family, to, output, note):
    source = tmp_path / "a.pth"
    torch.save(checkpoints.convert(state, family), source)
    assert convert(source, tmp_path / output, "--to", to) == 0
    said = capsys.readouterr().err
    assert (note in said) if note else said == ""


def test_says_what_is_assumed(tmp_path, state, capsys):
    source = tmp_path / "a.pth"
    torch.save(checkpoints.convert(state, "timm"), source)
    assert convert(source, tmp_path / "b.pth", "--to", "lukemelas") == 0
    assert "timm's plain network is assumed" in capsys.readouterr().err
    assert convert(source, tmp_path / "c.pth", "--to", "lukemelas", "--from", "timm_tf") == 0
    assert capsys.readouterr().err == ""


def test_input_normalisation_stays(tmp_path, state):
    source, output = tmp_path / "tf_efficientnet_b0_ap.pth", tmp_path / "b.safetensors"
    checkpoints.save(checkpoints.convert(state, "timm"), source)
    assert convert(source, output, "--to", "torchvision") == 0
    variant = EfficientNet.from_checkpoint(output).variant
    assert (variant.mean, variant.padding) == ((0.5, 0.5, 0.5), "same")


@pytest.mark.slow
def test_moving_average(tmp_path, state):
    average = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "model_ema": average}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", "--to", "timm") == 0
    assert_same(checkpoints.load(tmp_path / "b.pth"), average)
    assert convert(tmp_path / "a.pth", tmp_path / "c.pth", "--to", "timm", "--no-ema") == 0
    assert_same(checkpoints.load(tmp_path / "c.pth"), state)


def test_replaces_only_when_told_to(tmp_path, state, capsys):
    path = tmp_path / "a.safetensors"
    checkpoints.save(state, path)
    before = path.read_bytes()
    message = refused(capsys, path, path, "--to", "timm")
    assert message == f"effnet-fast: {path}: exists; --force replaces it\n"
    assert path.read_bytes() == before
    assert convert(path, path, "--to", "timm", "--force") == 0
    assert_same(load_file(path), checkpoints.convert(state, "timm"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
def test_bad_input_leaves_nothing(tmp_path, state, capsys):
    source, output = tmp_path / "a.pth", tmp_path / "b.pth"
    absent = tmp_path / "absent.pth"
    message = refused(capsys, absent, output, "--to", "timm")
    assert message == f"effnet-fast: {absent}: No such file or directory\n"
    source.write_bytes(b"hello")
    assert f"{source}: " in refused(capsys, source, output, "--to", "timm")
    torch.save({**state, "extra.weight": torch.ones(1)}, source)
    message = refused(capsys, source, output, "--to", "timm")
    assert "1 names that torchvision's EfficientNet lacks (extra.weight)" in message
    torch.save(state, source)
    assert "suffix must be" in refused(capsys, source, tmp_path / "b.onnx", "--to", "timm")
    assert "No such file" in refused(capsys, source, tmp_path / "no" / "b.pth", "--to", "timm")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


MEASURE = """
import resource, sys
from effnet_fast import cli
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, source, output = sys.argv[1:]
cli.main(["convert", small, small + ".safetensors", "--to", "nvidia", "--json"])
before = peak()
cli.main(["convert", source, output, "--to", "nvidia"])
print(peak() - before, file=sys.stderr)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("suffixes", [(".pth", ".safetensors"), (".safetensors", ".pth")])
def test_holds_one_copy(tmp_path, state, suffixes):
    """More memory than after the first conversion: one copy of the tensors and no second."""
    source, output = (tmp_path / f"{i}{suffix}" for i, suffix in enumerate(suffixes))
    with torch.device("meta"):
        large = EfficientNet("b5").state_dict()
    large = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in large.items()}
    checkpoints.save(large, source)
    checkpoints.save(state, tmp_path / "small.pth")
    argv = [sys.executable, "-c", MEASURE, tmp_path / "small.pth", source, output]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=True)
    assert int(done.stderr.splitlines()[-1]) < 1.25 * source.stat().st_size
