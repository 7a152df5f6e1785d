"""Hugging Face transformers' EfficientNetModel and EfficientNetForImageClassification.

Their forward returns an object. What is run here is a call with images, and labels, alone: who asks
for hidden states or for a tuple gets the package's own forward, whose blocks are fused.

Source: transformers/models/efficientnet/modeling_efficientnet.py of transformers 5.24,
https://github.com/huggingface/transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.inference.parts import Course, Head, Stage, Step, whole
from effnet_fast.models.execution import on_backend
from effnet_fast.models.foreign import network
from effnet_fast.models.foreign.lukemelas import require_off
from effnet_fast.models.foreign.network import FusedNetwork, Parts, enter
from effnet_fast.models.pooled_head import call_step
from effnet_fast.modules import in_turn, stock, structure
from effnet_fast.modules.foreign import is_fused, own_class
from effnet_fast.modules.foreign_code import find, path_of
from effnet_fast.modules.readers import transformers as readers
from effnet_fast.modules.readers.members import Names
from effnet_fast.modules.structure import RefusedError

_MODELS = "transformers.models.efficientnet.modeling_efficientnet"
_OUTPUTS = "transformers.modeling_outputs"
_CLASSIFIER = f"{_MODELS}:EfficientNetForImageClassification"
_MODEL = f"{_MODELS}:EfficientNetModel"
_ENCODER = f"{_MODELS}:EfficientNetEncoder"
_LAST: Names = ("top_conv", "top_bn", "top_activation")
_AVG_POOL = stock.Stock((nn.AvgPool2d, "__call__ _call_impl forward"), (torch._C._nn, "avg_pool2d"))
structure.SETTINGS[nn.AvgPool2d] = (
    *("kernel_size", "stride", "padding"),
    *("ceil_mode", "divisor_override"),
)


def _is_plain(config: Any) -> bool:
    """Whether a call that says nothing else gives an object without hidden states."""
    return config.return_dict is True and not config.output_hidden_states


class _Named(FusedNetwork):
    """In front of a network whose forward takes images and more."""

    # What forward takes, in order.
    _taken: tuple[str, ...] = ("pixel_values", "output_hidden_states", "return_dict")

    def forward(self: Any, *arguments: Any, **more: Any) -> Any:
        forward: Callable[..., Any] = type(self).own.forward
        taken = type(self)._taken
        if torch.compiler.is_compiling():
            return forward(self, *arguments, **more)
        if forward is type(self).forward_stock and len(arguments) <= len(taken):
            given = dict(zip(taken, arguments, strict=False)) | more
            x, labels = given.pop("pixel_values", None), given.pop("labels", None)
            # Labels alone ask for more than the plain result, and True for what is the default.
            asked = [value for value in given.values() if value is not None]
            is_plain = not asked or (asked == [True] and given.get("return_dict") is True)
            if is_plain and isinstance(x, Tensor) and _is_plain(self.config):
                y = network.run(self, x)
                if y is not None:
                    return y if labels is None else _with_loss(self, y, labels)
        with on_backend(self):
            return forward(self, *arguments, **more)


class _NamedClassifier(_Named):
    """The same with labels."""

    _taken = ("pixel_values", "labels", "output_hidden_states", "return_dict")


def _with_loss(model: Any, output: Any, labels: Tensor) -> Any:
    loss = model.loss_function(labels, output.logits, model.config)
    return type(output)(loss=loss, logits=output.logits)


def _child(parent: Any, name: str, path: str) -> Any:
    """A child of exactly this class, accelerated or not, which hands on and does no more."""
    child = parent.__dict__["_modules"].get(name)
    if child is None or path_of(own_class(type(child))) != path:
        raise RefusedError(f"its {name} is {type(child).__name__}")
    try:
        structure.require(child)
    except RefusedError as refused:
        raise RefusedError(f"{name}{refused}") from None
    return child


def _last_step(encoder: Any) -> Step:
    table = encoder.__dict__["_modules"]
    if missing := [name for name in _LAST if table.get(name) is None]:
        raise RefusedError(f"encoder has no {missing[0]}")
    modules = {name: table[name] for name in _LAST}
    return Step("top_conv", (*modules.values(),), lambda: readers.layer_of(modules, _LAST))


def _model_course(model: Any) -> Course:
    state = model.__dict__
    names = "embeddings", "encoder", "pooler"
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    if not _is_plain(model.config):
        raise RefusedError("its config asks for hidden states or for a tuple")
    encoder = _child(model, "encoder", _ENCODER)
    embeddings, blocks = state["_modules"].get("embeddings"), encoder._modules.get("blocks")
    if embeddings is None or type(blocks) is not nn.ModuleList:
        raise RefusedError("it has no embeddings, or its blocks are no ModuleList")
    stages = (Stage(f"blocks.{name}", block) for name, block in blocks._modules.items())
    stem = whole("embeddings", embeddings)
    return Course((encoder, blocks), stem, tuple(stages), _last_step(encoder))


def _run_last(model: Any, x: Tensor) -> Tensor:
    """The last convolution's map of the last stage's."""
    with on_backend(model) if is_fused(type(model)) else nullcontext():
        walk = in_turn.Walk(x)
        call_step(walk, _last_step(model.encoder))
        return walk.result()


def _present_maps(model: Any, x: Tensor, y: Tensor) -> Any:
    pooled = model.pooler(y)
    kind = find(f"{_OUTPUTS}:BaseModelOutputWithPoolingAndNoAttention")
    return kind(last_hidden_state=y, pooler_output=pooled.reshape(pooled.shape[:2]))


def _model_parts(model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    head, pooler, encoder = None, table.get("pooler"), table.get("encoder")
    if pooler is not None:  # its map is seen: the last convolution runs after the plan
        run = partial(_run_last, model)
        head = Head(pooler, False, pooler, run, run)
    blocks = getattr(encoder, "_modules", {}).get("blocks")
    identity = (table.get("embeddings"), encoder, pooler, blocks, _is_plain(model.config))
    present = partial(_present_maps, model)
    return Parts(head, (), identity, code, partial(_model_course, model), present)


def _course(model: Any) -> Course:
    state = model.__dict__
    names = "efficientnet", "dropout", "classifier"
    if not state.keys().isdisjoint(names):
        raise structure.hidden(state, names)
    inner = _child(model, "efficientnet", _MODEL)
    if not _is_plain(model.config):
        raise RefusedError("its config asks for hidden states or for a tuple")
    dropout = state["_modules"].get("dropout")
    require_off(model, dropout, "dropout")
    found = _model_course(inner)
    return found._replace(containers=(*found.containers, inner, dropout))


def _finish(model: Any, pooled: Tensor) -> Tensor:
    """The logits of pooled features."""
    result: Tensor = model.classifier(model.dropout(pooled))
    return result


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The logits of the last stage's map."""
    inner = model.efficientnet
    pooled = inner.pooler(_run_last(inner, x))
    return _finish(model, pooled.reshape(pooled.shape[:2]))


def _present_logits(x: Tensor, y: Tensor) -> Any:
    return find(f"{_OUTPUTS}:ImageClassifierOutputWithNoAttention")(loss=None, logits=y)


def _parts(model: Any, code: stock.Stock) -> Parts:
    table = model.__dict__["_modules"]
    inner, classifier = table.get("efficientnet"), table.get("classifier")
    inside = getattr(inner, "_modules", {})
    encoder, pooler = inside.get("encoder"), inside.get("pooler")
    head = None
    if pooler is not None and classifier is not None:
        runs = partial(_finish, model), partial(_run_head, model)
        head = Head(pooler, True, classifier, *runs)
    blocks = getattr(encoder, "_modules", {}).get("blocks")
    identity = (
        *(inner, table.get("dropout"), classifier, inside.get("embeddings"), encoder, pooler),
        *(blocks, _is_plain(model.config)),
    )
    return Parts(head, (), identity, code, partial(_course, model), _present_logits)


_BELOW = f"{_MODELS}:EfficientNetEmbeddings", f"{_MODELS}:EfficientNetBlock"
enter(
    _MODEL, (), _model_parts, _BELOW, (f"{_ENCODER}.forward",), front=_Named,
    torch_code=(_AVG_POOL,),
)  # fmt: skip
enter(
    _CLASSIFIER, (), _parts, _BELOW, (f"{_MODEL}.forward", f"{_ENCODER}.forward"),
    front=_NamedClassifier, torch_code=(_AVG_POOL,),
)  # fmt: skip
