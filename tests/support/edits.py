"""Changes of a network's weights and statistics, of every kind that eval mode must follow."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from networks import random_images

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


def _classifier(model: nn.Module) -> nn.Linear:
    return model.classifier[1]


def _set_entries(tensor: Tensor, value: float) -> None:
    """Of the middle of a tensor, neither its first nor its last values."""
    flat = tensor.view(-1)
    flat[len(flat) // 3 : len(flat) // 3 + 4] = value


def from_another_process(model: nn.Module) -> None:
    """As in Hogwild training: only the memory is shared."""
    context = torch.multiprocessing.get_context("fork")
    weight = _classifier(model).weight.detach()
    child = context.Process(target=lambda: weight[10:20].fill_(3.0))
    child.start()
    child.join()
    assert child.exitcode == 0


def transpose_filters(model: nn.Module) -> None:
    """The same memory, read in another order."""
    conv = model.get_submodule(f"{BLOCK}1.0")
    conv.weight.data = conv.weight.data.transpose(2, 3)


def swap_rows(model: nn.Module) -> None:
    weight = _classifier(model).weight.data
    weight[[3, 40]] = weight[[40, 3]]


def write_raw(model: nn.Module) -> None:
    bias = _classifier(model).bias
    ctypes.c_float.from_address(bias.data_ptr() + 17 * bias.element_size()).value = 9.0


# What moves neither a version counter nor an address, and only few values.
BYTES: dict[str, Callable[[nn.Module], object]] = {
    "data_entry": lambda m: _classifier(m).bias.data[17].add_(10.0),
    "data_rows": lambda m: _classifier(m).weight.data[100:300].zero_(),
    "data_statistics": lambda m: _set_entries(m.features[8][1].running_mean.data, 5.0),
    "data_depthwise": lambda m: _set_entries(m.get_submodule(f"{BLOCK}1.0").weight.data, 2.0),
    "data_excite": lambda m: _set_entries(m.get_submodule(f"{BLOCK}2.fc1").bias.data, -9.0),
    "data_mask": lambda m: _classifier(m).weight.data.mul_(_classifier(m).weight.data.abs() > 0.03),
    "data_signs": lambda m: m.features[8][0].weight.data[7:9].neg_(),
    "data_swapped_rows": swap_rows,
    "data_transposed": transpose_filters,
    "numpy": lambda m: _classifier(m).weight.detach().numpy().__setitem__(slice(400, 700), 0),
    "dlpack": lambda m: torch.from_dlpack(_classifier(m).bias.detach())[30:40].fill_(7.0),
    "address": write_raw,
}
