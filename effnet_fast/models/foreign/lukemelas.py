"""efficientnet_pytorch's EfficientNet.

Source: efficientnet_pytorch/model.py of efficientnet_pytorch 0.7.1,
https://github.com/lukemelas/EfficientNet-PyTorch.
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

_PACKAGE = "efficientnet_pytorch"
_NAMES = "_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1", "_avg_pooling", "_swish"
_TOP = "_dropout", "_fc"


def _step(table: dict[str, Any], *names: str) -> Step:
    modules = {name: table[name] for name in (*names, "_swish")}
    return Step(names[0], (*modules.values(),), lambda: layer_reader(_PACKAGE)(modules))


def _stages(model: Any, blocks: Any) -> Iterator[Stage]:
    """The blocks, each with its rate of drop-path, as forward computes it."""
    found = blocks.__dict__["_modules"].values()
    for index, block in enumerate(found):
        rate = model._global_params.drop_connect_rate
        if rate:
            rate *= float(index) / len(found)
        yield Stage(f"_blocks.{index}", block, {"drop_connect_rate": rate})


def _course(model: Any) -> Course:
    state = model.__dict__
    table, names = state["_modules"], (*_NAMES, *_TOP)
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    if missing := [name for name in names if table.get(name) is None]:
        raise RefusedError(f"it has no {missing[0]}")
    if not model._global_params.include_top:
        raise RefusedError("it has no classifier")
    blocks = table["_blocks"]
    if type(blocks) is not nn.ModuleList:
        raise RefusedError(f"_blocks is {type(blocks).__name__}, not ModuleList")
    dropout = table["_dropout"]
    try:
        structure.require(dropout, nn.Dropout)
    except RefusedError as refused:
        raise RefusedError(f"_dropout{refused}") from None
    if dropout.training and dropout.p > 0 and not model.training:
        raise RefusedError("_dropout is in training mode: call eval()")
    stem, last = _step(table, "_conv_stem", "_bn0"), _step(table, "_conv_head", "_bn1")
    return Course((blocks, dropout), stem, tuple(_stages(model, blocks)), last)


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features."""
    result: Tensor = model._fc(model._dropout(pooled))
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    x = model._avg_pooling(model._swish(model._bn1(model._conv_head(x))))
    return _finish(model, x.flatten(start_dim=1))


def _parts(model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    kept = [table.get(name) for name in (*_NAMES, *_TOP)]
    params = model._global_params
    head = None
    if None not in kept:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(table["_avg_pooling"], True, table["_fc"], *runs)
    identity = (*kept, params.include_top, params.drop_connect_rate)
    return Parts(head, (), identity, code, partial(_course, model))


enter(
    f"{_PACKAGE}.model:EfficientNet",
    ("extract_features",),
    _parts,
    (f"{_PACKAGE}.model:MBConvBlock",),
)
