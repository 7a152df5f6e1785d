"""Weights files: both readers, what is refused, and that nothing is half loaded."""

import argparse
import functools
import pathlib
import pickle
import warnings

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from effnet_fast import EfficientNet, checkpoints
from effnet_fast.checkpoints import FAMILIES
from effnet_fast.checkpoints.reading import EMA_WRAPPERS, WRAPPERS
from networks import TINY

CLASSES = 4


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


@functools.cache
def tiny_state():
    """A small network's, as one sees it after loading: no batches counted."""
    torch.manual_seed(0)
    model = EfficientNet(TINY, num_classes=CLASSES)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def tiny():
    return tiny_state()


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


def wrapped(state, wrappers, prefix):
    """A training checkpoint around a state dict, the last of `wrappers` innermost."""
    content = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix:
        content["n_averaged"] = torch.tensor(7)  # torch.optim.swa_utils.AveragedModel's
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, wrapper: content, "optimizer": {"state": {0: torch.ones(2)}}}
    return content


PREFIXES = st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "backbone."]), max_size=3)


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    wrappers=st.lists(st.sampled_from([*EMA_WRAPPERS, *WRAPPERS]), max_size=3),
    prefix=PREFIXES.map("".join),
    family=st.sampled_from(list(FAMILIES)),
    uncounted=st.sets(st.integers(0, 31)),
)
def test_load_unwraps(tmp_path, wrappers, prefix, family, uncounted):
    tiny = tiny_state()
    named = checkpoints.convert(tiny, family)
    counts = [key for key in named if key.endswith("num_batches_tracked")]
    missing = {counts[i] for i in uncounted if i < len(counts)}
    kept = {key: value for key, value in named.items() if key not in missing}
    path = save(wrapped(kept, wrappers, prefix), tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_missing_names_are_given_and_nothing_is_half_loaded(tmp_path, data):
    tiny = tiny_state()
    family = data.draw(st.sampled_from(list(FAMILIES)))
    named = checkpoints.convert(tiny, family)
    needed = [key for key in named if not key.endswith("num_batches_tracked")]
    dropped = data.draw(st.sets(st.sampled_from(needed), min_size=1, max_size=4))
    kept = {key: value for key, value in named.items() if key not in dropped}
    model = EfficientNet(TINY, num_classes=CLASSES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a\.pth: ") as caught:
        checkpoints.load_into(model, save(kept, tmp_path / "a.pth"))
    assert_same(model.state_dict(), before)
    missing = [k for k, n in zip(tiny, named, strict=True) if n in dropped]
    told = str(caught.value)
    assert any(key in told for key in (*missing, *dropped)) or "not an EfficientNet's" in told


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", EMA_WRAPPERS)
def test_the_moving_average_goes_first(tmp_path, tiny, wrapper):
    average = {key: value + 1 for key, value in tiny.items()}
    path = save({"state_dict": tiny, wrapper: average}, tmp_path / "a.pth")
    assert_same(checkpoints.load(path), average)
    assert_same(checkpoints.load(path, ema=False), tiny)
    path = save({"model": tiny, wrapper: None}, tmp_path / "b.pth")
    assert_same(checkpoints.load(path), tiny)
    path = save({wrapper: {"decay": 0.9}, "model": {"state_dict": tiny}}, tmp_path / "c.pth")
    assert_same(checkpoints.load(path), tiny)


def test_the_options_of_training_scripts_are_plain_data(tmp_path, tiny):
    options = argparse.Namespace(lr=0.1, model="efficientnet_b0")
    path = save({"model": tiny, "args": options}, tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)
    # Reading that has not changed what torch.load takes elsewhere.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.slow
def test_load_reads_wrappers_of_torch(tmp_path, tiny):
    model = EfficientNet(TINY, num_classes=CLASSES)
    model.load_state_dict(tiny)
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(model))
    path = save({"model_ema": averaged.state_dict()}, tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)
    path = save(torch.compile(model).state_dict(), tmp_path / "b.pth")
    assert_same(checkpoints.load(path), tiny)


def test_load_reads_the_old_format_of_torch(tmp_path, tiny):
    torch.save(tiny, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.load(tmp_path / "a.pth"), tiny)


def test_load_knows_safetensors_by_their_content(tmp_path, tiny):
    save_file(tiny, tmp_path / "blob")
    assert_same(checkpoints.load(tmp_path / "blob"), tiny)


@pytest.mark.parametrize("prefix", ["net.", "model._orig_mod."])
def test_other_parts_of_the_wrapping_module_are_left_out(tmp_path, tiny, prefix):
    network = {f"{prefix}{key}": value for key, value in tiny.items()}
    content = {"criterion.weight": torch.ones(1), **network}
    assert_same(checkpoints.load(save({"state_dict": content}, tmp_path / "a.pth")), tiny)


def test_names_that_lack_the_prefix_are_given(tmp_path, tiny):
    content = {f"net.{key}": value for key, value in tiny.items()}
    content["features.0.1.bias"] = content.pop("net.features.0.1.bias")
    with pytest.raises(ValueError, match=r"begin with 'net\.', but for 1 \(features\.0\.1\.bias\)"):
        checkpoints.load(save(content, tmp_path / "a.pth"))


@pytest.mark.slow
def test_one_network_is_found_under_any_name_and_several_are_refused(tmp_path, tiny):
    other = {key: value + 1 for key, value in tiny.items()}
    path = save({"net": tiny, "acc": 93.5, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)
    path = save({"teacher": other, "student": other, "model": tiny}, tmp_path / "b.pth")
    assert_same(checkpoints.load(path), tiny)
    path = save({"teacher": other, "student": tiny}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth: holds several networks \(teacher, student\)"):
        checkpoints.load(path)
    both = {f"{name}.{key}": value for name in ("ema", "net") for key, value in tiny.items()}
    with pytest.raises(ValueError, match=r"several networks \(names begin with 'ema\.', 'net\.'\)"):
        checkpoints.load(save({"state_dict": both}, tmp_path / "d.pth"))


@pytest.mark.parametrize(
    "value", [numpy.float64(0.5), numpy.int32(3), numpy.bool_(True), pathlib.Path("runs")], ids=str
)
def test_metrics_and_paths_are_plain_data(tmp_path, tiny, value):
    options = argparse.Namespace(value=value)
    path = save({"model": tiny, "best": value, "args": options}, tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_other_systems_are_plain_data(tmp_path, tiny, module):
    content = {"model": tiny, "data": pathlib.PurePosixPath("runs")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    old = b"cpathlib\nPurePosixPath\n"
    written = (tmp_path / "a.pth").read_bytes()
    assert old in written
    new = f"c{module}\nWindowsPath\n".encode()
    (tmp_path / "a.pth").write_bytes(written.replace(old, new))
    assert_same(checkpoints.load(tmp_path / "a.pth"), tiny)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_load_reads_folders_of_the_hub(tmp_path, tiny, name):
    with pytest.raises(
        ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"
    ):
        checkpoints.load(tmp_path)
    checkpoints.save(tiny, tmp_path / name)
    assert_same(checkpoints.load(tmp_path), tiny)


def test_load_refuses_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: a TorchScript archive, which holds code"):
        checkpoints.load(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loaded_tensors_do_not_follow_the_file(tmp_path, tiny, suffix):
    path = tmp_path / f"a{suffix}"
    checkpoints.save(tiny, path)
    loaded = checkpoints.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(loaded, tiny)
    loaded["features.0.0.weight"].add_(1)  # and they may be written to
    checkpoints.save(loaded, path)


def test_load_executes_nothing(tmp_path, state):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = save({**state, "extra": Attack()}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth: not a file of plain .*: it needs _?io\.open"
    ) as caught:
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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_load_gives_torchvisions_names(tmp_path, tiny, family):
    path = save(checkpoints.convert(tiny, family), tmp_path / "a.pth")
    assert_same(checkpoints.load(path), tiny)
    assert_same(checkpoints.load(path, format=family), tiny)
    other = "nvidia" if family != "nvidia" else "lukemelas"
    with pytest.raises(ValueError, match=rf"a\.pth: parameters are named as .*, not as {other}"):
        checkpoints.load(path, format=other)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_load_gives_the_networks_order(tmp_path, tiny, family):
    save_file(checkpoints.convert(tiny, family), tmp_path / "a.safetensors")
    assert_same(checkpoints.load(tmp_path / "a.safetensors"), tiny)


def test_load_keeps_what_surgery_added(tmp_path, tiny):
    changed = {"classifier.1.0.weight": torch.ones(2), **tiny}
    del changed["classifier.1.weight"]
    loaded = checkpoints.load(save(changed, tmp_path / "a.pth"))
    assert loaded.keys() == changed.keys()


def test_load_refuses_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format must be one of auto, torchvision"):
        checkpoints.load(tmp_path / "a.pth", format="caffe")


def test_load_passes_on_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.safetensors")


def test_load_into_copies_everything(tmp_path, state):
    model = Small()
    checkpoints.load_into(model, save(state, tmp_path / "a.pth"))
    assert_same(model.state_dict(), state)


@pytest.mark.slow
def test_load_into_warns_of_another_family(tmp_path):
    """The names fit, the numbers would not: SAME padding and another eps."""
    model = EfficientNet(TINY, num_classes=CLASSES)
    path = save(checkpoints.convert(tiny_state(), "lukemelas"), tmp_path / "a.pth")
    differences = r"padding='same' and this model 'symmetric', bn_eps=0.001 and this model 1e-05"
    with pytest.warns(UserWarning, match=f"networks of lukemelas have {differences}"):
        checkpoints.load_into(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.load_into(EfficientNet.from_checkpoint(path, variant=TINY), path)
        checkpoints.load_into(model, save(tiny_state(), tmp_path / "b.pth"))


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


def truncate(state):
    state["features.0.0.weight"] = state["features.0.0.weight"].long()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"1 missing \(features\.0\.1\.bias\)"),
        (add, r"1 unexpected \(features\.0\.2\.bias\)"),
        (reshape, r"features\.0\.0\.weight \(5, 3, 3, 3\) instead of \(4, 3, 3, 3\)"),
        (retype, r"num_batches_tracked torch\.float32 instead of torch\.int64"),
        (truncate, r"features\.0\.0\.weight torch\.int64 instead of torch\.float32"),
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
