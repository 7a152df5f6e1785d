"""Names: every family's own, every way between them, nothing copied and nothing lost."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peers
import tiers
from effnet_fast import EfficientNet, checkpoints
from effnet_fast.checkpoints import FAMILIES, NAMINGS
from effnet_fast.models import VARIANTS, custom_variant
from networks import TINY, TINY_V2

TINY_LITE = replace(VARIANTS["lite0"], name="tiny_lite", width=0.25, depth=0.5, resolution=48)
SIZES = [
    pytest.param(family, *param.values, marks=param.marks)
    for family in peers.BUILDERS
    for param in tiers.networks(VARIANTS)
    if peers.has(family, *param.values)
]
PAIRS = [(a, b) for a in NAMINGS for b in NAMINGS if a != b]


def shapes(state):
    return {key: (tuple(value.shape), value.dtype) for key, value in state.items()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert actual[key].shape == value.shape
        assert torch.equal(actual[key], value)


@functools.cache
def tiny_state(variant=TINY):
    """All kinds of blocks; its first two stages have equal channels and kernels."""
    torch.manual_seed(0)
    return EfficientNet(variant, num_classes=4).state_dict()


@pytest.fixture
def tiny():
    return tiny_state()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), SIZES)
def test_names_order_and_shapes_are_the_familys(family, size):
    with torch.device("meta"):
        ours = EfficientNet(size).state_dict()
    theirs = peers.skeleton(family, size).state_dict()
    converted = checkpoints.convert(ours, family)
    assert list(shapes(converted).items()) == list(shapes(theirs).items())
    back = checkpoints.convert(theirs, "torchvision")
    assert list(shapes(back).items()) == list(shapes(ours).items())


@pytest.fixture
def tiny_v2():
    """All kinds of FusedMBConv."""
    return tiny_state(TINY_V2)


def test_v2_round_trip(tiny_v2):
    named = checkpoints.convert(tiny_v2, "timm")
    expected = {  # timm's names of each kind of block
        "blocks.0.0.": ["conv", "bn1"],
        "blocks.1.0.": ["conv_exp", "bn1", "conv_pwl", "bn2"],
        "blocks.3.0.": [
            *("conv_pw", "bn1", "conv_dw", "bn2"),
            *("se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
        ],
    }
    for block, modules in expected.items():
        weights = [key for key in named if key.startswith(block) and key.endswith(".weight")]
        assert weights == [f"{block}{module}.weight" for module in modules]
    assert_same(checkpoints.convert(named), tiny_v2)


@pytest.mark.parametrize("to", ["lukemelas", "nvidia"])
def test_families_without_v2(tiny_v2, to):
    with pytest.raises(ValueError, match=f"{to} has no FusedMBConv, and so no names for"):
        checkpoints.convert(tiny_v2, to)


@pytest.mark.parametrize(("source", "to"), [("torchvision", "timm"), ("timm", "torchvision")])
def test_a_missing_name_of_v2_moves_no_other(tiny_v2, source, to):
    whole = checkpoints.convert(tiny_v2, source)
    right = dict(zip(whole, checkpoints.convert(whole, to), strict=True))
    _stem, *others = whole
    for missing in others:
        state = {key: value for key, value in whole.items() if key != missing}
        assert list(checkpoints.convert(state, to)) == [right[key] for key in state], missing


@pytest.mark.parametrize(("source", "to"), PAIRS)
@pytest.mark.parametrize("variant", [TINY, TINY_LITE], ids=lambda v: v.name)
def test_round_trip(variant, source, to):
    tiny = tiny_state(variant)
    named = checkpoints.convert(tiny, source)
    there = checkpoints.convert(named, to)
    assert there.keys() != named.keys()
    assert_same(checkpoints.convert(there, source), named)
    assert_same(checkpoints.convert(there), tiny)
    for before, after in zip(named.values(), there.values(), strict=True):
        assert before.data_ptr() == after.data_ptr()  # nothing is copied


def test_squeeze_and_excitation_of_nvidia_is_linear(tiny):
    nvidia = checkpoints.convert(tiny, "nvidia")
    assert nvidia["layers.1.block0.se.squeeze.weight"].dim() == 2
    assert nvidia["layers.1.block0.se.expand.weight"].dim() == 2
    assert nvidia["layers.1.block0.expand.conv.weight"].dim() == 4
    # Checkpoints of its TensorRT form hold convolutions.
    nvidia = {
        key: v[:, :, None, None] if ".se." in key and v.dim() == 2 else v
        for key, v in nvidia.items()
    }
    assert_same(checkpoints.convert(nvidia), tiny)


def test_old_names_of_nvidia(tiny):
    nvidia = checkpoints.convert(tiny, "nvidia")
    old = {}
    for key, value in nvidia.items():
        if key.startswith("layers."):
            _, stage, rest = key.split(".", 2)
            key = f"layer{int(stage) + 1}.{rest}"
        old[key] = value
    assert_same(checkpoints.convert(old), tiny)


def test_timm_and_timm_tf_have_the_same_names(tiny):
    assert_same(checkpoints.convert(tiny, "timm_tf"), checkpoints.convert(tiny, "timm"))


@pytest.mark.parametrize("naming", NAMINGS)
def test_order_of_the_input_is_kept(tiny, naming):
    items = list(tiny.items())
    random.shuffle(items)
    converted = checkpoints.convert(dict(items), naming)
    assert [v.data_ptr() for v in converted.values()] == [v.data_ptr() for _, v in items]


@pytest.mark.parametrize("naming", NAMINGS)
def test_networks_of_other_stages(naming):
    variant = custom_variant(stages=VARIANTS["b0"].stages[:4])
    with torch.device("meta"):
        state = EfficientNet(variant).state_dict()
    named = checkpoints.convert(state, naming)
    assert list(checkpoints.convert(named)) == list(state)


@pytest.mark.parametrize("naming", [name for name in NAMINGS if name != "torchvision"])
def test_unknown_names_are_given(tiny, naming):
    state = checkpoints.convert(tiny, naming)
    state |= {f"extra.{i}.weight": torch.ones(1) for i in range(5)}
    message = rf"5 names that {naming}'s EfficientNet lacks \(extra\.0\.weight, .*, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(state)


def test_unknown_leaf_is_named(tiny):
    state = checkpoints.convert(tiny, "timm") | {"conv_stem.bias": torch.ones(8)}
    assert "features.0.0.bias" in checkpoints.convert(state)  # the model will refuse it
    with pytest.raises(ValueError, match=r"conv_stem\.weight_g"):
        checkpoints.convert(state | {"conv_stem.weight_g": torch.ones(8)})


def test_a_missing_projection_leaves_the_other_names():
    """Without it the names of an expanded block of Lite are those of a plain one."""
    state = tiny_state(TINY_LITE)
    whole = checkpoints.convert(state, "timm")
    right = dict(zip(state, whole, strict=True))
    kept = {
        key: value for key, value in state.items() if not key.startswith("features.3.0.block.2.")
    }
    assert len(kept) == len(state) - 6
    assert list(checkpoints.convert(kept, "timm")) == [right[key] for key in kept]


def test_refuses_wrong_arguments(tiny):
    with pytest.raises(ValueError, match=r"to must be one of torchvision, timm, .*, got 'caffe'"):
        checkpoints.convert(tiny, "caffe")
    with pytest.raises(ValueError, match="source must be one of"):
        checkpoints.convert(tiny, "timm", source="caffe")
    with pytest.raises(ValueError, match="named as torchvision names them, not as lukemelas does"):
        checkpoints.convert(tiny, "timm", source="lukemelas")
    with pytest.raises(ValueError, match="not an EfficientNet's state dict"):
        checkpoints.convert({"conv1.weight": torch.ones(1)}, "timm")


def test_missing_what_tells_stages_apart(tiny):
    state = checkpoints.convert(tiny, "lukemelas")
    del state["_blocks.2._project_conv.weight"]
    with pytest.raises(ValueError, match=r"_blocks\.2\._project_conv\.weight is missing"):
        checkpoints.convert(state)
    state = checkpoints.convert(tiny, "timm")
    state = {key: value for key, value in state.items() if not key.startswith("blocks.3.0.")}
    with pytest.raises(ValueError, match=r"no tensors of the block before blocks\.3\.1\."):
        checkpoints.convert(state)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    variant=st.sampled_from([TINY, TINY_LITE]),
    source=st.sampled_from(list(FAMILIES)),
    to=st.sampled_from(list(FAMILIES)),
)
def test_missing_names_never_move_others(data, variant, source, to):
    """Whatever is missing, a tensor gets the name it has in the whole network, or an error."""
    whole = checkpoints.convert(tiny_state(variant), source)
    right = dict(zip(whole, checkpoints.convert(whole, to), strict=True))
    dropped = data.draw(st.sets(st.sampled_from(list(whole)), max_size=12))
    state = {key: value for key, value in whole.items() if key not in dropped}
    try:
        converted = checkpoints.convert(state, to)
    except ValueError:
        return
    assert list(converted) == [right[key] for key in state]
