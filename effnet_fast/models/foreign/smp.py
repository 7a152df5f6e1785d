"""segmentation_models_pytorch's own encoders, which give the images before their maps.

Its "efficientnet-b0" to "b7" are a copy of efficientnet_pytorch's network, "timm-efficientnet-..."
timm's. (Its "tu-" encoders hold timm's network itself.)

Source: encoders/efficientnet.py, _efficientnet.py and timm_efficientnet.py of
segmentation_models_pytorch 0.6, https://github.com/qubvel-org/segmentation_models.pytorch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from effnet_fast.inference.parts import Course, Stage
from effnet_fast.models.foreign import timm
from effnet_fast.models.foreign.lukemelas import required, step
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock
from effnet_fast.modules.readers import timm as timm_readers
from effnet_fast.modules.structure import RefusedError

_PACKAGE = "segmentation_models_pytorch"
_ENCODERS = f"{_PACKAGE}.encoders"
_NAMES = "_conv_stem", "_bn0", "_blocks", "_swish"
_TIMM_NAMES = "conv_stem", "bn1", "blocks"
# How many stages of timm's network run by the encoder's depth, and whose maps it gives.
_TIMM_TAPS = 0, 2, 3, 5, 7


def _behind(x: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """What forward returns."""
    return [x, *maps]


def _ends(model: Any) -> list[int]:
    """The blocks, counted from 1, whose maps forward keeps at first."""
    return [index + 1 for index in range(len(model._blocks)) if index in model._out_indexes]


def _course(model: Any) -> Course:
    table = required(model.__dict__, _NAMES)
    blocks, rate = table["_blocks"], model._drop_connect_rate
    count = len(blocks)
    # Forward ends behind one map more than it gives, and runs all blocks where there is none.
    ends, depth = _ends(model), model._depth
    if depth < 1:
        raise RefusedError(f"its depth is {depth}")
    last = ends[depth - 1] if len(ends) >= depth else count
    stages = [
        Stage(f"_blocks.{index}", block, {"drop_connect_rate": rate * index / count})
        for index, block in enumerate(blocks.__dict__["_modules"].values())
    ]
    return Course(
        (blocks,), step(_PACKAGE, table, "_conv_stem", "_bn0"), tuple(stages[:last]), None
    )


def _parts(model: Any, code: stock.Stock) -> Parts:
    modules = model.__dict__["_modules"]
    ends = [] if modules.get("_blocks") is None else _ends(model)
    taps = (0, *ends[: max(model._depth - 1, 0)])
    settings = tuple(ends), model._depth, model._drop_connect_rate
    identity = (*map(modules.get, _NAMES), *settings)
    return Parts(None, taps, identity, code, partial(_course, model), _behind)


def _timm_course(model: Any) -> Course:
    course = timm.course_of(model, _TIMM_NAMES)
    depth = model._depth
    if depth < 2:
        raise RefusedError("it has no stage")
    last = _TIMM_TAPS[depth - 1]
    if len(course.stages) < last:
        raise RefusedError(f"it has {len(course.stages)} stages, not {last}")
    return course._replace(stages=course.stages[:last])


def _timm_parts(model: Any, code: stock.Stock) -> Parts:
    modules, depth = model.__dict__["_modules"], model._depth
    identity = (*map(modules.get, _TIMM_NAMES), depth)
    course = partial(_timm_course, model)
    return Parts(None, _TIMM_TAPS[:depth], identity, code, course, _behind)


enter(
    f"{_ENCODERS}.efficientnet:EfficientNetEncoder",
    (),
    _parts,
    (f"{_ENCODERS}._efficientnet:MBConvBlock",),
)
for _name in ("EfficientNetEncoder", "EfficientNetLiteEncoder"):
    enter(
        f"{_ENCODERS}.timm_efficientnet:{_name}",
        (),
        _timm_parts,
        timm.BLOCKS,
        settings=timm_readers.SETTINGS,
    )
