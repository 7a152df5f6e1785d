"""Whatever eval mode keeps between calls follows every change, and never enters the state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import networks
from effnet_fast.models import EfficientNet
from networks import TINY, Pair, pair, random_images, trio
from tolerances import assert_no_worse_than

BLOCK = "features.5.1.block."
X = random_images(2, 48)


def perturbed(model: nn.Module) -> dict[str, Tensor]:
    """Another well-conditioned state of the network."""
    generator = torch.Generator().manual_seed(9)
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
            continue
        factor = 0.9 + 0.2 * torch.rand(tensor.shape, generator=generator)
        state[name] = tensor * factor.to(tensor.dtype)
    return state


def edit_in_place(*paths: str) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            for path in paths:
                owner, _, name = path.rpartition(".")
                getattr(model.get_submodule(owner), name).mul_(1.25)

    return edit


def add_in_place(*paths: str) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            for path in paths:
                owner, _, name = path.rpartition(".")
                getattr(model.get_submodule(owner), name).add_(0.25)

    return edit


def add_to_eps(model: nn.Module) -> None:
    model.get_submodule(f"{BLOCK}0.1").eps += 0.5


def replace_parameter(model: nn.Module) -> None:
    conv = model.features[5][1].block[3][0]
    conv.weight = nn.Parameter(conv.weight.detach() * 1.5)


def replace_data(model: nn.Module) -> None:
    conv = model.features[5][1].block[0][0]
    conv.weight.data = conv.weight.data * 1.5


def one_training_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    model.train()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.momentum = 0.01
    model(X).square().mean().backward()
    optimizer.step()
    model.eval()


def training_forward_alone(model: nn.Module) -> None:
    """Moves the running statistics and nothing else."""
    model.train()
    with torch.no_grad():
        model(X)
    model.eval()


def ema_update(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    averaged.update_parameters(model)
    other = copy.deepcopy(model)
    other.load_state_dict(perturbed(model))
    averaged.update_parameters(other)
    model.load_state_dict(averaged.module.state_dict())


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda m: m.load_state_dict(perturbed(m)),
    "load_state_dict_assign": lambda m: m.load_state_dict(perturbed(m), assign=True),
    "expand_weight": edit_in_place(f"{BLOCK}0.0.weight"),
    "depthwise_weight": edit_in_place(f"{BLOCK}1.0.weight"),
    "project_weight": edit_in_place(f"{BLOCK}3.0.weight"),
    "norm_weight": edit_in_place(f"{BLOCK}0.1.weight", f"{BLOCK}1.1.weight"),
    "norm_bias": add_in_place(f"{BLOCK}0.1.bias", f"{BLOCK}3.1.bias"),
    "running_mean": edit_in_place(f"{BLOCK}0.1.running_mean", f"{BLOCK}1.1.running_mean"),
    "running_var": edit_in_place(f"{BLOCK}3.1.running_var"),
    "squeeze_excite": edit_in_place(f"{BLOCK}2.fc1.weight", f"{BLOCK}2.fc2.bias"),
    "stem_and_head": edit_in_place("features.0.0.weight", "features.8.1.running_var"),
    "eps": add_to_eps,
    "parameter_replaced": replace_parameter,
    "data_replaced": replace_data,
    "training_step": one_training_step,
    "training_forward": training_forward_alone,
    "ema": ema_update,
}


def check(models: Pair) -> Tensor:
    with torch.no_grad():
        return models.assert_alike(X, backward=False)["y"]


@pytest.mark.parametrize("name", EDITS)
def test_edit_is_followed(name: str) -> None:
    models = pair()
    before = check(models)
    for _ in range(2):
        after = check(models.apply(EDITS[name]))
        assert networks.rms(after - before) > 3 * networks.ALIKE * networks.rms(before)
        before = after


def test_edit_in_inference_mode_is_followed() -> None:
    models = pair()
    with torch.inference_mode():
        check(models)
        models.apply(EDITS["project_weight"])
        check(models)
    check(models)


def test_network_made_in_inference_mode() -> None:
    """Its tensors keep no version counter."""
    with torch.inference_mode():
        models = pair()
        before = check(models)
        after = check(models.apply(EDITS["expand_weight"]))
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


def test_state_dict_and_buffers_stay_torchvisions() -> None:
    models = pair()
    check(models)
    models.apply(one_training_step)
    check(models)
    assert list(models.actual.state_dict()) == list(models.stock.state_dict())
    buffers = [name for name, _ in models.actual.named_buffers()]
    assert buffers == [name for name, _ in models.stock.named_buffers()]
    assert [n for n, _ in models.actual.named_modules()] == [
        n for n, _ in models.stock.named_modules()
    ]


def test_pickle_does_not_grow_with_use() -> None:
    def size(model: nn.Module) -> int:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.tell()

    model = EfficientNet(TINY).eval()
    unused = size(model)
    with torch.no_grad():
        model(X)
    assert size(model) < 1.1 * unused


def test_copies_go_their_own_way() -> None:
    models = pair()
    before = check(models)
    twins = copy.deepcopy(models)
    check(twins.apply(EDITS["load_state_dict"]))
    assert torch.equal(check(models), before)

    state_of_copy = copy.deepcopy(models.actual)
    with torch.no_grad():
        assert torch.equal(state_of_copy(X), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_moves_are_followed(dtype: torch.dtype) -> None:
    models = pair()
    check(models)
    models.actual.to(dtype)
    models.stock.to(dtype)
    with torch.no_grad():
        y, expected = (model(X.to(dtype)) for model in models.models)
        assert y.dtype is dtype
        tolerance = 0.1 if dtype is torch.bfloat16 else 1e-9
        assert networks.rms(y - expected) <= tolerance * networks.rms(expected)
        models.actual.float()
        models.stock.float()
        torch.testing.assert_close(models.actual(X), models.stock(X), rtol=1e-3, atol=1e-3)


def test_layout_moves_are_followed() -> None:
    models = pair()
    before = check(models)
    models.actual.to(memory_format=torch.channels_last)
    after = check(models)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_half_precision_under_autocast() -> None:
    """Judged by the exact result: stock itself errs by a tenth of the logits here."""
    models = trio()
    with torch.no_grad():
        exact = models.exact(X.double())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y, stock = models.actual(X), models.stock(X)
            assert_no_worse_than(y, stock, exact)
