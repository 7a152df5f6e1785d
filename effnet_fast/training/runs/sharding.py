"""Whole state dicts of networks and optimizers, sharded ones among them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module, is_sharded: bool) -> dict[str, Any]:
    """The state dict of a network; all processes must ask for a sharded one's."""
    if not is_sharded:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_options())


def load_model(model: nn.Module, state: dict[str, Any], is_sharded: bool) -> None:
    """Loads a `model_state`."""
    if not is_sharded:
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, state, options=_options())


def optimizer_state(model: nn.Module, optimizer: Optimizer, is_sharded: bool) -> dict[str, Any]:
    """The state dict of the optimizer of a network."""
    if not is_sharded:
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_options())


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, state: dict[str, Any], is_sharded: bool
) -> None:
    """Loads an `optimizer_state`."""
    if not is_sharded:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=_options())
