"""Logits, gradients and running statistics of whole networks against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import networks
import tiers
from effnet_fast.models import VARIANTS, EfficientNet, Variant
from networks import pair, random_images, rms, run_network, trio
from tolerances import assert_parity


def swap_channels(weight: Tensor, dim: int = 0) -> None:
    """Exchanges the two channels of a weight that differ most from each other."""
    rows = weight.data.transpose(0, dim)
    other = int((rows - rows[:1]).flatten(1).norm(dim=1).argmax())
    rows[[0, other]] = rows[[other, 0]].clone()


def assert_logits(variant: Variant, resolution: int) -> None:
    """Ours against torchvision's on two images, and proof that the comparison can fail."""
    models = trio(variant, resolution)
    x = random_images(2, resolution)
    with torch.inference_mode():
        stock, exact = models.stock(x), models.exact(x.double())
        actual = models.actual(x)
        assert_parity({"y": actual}, {"y": stock}, {"y": exact})

        tolerance = 2 * rms(stock - exact) + 2 * torch.finfo(x.dtype).eps * rms(exact)
        assert rms(exact[0] - exact[1]) >= 100 * tolerance

        block = models.actual.features[4][0].block
        swap_channels(block[0][0].weight)
        swapped = models.actual(x)
        with pytest.raises(AssertionError):
            assert_parity({"y": swapped}, {"y": stock}, {"y": exact})


@pytest.mark.parametrize("name", tiers.networks(networks.PUBLISHED))
def test_logits(name: str) -> None:
    variant = VARIANTS[name]
    assert_logits(variant, networks.reduced_resolution(variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers.some(networks.PUBLISHED, ["b0"]))
def test_logits_at_full_resolution(name: str) -> None:
    assert_logits(VARIANTS[name], VARIANTS[name].resolution)


@pytest.mark.parametrize(
    ("part", "dim"),
    [
        ("features.0.0", 0),
        ("features.3.1.block.0.0", 1),
        ("features.3.1.block.1.0", 0),
        ("features.3.1.block.2.fc1", 1),
        ("features.3.1.block.2.fc2", 0),
        ("features.3.1.block.3.0", 0),
        ("features.8.0", 1),
        ("classifier.1", 0),
    ],
)
def test_swapped_channels_are_noticed(part: str, dim: int) -> None:
    models = trio(VARIANTS["b0"], 65)
    swap_channels(models.actual.get_submodule(part).weight, dim)
    with pytest.raises(AssertionError, match=r"^y: "):
        models.assert_parity(random_images(2, 65), backward=False)


@pytest.mark.exhaustive
def test_eval_backward() -> None:
    trio(VARIANTS["b0"], 113).assert_parity(*random_images(8, 113).split(2))


@pytest.mark.slow
def test_train_step() -> None:
    """Forward, backward and running statistics, with dropout and drop-path drawing alike."""
    models = trio(VARIANTS["b0"], 113).train()
    models.assert_parity(*random_images(12, 113).split(4))


def test_train_step_notices_swapped_channels() -> None:
    models = pair().train()
    swap_channels(models.actual.features[3][0].block[1][0].weight)
    with pytest.raises(AssertionError, match=r"^y: "):
        models.assert_alike(random_images(4, 48))


def test_random_draws_of_training() -> None:
    """Under one seed drop-path and dropout keep the same rows and units as torchvision's."""
    models = pair().train()
    x = random_images(8, 48)
    states = []
    for model in models.models:
        for module in model.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.5
        torch.manual_seed(3)
        states.append((model(x), torch.get_rng_state()))
    torch.testing.assert_close(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    models = pair()
    x = random_images(2, 48)[:batch]
    if batch == 0:
        assert models.actual(x).shape == models.stock(x).shape == (0, 1000)
    else:
        models.assert_alike(x)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, 3:-4, 2:-1],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, :-2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["nchw", "channels_last", "sliced", "sliced_channels_last", "transposed", "expanded"],
)
def test_input_layouts(layout: object) -> None:
    x = layout(random_images(2, 57))  # type: ignore[operator]
    before = x.clone()
    models = pair()
    with torch.no_grad():
        networks.assert_alike(*({"y": model(x)} for model in models.models))
    assert torch.equal(x, before)


def test_grey_images() -> None:
    """in_chans=1 against torchvision's network with its stem replaced."""
    theirs = networks.torchvision_network(networks.TINY)
    stem = theirs.features[0]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, 3, 2, 1, bias=False)
    networks.calibrate(theirs, random_images(8, 48, channels=1, seed=1))
    ours = EfficientNet(networks.TINY, in_chans=1).eval()
    ours.load_state_dict(theirs.state_dict())
    networks.Pair(ours, theirs).assert_alike(random_images(2, 48, channels=1))


@pytest.mark.parametrize("shape", [(3, 48, 48), (1, 4, 48, 48), (48, 48), (1, 2, 3, 48, 48)])
def test_wrong_shapes_raise_as_torchvision(shape: tuple[int, ...]) -> None:
    models = pair()
    raised = []
    for model in models.models:
        with pytest.raises((ValueError, RuntimeError)) as info:
            model(torch.zeros(shape))
        raised.append(info.type)
    assert raised[0] is raised[1]


def test_double_precision() -> None:
    models = trio()
    x = random_images(2, 48).double()
    actual = run_network(models.actual.double(), x)
    exact = run_network(models.exact, x)
    for name, tensor in exact.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_reference_backend_is_stock() -> None:
    """With backend="reference" the results are torchvision's to the bit, in either mode."""
    models = pair()
    models.actual.backend = "reference"
    x = random_images(4, 48).to(memory_format=torch.channels_last)
    for training in (False, True):
        actual = run_network(models.actual.train(training), x)
        stock = run_network(models.stock.train(training), x)
        assert all(torch.equal(actual[name], stock[name]) for name in stock)
