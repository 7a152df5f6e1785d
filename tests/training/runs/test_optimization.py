"""Optimizers against their formulas, learning rates over a run, the moving average."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from effnet_fast.models import EfficientNet
from effnet_fast.training.runs.optimization import (
    MovingAverage,
    RMSpropTF,
    make_optimizer,
    make_schedule,
    rate_factor,
)
from effnet_fast.training.runs.recipe import OPTIMIZERS, Recipe, read_recipe
from networks import TINY


def test_rmsprop_tf_is_the_formula():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    options = {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "momentum": 0.8, "weight_decay": 0.01}
    optimizer = RMSpropTF([weight], **options)
    expected, square, velocity = weight.tolist(), [1.0, 1.0], [0.0, 0.0]
    for step in range(3):
        given = [0.5 * (step + 1), -1e-4]
        weight.grad = torch.tensor(given, dtype=torch.float64)
        optimizer.step()
        for i, plain in enumerate(given):
            grad = plain + 0.01 * expected[i]
            square[i] = 0.9 * square[i] + 0.1 * grad**2
            velocity[i] = 0.8 * velocity[i] + 0.1 * grad / math.sqrt(square[i] + 1e-3)
            expected[i] -= velocity[i]
    assert weight.tolist() == pytest.approx(expected, rel=1e-13)


def test_rmsprop_tf_is_timms():
    timm = pytest.importorskip("timm.optim")
    weights = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    twins = copy.deepcopy(weights)
    ours = RMSpropTF(weights, 0.016, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5)
    theirs = timm.RMSpropTF(
        twins, 0.016, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5, lr_in_momentum=True
    )
    for _ in range(4):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn_like(weight)
            twin.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, twin in zip(weights, twins, strict=True):
        torch.testing.assert_close(weight, twin)


def test_rmsprop_tf_refuses_a_negative_number():
    with pytest.raises(ValueError, match=r"momentum must not be negative, got -0\.5"):
        RMSpropTF([nn.Parameter(torch.ones(1))], momentum=-0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_weight(name):
    model = EfficientNet(TINY, num_classes=3)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, Recipe(optimizer=name, rate=0.01), 4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]), key


def test_groups_by_depth_and_without_decay_on_norms():
    model = EfficientNet(TINY, num_classes=3)
    optimizer = make_optimizer(model, Recipe(rate=0.1, weight_decay=0.5), 4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    optimizer = make_optimizer(model, Recipe(rate=0.1, layer_decay=0.5), 4)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[-1] == 0.1
    assert rates == sorted(rates)
    assert len(set(rates)) > 2


def test_a_rate_for_256_images_is_scaled_and_frozen_networks_are_refused():
    model = EfficientNet(TINY, num_classes=3)
    recipe = Recipe(optimizer="sgd", rate=0.016, rate_images=256)
    assert make_optimizer(model, recipe, 512).param_groups[0]["lr"] == pytest.approx(0.032)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        make_optimizer(model, recipe, 512)


def test_the_papers_rates():
    recipe, steps = read_recipe("paper"), 10
    rates = [rate_factor(recipe, step, steps) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 50, 2 / 50, 3 / 50])  # 5 epochs of warm-up
    assert rates[49] == 1.0
    assert rates[50] == 0.97**2  # 5 epochs are two whole times 2.4
    assert rates[71] == 0.97**2
    assert rates[72] == 0.97**3


def test_cosine_ends_at_its_last_rate():
    recipe = Recipe(schedule="cosine", epochs=4, warmup_epochs=1.0, final_rate=0.1)
    rates = [rate_factor(recipe, step, 10) for step in range(41)]
    assert rates[9:11] == [1.0, 1.0]
    assert rates[25] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[40] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rate_factor(Recipe(schedule="constant"), 77, 10) == 1.0


def test_the_schedule_sets_the_groups_rates():
    model = EfficientNet(TINY, num_classes=3)
    recipe = Recipe(optimizer="sgd", rate=0.2, warmup_epochs=1.0)
    optimizer = make_optimizer(model, recipe, 4)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_the_average_begins_quickly_and_keeps_counts():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = MovingAverage(model, 0.9999)
    expected = 0.0
    for step in range(1, 4):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
            model[1].running_mean.fill_(float(step))
            model[1].num_batches_tracked.fill_(step)
        average.update(model)
        decay = min(0.9999, (1 + step) / (10 + step))
        expected = float(step) if step == 1 else decay * expected + (1 - decay) * step
    assert average.model[0].weight.item() == pytest.approx(expected)
    assert average.model[1].running_mean.item() == pytest.approx(expected)
    assert average.model[1].num_batches_tracked.item() == 3
    assert average.counters() == {"steps": 3, "averaged": 3}
