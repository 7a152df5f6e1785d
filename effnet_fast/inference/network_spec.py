"""A network as the inference kernels run it, or the reason why they cannot.

As `modules.structure`, one level up: the children are read anew, and what the kernels do not know
exactly is refused with its place and the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.backends.base import PLAIN
from effnet_fast.inference import parts
from effnet_fast.inference.parts import InferenceParts, Stage, Step
from effnet_fast.modules import structure
from effnet_fast.modules.dense_block import DenseBlock
from effnet_fast.modules.structure import RefusedError

MAX_KERNEL = 31  # csrc/cpu/network/args.h
CPU = torch.device("cpu")
LOGITS, POOLED, LAST_MAP, TAPS = "logits", "pooled", "last_map", "taps"


@dataclass(frozen=True)
class BlockSpec:
    """A block, and which output shows its result."""

    layers: structure.Block | DenseBlock
    tap: int


class Linear(NamedTuple):
    """The classifier's tensors; the module may be given others at any time."""

    weight: Tensor  # [classes, features]
    bias: Tensor | None  # [classes]


@dataclass(frozen=True)
class NetworkSpec:
    """The layers that the kernels run."""

    stem: structure.Layer
    stem_tap: int  # which output shows its result, -1 for none
    blocks: tuple[BlockSpec, ...]
    head: structure.Layer | None  # the last convolution, before the mean; None to end before it
    linear: Linear | None  # the classifier; None to end before it
    result: str  # LOGITS, POOLED [N,C], the LAST_MAP before an unknown head, or an encoder's TAPS
    modules: tuple[nn.Module, ...]  # those that these layers consist of
    dtype: torch.dtype  # of all weights of convolutions and of the classifier
    window: int | None = None  # the largest side of the last map, where the mean is of such alone
    observed: tuple[int, ...] = ()  # stages with forward hooks, counted from 1
    shown: tuple[int, ...] = ()  # stages whose maps come out, 0 for the stem

    @property
    def is_whole(self) -> bool:
        """Whether the network's result is the kernels', with no module after them."""
        return self.result in (LOGITS, TAPS)

    @property
    def has_frozen_norm(self) -> bool:
        """Whether a BatchNorm is of buffers alone."""
        return any(isinstance(layer.bn, structure.FrozenNorm) for layer in layers_of(self))

    def tensors(self) -> Iterator[Tensor | None]:
        """Everything that is packed."""
        yield from self.stem.tensors
        for block in self.blocks:
            yield from block.layers.parameters
        if self.head:
            yield from self.head.tensors
        if self.linear is not None:
            yield from self.linear


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Puts the place in front of the reason of what is refused inside."""
    try:
        yield
    except RefusedError as refused:
        text = str(refused)
        raise RefusedError(f"{place}{text if text.startswith(' ') else f': {text}'}") from None


def spec_of(model: Any, device: torch.device = CPU, *, observes: bool = False) -> NetworkSpec:
    """The kernels' form of an EfficientNet or EfficientNetFeatures, all of it on `device`.

    A subclass may have a forward of its own: it is what calls the one that this stands in for.

    Args:
        observes: whether stages may have forward hooks, which whoever runs the network calls.

    Raises:
        RefusedError: it has none, with the reason.
    """
    if changed := parts.changed_step(model):
        raise RefusedError(changed)
    given: InferenceParts = parts.parts_of(model)
    given.code.require()
    course = given.course()
    stem = _convolution(course.stem, structure.DENSE)
    head, linear, result = _head(given, course.last)
    observed = tuple(_observed(course.stages)) if observes else ()
    hooked = [course.stages[number - 1].module for number in observed]
    own = (len(course.stages),) if result == LAST_MAP else given.taps
    shown = tuple(sorted({*own, *observed, *(number - 1 for number in observed)}))
    taps = {stage: index for index, stage in enumerate(shown)}
    blocks = [_block(*row, taps, hooked) for row in _blocks(course.stages, hooked)]
    roots = [*course.stem.modules, *(stage.module for stage in course.stages)]
    watched = [*course.containers, *(m for root in roots for m in root.modules())]
    if given.head and course.last and head:
        roots = [*course.last.modules, given.head.pool]
        if linear is not None or _last_layer(given.head.classifier) is not None:
            roots.append(given.head.classifier)
        watched += (m for root in roots for m in root.modules())
    assert stem.tensors[0] is not None
    modules = tuple(dict.fromkeys(watched))
    spec = NetworkSpec(
        *(stem, taps.get(0, -1), tuple(blocks), head, linear, result, modules),
        stem.tensors[0].dtype,
        given.head.window if given.head and head else None,
        *(observed, shown),
    )
    _check(spec, device)
    return spec


def _convolution(step: Step, kind: str) -> structure.Layer:
    with _at(step.place):
        layer = step.read()
        if not isinstance(layer, structure.Layer) or layer.kind != kind or not layer.activates:
            raise RefusedError(f" is no {kind} convolution with an activation")
        if layer.geometry.stride[0] != layer.geometry.stride[1]:
            raise RefusedError(f" has stride {layer.geometry.stride}")
        return layer


def _observed(stages: tuple[Stage, ...]) -> Iterator[int]:
    """The stages with forward hooks and nothing else; forward gives them the map alone."""
    for number, stage in enumerate(stages, start=1):
        if not stage.arguments and structure.is_observed(stage.module.__dict__):
            yield number


def _blocks(stages: tuple[Stage, ...], hooked: Sequence[nn.Module]) -> Iterator[tuple[Stage, int]]:
    """Each block, and the stage whose last it is, or -1; these stages may have hooks."""
    for index, stage in enumerate(stages, start=1):
        if structure.is_block(type(stage.module)):
            yield stage, index
            continue
        with _at(stage.place):
            if stage.module not in hooked or type(stage.module) not in structure.SEQUENCES:
                parts.require_sequence(stage.module)
            blocks = parts.in_order(stage.module)
            if not blocks:
                raise RefusedError(" is empty")
        for number, block in enumerate(blocks):
            is_last = number == len(blocks) - 1
            yield Stage(f"{stage.place}.{number}", block), index if is_last else -1


def _block(
    given: Stage, stage: int, taps: dict[int, int], hooked: Sequence[nn.Module]
) -> BlockSpec:
    module = given.module
    with _at(given.place):
        if not structure.is_block(type(module)):
            raise RefusedError(f" is {type(module).__name__}, none of the blocks that are known")
        if module not in hooked:
            structure.require(module)
        block: structure.Block | DenseBlock = structure.structure_of(
            module, *given.arguments.values()
        )
        geometry = block.spatial
        if geometry.kernel[0] > MAX_KERNEL:
            raise RefusedError(f" has a kernel above {MAX_KERNEL}")
        if not geometry.is_regular:
            raise RefusedError(
                f" has a kernel of {geometry.kernel} with padding {geometry.padding}"
            )
        if block.residual and block.drop_probability > 0:
            raise RefusedError("stochastic_depth is in training mode: call eval()")
        return BlockSpec(block, taps.get(stage, -1))


def _head(
    given: InferenceParts, last: Step | None
) -> tuple[structure.Layer | None, Linear | None, str]:
    """Last convolution, classifier and result, as far as the kernels know them."""
    if given.head is None:
        return None, None, TAPS
    if last is None or not parts.averages_pixels(given.head):
        return None, None, LAST_MAP
    head = _convolution(last, structure.POINTWISE)
    classifier = _last_layer(given.head.classifier)
    if isinstance(classifier, nn.Linear):
        return head, Linear(classifier.weight, classifier.bias), LOGITS
    return head, None, POOLED


def _last_layer(classifier: nn.Module) -> nn.Linear | nn.Identity | None:
    """What a classifier of at most one linear layer amounts to; None for anything else."""
    found: nn.Linear | nn.Identity = nn.Identity()
    try:
        children = [classifier]
        if type(classifier) is nn.Sequential:
            structure.require(classifier)
            children = list(parts.in_order(classifier))
        for child in children:
            structure.require(child, nn.Linear, nn.Identity, nn.Dropout)
            drops = isinstance(child, nn.Dropout) and child.training and child.p > 0
            if drops or isinstance(found, nn.Linear):
                return None
            if isinstance(child, nn.Linear):
                found = child
    except RefusedError:
        return None
    tensors = found.__dict__["_parameters"].values()
    known = (*PLAIN, type(None))
    return found if all(type(tensor) in known for tensor in tensors) else None


def _check(spec: NetworkSpec, device: torch.device) -> None:
    """Refuses layers that do not fit together, or that do not run here as they are."""
    channels = spec.stem.conv.out_channels
    for block in spec.blocks:
        if block.layers.first.conv.in_channels != channels:
            raise RefusedError(f"a block does not take {channels} channels")
        channels = block.layers.last.conv.out_channels
    if spec.head and spec.head.conv.in_channels != channels:
        raise RefusedError(f"the last convolution does not take {channels} channels")
    linear = spec.linear
    if linear is not None and spec.head:
        features = spec.head.conv.out_channels
        if linear.weight.dim() != 2 or linear.weight.shape[1] != features:
            raise RefusedError(f"the classifier does not take {features} features")
        if linear.bias is not None and linear.bias.shape != linear.weight.shape[:1]:
            raise RefusedError("the classifier's bias does not fit its weight")
    for layer in layers_of(spec):
        if layer.by_batch:
            raise RefusedError("a BatchNorm uses the batch's statistics: call eval()")
    for tensor in spec.tensors():
        if tensor is None:
            continue
        if tensor.device != device:
            raise RefusedError(f"a part of it is on {tensor.device}, not on {device}")
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise RefusedError("a parameter is no dense tensor of floating point numbers")
    for layer in layers_of(spec):  # PyTorch takes those of its input, or fp32 beside a narrower one
        dtypes = {tensor.dtype for tensor in layer.tensors[1:] if tensor is not None}
        if len(dtypes) > 1 or not dtypes <= {spec.dtype, torch.float32}:
            names = " and ".join(sorted(map(str, dtypes)))
            raise RefusedError(f"a BatchNorm is of {names} among weights of {spec.dtype}")
    for weight in _weights(spec):
        if weight.dtype != spec.dtype:
            raise RefusedError(f"its weights are of {spec.dtype} and {weight.dtype}")


def layers_of(spec: NetworkSpec) -> Iterator[structure.Layer]:
    """Every convolution with its BatchNorm."""
    yield spec.stem
    for block in spec.blocks:
        yield from block.layers.layers
    if spec.head:
        yield spec.head


def _weights(spec: NetworkSpec) -> Iterator[Tensor]:
    weights = (layer.tensors[0] for layer in layers_of(spec))
    yield from (weight for weight in weights if weight is not None)
    for block in spec.blocks:
        excite = block.layers.excite if isinstance(block.layers, structure.Block) else None
        yield from (tensor for tensor in excite or () if tensor is not None)
    if spec.linear is not None:
        yield from (t for t in (spec.linear.weight, spec.linear.bias) if t is not None)
