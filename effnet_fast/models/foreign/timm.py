"""timm's EfficientNet and EfficientNetFeatures, its encoder.

Source: timm/models/efficientnet.py of timm 1.0,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step
from effnet_fast.models.foreign.network import Parts, enter
from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign_code import find
from effnet_fast.modules.readers import timm as readers
from effnet_fast.modules.structure import RefusedError

_MODELS = "timm.models.efficientnet"
_POOL = "timm.layers.adaptive_avgmax_pool:SelectAdaptivePool2d"
_BLOCKS = tuple(
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


def _course(model: Any, names: tuple[str, ...]) -> Course:
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
        pool = table["global_pool"]
        try:
            structure.require(pool, find(_POOL))
        except RefusedError as refused:
            raise RefusedError(f"global_pool{refused}") from None
        if pool._modules.get("pool") is None:
            raise RefusedError("global_pool has no pool")
        containers.append(pool)
        last = _step(model, "conv_head", "bn2")
    elif state.get("feature_hooks") is not None:
        raise RefusedError("its maps are taken by hooks")
    stages = tuple(Stage(f"blocks.{name}", stage) for name, stage in blocks._modules.items())
    return Course(tuple(containers), _step(model, "conv_stem", "bn1"), stages, last)


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
    return Parts(head, (), identity, code, partial(_course, model, _CLASSIFIER))


def _encoder_parts(model: Any, code: stock.Stock) -> Parts:
    taps = tuple(sorted(model._stage_out_idx))
    state = model.__dict__
    identity = (*map(state["_modules"].get, _ENCODER), taps, state.get("feature_hooks"))
    return Parts(None, taps, identity, code, partial(_course, model, _ENCODER))


enter(
    f"{_MODELS}:EfficientNet",
    ("forward_features", "forward_head"),
    _parts,
    _BLOCKS,
    (f"{_POOL}.forward",),
    settings=readers.SETTINGS,
)
enter(f"{_MODELS}:EfficientNetFeatures", (), _encoder_parts, _BLOCKS, settings=readers.SETTINGS)
