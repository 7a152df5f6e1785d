"""NVIDIA's EfficientNet.

Source: PyTorch/Classification/ConvNets/image_classification/models/{efficientnet,common}.py,
https://github.com/NVIDIA/DeepLearningExamples (729963d), which torch.hub has, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step
from effnet_fast.models.foreign.lukemelas import require_off
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign_code import find
from effnet_fast.modules.readers import nvidia as readers
from effnet_fast.modules.structure import RefusedError

_NAMES = "stem", "layers", "features", "classifier"
_TOP = "pooling", "squeeze", "dropout", "fc"


def _step(package: str, table: dict[str, Any], name: str) -> Step:
    sequence = table[name]
    modules = (*getattr(sequence, "_modules", {}).values(),)
    return Step(name, modules, lambda: readers.layer_of(package, name, sequence))


def _required(state: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, Any]:
    table: dict[str, Any] = state["_modules"]
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    if tuple(table) != names:
        raise RefusedError(f"{place} has children {list(table)}")
    return table


def _course(package: str, model: Any) -> Course:
    table = _required(model.__dict__, _NAMES, "it")
    for name, child in table.items():
        try:
            structure.require(child, nn.Sequential)
        except RefusedError as refused:
            raise RefusedError(f"{name}{refused}") from None
    top = _required(table["classifier"].__dict__, _TOP, "classifier")
    try:
        structure.require(top["squeeze"], find(f"{package}.models.common:Flatten"))
    except RefusedError as refused:
        raise RefusedError(f"classifier.squeeze{refused}") from None
    require_off(model, top["dropout"], "classifier.dropout")
    containers = (*table.values(), top["squeeze"], top["dropout"])
    stages = (Stage(f"layers.{name}", m) for name, m in table["layers"]._modules.items())
    stem, last = (_step(package, table, name) for name in ("stem", "features"))
    return Course(containers, stem, tuple(stages), last)


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features."""
    top = model.classifier
    result: Tensor = top.fc(top.dropout(pooled))
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    result: Tensor = model.classifier(model.features(x))
    return result


def _parts(package: str, model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    top = getattr(table.get("classifier"), "_modules", {})
    kept = [*(table.get(name) for name in _NAMES), *(top.get(name) for name in _TOP)]
    head = None
    if None not in kept:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(top["pooling"], True, top["fc"], *runs)
    return Parts(head, (), tuple(kept), code, partial(_course, package, model))


for _package in readers.PACKAGES:
    enter(
        f"{_package}.models.efficientnet:EfficientNet",
        (),
        partial(_parts, _package),
        (f"{_package}.{readers.BLOCK}",),
        (f"{_package}.models.common:Flatten.forward",),
    )
