"""`effnet_fast.accelerate`: the fused forward in models of other packages, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

import torch
from torch import nn

from effnet_fast import backends
from effnet_fast.deployment import DeployedEfficientNet
from effnet_fast.models import foreign as networks  # noqa: F401  (enters their recipes)
from effnet_fast.models.backbone import Backbone, check_memory
from effnet_fast.modules import foreign, structure
from effnet_fast.modules.structure import RefusedError

FAMILIES = (
    "torchvision's and timm's EfficientNet (timm's MobileNetV3 and MnasNet, too)",
    "efficientnet_pytorch, efficientnet_lite_pytorch, segmentation_models_pytorch's own encoders",
    "transformers' EfficientNet, MONAI's in two dimensions and NVIDIA's",
)
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto", memory: str = "fast") -> Model:
    """Gives the blocks of other packages in a model a forward that fuses, in place.

    The class of each block that is recognised becomes a subclass of its own. Parameters, buffers,
    names, children and hooks stay, so does what an optimizer or a wrapper holds of them; the
    numbers are the same up to rounding. What a block is is read anew at each call: where something
    in it is no longer what its package made, it runs as the package runs it. Copies stay
    accelerated. A pickle holds the package's own classes: call this again after loading one.

    Args:
        model: a model of torchvision, timm, efficientnet_pytorch, efficientnet_lite_pytorch,
            segmentation_models_pytorch, transformers, MONAI or NVIDIA, or anything that has one
            inside.
        backend, memory: as in `EfficientNet`, of all that is accelerated.

    Returns:
        the model itself. `doctor(model)` tells what is fused, and why the rest is not.

    Raises:
        TypeError: model is no nn.Module, or a ScriptModule or deployed network, which have no
            modules to speak of.
        ValueError: no block in it is of a family that is known, or another backend or memory.
        RuntimeError: it is compiled: accelerate it before torch.compile.

    Warns:
        UserWarning: some classes are of a version whose code is not known, or FSDP2's fully_shard
            has changed them already, and stay as they are.
    """
    _check(model)
    backends.parse(backend)
    check_memory(memory)
    found = [module for module in model.modules() if foreign.is_known(type(module))]
    own = [module for module in model.modules() if isinstance(module, Backbone)]
    refused = _sharded(model)
    if not found and not own and not refused:
        raise ValueError(
            f"{type(model).__name__} has no block that can be accelerated: there are readers for "
            f"{'; '.join(FAMILIES)}"
        )
    for module in found:
        try:
            module.__class__ = foreign.fused_class(foreign.own_class(type(module)), backend, memory)
        except RefusedError as reason:
            refused[str(reason)] += 1
            continue
        for child, kind in foreign.inner_classes(module):
            child.__class__ = kind
    for network in own:
        network.backend, network.memory = backend, memory
    if refused:
        reasons = "; ".join(f"{reason} ({count} modules)" for reason, count in refused.items())
        warnings.warn(f"some blocks stay as they are: {reasons}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every module has its package's own class again.

    Returns:
        the model itself.

    Raises:
        TypeError: model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if foreign.is_fused(type(module)):
            module.__class__ = foreign.own_class(type(module))
    return model


def _sharded(model: nn.Module) -> Counter[str]:
    """Why blocks stay as they are whose class FSDP2 has changed already, and how many do."""
    kinds = (structure.unsharded(type(module)) for module in model.modules())
    return Counter(
        f"{kind.__name__} is sharded by fully_shard already: accelerate the model before that"
        for kind in kinds
        if kind is not None and foreign.is_known(kind) and not foreign.is_fused(kind)
    )


def _check(model: nn.Module) -> None:
    """Raises for what has no modules whose class could change."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule: accelerate the model that it was made of")
    if isinstance(model, DeployedEfficientNet):
        raise TypeError("model is deployed already: accelerate the model that it was made of")
    for name, module in model.named_modules():
        # The class of torch.compile's result, without the seconds that importing Dynamo takes.
        is_result = type(module).__module__.startswith("torch._dynamo.")
        if is_result or module.__dict__.get("_compiled_call_impl") is not None:
            where = f"its {name}" if name else "it"
            raise RuntimeError(f"{where} is compiled: accelerate the model before torch.compile")
