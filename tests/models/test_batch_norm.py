"""BatchNorm2d's semantics inside the network: every switch it has, frozen parts, statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effnet_fast.modules.layers import MBConv, MBConvConfig
from networks import assert_alike, pair, random_images, run_network

CHANNELS_LAST = torch.channels_last


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def block_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The three norms of a block with expansion and residual."""
    return norms(model.features[5][1])


def forget_statistics(bn: nn.BatchNorm2d) -> None:
    """What track_running_stats=False gives at construction."""
    bn.track_running_stats = False
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None


def forget_affine(bn: nn.BatchNorm2d) -> None:
    """What affine=False gives at construction."""
    bn.affine = False
    bn.weight = bn.bias = None


# name: change to one BatchNorm2d
SWITCHES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "momentum_none": lambda bn: setattr(bn, "momentum", None),
    "momentum_0": lambda bn: setattr(bn, "momentum", 0.0),
    "momentum_1": lambda bn: setattr(bn, "momentum", 1.0),
    "eps_large": lambda bn: setattr(bn, "eps", 0.3),
    "no_statistics": forget_statistics,
    "stops_tracking": lambda bn: setattr(bn, "track_running_stats", False),
    "no_affine": forget_affine,
    "no_affine_no_statistics": lambda bn: (forget_affine(bn), forget_statistics(bn)),
    "no_bias": lambda bn: setattr(bn, "bias", None),
    "no_counter": lambda bn: setattr(bn, "num_batches_tracked", None),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("where", [0, 1, 2, "all"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switch(name: str, where: int | str, training: bool) -> None:
    def change(model: nn.Module) -> None:
        chosen = block_norms(model) if where == "all" else [block_norms(model)[int(where)]]
        for bn in chosen:
            SWITCHES[name](bn)
        model.train(training)

    models = pair().apply(change)
    models.assert_alike(random_images(4, 48))


@pytest.mark.slow
def test_switches_of_all_norms_over_two_steps() -> None:
    """momentum=None averages over the batches seen; the second step depends on the count."""
    for name in ("momentum_none", "momentum_1"):
        models = (
            pair().train().apply(lambda model, n=name: [SWITCHES[n](bn) for bn in norms(model)])
        )
        for seed in (3, 4):
            results = models.assert_alike(random_images(4, 48, seed=seed), backward=False)
        assert results["buffer features.0.1.num_batches_tracked"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(itertools.product([False, True], repeat=3)))
def test_train_and_eval_mixed_in_one_block(pattern: tuple[bool, bool, bool]) -> None:
    for rest in (False, True):
        models = pair()
        for model in models.models:
            model.train(rest)
            for bn, training in zip(block_norms(model), pattern, strict=True):
                bn.train(training)
        before = {k: v.clone() for k, v in models.actual.named_buffers()}
        results = models.assert_alike(random_images(4, 48))
        for bn, training, path in zip(block_norms(models.actual), pattern, "013", strict=True):
            name = f"features.5.1.block.{path}.1.running_mean"
            assert torch.equal(results[f"buffer {name}"], before[name]) is not training
            assert bn.training is training


def test_all_norms_in_eval_while_training() -> None:
    """Fine-tuning with frozen statistics: drop-path and dropout still draw."""
    models = pair().train()
    models.apply(lambda model: [bn.eval() for bn in norms(model)])
    before = {k: v.clone() for k, v in models.actual.named_buffers()}
    results = models.assert_alike(random_images(4, 48))
    assert all(torch.equal(results[f"buffer {k}"], v) for k, v in before.items())


def test_all_norms_in_training_inside_an_eval_network() -> None:
    """Adapting statistics at test time."""
    models = pair()
    models.apply(lambda model: [bn.train() for bn in norms(model)])
    models.assert_alike(random_images(4, 48))


@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_running_variance_is_unbiased(expand_ratio: int) -> None:
    block = MBConv(MBConvConfig(expand_ratio, 3, 2, 8, 8), 0.0, nn.BatchNorm2d).train()
    for bn in norms(block):
        bn.momentum = 1.0
    x = torch.randn(2, 8, 5, 5).to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        block(x)
        z = block.block[0][0](x)
    bn = norms(block)[0]
    torch.testing.assert_close(bn.running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, z.transpose(0, 1).flatten(1).var(1, correction=1))
    assert not torch.allclose(bn.running_var, z.transpose(0, 1).flatten(1).var(1, correction=0))


def test_statistics_of_data_far_from_zero() -> None:
    """Mean 1000, deviation 1: a variance taken as E[x^2] - E[x]^2 would be lost in fp32."""
    torch.manual_seed(0)
    block = MBConv(MBConvConfig(1, 3, 1, 8, 16), 0.0, nn.BatchNorm2d).train()
    with torch.no_grad():
        block.block[0][0].weight.zero_()[:, :, 1, 1] = 1.0
        block.block[0][1].momentum = 1.0
        x = (1000 + torch.randn(8, 8, 12, 12)).to(memory_format=CHANNELS_LAST)
        block(x)
    exact = x.double().transpose(0, 1).flatten(1)
    bn = block.block[0][1]
    torch.testing.assert_close(bn.running_mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(bn.running_var.double(), exact.var(1), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["network", "block"])
def test_one_value_per_channel_raises_as_stock(part: str) -> None:
    models = pair().train()
    messages = []
    for model in models.models:
        target = model if part == "network" else model.features[5][1]
        x = random_images(1, 32) if part == "network" else torch.randn(1, 32, 1, 1)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as info:
            target(x)
        messages.append(str(info.value))
    assert messages[0] == messages[1]


def test_wrong_channels_raise_as_stock() -> None:
    models = pair()
    for model in models.models:
        with pytest.raises(RuntimeError):
            model.features[5][1](torch.randn(2, 31, 6, 6))


# name: what is frozen
FROZEN: dict[str, Callable[[nn.Module], object]] = {
    "norms": lambda m: [bn.requires_grad_(False) for bn in norms(m)],
    "norm_weights": lambda m: [bn.weight.requires_grad_(False) for bn in norms(m)],
    "norm_biases": lambda m: [bn.bias.requires_grad_(False) for bn in norms(m)],
    "convolutions": lambda m: [
        c.weight.requires_grad_(False) for c in m.modules() if isinstance(c, nn.Conv2d)
    ],
    "depthwise": lambda m: [
        c.weight.requires_grad_(False)
        for c in m.modules()
        if isinstance(c, nn.Conv2d) and c.groups > 1
    ],
    "squeeze_excite": lambda m: [
        c.requires_grad_(False) for c in m.modules() if type(c).__name__ == "SqueezeExcitation"
    ],
    "first_half": lambda m: m.features[:5].requires_grad_(False),
    "features": lambda m: m.features.requires_grad_(False),
    "all_but_one": lambda m: (
        m.requires_grad_(False),
        m.features[5][1].block[1][1].weight.requires_grad_(True),
    ),
    "everything": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen(name: str, training: bool) -> None:
    """Frozen parameters get no gradient, the others and the input theirs; statistics move on."""
    models = pair().apply(FROZEN[name])
    models.train(training)
    before = {k: v.clone() for k, v in models.actual.named_buffers()}
    results = models.assert_alike(random_images(4, 48))
    frozen = [k for k, p in models.actual.named_parameters() if not p.requires_grad]
    assert frozen
    assert not any(f"grad {name}" in results for name in frozen)
    for key, value in before.items():
        assert torch.equal(results[f"buffer {key}"], value) is not training, key


@pytest.mark.slow
def test_frozen_input_and_parameters_in_training() -> None:
    """Without any gradient to compute, and under no_grad, the statistics are still updated."""
    models = pair().train()
    with torch.no_grad():
        models.assert_alike(random_images(4, 48), backward=False)
    models = pair().train().apply(FROZEN["everything"])
    models.assert_alike(random_images(4, 48), backward=False)


def test_eval_norm_passes_the_gradient_to_its_input() -> None:
    models = pair().apply(lambda model: [m.requires_grad_(False) for m in norms(model)])
    results = models.assert_alike(random_images(2, 48))
    assert results["grad x"].abs().max() > 0


@pytest.mark.slow
def test_pieces_of_the_step_without_input_gradient() -> None:
    """Training as it is done: images need no gradient, parameters do."""
    models = pair().train()
    x = random_images(4, 48)
    results = []
    for model in models.models:
        torch.manual_seed(0)
        model(x).square().mean().backward()
        results.append({f"grad {k}": p.grad for k, p in model.named_parameters()})
    assert_alike(*results)


def test_gradients_accumulate() -> None:
    models = pair()
    x = random_images(2, 48)
    once = run_network(models.actual, x)
    y = models.actual(x.requires_grad_())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    for name, parameter in models.actual.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[f"grad {name}"], rtol=1e-4, atol=1e-5)


def test_backward_after_statistics_moved() -> None:
    """Backward uses the statistics of its forward, whatever a training step has made of them."""
    model = pair().actual
    gradients = []
    for step in (None, random_images(2, 65, seed=1)):
        y = model.eval()(random_images(2, 65))
        if step is not None:
            model.train()(step)
        model.zero_grad()
        y.square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
