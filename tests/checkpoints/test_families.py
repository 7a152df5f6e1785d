"""Whose network a file is of: what is told from names, files and metadata, and what is assumed."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from effnet_fast import EfficientNet, checkpoints
from effnet_fast.checkpoints import FAMILIES, FAMILY_ENTRY
from networks import TINY

UNTOLD = "timm's plain network is assumed"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return EfficientNet(TINY, num_classes=4).state_dict()


def found(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    checkpoint = checkpoints.open_checkpoint(path)
    return checkpoint.family, checkpoint.assumption[: len(UNTOLD)]


@pytest.mark.parametrize("family", ["torchvision", "lukemelas", "nvidia"])
def test_names_tell(tmp_path, tiny, family):
    state = checkpoints.convert(tiny, family)
    assert found(state, tmp_path / "tf_efficientnet_b0.pth") == (family, "")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tf_efficientnet_b0_aa-827b6e33.pth", "timm_tf"),
        ("efficientnet_b0_ra-3dd342df.pth", "timm"),
        ("models--timm--tf_efficientnet_l2.ns_jft_in1k/snapshots/0a/model.bin", "timm_tf"),
        ("tf_efficientnet_runs/efficientnet_b0.pth", "timm"),
        ("tf_efficientnet_lite0-0aa007d2.pth", "timm_tf"),
        ("efficientnet_lite0_ra-37913777.pth", "timm"),
        ("tf_efficientnetv2_s_21k-6337ad01.pth", "timm_tf"),
        ("models--timm--efficientnetv2_m.untrained/model.bin", "timm"),
    ],
)
def test_files_tell_what_names_do_not(tmp_path, tiny, path, expected):
    state = checkpoints.convert(tiny, "timm")
    assert found(state, tmp_path / path) == (expected, "")


@pytest.mark.parametrize(
    "path", ["last.pth", "efficientnet_runs/last.pth", "effnet/b0.pth", "efficientnetv2_rw_s.pth"]
)
def test_what_nothing_tells_is_assumed_and_said(tmp_path, tiny, path):
    state = checkpoints.convert(tiny, "timm")
    assert found(state, tmp_path / path) == ("timm", UNTOLD)


def test_the_options_in_a_training_checkpoint_name_the_model(tmp_path, tiny):
    options = argparse.Namespace(model="tf_efficientnet_b0")
    state = {"args": options, "state_dict": checkpoints.convert(tiny, "timm")}
    assert found(state, tmp_path / "last.pth") == ("timm_tf", "")


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_config_beside_a_file_names_the_model(tmp_path, tiny, whole):
    path = tmp_path / "model.safetensors"
    checkpoints.save(checkpoints.convert(tiny, "timm"), path)
    config = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"tag": "ap_in1k"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = checkpoints.open_checkpoint(tmp_path if whole else path)
    assert (checkpoint.family, checkpoint.inception) == ("timm_tf", True)
    for other in ("{", "[]", '{"architecture": ["EfficientNet"]}', '{"architecture": "resnet50"}'):
        (tmp_path / "config.json").write_text(other)
        assert checkpoints.open_checkpoint(path).assumption


@pytest.mark.parametrize(
    ("arch", "family"), [("tf_efficientnet_b0", "timm_tf"), ("efficientnet_b0", "timm")]
)
def test_timms_training_checkpoints_name_the_model(tmp_path, tiny, arch, family):
    state = {"arch": arch, "state_dict": checkpoints.convert(tiny, "timm")}
    assert found(state, tmp_path / "tf_efficientnet_or_efficientnet.pth") == (family, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_tell_whatever_the_names(tmp_path, tiny, family):
    path = tmp_path / "efficientnet_b0.safetensors"
    checkpoints.save(tiny, path, {FAMILY_ENTRY: family})
    assert checkpoints.open_checkpoint(path).family == family
    assert checkpoints.open_checkpoint(path, "nvidia").family == "nvidia"
    checkpoints.save(tiny, path, {FAMILY_ENTRY: "caffe"})
    assert checkpoints.open_checkpoint(path).family == "torchvision"


@pytest.mark.parametrize(
    ("name", "inception"),
    [
        ("tf_efficientnet_b4_ap-dedb23e6.pth", True),
        ("tf_efficientnet_b4.ap_in1k.pth", True),
        ("adv-efficientnet-b4-44fb3a87.pth", True),
        ("efficientnet_b0.ra4_e3600_r224_in1k.pth", True),
        ("tf_efficientnet_b4_ns-d6313a46.pth", False),
        ("efficientnet-b4-6ed6700e.pth", False),
        ("efficientnet_b4_apex.pth", False),
        ("my_ap_run/last.pth", False),
        ("run_ra4_1/efficientnet_b0.pth", False),
    ],
)
def test_input_normalisation(tmp_path, tiny, name, inception):
    state = checkpoints.convert(tiny, "timm")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(state, tmp_path / name)
    checkpoint = checkpoints.open_checkpoint(tmp_path / name)
    assert checkpoint.inception == inception
    checkpoints.save(state, tmp_path / "other.safetensors", checkpoint.metadata)
    assert checkpoints.open_checkpoint(tmp_path / "other.safetensors").inception == inception


def test_refuses_unknown_families(tmp_path):
    with pytest.raises(ValueError, match="family must be one of auto, torchvision, timm, timm_tf"):
        checkpoints.open_checkpoint(Path("absent"), "caffe")
