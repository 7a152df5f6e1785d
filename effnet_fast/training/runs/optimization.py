"""Optimizers, learning rates over a run, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from effnet_fast.training.runs.recipe import Recipe

# Of each optimizer: the class, its arguments that recipes name, and whether PyTorch has one kernel
# for a whole step of it on CPUs, too.
Row = tuple[Callable[..., Optimizer], dict[str, str], bool]


class RMSpropTF(Optimizer):
    """RMSProp as TensorFlow 1 has it, with which EfficientNet was trained.

    Unlike torch.optim.RMSprop it adds epsilon inside the root, begins with a mean of squares of 1,
    and multiplies the rate into the momentum:

        square = alpha square + (1 - alpha) grad^2
        velocity = momentum velocity + lr grad / sqrt(square + eps)
        weight = weight - velocity

    Weight decay is added to the gradient.

    Args:
        params: parameters, or groups of them.
        lr, alpha, eps, momentum, weight_decay: as above.

    Raises:
        ValueError: a negative number.

    Source: https://www.tensorflow.org/api_docs/python/tf/compat/v1/train/RMSPropOptimizer, and
    Tan & Le (arXiv 1905.11946), section 5.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.016,
        *,
        alpha: float = 0.9,
        eps: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        for name, value in defaults.items():
            if not value >= 0.0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        super().__init__(params, defaults)

    @torch.no_grad()
    # PyTorch declares two overloads of it, one per kind of closure.
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [cast(Tensor, p.grad) for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"square": torch.ones_like(p), "velocity": torch.zeros_like(p)}
        squares = [self.state[p]["square"] for p in params]
        velocities = [self.state[p]["velocity"] for p in params]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, grads, grads, value=1.0 - group["alpha"])
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_addcdiv_(velocities, grads, roots, value=group["lr"])
        torch._foreach_sub_(params, velocities)


# Arguments of the optimizer by the fields of a recipe that give them.
_EPS = {"eps": "epsilon"}
TABLE: dict[str, Row] = {
    "sgd": (torch.optim.SGD, {"momentum": "momentum"}, True),
    "rmsprop_tf": (RMSpropTF, {"momentum": "momentum", "alpha": "alpha", **_EPS}, False),
    "adamw": (torch.optim.AdamW, _EPS, True),
    "adam": (torch.optim.Adam, _EPS, True),
    "nadam": (torch.optim.NAdam, _EPS, False),
    "radam": (torch.optim.RAdam, _EPS, False),
    "adamax": (torch.optim.Adamax, _EPS, False),
    "adagrad": (torch.optim.Adagrad, _EPS, True),
    "adadelta": (torch.optim.Adadelta, _EPS, False),
    "asgd": (torch.optim.ASGD, {}, False),
    "rmsprop": (
        torch.optim.RMSprop,
        {"momentum": "momentum", "alpha": "alpha", **_EPS},
        False,
    ),
}


def make_optimizer(
    model: Any, recipe: Recipe, images: int, *, is_sharded: bool = False
) -> Optimizer:
    """The recipe's optimizer over the parameters of `model` that are trained.

    Args:
        model: an `EfficientNet`.
        recipe: names the optimizer and its numbers.
        images: per step, of all processes together; the rate may be scaled to them.
        is_sharded: whether parameters will be spread over processes, which no whole-step kernel
            takes.

    Raises:
        ValueError: nothing is left to train.
    """
    make, names, has_kernel = TABLE[recipe.optimizer]
    groups = model.param_groups(
        recipe.scaled_rate(images), recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    if recipe.layer_decay == 1.0:
        groups = _joined(groups)
    if not groups:
        raise ValueError("all parameters are frozen: nothing is left to train")
    options = {key: getattr(recipe, field) for key, field in names.items()}
    options = {key: value for key, value in options.items() if value is not None}
    if recipe.optimizer == "sgd" and recipe.momentum:
        options["nesterov"] = True
    if has_kernel and not is_sharded:
        options["fused"] = True
    return make(groups, lr=recipe.scaled_rate(images), **options)


def _joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of equal numbers as one: a step over many small groups costs more."""
    joined: dict[float, dict[str, Any]] = {}
    for group in groups:
        name = "decay" if group["weight_decay"] else "no_decay"
        same = joined.setdefault(group["weight_decay"], {**group, "params": [], "name": name})
        same["params"].extend(group["params"])
    return list(joined.values())


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What the learning rate of a step is multiplied by.

    Args:
        step: number of steps before this one.
        steps_per_epoch: of the optimizer.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "exponential":
        return recipe.decay_rate ** math.floor(step / steps_per_epoch / recipe.decay_epochs)
    if recipe.schedule == "constant":
        return 1.0
    rest = max(1, recipe.epochs * steps_per_epoch - warmup)
    share = min(1.0, (step - warmup) / rest)
    return recipe.final_rate + (1.0 - recipe.final_rate) * 0.5 * (1.0 + math.cos(math.pi * share))


def make_schedule(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LambdaLR:
    """The learning rate of every step; call its `step()` after the optimizer's."""
    return LambdaLR(optimizer, lambda step: rate_factor(recipe, step, steps_per_epoch))


def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; buffers are whole, and no list may mix both."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class MovingAverage:
    """The exponential moving average of a network's weights and statistics.

    Source: Tan & Le (arXiv 1905.11946), section 5; the decay of the first steps is that of
    tf.train.ExponentialMovingAverage with num_updates.

    Args:
        model: the network, of which a copy is made.
        decay: at most; step i has min(decay, (1 + i) / (10 + i)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.averaged = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.averaged.module

    def update(self, model: nn.Module) -> None:
        """Takes in the weights after a step."""
        self.steps += 1
        self.averaged.update_parameters(model)

    @torch.no_grad()
    def _average(self, averages: Iterable[Tensor], values: Iterable[Tensor], _: Any) -> None:
        averages, values = [*map(local, averages)], [*map(local, values)]
        if averages[0].is_floating_point():
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(averages, values, 1.0 - decay)
        else:  # counts of batches are no averages
            torch._foreach_copy_(averages, values)

    def counters(self) -> dict[str, int]:
        """What continues beside the weights."""
        return {"steps": self.steps, "averaged": int(self.averaged.n_averaged)}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Continues from `counters`."""
        self.steps = counters["steps"]
        self.averaged.n_averaged.fill_(counters["averaged"])
