"""efficientnet_pytorch's EfficientNet, and that of efficientnet_lite_pytorch, a copy of it.

Sources: efficientnet_pytorch/model.py of efficientnet_pytorch 0.7.1,
https://github.com/lukemelas/EfficientNet-PyTorch; efficientnet_lite_pytorch/model.py of
efficientnet_lite_pytorch 0.1.0, https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock, structure
from effnet_fast.modules.readers.lukemelas import layer_reader
from effnet_fast.modules.structure import RefusedError

_NAMES = "_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1", "_avg_pooling", "_swish"
_TOP = "_dropout", "_fc"


def step(package: str, table: dict[str, Any], *names: str) -> Step:
    """A convolution and a norm of these names, and the activation."""
    modules = {name: table[name] for name in (*names, "_swish")}
    return Step(names[0], (*modules.values(),), lambda: layer_reader(package)(modules))


def required(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The children of a network with this `__dict__`.

    Raises:
        RefusedError: one of these is missing, or hidden by an attribute.
    """
    table: dict[str, Any] = state["_modules"]
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    if missing := [name for name in names if table.get(name) is None]:
        raise RefusedError(f"it has no {missing[0]}")
    blocks = table["_blocks"]
    if type(blocks) is not nn.ModuleList:
        raise RefusedError(f"_blocks is {type(blocks).__name__}, not ModuleList")
    return table


def require_off(model: Any, dropout: Any, name: str) -> None:
    """Raises RefusedError for a dropout that drops while the network infers."""
    try:
        structure.require(dropout, nn.Dropout)
    except RefusedError as refused:
        raise RefusedError(f"{name}{refused}") from None
    if dropout.training and dropout.p > 0 and not model.training:
        raise RefusedError(f"{name} is in training mode: call eval()")


def _stages(model: Any, blocks: Any) -> Iterator[Stage]:
    """The blocks, each with its rate of drop-path, as forward computes it."""
    found = blocks.__dict__["_modules"].values()
    for index, block in enumerate(found):
        rate = model._global_params.drop_connect_rate
        if rate:
            rate *= float(index) / len(found)
        yield Stage(f"_blocks.{index}", block, {"drop_connect_rate": rate})


def _course(package: str, model: Any) -> Course:
    table = required(model.__dict__, (*_NAMES, *_TOP))
    # A setting of the one package, and one of the other.
    if not getattr(model._global_params, "include_top", True):
        raise RefusedError("it has no classifier")
    if getattr(model._global_params, "local_pooling", False):
        raise RefusedError("it prints how it pools")
    blocks, dropout = table["_blocks"], table["_dropout"]
    require_off(model, dropout, "_dropout")
    stem, last = (
        step(package, table, *names) for names in (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    )
    return Course((blocks, dropout), stem, tuple(_stages(model, blocks)), last)


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features."""
    result: Tensor = model._fc(model._dropout(pooled))
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    x = model._avg_pooling(model._swish(model._bn1(model._conv_head(x))))
    return _finish(model, x.flatten(start_dim=1))


def _parts(package: str, model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    kept = [table.get(name) for name in (*_NAMES, *_TOP)]
    params = model._global_params
    head = None
    if None not in kept:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(table["_avg_pooling"], True, table["_fc"], *runs)
    return Parts(head, (), (*kept, params), code, partial(_course, package, model))


for _package in ("efficientnet_pytorch", "efficientnet_lite_pytorch"):
    enter(
        f"{_package}.model:EfficientNet",
        ("extract_features",),
        partial(_parts, _package),
        (f"{_package}.model:MBConvBlock",),
    )
