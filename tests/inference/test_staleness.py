"""What a watch over a network notices: replaced tables and states, layouts; and what it refuses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from effnet_fast.inference import staleness
from effnet_fast.inference.snapshot import Snapshot
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.modules import tensor_bytes
from effnet_fast.modules.structure import RefusedError
from networks import TINY

BLOCK = "features.5.1.block."


def packed(model: Any) -> Snapshot:
    """A snapshot whose weights are packed: from then on every byte counts."""
    snapshot = Snapshot(model, every_byte=True)
    snapshot.engine_for(torch.float32, "cpu")
    return snapshot


@pytest.fixture(scope="module")
def built() -> EfficientNet:
    return EfficientNet(TINY).eval()


def replace_table(path: str, name: str) -> Callable[[Any], object]:
    """By one of its own kind with the same entries."""

    def change(model: Any) -> None:
        state = model.get_submodule(path).__dict__
        state[name] = type(state[name])(state[name])

    return change


def replace_state(path: str) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        module.__dict__ = dict(module.__dict__)

    return change


def take_over(model: Any) -> None:
    model.features[5][1].__dict__.update(EfficientNet(TINY).features[5][1].__dict__)


def shadow(path: str, name: str, value: object) -> Callable[[Any], object]:
    """An attribute of the instance's own hides what a table has under its name."""
    return lambda model: model.get_submodule(path).__dict__.update({name: value})


def set_memory(model: Any) -> None:
    with torch.no_grad():
        model.classifier[1].bias.set_(torch.zeros(1000))


CHANGES: dict[str, Callable[[Any], object]] = {
    **{
        f"{name} of {path}": replace_table(path, name)
        for name, path in (
            ("_modules", "features"),
            ("_modules", "features.4"),
            ("_modules", f"{BLOCK}2"),
            ("_parameters", "classifier.1"),
            ("_buffers", f"{BLOCK}0.1"),
            ("_forward_hooks", "features.8"),
            ("_forward_pre_hooks", f"{BLOCK}0.0"),
        )
    },
    "state of a block": replace_state("features.5.1"),
    "state of a norm": replace_state(f"{BLOCK}1.1"),
    "state of another": take_over,
    "hidden weight": shadow(f"{BLOCK}0.0", "weight", torch.zeros(1)),
    "hidden statistics": shadow(f"{BLOCK}0.1", "running_mean", torch.zeros(1)),
    "hidden child": shadow(f"{BLOCK}2", "fc1", nn.Identity()),
    "pool of the network": lambda m: setattr(m, "global_pool", ""),
    "hidden child of the network": shadow("", "avgpool", nn.Identity()),
    "children of the network": lambda m: m.__dict__.update(
        _modules={**m.__dict__["_modules"], "classifier": nn.Identity()}
    ),
    "state of the network": lambda m: setattr(
        m, "__dict__", {**m.__dict__, "_modules": dict(m._modules, avgpool=nn.Identity())}
    ),
    "transposed": lambda m: setattr(
        m.features[5][1].block[1][0].weight,
        "data",
        m.features[5][1].block[1][0].weight.data.transpose(2, 3),
    ),
    "negative bit": lambda m: setattr(
        m.classifier[1].bias, "data", torch._neg_view(m.classifier[1].bias.data)
    ),
    "other memory": set_memory,
    "freed memory": lambda m: m.classifier[1].bias.untyped_storage().resize_(0),
}


def test_the_bytes_behind_a_tensor_tell() -> None:
    assert tensor_bytes.bytes_tell()
    assert not tensor_bytes._is_shown(lambda t: t)


def test_without_the_bytes_each_tensor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bytes, "bytes_tell", lambda: False)
    test_a_change_is_noticed(True)


@pytest.mark.parametrize("every_byte", [False, True], ids=["few_values", "every_byte"])
def test_a_change_is_noticed(every_byte: bool) -> None:
    for name, change in CHANGES.items():
        model = EfficientNet(TINY).eval()
        snapshot = Snapshot(model, every_byte=every_byte)
        assert snapshot.is_fresh(model)
        change(model)
        assert not snapshot.is_fresh(model), name


@pytest.fixture
def hooks() -> Iterator[None]:
    kept = {name: nn_module.__dict__[name] for name in staleness.GLOBAL_HOOKS}
    yield
    nn_module.__dict__.update(kept)


@pytest.mark.parametrize("name", staleness.GLOBAL_HOOKS)
def test_replaced_tables_of_global_hooks(name: str, hooks: None, built: EfficientNet) -> None:
    snapshot = Snapshot(built)
    setattr(nn_module, name, OrderedDict())
    assert not snapshot.is_fresh(built)


def test_the_order_of_an_ordered_dict() -> None:
    """Which is its own: the dict below keeps its order."""
    model = EfficientNet(TINY).eval()
    stage = model.features[5]
    stage._modules = OrderedDict(stage._modules)
    snapshot = Snapshot(model)
    assert snapshot.is_fresh(model)
    stage._modules.move_to_end("0")
    assert not snapshot.is_fresh(model)


def test_attributes_set_by_code_that_has_run_often(built: EfficientNet) -> None:
    """Python then stores them by other, quicker instructions."""

    def assign(module: Any, value: float) -> None:
        module.eps = value

    other, norm = EfficientNet(TINY).features[8][1], built.features[8][1]
    for i in range(200):
        assign(other, 1.0 + i)
    snapshot = Snapshot(built)
    for i in range(3):
        assert snapshot.is_fresh(built)
        kept = norm.eps
        assign(norm, 0.5 + i)
        assert not snapshot.is_fresh(built)
        assign(norm, kept)


def test_an_encoders_maps() -> None:
    model = EfficientNetFeatures(TINY).eval()
    snapshot = Snapshot(model)
    model._taken = model._taken[1:]
    assert not snapshot.is_fresh(model)


def test_what_means_nothing_goes_unnoticed(built: EfficientNet) -> None:
    """Attributes of the user's own, references to a tensor and its gradient."""
    snapshot = packed(built)
    built.note = built.features[3].note = "seen"
    weight = built.classifier[1].weight
    kept = [weight.detach(), weight.view(-1), (2 * weight).sum()]
    kept[-1].backward()
    assert snapshot.is_fresh(built)
    weight.grad = None
    del kept, built.note, built.features[3].note
    assert snapshot.is_fresh(built)


def test_every_byte_counts(built: EfficientNet) -> None:
    """Drawn bits of drawn tensors, one at a time; a few values of each tensor would not show it."""
    snapshot, few = packed(built), Snapshot(built)
    tensors = [t.detach().view(-1) for t in snapshot.spec.tensors() if t is not None]
    missed = 0
    for _ in range(300):
        tensor = tensors[int(torch.randint(len(tensors), ()))].numpy().view("uint8")
        place, bit = int(torch.randint(len(tensor), ())), 1 << int(torch.randint(8, ()))
        tensor[place] ^= bit
        assert not snapshot.is_fresh(built)
        missed += few.is_fresh(built)
        tensor[place] ^= bit
    assert snapshot.is_fresh(built)
    assert missed > 200


def test_bytes_count_once_they_are_packed(built: EfficientNet) -> None:
    """A forward after each step of training packs nothing, and spares the checksums."""
    snapshot, bias = Snapshot(built, every_byte=True), built.classifier[1].bias
    bias.data[17] += 1
    assert snapshot.is_fresh(built)
    snapshot.engine_for(torch.float32, "cpu")
    snapshot.engine_for(torch.bfloat16, "cpu")
    assert snapshot.is_fresh(built)
    bias.data[17] += 1
    assert not snapshot.is_fresh(built)


def test_the_last_element_counts() -> None:
    """Of a view with gaps between its elements too."""
    model = EfficientNet(TINY).eval()
    memory = torch.zeros(2 * model.num_features)
    model.features[8][1].bias = nn.Parameter(memory[1::2])
    snapshot = packed(model)
    for tensor in (memory, *model.features[8].parameters()):
        assert snapshot.is_fresh(model)
        tensor.data[-1] += 1
        assert not snapshot.is_fresh(model)
        snapshot = packed(model)


class Table(dict):
    """May give other values than it has."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            shadow("classifier.1", "weight", torch.zeros(1000, 320)),
            "'weight' in more than one place",
        ),
        (lambda m: setattr(m.features[0][0], "stride", [2, 2]), r"stride \[2, 2\]"),
        (lambda m: setattr(m.features[8][1], "eps", torch.tensor(1e-5)), "eps of a BatchNorm2d"),
        (
            lambda m: setattr(m.features[5], "_modules", Table(m.features[5]._modules)),
            "table is no",
        ),
        (lambda m: m.features[2][0].block[0][1].bias.untyped_storage().resize_(0), "no memory"),
        (lambda m: m.features[8][0].weight.untyped_storage().resize_(64), "no memory"),
    ],
    ids=["hidden", "list", "tensor", "table", "freed", "shrunk"],
)
def test_what_cannot_be_watched_is_refused(change: Callable[[Any], object], words: str) -> None:
    model = EfficientNet(TINY).eval()
    change(model)
    with pytest.raises(RefusedError, match=words):
        Snapshot(model)
