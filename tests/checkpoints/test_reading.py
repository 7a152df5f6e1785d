"""Weights files: both readers, what is refused, and that nothing is half loaded."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effnet_fast import checkpoints


class Small(nn.Module):
    """A few parameters under names that an EfficientNet has too."""

    def __init__(self, width=4):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width))
        self.features = nn.Sequential(stem)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {key: value.clone() for key, value in Small().state_dict().items()}


def save(content, path):
    torch.save(content, path)
    return path


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_load_reads_pth(tmp_path, state):
    assert_same(checkpoints.load(save(state, tmp_path / "a.pth")), state)


def test_load_reads_safetensors(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    loaded = checkpoints.load(tmp_path / "a.safetensors")
    assert_same({key: loaded[key] for key in state}, state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_load_unwraps(tmp_path, state, wrapper):
    wrapped = {"epoch": 3, wrapper: {f"module.{key}": value for key, value in state.items()}}
    assert_same(checkpoints.load(save(wrapped, tmp_path / "a.pth")), state)


def test_load_executes_nothing(tmp_path, state):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = save({**state, "extra": Attack()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: not a file of plain tensors") as caught:
        checkpoints.load(path)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_refuses_truncated(tmp_path, state, suffix):
    path = tmp_path / f"a.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: truncated or corrupt"):
        checkpoints.load(path)


@pytest.mark.parametrize("content", [b"", b"hello, world\n"], ids=["empty", "text"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_refuses_what_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.{suffix}: "):
        checkpoints.load(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {3: torch.ones(1)}], ids=str)
def test_load_refuses_what_is_no_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.pth: (holds|entry)"):
        checkpoints.load(save(content, tmp_path / "a.pth"))


def test_load_refuses_other_networks(tmp_path):
    path = save({"conv1.weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: not an EfficientNet's state dict"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("key", "naming"),
    [
        ("conv_stem.weight", "timm"),
        ("_conv_stem.weight", "lukemelas"),
        ("stem.conv.weight", "nvidia"),
    ],
)
def test_load_names_the_naming_it_cannot_read(tmp_path, key, naming):
    path = save({key: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(NotImplementedError, match=f"named as {naming} names them"):
        checkpoints.load(path)


def test_load_refuses_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format must be one of auto, torchvision"):
        checkpoints.load(tmp_path / "a.pth", format="keras")


def test_load_passes_on_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.safetensors")


def test_load_into_copies_everything(tmp_path, state):
    model = Small()
    checkpoints.load_into(model, save(state, tmp_path / "a.pth"))
    assert_same(model.state_dict(), state)


def test_load_into_casts_floats(tmp_path, state):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model = Small()
    checkpoints.load_into(model, save(half, tmp_path / "a.pth"))
    assert_same(model.state_dict(), {k: v.to(state[k].dtype) for k, v in half.items()})


def drop(state):
    del state["features.0.1.bias"]


def add(state):
    state["features.0.2.bias"] = torch.ones(4)


def reshape(state):
    state["features.0.0.weight"] = torch.ones(5, 3, 3, 3)


def retype(state):
    state["features.0.1.num_batches_tracked"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"1 missing \(features\.0\.1\.bias\)"),
        (add, r"1 unexpected \(features\.0\.2\.bias\)"),
        (reshape, r"features\.0\.0\.weight \(5, 3, 3, 3\) instead of \(4, 3, 3, 3\)"),
        (retype, r"num_batches_tracked torch\.float32 instead of torch\.int64"),
    ],
)
def test_load_into_changes_nothing_when_something_differs(tmp_path, state, spoil, message):
    spoil(state)
    model = Small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"a\.pth: weights do not fit the model: .*{message}"):
        checkpoints.load_into(model, save(state, tmp_path / "a.pth"))
    assert_same(model.state_dict(), before)


def test_check_names_the_first_few():
    with pytest.raises(ValueError, match=r"6 missing \(([^,]+, ){3}\.\.\.\)"):
        checkpoints.check(Small(), {})
