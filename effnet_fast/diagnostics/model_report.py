"""What runs a model: which networks and blocks of it run fused, and why the others do not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnet_fast import deployment
from effnet_fast.backends import use_backend
from effnet_fast.inference import own_plan, parts
from effnet_fast.inference.network_spec import spec_of
from effnet_fast.models.backbone import Backbone
from effnet_fast.models.execution import backend_of
from effnet_fast.models.foreign.network import FusedNetwork
from effnet_fast.models.pooled_head import pooled_module
from effnet_fast.modules import foreign, in_turn, structure
from effnet_fast.modules.explain import explain
from effnet_fast.modules.fused_forward import POOLED
from effnet_fast.modules.structure import RefusedError
from effnet_fast.ops.layout import makes_nhwc

ONE_CALL, BLOCKS, STOCK = "one call", "block by block", "stock"
SHOWN = 3  # module names per reason in the printed report


@dataclass(frozen=True)
class Fusion:
    """Whether one block of a model is fused.

    Args:
        name: where the block stands in the model, as in `named_modules()`.
        kind: its class.
        reason: why it runs unfused; None when it is fused.
    """

    name: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class Course:
    """What runs one network of a model, in either mode.

    Args:
        name: where the network stands in the model, "" for the model itself.
        kind: its class.
        eval: in eval mode without gradients: "one call" for the whole network, "block by block",
            or "stock" where no block is fused.
        eval_reason: why eval is not one call; None where it is.
        training: "block by block" or "stock".
        training_reason: why some blocks are not fused there; None where all are.
        deploy_reason: why `effnet_fast.deploy` refuses it in eval mode; None where it takes it.
        wrapped: whether a forward of another's making is set on the instance, as Accelerate's
            `prepare` does for bf16: what is above runs where that calls the network's own.
    """

    name: str
    kind: str
    eval: str
    eval_reason: str | None
    training: str
    training_reason: str | None
    deploy_reason: str | None
    wrapped: bool


def explain_blocks(model: nn.Module) -> list[Fusion]:
    """Which blocks of a model are fused in its present state, and why the others are not.

    A layer inside a fused block is part of it and not listed again.
    """
    found: list[Fusion] = []
    fused: list[str] = []
    networks = (module for module in model.modules() if _runs_fused(module))
    pooled = [pooled_module(network) for network in networks]
    with use_backend(getattr(model, "backend", "auto")):
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in fused)
            if inside or not _is_fusible(type(module)):
                continue
            at_once = any(module is layer for layer in pooled)
            reason = _not_accelerated(type(module))
            if reason is None:
                reason = explain(module, POOLED if at_once else None)
            if reason is None:
                fused.append(name)
            found.append(Fusion(name, type(module).__name__, reason))
    return found


def explain_networks(model: nn.Module) -> list[Course]:
    """What eval and training run of each network in a model.

    For either mode `train` or `eval` is called on the network, and every module's mode put back:
    nobody else may run the model meanwhile. Eval is asked with an image of the weights' dtype on
    their device, under the autocast and the backend that are on.
    """
    return [_course(name, module) for name, module in model.named_modules() if _runs_fused(module)]


def layout_advice(model: nn.Module, blocks: list[Fusion]) -> str | None:
    """What to do where fused blocks convert images around themselves; None where none does.

    Networks and sequences whose forward is this package's hand channels_last from block to block. A
    block under any other root gives its result in the layout that stock gives it.
    """
    modules = dict(model.named_modules())
    sequences = structure.SEQUENCES - {nn.Sequential}
    roots = (n for n, m in modules.items() if _runs_fused(m) or type(m) in sequences)
    within = tuple(f"{name}." if name else "" for name in roots)
    alone = [
        block.name
        for block in blocks
        if block.reason is None
        and not block.name.startswith(within)
        and not makes_nhwc(in_turn.weights_of([modules[block.name]]))
    ]
    if not alone:
        return None
    return (
        f"{len(alone)} blocks stand in a forward of another's making, where each converts "
        "contiguous images: call model.to(memory_format=torch.channels_last), or give images in "
        "that layout"
    )


def _runs_fused(module: nn.Module) -> bool:
    """Whether it is a network whose forward is this package's."""
    return isinstance(module, (Backbone, FusedNetwork))


def _is_fusible(kind: type) -> bool:
    """Whether it is a class of blocks or layers, or derives from one."""
    return any(
        structure.has_reader(base) or (foreign.is_known(base) and not foreign.is_network(base))
        for base in kind.__mro__
    )


def _not_accelerated(kind: type) -> str | None:
    """Why another package's class is its own still; None for any other."""
    if not foreign.is_known(kind) or foreign.is_fused(kind):
        return None
    try:
        foreign.fused_class(kind, "auto", "fast")
    except RefusedError as refused:
        return str(refused)
    return "it is not accelerated: call effnet_fast.accelerate(model)"


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model as train(training) leaves it; it may freeze norms or do more."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if model.training != training:
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _course(name: str, network: Any) -> Course:
    with _in_mode(network, False):
        with torch.no_grad():
            eval_reason = _plan_reason(network)
        eval_course = ONE_CALL if eval_reason is None else _blocks(network)[0]
        deploy_reason = deployment.obstacle(network)
    with _in_mode(network, True), torch.enable_grad():
        training, training_reason = _blocks(network)
    own = network.__dict__.get("forward")
    wrapped = own is not None and not parts.is_own(network, "forward")
    kind = type(network).__name__
    return Course(
        *(name, kind, eval_course, eval_reason, training, training_reason, deploy_reason, wrapped)
    )


def _plan_reason(network: Any) -> str | None:
    """Why the network's own forward does not run in one call; None where it does."""
    weight = next(network.parameters(), None)
    if weight is None or weight.dim() < 2:  # FullyShardedDataParallel has one flat parameter
        return "it has no weights"
    x = torch.empty((1, weight.shape[1], 32, 32), dtype=weight.dtype, device=weight.device)
    if reason := own_plan.obstacle(network, x, backend_of(network)):
        return reason
    try:
        dtype = spec_of(network, observes=True).dtype
    except RefusedError as refused:
        return str(refused)
    return None if own_plan.is_autocast() or dtype is x.dtype else f"its weights are of {dtype}"


def _blocks(network: nn.Module) -> tuple[str, str | None]:
    """How the network runs block by block, and the reasons why not all blocks are fused."""
    reasons = Counter(block.reason for block in explain_blocks(network))
    course = BLOCKS if None in reasons else STOCK
    del reasons[None]
    return course, "; ".join(str(reason) for reason, _ in reasons.most_common(SHOWN)) or None


def lines(blocks: list[Fusion], networks: list[Course], layout: str | None = None) -> list[str]:
    """The report of a model, as it is printed."""
    fused = sum(block.reason is None for block in blocks)
    found = [f"{fused} of {len(blocks)} blocks fused"]
    for reason, count in Counter(b.reason for b in blocks if b.reason).most_common():
        names = [block.name for block in blocks if block.reason == reason]
        more = ", ..." if count > SHOWN else ""
        found.append(f"not fused: {', '.join(names[:SHOWN])}{more} ({count}): {reason}")
    for course in networks:
        found.append(f"{course.name + ': ' if course.name else ''}{course.kind}")
        rows = (
            ("eval", course.eval, course.eval_reason),
            ("training", course.training, course.training_reason),
            ("deploy", "refused" if course.deploy_reason else "taken", course.deploy_reason),
        )
        found += [f"  {mode}: {run}{f': {why}' if why else ''}" for mode, run, why in rows]
        if course.wrapped:
            found.append("  a forward that is set on the instance runs around that")
    if layout:
        found.append(f"layout: {layout}")
    return found
