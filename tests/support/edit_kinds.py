"""What users do to a model between two calls: the kinds of edit that `drawn_edits` draws from.

A kind takes a `Session` and changes its model, the code that the model runs, or what the call runs
under. Where and by how much is drawn. What reaches beyond the model registers its undoing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import types
import warnings
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import effnet_fast
import surgery
from edit_session import Kind, Session
from edit_weights import WEIGHT_KINDS
from effnet_fast.modules import layers, same_padding, stochastic_depth


def _set(attribute: str, kinds: tuple[type, ...], *values: object) -> Kind:
    def edit(s: Session) -> None:
        setattr(s.one(*kinds), attribute, s.draw.choice(values))

    return edit


def _patched(name: str, kinds: tuple[type, ...]) -> Kind:
    """A method set on an instance."""

    def edit(s: Session) -> None:
        module, factor = s.one(*kinds), s.factor()
        original = getattr(module, name)
        way = s.draw.choice((setattr, lambda m, n, v: m.__dict__.update({n: v})))

        def patched(*args: Any) -> Any:
            y = original(*args)
            return y * factor if isinstance(y, Tensor) else y

        way(module, name, patched)

    return edit


def _check_nothing(s: Session) -> None:
    s.one(nn.BatchNorm2d)._check_input_dim = lambda x: x.mul_(1.5)


def _scaled(original: Any, factor: float) -> Any:
    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        y = original(*args, **kwargs)
        return y * factor if isinstance(y, Tensor) else y

    return patched


CLASSES: tuple[tuple[type, str], ...] = (
    *((kind, name)
      for kind in (nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.Sigmoid, nn.AdaptiveAvgPool2d, nn.Linear,
                   nn.Dropout, nn.Sequential, layers.Conv2dNormActivation, layers.MBConv,
                   layers.SqueezeExcitation, stochastic_depth.StochasticDepth,
                   same_padding.Conv2dSame, effnet_fast.EfficientNet)
      for name in ("forward", "__call__")),
    (nn.Conv2d, "_conv_forward"), (layers.SqueezeExcitation, "gate"), (nn.Module, "_call_impl"),
    (layers.MBConv, "forward_stock"), (layers.Conv2dNormActivation, "forward_stock"),
    (effnet_fast.EfficientNet, "forward_head"), (effnet_fast.EfficientNet, "forward_features"),
)  # fmt: skip
FUNCTIONS: tuple[tuple[Any, str], ...] = (
    *((F, name) for name in ("conv2d", "batch_norm", "silu", "adaptive_avg_pool2d", "linear", "pad",
                             "dropout")),
    *((torch, name) for name in ("batch_norm", "sigmoid", "flatten", "mm", "bmm")),
    *((torch._C._nn, name) for name in ("silu", "silu_", "adaptive_avg_pool2d")),
    (torch.Tensor, "__mul__"), (torch.Tensor, "__iadd__"),
    (stochastic_depth, "stochastic_depth"), (same_padding, "same_padding"),
)  # fmt: skip


def patch_class(s: Session) -> None:
    kind, name = s.draw.choice(CLASSES)
    s.patch(kind, name, _scaled(getattr(kind, name), s.factor()))


def patch_function(s: Session) -> None:
    owner, name = s.draw.choice(FUNCTIONS)
    if name in ("__mul__", "__iadd__"):  # _scaled multiplies itself
        original = getattr(owner, name)
        s.patch(owner, name, lambda a, b: original(a, b).neg())
    else:
        s.patch(owner, name, _scaled(getattr(owner, name), s.factor()))


class Scaling(TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y * 1.5 if func is F.conv2d else y


class ScalingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y * 1.5 if func is torch.ops.aten.convolution.default else y


def mode(s: Session) -> None:
    s.stack.enter_context(s.draw.choice((Scaling, ScalingBelow))())


def harmless_mode(s: Session) -> None:
    makers = (lambda: FlopCounterMode(display=False), lambda: torch.device("cpu"))
    s.stack.enter_context(s.draw.choice(makers)())


def hook(s: Session) -> None:
    module, factor = s.one(nn.Module), s.factor()

    def forward(m: nn.Module, args: Any, y: Any) -> Any:
        return y * factor if isinstance(y, Tensor) else None

    def before(m: nn.Module, args: Any) -> Any:
        return tuple(a * factor if isinstance(a, Tensor) else a for a in args)

    roads = (
        lambda: module.register_forward_hook(forward),
        lambda: module.register_forward_pre_hook(before),
        lambda: module.register_full_backward_hook(lambda m, g, _: None),
        lambda: setattr(module, "_forward_hooks", OrderedDict({1: forward})),
        lambda: module.__dict__.update(_forward_pre_hooks=OrderedDict({1: before})),
    )
    handle = s.draw.choice(roads)()
    if handle is not None and s.draw.random() < 0.3:
        handle.remove()


def global_hook(s: Session) -> None:
    handle = nn_module.register_module_forward_hook(
        lambda m, args, y: y * 1.01 if isinstance(m, nn.SiLU) else None
    )
    s.stack.callback(handle.remove)


def replace_child(s: Session) -> None:
    layer = s.layer()
    roads = (
        lambda: surgery.set_item(layer, -1, nn.ReLU()),
        lambda: surgery.set_item(layer, 1, nn.Identity()),
        lambda: surgery.set_item(layer, 1, nn.GroupNorm(1, layer[0].out_channels)),
        lambda: surgery.set_item(layer, 0, surgery.like(layer[0])),
        lambda: surgery.set_item(layer, 0, surgery.like(layer[0], surgery.DoubledConv)),
        lambda: surgery.set_item(layer, 0, surgery.LowRankUpdate(layer[0])),
        lambda: layer.append(nn.Hardtanh()),
        lambda: layer._modules.__setitem__("1", copy.deepcopy(layer[1]).requires_grad_(False)),
        lambda: setattr(layer, "_modules", dict(reversed(layer._modules.items()))),
        lambda: surgery.fuse_in_eval(layer),
    )
    s.draw.choice(roads)()


def rearrange(s: Session) -> None:
    stage = s.draw.choice([m for m in s.model.features if isinstance(m, nn.Sequential)])
    last = stage[-1]
    roads = (
        lambda: stage.append(last),  # the same block twice
        lambda: stage.append(copy.deepcopy(last)),
        lambda: stage.append(nn.Identity()),
        lambda: stage.pop(-1) if len(stage) > 1 else None,
        lambda: setattr(stage, "_modules", {**stage._modules, "again": last}),
        lambda: s.model._modules.__setitem__("features", nn.Sequential(*s.model.features)),
        lambda: s.model.features.insert(1, nn.Identity()),
    )
    s.draw.choice(roads)()


def head(s: Session) -> None:
    model = s.model
    if not isinstance(model, effnet_fast.EfficientNet):
        return
    roads = (
        lambda: model.reset_classifier(3),
        lambda: model.reset_classifier(4, "catavgmax"),
        lambda: setattr(model, "classifier", nn.Identity()),
        lambda: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(1)),
        lambda: model.classifier.insert(1, nn.Linear(model.num_features, model.num_features)),
        lambda: setattr(model, "forward_head", lambda x: x.mean((2, 3))),
        lambda: model.classifier[0].train(),
    )
    s.draw.choice(roads)()
    model.train(model.training)


def parametrization(s: Session) -> None:
    conv = s.one(nn.Conv2d)
    roads = (
        lambda: parametrize.register_parametrization(conv, "weight", surgery.Damped()),
        lambda: parametrizations.weight_norm(conv),
        lambda: surgery.legacy_weight_norm(conv),
        lambda: prune.l1_unstructured(conv, "weight", 0.3),
        lambda: surgery.quantization_aware(s.layer()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s.draw.choice(roads)()


def precision(s: Session) -> None:
    dtype = s.draw.choice((torch.bfloat16, torch.float64, torch.float16))
    s.draw.choice((s.model, s.one(nn.Module))).to(dtype)


def device(s: Session) -> None:
    s.one(nn.Module).to("meta")


def freeze(s: Session) -> None:
    if s.draw.random() < 0.3:
        s.model.unfreeze()
    else:
        s.model.freeze(s.draw.choice((None, 1)), bn=s.draw.random() < 0.5)


def copied(s: Session) -> None:
    if "forward" in s.model.__dict__:
        return
    if s.draw.random() < 0.7:
        s.model = copy.deepcopy(s.model)
    else:
        with contextlib.suppress(AttributeError, pickle.PicklingError, TypeError):
            file = io.BytesIO(pickle.dumps(s.model))
            s.model = pickle.load(file)


def change_class(s: Session) -> None:
    kinds = {nn.Conv2d: surgery.DoubledConv, nn.BatchNorm2d: surgery.ShiftedNorm,
             nn.SiLU: surgery.SteepSiLU, nn.Sequential: surgery.Reversed}  # fmt: skip
    module = s.one(*kinds)
    if type(module) in kinds:
        module.__class__ = kinds[type(module)]


def statistics(s: Session) -> None:
    norm = s.one(nn.BatchNorm2d)
    roads = (
        lambda: setattr(norm, "track_running_stats", False),
        lambda: (setattr(norm, "running_mean", None), setattr(norm, "running_var", None)),
        lambda: setattr(norm, "weight", None),
        norm.train,
    )
    s.draw.choice(roads)()


def subclass(s: Session) -> None:
    """A parameter that is a tensor of a class of its own."""
    module, name = s.parameter()
    value = getattr(module, name).detach()
    module._parameters[name] = nn.Parameter(value).as_subclass(_Tensor)


class _Tensor(torch.Tensor):
    pass


def wrapped_forward(s: Session) -> None:
    """As Accelerate's prepare, and what its unwrap_model leaves."""
    model = s.model
    function = model.forward.__func__ if hasattr(model.forward, "__func__") else None
    if function is not None:
        wrapper = function if s.draw.random() < 0.5 else _scaled(function, 1.5)
        model.forward = types.MethodType(wrapper, model)


def switch(s: Session) -> None:
    roads = (
        lambda: setattr(s.model, "plan", not s.model.plan),
        lambda: setattr(s.model, "memory", s.draw.choice(("lean", "fast"))),
        lambda: s.model.set_grad_checkpointing(s.draw.random() < 0.5),
        lambda: s.model.to(memory_format=torch.channels_last),
        lambda: s.model.requires_grad_(s.draw.random() < 0.5),
        lambda: s.one(nn.Module).requires_grad_(False),
        lambda: s.model.apply(lambda m: None),
        lambda: s.model.share_memory(),
    )
    s.draw.choice(roads)()


KINDS: dict[str, Kind] = {
    **WEIGHT_KINDS,
    "eps": _set("eps", (nn.BatchNorm2d,), 1e-2, 0.5),
    "momentum": _set("momentum", (nn.BatchNorm2d,), 0.3, None),
    "stride": _set("stride", (nn.Conv2d,), (1, 1), (2, 2)),
    "padding": _set("padding", (nn.Conv2d,), (0, 0), (1, 1), (2, 2), "same"),
    "padding_mode": _set("padding_mode", (nn.Conv2d,), "circular"),
    "dilation": _set("dilation", (nn.Conv2d,), (2, 2)),
    "residual": _set("use_res_connect", (layers.MBConv,), True, False),
    "inplace": _set("inplace", (nn.SiLU,), True, False),
    "output_size": _set("output_size", (nn.AdaptiveAvgPool2d,), (1, 1), 2),
    "probability": _set("p", (stochastic_depth.StochasticDepth, nn.Dropout), 0.0, 0.4),
    "mode_of_part": lambda s: s.one(nn.Module).train(s.draw.random() < 0.5),
    "mode_of_model": lambda s: s.model.train(s.draw.random() < 0.3),
    "statistics": statistics,
    "instance_forward": _patched("forward", (nn.Module,)),
    "instance_conv_forward": _patched("_conv_forward", (nn.Conv2d,)),
    "instance_check": _check_nothing,
    "instance_gate": _patched("gate", (layers.SqueezeExcitation,)),
    "instance_stock": _patched("forward_stock", (layers.MBConv, layers.Conv2dNormActivation)),
    "instance_call": _patched("_call_impl", (nn.Module,)),
    "wrapped_forward": wrapped_forward,
    "class": patch_class,
    "function": patch_function,
    "mode": mode,
    "harmless_mode": harmless_mode,
    "hook": hook,
    "global_hook": global_hook,
    "child": replace_child,
    "rearranged": rearrange,
    "head": head,
    "change_class": change_class,
    "subclass": subclass,
    "parametrization": parametrization,
    "precision": precision,
    "device": device,
    "freeze": freeze,
    "copy": copied,
    "switch": switch,
    "autocast": lambda s: setattr(s, "autocast", not s.autocast),
}
