"""Runs on images of which some, or all, cannot be read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_fast.models import EfficientNet
from effnet_fast.training.data.loading import Batch, UnreadableLimitError
from effnet_fast.training.runs.feeding import Feed, Images
from effnet_fast.training.runs.loop import train
from effnet_fast.training.runs.network import preset_of
from effnet_fast.training.runs.optimization import make_optimizer
from effnet_fast.training.runs.processes import Processes
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.settings import Settings
from effnet_fast.training.runs.steps import Steps
from networks import TINY
from training_runs import SIDE, SMALL, make_data

ONE: dict[str, Any] = {**SMALL, "epochs": 1}


def spoil(folder: Path) -> list[str]:
    """Makes all images of a folder unreadable; their paths."""
    paths = sorted(folder.rglob("*.png"))
    for path in paths:
        path.write_bytes(b"no image")
    return [str(path) for path in paths]


def named(run: Path) -> list[str]:
    """The paths in a run's unreadable.csv."""
    with open(run / "unreadable.csv", newline="") as file:
        return sorted(row["path"] for row in csv.DictReader(file))


def test_validation_images_are_named_and_counted(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=2)
    spoiled = spoil(data / "val" / "red")
    metrics = train(data, tmp_path / "run", **ONE)
    assert named(tmp_path / "run") == spoiled
    assert metrics["unreadable"] == len(spoiled)
    assert metrics["loss"] > 0


def test_no_validation_image_can_be_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=1)
    spoiled = spoil(data / "val")
    metrics = train(data, tmp_path / "run", **ONE)
    assert (metrics["loss"], metrics["top1"], metrics["top5"]) == (None, None, None)
    assert metrics["unreadable"] == len(spoiled)


def test_no_training_image_can_be_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=1)
    first = spoil(data / "train")[0]
    with pytest.raises(ValueError, match="no training image can be read") as caught:
        train(data, tmp_path / "run", **ONE)
    assert str(Path(first).parent.parent) in str(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()


class CrashError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize(("limit", "is_enough"), [(2, False), (3, True)])
def test_a_resumed_run_goes_on_counting(tmp_path: Path, limit: int, is_enough: bool) -> None:
    """Two images cannot be read in the first epoch, and another one after the interruption."""
    data = make_data(tmp_path / "data", train=3, val=1)
    first, second, third = (data / "train" / "red" / f"{number}.png" for number in range(3))
    contents = {path: path.read_bytes() for path in (first, second)}
    for path in contents:
        path.write_bytes(b"no image")

    def crash(step: int, loss: float) -> None:
        if step == 2:
            raise CrashError

    given = {**SMALL, "batch": 9, "unreadable_limit": limit}
    with pytest.raises(CrashError):
        train(data, tmp_path / "run", on_step=crash, **given)
    for path, content in contents.items():
        path.write_bytes(content)
    third.write_bytes(b"no image")
    if is_enough:
        assert train(data, tmp_path / "run", resume=True, **given)["unreadable"] == 3
        return
    with pytest.raises(UnreadableLimitError, match="3 images cannot be read, and 2 are allowed"):
        train(data, tmp_path / "run", resume=True, **given)


def test_the_limit_is_that_of_validation_images_too(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=2)
    spoil(data / "val" / "red")
    with pytest.raises(UnreadableLimitError, match=r"2 images cannot be read, and 1 are allowed"):
        train(data, tmp_path / "run", **ONE, unreadable_limit=1)


def batch(count: int, total: int) -> Batch:
    """Images of which the others of `total` could not be read."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 3, torch.arange(count), (), total)


@pytest.fixture
def steps(tmp_path: Path) -> Any:
    """Makes a network, with SGD that decays its weights, and what takes steps."""
    processes = Processes("cpu", "fp32", "ddp")
    images = Images(make_data(tmp_path / "data", train=2, val=1))
    recipe = Recipe(optimizer="adamw", rate=0.1, weight_decay=0.1)

    def make() -> tuple[EfficientNet, Steps]:
        torch.manual_seed(0)
        model = EfficientNet(TINY, num_classes=3, dropout=0.0, stochastic_depth_prob=0.0).train()
        feed = Feed(images, recipe, Settings(workers=0), preset_of(model), processes)
        optimizer = make_optimizer(model, recipe, 6)
        return model, Steps(model, model, optimizer, feed.augmentation, recipe, processes, None)

    yield make
    processes.close()


def take(steps: Steps, *group: Batch) -> bool:
    steps.backward(group)
    return steps.update(group, torch.tensor(float(sum(len(part.images) for part in group))))


def test_unreadable_images_have_no_part_in_the_mean(steps: Any) -> None:
    """A batch of five of which three can be read has the gradient of one of three."""
    gradients = []
    for total in (3, 5):
        model, taken = steps()
        taken.backward([batch(3, total)])
        gradients.append([p.grad for p in model.parameters()])
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_step_without_a_readable_image_moves_nothing(steps: Any) -> None:
    model, taken = steps()
    assert take(taken, batch(3, 3))  # AdamW has momentum from now on
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not take(taken, batch(0, 3), batch(0, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert take(taken, batch(0, 3), batch(3, 3))
    assert not torch.equal(before["features.0.0.weight"], model.features[0][0].weight)
