"""Changes of a network after its deployment: followed, or refused with the reason."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import effnet_fast
import networks
import surgery
from edits import EDITS
from networks import pair, random_images

X = random_images(2, 48)


def network() -> nn.Module:
    return pair().actual


@pytest.mark.parametrize("name", EDITS)
def test_edit_is_followed(name: str) -> None:
    models = pair()
    deployed = effnet_fast.deploy(models.actual)
    before = deployed(X)
    for _ in range(2):
        models.apply(EDITS[name])
        after = deployed(X)
        networks.assert_alike({"y": after}, {"y": models.stock(X).detach()})
        assert networks.rms(after - before) > 3 * networks.ALIKE * networks.rms(before)
        before = after


def test_bulk_edits_through_data() -> None:
    """As when averaged weights are swapped in: no counter and no address moves."""
    model = network()
    deployed = effnet_fast.deploy(model)
    before = deployed(X)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert not torch.equal(deployed(X), before)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(kept[name])
    assert torch.equal(deployed(X), before)


@pytest.mark.parametrize("column", [1, 5, -2])
def test_a_single_value_edited_in_place_is_followed(column: int) -> None:
    """Of which the version counter alone tells: few values are compared."""
    model = network()
    deployed = effnet_fast.deploy(model)
    before = deployed(X)
    with torch.no_grad():
        model.classifier[1].weight[3, column] += 10
    assert not torch.equal(deployed(X)[:, 3], before[:, 3])


def test_refresh_after_a_single_value() -> None:
    model = network()
    deployed = effnet_fast.deploy(model)
    before = deployed(X)
    model.classifier[1].weight.data[3, 5] += 10
    deployed.refresh()
    assert not torch.equal(deployed(X)[:, 3], before[:, 3])


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "hook": (
        lambda m: m.features[5][1].block[0].register_forward_hook(print),
        "features.5.1: block.0 has a hook",
    ),
    "pre_hook": (lambda m: m.features[0].register_forward_pre_hook(print), "features.0 has"),
    "own_hook": (lambda m: m.register_forward_hook(print), "it has a hook"),
    "patched": (lambda m: surgery.patch_forward(m.features[2], 2.0), "features.2 has a patch"),
    "patched_whole": (lambda m: surgery.patch_forward(m, 2.0), "its forward is patched"),
    "tanh": (
        lambda m: surgery.set_item(m.features[0], 2, nn.Tanh()),
        "features.0: .*.2 is Tanh, not SiLU",
    ),
    "other_relu6": (
        lambda m: surgery.set_item(m.features[0], 2, surgery.relu6_up_to(4.0)),
        "features.0: .*.2 clamps to 0.0 and 4.0, not to 0 and 6",
    ),
    "stage": (lambda m: surgery.set_item(m.features, 3, nn.Identity()), "features.3 is Id"),
    "class": (
        lambda m: setattr(m.features[1][0], "__class__", surgery.Reversed),
        "features.1.0 is Reversed",
    ),
    "training": (lambda m: m.train(), "call model.eval"),
    "norm_training": (lambda m: m.features[1].train(), "call eval"),
    "dtype": (lambda m: m.features[2].double(), "BatchNorm is of torch.float64 among"),
    "device": (lambda m: m.features[2].to("meta"), "on meta"),
    "parametrized": (
        lambda m: surgery.parametrize_all(m.features[2][0].block[1]),
        "features.2.0: block.1.0 is Parametrized",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_structure_is_refused(name: str) -> None:
    change, words = REFUSED[name]
    model = network()
    deployed = effnet_fast.deploy(model)
    deployed(X)
    change(model)
    for call in (lambda: deployed(X), lambda: effnet_fast.deploy(model)):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_forward_that_is_the_classs_own_is_taken() -> None:
    """As Accelerate's `unwrap_model` leaves it on the instance."""
    model = network()
    y = effnet_fast.deploy(model)(X)
    model.forward = types.MethodType(type(model).forward, model)
    deployed = effnet_fast.deploy(model)
    assert torch.equal(deployed(X), y)
    model.forward = types.MethodType(network().forward.__func__, network())
    with pytest.raises(RuntimeError, match="its forward is patched"):
        deployed(X)


def test_layers_that_fit_are_taken_over() -> None:
    models = pair()
    deployed = effnet_fast.deploy(models.actual)
    deployed(X)

    def change(model: nn.Module) -> None:
        model.features[3][0].block[1][0].stride = (1, 1)
        model.classifier[1] = nn.Linear(model.classifier[1].in_features, 3)

    models.apply(change)
    networks.assert_alike({"y": deployed(X)}, {"y": models.stock(X).detach()})


def test_hook_that_is_gone() -> None:
    model = network()
    deployed = effnet_fast.deploy(model)
    y = deployed(X)
    handle = model.features[1].register_forward_hook(print)
    with pytest.raises(RuntimeError, match="undo that"):
        deployed(X)
    handle.remove()
    assert torch.equal(deployed(X), y)
