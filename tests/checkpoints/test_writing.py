"""Files are whole or not there, and hold no more than the tensors."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from effnet_fast import checkpoints
from effnet_fast.checkpoints import writing

SUFFIXES = [".safetensors", ".pth", ".pt", ".bin"]


def state(size=64):
    torch.manual_seed(0)
    return {
        "features.0.0.weight": torch.randn(size, 3, 3, 3),
        "features.0.1.num_batches_tracked": torch.tensor(7),
        "classifier.1.bias": torch.randn(size).half(),
    }


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writes_what_others_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    checkpoints.save(state(), path)
    assert_same(read(path), state())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.save(state(), path, {"key": "text"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "key": "text"}


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_permissions_follow_the_umask(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    previous = os.umask(0o027)
    try:
        checkpoints.save(state(), path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, step):
    path = tmp_path / f"a{suffix}"
    checkpoints.save(state(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(writing.os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(state(8), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_replaces_the_file_that_the_tensors_are_mapped_from(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    checkpoints.save(state(), path)
    is_pth = suffix == ".pth"
    mapped = torch.load(path, weights_only=True, mmap=True) if is_pth else load_file(path)
    checkpoints.save(mapped, path)
    assert_same(read(path), state())


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_views_are_saved_without_what_they_are_views_of(tmp_path, suffix):
    whole = torch.randn(1000, 100)
    views = {"row": whole[3], "column": whole[:, 3], "all": whole}
    path = tmp_path / f"a{suffix}"
    checkpoints.save(views, path)
    assert_same(read(path), views)
    del views["all"]
    checkpoints.save(views, path)
    assert path.stat().st_size < 10_000
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoints.save({"last": last}, path)
    assert_same(read(path), {"last": last})


def test_refuses_other_suffixes_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"a\.onnx: the suffix must be one of \.safetensors, "):
        checkpoints.save(state(), tmp_path / "a.onnx")
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError) as caught:
            checkpoints.save(state(), tmp_path / "absent" / f"a{suffix}")
        assert caught.value.filename == str(tmp_path / "absent")


WRITES = """
import sys, torch
from effnet_fast import checkpoints
state = {name: torch.full((3,), 1.0) for name in "abcdefgh"}
checkpoints.save(state, sys.argv[1], {name: "é\\u0007/" * 3 for name in "zyxwvutsr"})
"""


def test_equal_content_makes_equal_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {f"entry {i}": 'é"\\/\x07\x7f' * i for i in range(20)}
    found = set()
    for names in (list(metadata), sorted(metadata, reverse=True)):
        checkpoints.save(state(), path, {name: metadata[name] for name in names})
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


@pytest.mark.exhaustive
def test_processes_write_equal_bytes(tmp_path):
    found = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", WRITES, path], check=True, env=environment)
        found.add(path.read_bytes())
    assert len(found) == 1
