"""timm's EfficientNet, EfficientNetFeatures, its encoder, and MobileNetV3.

Source: timm/models/efficientnet.py and mobilenetv3.py of timm 1.0,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step, require_sequence
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign_code import find
from effnet_fast.modules.readers import timm as readers
from effnet_fast.modules.structure import RefusedError

_MODELS = "timm.models.efficientnet"
_POOL = "timm.layers.adaptive_avgmax_pool:SelectAdaptivePool2d"
BLOCKS = tuple(
    f"timm.models._efficientnet_blocks:{name}"
    for name in ("DepthwiseSeparableConv", "InvertedResidual", "EdgeResidual", "ConvBnAct")
)
_FLATTENS = {"start_dim": 1, "end_dim": -1}


def _step(model: Any, conv: str, bn: str) -> Step:
    table = model.__dict__["_modules"]
    modules = table[conv], table[bn]
    read = partial(readers.layer_of, dict(zip((conv, bn), modules, strict=True)), conv, bn)
    return Step(conv, modules, read)


def _shows_checkpoints(model: Any, blocks: Any) -> bool:
    """Whether checkpointing changes more than memory.

    A BatchNorm in training counts the batch that runs again, and forward passes by the hooks of
    stages.
    """
    if any(part.training for part in model.modules()):
        return True
    stages = (stage for stage in blocks._modules.values() if stage is not None)
    return any(structure.is_altered(stage.__dict__) for stage in stages)


def course_of(model: Any, names: tuple[str, ...]) -> Course:
    """What forward calls in turn.

    Args:
        names: the children that it calls; with "conv_head" they are a classifier's.

    Raises:
        RefusedError: it is not known, with the reason.
    """
    state = model.__dict__
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    table = state["_modules"]
    if missing := [name for name in names if table.get(name) is None]:
        raise RefusedError(f"it has no {missing[0]}")
    blocks = table["blocks"]
    containers = [blocks]
    try:
        structure.require(blocks, nn.Sequential)
    except RefusedError as refused:
        raise RefusedError(f"blocks{refused}") from None
    if model.grad_checkpointing and _shows_checkpoints(model, blocks):
        raise RefusedError("gradient checkpointing is on")
    last = None
    if "global_pool" in names:
        if type(table["conv_head"]) is nn.Identity:
            raise RefusedError("it has no last convolution")
        containers.append(_pool_of(table))
        if "bn2" in names:
            last = _step(model, "conv_head", "bn2")
    elif state.get("feature_hooks") is not None:
        raise RefusedError("its maps are taken by hooks")
    stages = tuple(Stage(f"blocks.{name}", stage) for name, stage in blocks._modules.items())
    return Course(tuple(containers), _step(model, "conv_stem", "bn1"), stages, last)


def _pool_of(table: dict[str, Any]) -> Any:
    """The pooling, which calls its child `pool` and one that flattens."""
    pool = table["global_pool"]
    try:
        structure.require(pool, find(_POOL))
    except RefusedError as refused:
        raise RefusedError(f"global_pool{refused}") from None
    if pool._modules.get("pool") is None:
        raise RefusedError("global_pool has no pool")
    return pool


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features."""
    if model.drop_rate > 0.0:
        pooled = F.dropout(pooled, p=model.drop_rate, training=model.training)
    result: Tensor = model.classifier(pooled)
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    result: Tensor = model.forward_head(model.bn2(model.conv_head(x)))
    return result


def _flattens(pool: Any) -> bool:
    """Whether a SelectAdaptivePool2d makes [N,C] of what its child `pool` gives, and no more."""
    flatten = pool._modules.get("flatten")
    if type(flatten) is not nn.Flatten or structure.is_altered(flatten.__dict__):
        return False
    return flatten.__dict__.items() >= _FLATTENS.items()


_CLASSIFIER = "conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier"
_ENCODER = "conv_stem", "bn1", "blocks"


def _parts(model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    pool, classifier = table.get("global_pool"), table.get("classifier")
    inner = getattr(pool, "_modules", {}).get("pool")
    flattens = pool is not None and _flattens(pool)
    head = None
    if inner is not None and classifier is not None:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(inner, flattens, classifier, *runs)
    identity = (*map(table.get, _CLASSIFIER), inner, flattens)
    return Parts(head, (), identity, code, partial(course_of, model, _CLASSIFIER))


def _encoder_parts(model: Any, code: stock.Stock) -> Parts:
    taps = tuple(sorted(model._stage_out_idx))
    state = model.__dict__
    identity = (*map(state["_modules"].get, _ENCODER), taps, state.get("feature_hooks"))
    return Parts(None, taps, identity, code, partial(course_of, model, _ENCODER))


# What of MobileNetV3 follows the pooling, in order; releases before 1.0.12 have no norm there.
_MOBILE_HEAD = "conv_head", "norm_head", "act2", "flatten"
_MOBILE = "conv_stem", "bn1", "blocks", "global_pool", "conv_head"


def _last_stage(table: dict[str, Any]) -> Any:
    """The last stage where it is a 1x1 convolution, which the pooling follows; else None."""
    stage = next(reversed(getattr(table.get("blocks"), "_modules", {}).values()), None)
    if type(stage) is not nn.Sequential or len(stage._modules) != 1:
        return None
    (block,) = stage._modules.values()
    return stage if readers.is_pointwise(block) else None


def _mobile_course(model: Any) -> Course:
    course = course_of(model, _MOBILE)
    stage = _last_stage(model.__dict__["_modules"])
    if stage is None:
        return course
    *stages, (place, _, _) = course.stages
    (name,) = stage._modules

    def read() -> structure.Layer:
        require_sequence(stage)
        return readers.pointwise_layer(stage._modules[name])

    containers = (*course.containers, stage)
    return course._replace(
        containers=containers, stages=tuple(stages), last=Step(f"{place}.{name}", (stage,), read)
    )


def _finish_mobile(model: Any, pooled: Tensor) -> Tensor:
    """The result of pooled features [N,C]."""
    x = pooled[:, :, None, None]
    for name in _MOBILE_HEAD:
        if name in model._modules:
            x = model._modules[name](x)
    return _finish(model, x)


def _run_mobile_head(model: Any, x: Tensor) -> Tensor:
    """The result of the map of the last stage before the convolution that is pooled."""
    stage = _last_stage(model.__dict__["_modules"])
    result: Tensor = model.forward_head(x if stage is None else stage(x))
    return result


def _keeps_shape(pool: Any) -> bool:
    """Whether a SelectAdaptivePool2d gives [N,C,1,1], of what its child `pool` gives."""
    flatten = pool._modules.get("flatten")
    return type(flatten) is nn.Identity and not structure.is_altered(flatten.__dict__)


def _mobile_parts(model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    pool, conv = table.get("global_pool"), table.get("conv_head")
    inner = getattr(pool, "_modules", {}).get("pool")
    keeps = pool is not None and _keeps_shape(pool)
    head = None
    if inner is not None and conv is not None:
        runs = partial(_finish_mobile, model), partial(_run_mobile_head, model)
        head = Head(inner, keeps, conv, *runs)  # conv_head, since no classifier follows at once
    identity = (*map(table.get, _MOBILE), inner, keeps, _last_stage(table))
    return Parts(head, (), identity, code, partial(_mobile_course, model))


enter(
    f"{_MODELS}:EfficientNet",
    ("forward_features", "forward_head"),
    _parts,
    BLOCKS,
    (f"{_POOL}.forward",),
    settings=readers.SETTINGS,
)
enter(f"{_MODELS}:EfficientNetFeatures", (), _encoder_parts, BLOCKS, settings=readers.SETTINGS)
enter(
    "timm.models.mobilenetv3:MobileNetV3",
    ("forward_features", "forward_head"),
    _mobile_parts,
    BLOCKS,
    (f"{_POOL}.forward",),
    settings=readers.SETTINGS,
)
