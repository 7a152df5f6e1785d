"""The network that goes with a checkpoint: its size, family, classes and channels."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effnet_fast import checkpoints
from effnet_fast.checkpoints import FAMILIES, Checkpoint
from effnet_fast.checkpoints.families import INCEPTION_MEAN, INCEPTION_STD
from effnet_fast.checkpoints.plain import memory_of
from effnet_fast.files import naming_file
from effnet_fast.models.backbone import Backbone
from effnet_fast.models.input_channels import adapt_input_channels
from effnet_fast.models.variants import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VARIANTS,
    Stage,
    Variant,
    custom_variant,
)

STEM, CLASSIFIER = "features.0.0.weight", "classifier.1.weight"
SQUEEZE = ".fc1."  # in the names of squeeze-and-excitation
# The last convolution of a block, by whether MBConv squeeze: of one with expansion, of one without,
# then of FusedMBConv with and without projection. The first that is there is the block's.
PROJECTIONS = {
    True: ("3.0.weight", "2.0.weight", "1.0.weight", "0.0.weight"),
    False: ("2.0.weight", "1.0.weight", "0.0.weight"),
}
PART = re.compile(r"(features\.\d+|classifier)\.")  # a network of features ends with one of them
# How families other than torchvision prepare images for V2, which they do not crop.
V2_IMAGES: dict[str, dict[str, Any]] = {
    "timm": {"interpolation": "bicubic", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "timm_tf": {"interpolation": "bicubic", "mean": INCEPTION_MEAN, "std": INCEPTION_STD},
}
FILLING = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)
Built = TypeVar("Built", bound=Backbone)


def load_network(
    build: Callable[..., Built],
    path: str | os.PathLike[str],
    *,
    family: str = "auto",
    variant: Variant | str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    ema: bool = True,
    progress: bool = True,
    classifies: bool = True,
    **options: Any,
) -> Built:
    """`build(variant, num_classes=, in_chans=, **options)` with a file's weights.

    See `EfficientNet.from_checkpoint` for the arguments and errors. A network that does not
    classify takes no num_classes, and of the weights those of the layers that it has.
    """
    checkpoint = checkpoints.open_checkpoint(path, family, ema=ema, progress=progress)
    if checkpoint.assumption:
        warnings.warn(f"{os.fspath(path)}: {checkpoint.assumption}", stacklevel=3)
    state, origin = checkpoint.state, frozenset(checkpoint.metadata.items())
    with naming_file(os.fspath(path)):
        found = find_variant(checkpoint, variant, build, classifies)
        if classifies:
            options["num_classes"] = _classes(state, num_classes)
        options["in_chans"] = _channels_of_images(state, in_chans)
    with unfilled():
        model = build(found, **options)
    if not classifies:
        drop_other_layers(model, state)
    with naming_file(os.fspath(path)):
        checkpoints.check(model, state)
    own = model.state_dict()
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if names - own.keys():  # of a norm_layer: nothing in the file would fill them
        model = build(found, **options)
        model.load_state_dict(state)
        return _remembering(model, origin)
    with naming_file(os.fspath(path)):
        model.load_state_dict(_parameters(state, own), assign=True)
    return _remembering(model, origin)


def _remembering(model: Built, origin: frozenset[tuple[str, str]]) -> Built:
    model._origin = origin
    return model


def build_from_state(build: Callable[[], Built], state: dict[str, Tensor]) -> Built:
    """`build()`'s network with a state's tensors, in the state's dtypes; `state` is emptied.

    Raises:
        ValueError: as `checkpoints.check`.
    """
    with unfilled():
        model = build()
    checkpoints.check(model, state)
    own = {key: value.to(state[key].dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(_parameters(state, own), assign=True)
    return model


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Networks that are built within have no memory: they are on the meta device."""
    with torch.device("meta"), _Uninitialised():
        yield


def drop_other_layers(model: Backbone, state: dict[str, Tensor]) -> None:
    """Takes the classifier, head and last stages out of `state` as far as `model` lacks them."""
    whole = {f"features.{i}" for i in range(len(model.variant.stages) + 2)} | {"classifier"}
    lacking = whole - {_part(key) for key in model.state_dict()}
    for key in [key for key in state if _part(key) in lacking]:
        del state[key]


def _part(key: str) -> str | None:
    match = PART.match(key)
    return match and match.group(1)


def _parameters(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` as parameters, in the order of `own`; `state` is emptied.

    Each is given up as soon as it is copied: one copy of them in memory. No two share memory, as
    those of a file can: a step of training would change both.
    """
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, like in own.items():
        tensor = state.pop(key)
        tensors[key] = _parameter(tensor, like, memory_of(tensor) not in taken)
        taken.add(memory_of(tensor))
    return tensors


def _parameter(tensor: Tensor, like: Tensor, is_only: bool) -> Tensor:
    """The tensor in the dtype of `like`, on the default device, in memory that torch manages.

    is_only says whether no other parameter has that memory.
    """
    if (
        is_only
        and tensor.dtype == like.dtype
        and tensor.device == torch.get_default_device()
        and tensor.is_contiguous()
        and tensor.untyped_storage().resizable()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    ):
        return tensor
    return torch.empty(like.shape, dtype=like.dtype).copy_(tensor)


class _Uninitialised(TorchFunctionMode):
    """Leaves out what fills parameters that are about to be replaced.

    On the meta device filling them computes nothing, but the first time imports PyTorch's
    decompositions, 1.4 s and 100 MiB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def family_variant(variant: Variant, checkpoint: Checkpoint) -> Variant:
    """The variant as the checkpoint's family has it: padding, BN constants, preprocessing.

    Raises:
        ValueError: the family has no network of such blocks.
    """
    family = FAMILIES[checkpoint.family].of_blocks(variant.squeeze)
    changes: dict[str, Any] = {"padding": family.padding}
    if family.bn_eps is not None:
        changes |= {"bn_eps": family.bn_eps, "bn_momentum": family.bn_momentum}
    if variant.has_fused:
        if checkpoint.family not in ("torchvision", *V2_IMAGES):
            raise ValueError(f"{checkpoint.family} has no FusedMBConv, and so no EfficientNetV2")
        changes |= V2_IMAGES.get(checkpoint.family, {})
    elif family.crop_border is not None:
        side = variant.resolution
        changes |= {"crop": side, "resize": side + family.crop_border}
    if family.mean is not None:
        changes |= {"mean": family.mean, "std": family.std}
    if family.fixed:
        changes["padded_as"] = variant.resolution
    if family.expand_bn_momentum is not None:
        changes["expand_bn_momentum"] = family.expand_bn_momentum
    if checkpoint.inception:
        changes |= {"mean": INCEPTION_MEAN, "std": INCEPTION_STD}
    facts = checkpoint.facts
    return replace(variant, **(changes | dict(facts.network) | dict(facts.images)))


def published_variant(state: Mapping[str, Tensor]) -> Variant | None:
    """The published size whose channels and repeats those of a torchvision-named state are.

    A state without the head, or the last stages too, is of the only size that begins so.
    """
    found = _channels(state)
    fitting = [v for v in VARIANTS.values() if _variant_channels(v)[: len(found)] == found]
    return fitting[0] if len(fitting) == 1 else None


def find_variant(
    checkpoint: Checkpoint,
    given: Variant | str | None = None,
    build: Callable[..., Backbone] = Backbone,
    classifies: bool = False,
) -> Variant:
    """The network of a checkpoint, with its family's constants and its own preprocessing.

    Args:
        given: the size, or its name; None finds it.
        build, classifies: make the network that an error is about.

    Raises:
        ValueError: no published size has these layers, and the checkpoint does not describe them.
    """
    table = checkpoint.facts.table
    if given is None and table:
        variant = _described(table, checkpoint.family)
    else:
        variant = _size(build, checkpoint.state, given, classifies)
    return family_variant(variant, checkpoint)


def _described(table: Mapping[str, Any], family: str) -> Variant:
    """The network of a table of layers: of a published size where one has the same layers."""
    stages = tuple(Stage(*row) for row in table["baseline"])
    variant = custom_variant(depth=table["depth"], width=table["width"], stages=stages)
    variant = replace(variant, head=table["head"])
    for stage in variant.stages:
        list(variant.block_configs(stage))  # raises for what no block has
        # transformers adds no residual there, and ours does.
        keeps = stage.stride == 1 and stage.in_channels == stage.out_channels
        if keeps and family == "transformers":
            raise ValueError("the first block of a stage must stride or change the channels")
    for known in VARIANTS.values():
        layers = known.stages, known.head_channels, known.squeeze
        if layers == (variant.stages, variant.head_channels, True):
            return known
    return variant


def _size(
    build: Callable[..., Backbone],
    state: dict[str, Tensor],
    given: Variant | str | None,
    classifies: bool,
) -> Variant:
    if isinstance(given, Variant):
        return given
    if given is not None:
        if given not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {given!r}")
        return VARIANTS[given]
    if variant := published_variant(state):
        return variant
    found = _channels(state)
    nearest = max(VARIANTS.values(), key=lambda v: _agreement(_variant_channels(v), found))
    message = f"no published size has these layers; the nearest is {nearest.name}"
    classes = state[CLASSIFIER].shape[:1].numel() if CLASSIFIER in state else 1000
    with unfilled():
        model = build(nearest, num_classes=classes) if classifies else build(nearest)
    if not classifies:
        drop_other_layers(model, state)
    try:
        checkpoints.check(model, state)
    except ValueError as error:
        message = f"{message}: {error}"
    raise ValueError(f"{message}. Give variant= for a network of another size")


def _variant_channels(variant: Variant) -> list[int]:
    """Whether blocks squeeze, then output channels of the stem, of every block behind the stage's
    number, and of the head."""
    blocks = ([i] + [s.out_channels] * s.repeats for i, s in enumerate(variant.stages, 1))
    ends = int(variant.squeeze), variant.stem_channels
    return [*ends, *itertools.chain(*blocks), variant.head_channels]


def _channels(state: Mapping[str, Tensor]) -> list[int]:
    """The same of a torchvision-named state dict, as far as it goes."""

    def width(*names: str) -> list[int]:
        return [len(state[name]) for name in names if name in state and state[name].dim()][:1]

    squeezes = any(SQUEEZE in key for key in state)
    projections = PROJECTIONS[squeezes]
    channels = [int(squeezes), *width(STEM)]
    for stage in itertools.count(1):
        prefix = f"features.{stage}.0.block."
        if not any(key.startswith(prefix) for key in state):
            return channels + width(f"features.{stage}.0.weight")
        channels.append(stage)
        for block in itertools.count():
            prefix = f"features.{stage}.{block}.block."
            found = width(*(f"{prefix}{projection}" for projection in projections))
            if not found:
                break
            channels += found
    raise AssertionError


def _agreement(expected: list[int], found: list[int]) -> int:
    """How far two lists agree: equal entries, and how near their lengths are."""
    equal = sum(a == b for a, b in zip(expected, found, strict=False))
    return equal - abs(len(expected) - len(found))


def _classes(state: dict[str, Tensor], wanted: int | None) -> int:
    """Size of the logits; drops the classifier from `state` where none is wanted."""
    if wanted == 0:
        for key in [key for key in state if key.startswith("classifier.")]:
            del state[key]
        return 0
    if CLASSIFIER not in state:
        if wanted is None:
            raise ValueError(
                f"no {CLASSIFIER}: give num_classes=0 for a network without classifier"
            )
        return wanted
    found = state[CLASSIFIER].shape[:1].numel()
    if wanted not in (None, found):
        raise ValueError(
            f"num_classes is {wanted}, but the file's classifier has {found} classes: leave "
            "num_classes out and replace the classifier afterwards"
        )
    return found


def _channels_of_images(state: dict[str, Tensor], wanted: int | None) -> int:
    """Channels of the images; adapts the stem in `state` to the number that is wanted."""
    stem = state[STEM]
    if stem.dim() != 4:
        raise ValueError(f"{STEM} has shape {tuple(stem.shape)}, not four dimensions")
    if stem.shape[1] == 0:
        raise ValueError(f"{STEM} has shape {tuple(stem.shape)}, without channels of images")
    if wanted is None:
        return stem.shape[1]
    state[STEM] = adapt_input_channels(stem, wanted)
    return wanted
