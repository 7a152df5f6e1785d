"""MONAI's EfficientNetBN and EfficientNetBNFeatures, its encoder, in two dimensions.

Source: monai/networks/nets/efficientnet.py of MONAI 1.6, https://github.com/Project-MONAI/MONAI.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step
from effnet_fast.models.foreign.lukemelas import require_off
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock, structure
from effnet_fast.modules.readers import monai as readers
from effnet_fast.modules.readers.members import Names
from effnet_fast.modules.structure import RefusedError

_MODELS = "monai.networks.nets.efficientnet"
_STEM: Names = ("_conv_stem", "_conv_stem_padding", "_bn0")
_LAST: Names = ("_conv_head", "_conv_head_padding", "_bn1")
_ENCODER = *_STEM, "_swish", "_blocks"
_CLASSIFIER = *_ENCODER, *_LAST, "_avg_pooling", "_dropout", "_fc"


def _step(table: dict[str, Any], names: Names) -> Step:
    modules = {name: table[name] for name in (*names, "_swish")}
    conv, pad, *rest = modules.values()
    return Step(names[0], (pad, conv, *rest), lambda: readers.layer_of(modules, names))


def _course(model: Any, names: tuple[str, ...]) -> Course:
    state = model.__dict__
    table = state["_modules"]
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    if missing := [name for name in names if table.get(name) is None]:
        raise RefusedError(f"it has no {missing[0]}")
    blocks = table["_blocks"]
    try:
        structure.require(blocks, nn.Sequential)
    except RefusedError as refused:
        raise RefusedError(f"_blocks{refused}") from None
    containers, last = [blocks], None
    if "_fc" in names:
        require_off(model, table["_dropout"], "_dropout")
        containers.append(table["_dropout"])
        last = _step(table, _LAST)
    stages = tuple(Stage(f"_blocks.{name}", stage) for name, stage in blocks._modules.items())
    return Course(tuple(containers), _step(table, _STEM), stages, last)


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features."""
    result: Tensor = model._fc(model._dropout(pooled))
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    x = model._swish(model._bn1(model._conv_head(model._conv_head_padding(x))))
    return _finish(model, model._avg_pooling(x).flatten(start_dim=1))


def _parts(model: Any, code: stock.Stock) -> Parts:
    kept = [model.__dict__["_modules"].get(name) for name in _CLASSIFIER]
    head = None
    if None not in kept:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(model._avg_pooling, True, model._fc, *runs)
    return Parts(head, (), tuple(kept), code, partial(_course, model, _CLASSIFIER))


def _encoder_parts(model: Any, code: stock.Stock) -> Parts:
    kept = [model.__dict__["_modules"].get(name) for name in _ENCODER]
    taps = tuple(range(len(getattr(model._blocks, "_modules", ())) + 1))
    taps = tuple(tap for tap in taps if tap in model.extract_stacks)
    return Parts(None, taps, (*kept, taps), code, partial(_course, model, _ENCODER))


for _name, _make in (
    ("EfficientNetBN", _parts),
    ("EfficientNetBNFeatures", _encoder_parts),
    ("EfficientNetEncoder", _encoder_parts),
):
    enter(f"{_MODELS}:{_name}", (), _make, (f"{_MODELS}:MBConvBlock",))
