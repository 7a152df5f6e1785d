"""Forward hooks on stages: the plan calls them on its maps, and stops where they change something.

Each case beside the same network without a plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import foreign_networks
import networks
from effnet_fast.inference.own_plan import plan_of
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, random_images

X = random_images(2, 48)


def classifier() -> nn.Module:
    model = EfficientNet(TINY)
    model.load_state_dict(networks.calibrated_state(TINY))
    return model.eval()


def encoder() -> nn.Module:
    model = EfficientNetFeatures(TINY, out_indices=(1, 3))
    model.load_state_dict(networks.calibrated_state(TINY))
    return model.eval()


def features() -> nn.Module:
    return classifier().get_submodule("features")


def of_timm() -> nn.Module:
    return foreign_networks.trio("test_efficientnet").actual


# Makers, where stages stand, and numbers of three of them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int, int]]] = {
    "classifier": (classifier, "features.", (1, 4, 7)),
    "encoder": (encoder, "features.", (1, 2, 5)),
    "features": (features, "", (1, 4, 7)),
    "timm": (of_timm, "blocks.", (0, 1, 3)),
}
Hook = Callable[[nn.Module, Any, Tensor], Tensor | None]


def in_place(module: nn.Module, inputs: Any, y: Tensor) -> None:
    y.mul_(0.5)


def by_data(module: nn.Module, inputs: Any, y: Tensor) -> None:
    y.data[0, 0] += 1


# What hooks do that changes the result.
CHANGES: dict[str, Hook] = {
    "returns": lambda m, inputs, y: y * 0.5,
    "in place": in_place,
    "by data": by_data,
}


def run(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, list) else [y]


def two(name: str) -> tuple[nn.Module, nn.Module]:
    """The network with a plan and without."""
    model = NETWORKS[name][0]()
    other: Any = copy.deepcopy(model)
    other.plan = False
    return model, other


def stage(model: nn.Module, name: str, place: int) -> nn.Module:
    return model.get_submodule(f"{NETWORKS[name][1]}{NETWORKS[name][2][place]}")


def is_planned(model: Any) -> bool:
    plan = model._own_plan if hasattr(model, "_own_plan") else plan_of(model)
    return plan.snapshot is not None and bool(plan.snapshot.engines)


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.stride()) == (b.shape, b.stride())
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def images() -> tuple[Tensor, Tensor]:
    return X, X.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_hooks_see_what_stages_take_and_give(name: str, places: tuple[int, ...]) -> None:
    seen: list[list[Tensor]] = []
    models = two(name)
    for model in models:
        for place in places:
            stage(model, name, place).register_forward_hook(
                lambda m, inputs, y: seen.append([*inputs, y])
            )
    for x in images():
        ours, theirs = run(models[0], x), run(models[1], x)
        assert_near(ours, theirs)
        assert len(seen) == 2 * len(places)
        for index in range(len(places)):
            assert_near(seen[index], seen[len(places) + index])
        seen.clear()
    assert is_planned(models[0])
    assert not is_planned(models[1])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", range(3))
def test_what_a_hook_changes_is_passed_on(name: str, change: str, place: int) -> None:
    models, calls = two(name), []
    before = run(models[0])

    def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor | None:
        calls.append(module)
        return CHANGES[change](module, inputs, y)

    for model in models:
        stage(model, name, place).register_forward_hook(hook)
    for x in images():
        assert_near(run(models[0], x), run(models[1], x))
    assert len(calls) == 4
    assert any(not torch.equal(*pair) for pair in zip(run(models[0]), before, strict=True))


@pytest.mark.parametrize("values", [slice(None), slice(5, 6)], ids=["all", "one"])
def test_a_hook_that_edits_what_follows(values: slice) -> None:
    models = two("classifier")
    for model in models:
        later: Any = model.get_submodule("features.5.0.block.0.1")

        def edit(module: nn.Module, inputs: Any, y: Tensor, norm: Any = later) -> None:
            norm.bias.data[values].add_(0.5)

        stage(model, "classifier", 1).register_forward_hook(edit)
    for _ in range(2):
        assert_near(run(models[0]), run(models[1]))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_map_that_a_later_hook_edits(backend: str, channels_last: bool) -> None:
    """The map that is returned and the hook's input are one tensor, as in PyTorch."""
    model = EfficientNetFeatures(TINY, backend=backend).eval()
    model.load_state_dict(networks.calibrated_state(TINY))
    x = X.to(memory_format=torch.channels_last) if channels_last else X
    before = run(model, x)
    later: Any = model.get_submodule("features.3")

    def edit(module: nn.Module, inputs: Any, y: Tensor) -> None:
        inputs[0].mul_(1.5)

    later.register_forward_hook(edit)
    after = run(model, x)
    assert_near(after[:2], [before[0], 1.5 * before[1]])


def test_hooks_come_and_go() -> None:
    model, other = two("classifier")
    counts: list[int] = []
    handles = []
    for number in (2, 2, 5):
        hooked: Any = model.get_submodule(f"features.{number}")
        handles.append(hooked.register_forward_hook(lambda *_: counts.append(1)))
        assert_near(run(model), run(other))
        assert len(counts) == len(handles)
        counts.clear()
    for handle in handles:
        handle.remove()
        run(model)
    assert len(counts) == 3
    snapshot = model._own_plan.snapshot  # type: ignore[union-attr]
    assert snapshot.spec.observed == ()


@pytest.mark.parametrize("options", [{"with_kwargs": True}, {"always_call": True}], ids=str)
def test_other_hooks_run_block_by_block(options: dict[str, bool]) -> None:
    model, other = two("classifier")
    seen: list[int] = []
    hooked: Any = stage(model, "classifier", 1)
    hooked.register_forward_hook(lambda *_: seen.append(1), **options)
    assert_near(run(model), run(other))
    assert len(seen) == 1
    assert not is_planned(model)
    (course,) = effnet_fast.doctor(model).networks or []
    assert course.eval == "block by block"
    assert "features.4 has a hook" in str(course.eval_reason)


def test_deploy_refuses_them() -> None:
    model = classifier()
    stage(model, "classifier", 1).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"features\.4 has a hook"):
        effnet_fast.deploy(model)


def test_a_hook_that_raises_ends_the_call() -> None:
    model = classifier()
    run(model)

    class EnoughError(Exception):
        pass

    def stop(*_: object) -> None:
        raise EnoughError

    stage(model, "classifier", 1).register_forward_hook(stop)
    with pytest.raises(EnoughError):
        run(model)
