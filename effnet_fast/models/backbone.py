"""The part that every EfficientNet has, whatever follows: stem, stages of blocks, head.

Running them on channels_last activations and one backend, recomputing them in backward, freezing
the first of them, and naming their parameters by depth.

Source: Tan & Le (arXiv 1905.11946); module tree, initialisation and random draws as torchvision
0.28; gradient checkpointing and the groups by depth under the names that timm gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_fast import backends
from effnet_fast.inference.own_plan import OwnPlan, forget_plan
from effnet_fast.inference.parts import InferenceParts, enter
from effnet_fast.models import features_plan, origin
from effnet_fast.models.captured import (
    is_captured,
    laid_out_as,
    to_channels_last,
    weights_make_nhwc,
)
from effnet_fast.models.feature_info import FeatureInfo, describe
from effnet_fast.models.param_groups import param_groups
from effnet_fast.models.stages import makers_of_stages
from effnet_fast.models.variants import VARIANTS, Variant
from effnet_fast.modules import in_turn
from effnet_fast.modules.layers import (
    ACTIVATION_LAYERS,
    Conv2dNormActivation,
    ResidualBlock,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MEMORY_MODES = ("fast", "lean")


# For calls from this file.
torch.fx.wrap("to_channels_last")
torch.fx.wrap("laid_out_as")


def _own_parts(model: Any) -> InferenceParts:
    parts: InferenceParts = model.inference_parts()
    return parts


class Backbone(nn.Module):
    """Base of `EfficientNet` and `EfficientNetFeatures`: the child `features` and its settings.

    Args:
        variant: row of `VARIANTS`, or its name.
        stochastic_depth_prob, norm_layer, in_chans, backend, memory: as in `EfficientNet`.
        encodes: the feature maps that are wanted: layers after the last of them are not built;
            None builds everything.

    Attributes:
        variant: the row of the table that was built.
        stochastic_depth_prob: p of the drop-path that was built.
        feature_info: `FeatureInfo` of the maps at strides 2, 4, 8, 16 and 32.
        grad_checkpointing: whether `set_grad_checkpointing` is on.
        plan: whether forward in eval mode without gradients may run the whole network from packed
            weights, on a CPU; they take about as much memory as the parameters, in bf16 too, where
            projections are kept in fp32 as well. Every call compares each byte of the parameters
            and buffers with what was packed. Set it to False to turn this off.

    Raises:
        ValueError: an argument outside what is allowed.
        TypeError: a norm_layer that cannot be called.
    """

    # TorchScript compiles properties, these it cannot.
    __jit_unused_properties__ = ("memory", "plan", "class_names")

    def __init__(
        self,
        variant: Variant | str,
        *,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module] | None,
        in_chans: int,
        backend: str,
        memory: str,
        encodes: FeatureInfo | None = None,
    ) -> None:
        super().__init__()
        variant = find_variant(variant)
        check_count("in_chans", in_chans)
        check_probability("stochastic_depth_prob", stochastic_depth_prob)
        _check_backend(backend)
        check_memory(memory)
        by_variant = norm_layer is None
        if norm_layer is None:
            norm_layer = partial(nn.BatchNorm2d, eps=variant.bn_eps, momentum=variant.bn_momentum)
        elif not callable(norm_layer):
            raise TypeError(
                "norm_layer must make a module from a number of channels, or be None, "
                f"got {type(norm_layer).__name__}"
            )
        self.variant = variant
        self.backend = backend
        self.in_chans = in_chans
        self.stochastic_depth_prob = stochastic_depth_prob
        self.grad_checkpointing = False
        self.feature_info = encodes or FeatureInfo(describe(variant))
        # What names of parameters do not say of a network that comes from a checkpoint.
        self._origin = frozenset[tuple[str, str]]()
        self._frozen_depth = 0
        self._frozen_norms = False
        self._frozen_names = frozenset[str]()
        self._own_plan, self._plans = OwnPlan(), True

        activation = ACTIVATION_LAYERS[variant.activation]
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=activation)
        makers: list[Callable[[], nn.Module]] = [
            partial(
                conv,
                in_chans,
                variant.stem_channels,
                kernel_size=3,
                stride=2,
                padding=variant.padding_of(None),
            ),
            *makers_of_stages(variant, stochastic_depth_prob, norm_layer),
            partial(conv, variant.stages[-1].out_channels, variant.head_channels, kernel_size=1),
        ]
        if encodes is not None:
            del makers[self.feature_info.get("stage")[-1] + 1 :]
        self.features = features_plan.Sequential(*(make() for make in makers))
        self.memory = memory
        if variant.expand_bn_momentum is not None and by_variant:
            _set_momentum(self.features, variant.expand_bn_momentum)

    @property
    def plan(self) -> bool:
        """See above; setting it sets that of `features`, which has a plan of its own."""
        return self._plans

    @plan.setter
    def plan(self, plan: bool) -> None:
        self._plans = plan
        if isinstance(self.features, features_plan.Sequential):
            self.features.plan = plan

    @property
    def memory(self) -> str:
        """ "fast" or "lean", as in `EfficientNet`; setting it sets every block's own `memory`."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_memory(memory)
        self._memory = memory
        for module in self.features.modules():
            if isinstance(module, ResidualBlock):
                module.memory = memory

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the logits; () where they are not known.

        A checkpoint may have them; its state dict and what is saved of the network keep them.
        """
        return origin.class_names(self._origin)

    @class_names.setter
    def class_names(self, names: Iterable[str]) -> None:
        self._origin = origin.with_class_names(self.variant, self._origin, names)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "inference_parts" in cls.__dict__:
            enter(cls, _own_parts)

    def inference_parts(self) -> InferenceParts:
        """The modules that forward runs, for what runs them from packed weights."""
        raise NotImplementedError

    def _prepared(self, x: Tensor) -> Tensor:
        """Images as the first layer takes them: who captures the operators sees a conversion.

        Elsewhere `in_turn` decides about layouts.
        """
        return to_channels_last(x) if is_captured(x) else x

    def _finished(self, y: Tensor, x: Tensor, stage: int = -1) -> Tensor:
        """A map y as a user sees it, in the layout that stock gives it for the images x.

        Args:
            y: what a child of `features` gave.
            x: the images.
            stage: the place of that child, -1 for the last.
        """
        if torch.jit.is_scripting():  # which knows no strides of weights
            return laid_out_as(y, x)
        if not is_captured(x):
            return y
        weights = in_turn.weights_of(list(self.features)[: stage + 1 or None])
        return y if weights_make_nhwc(weights) else laid_out_as(y, x)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # torch.save keeps this attribute of a state dict; who reads the file finds the family.
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {}).update(origin.remembered(self.variant, self._origin))

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's; BatchNorms that `freeze` holds stay in eval mode."""
        super().train(mode)
        if mode:
            self._own_plan.forget()
            forget_plan(self.features)
        if self._frozen_norms:
            for norm in self._norms_of_frozen():
                norm.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps the input of each block alone for backward, and computes the rest again.

        Results, random draws and running statistics stay the same: statistics are updated once in
        a step. The cost is about one more forward pass.
        """
        self.grad_checkpointing = enable
        for module in self.features.modules():
            if isinstance(module, ResidualBlock):
                module.grad_checkpointing = enable

    def freeze(self, stages: int | None = None, *, bn: bool = True) -> Self:
        """Excludes the first layers from training; replaces an earlier `freeze`.

        Args:
            stages: stages of blocks to freeze, the stem with them; 0 freezes nothing, None the
                whole of `features`, its last convolution included.
            bn: also keep their BatchNorms in eval mode, even under `train()`.

        Returns:
            The network itself.

        Raises:
            ValueError: more stages than the network has, or a negative number.
        """
        limit = min(self._count_stages(), len(self.features) - 1)
        if stages is not None and (
            isinstance(stages, bool) or not isinstance(stages, int) or not 0 <= stages <= limit
        ):
            raise ValueError(
                f"stages must be an int between 0 and {limit}, or None for all of features, "
                f"got {stages!r}"
            )
        self.unfreeze()
        if stages != 0:
            self._frozen_depth = len(self.features) if stages is None else stages + 1
        self._frozen_norms = bn and self._frozen_depth > 0
        names = []
        for index in range(self._frozen_depth):
            for name, parameter in self.features[index].named_parameters(f"features.{index}"):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    names.append(name)
        self._frozen_names = frozenset(names)
        if self._frozen_norms:
            for norm in self._norms_of_frozen():
                norm.eval()
        return self

    def unfreeze(self) -> Self:
        """Undoes `freeze`: its layers are trained again, BatchNorms in the network's mode.

        Parameters that were frozen by other means stay so.
        """
        parameters = dict(self.named_parameters())
        for name in self._frozen_names:
            if name in parameters:
                parameters[name].requires_grad_(True)
        if self._frozen_norms:
            for norm in self._norms_of_frozen():
                norm.train(self.training)
        self._frozen_depth, self._frozen_norms, self._frozen_names = 0, False, frozenset()
        return self

    def _count_stages(self) -> int:
        """Stages of blocks in the whole network."""
        return len(self.feature_info.stages) - 1

    def _norms_of_frozen(self) -> Iterator[nn.Module]:
        for child in list(self.features)[: self._frozen_depth]:
            yield from (m for m in child.modules() if isinstance(m, _BatchNorm))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions of the parameters' names by depth, as timm's tools take them.

        The stem comes first, then every block (every stage if `coarse`), the last convolution with
        the last block, and what is not matched, the classifier, at the end.
        """
        last = self._count_stages()
        stages = "|".join(str(i) for i in range(1, last + 1))
        block = rf"^features\.({stages})\." + ("" if coarse else r"(\d+)\.")
        return {
            "stem": r"^features\.0\.",
            "blocks": [(block, None), (rf"^features\.{last + 1}\.", (99999,))],
        }

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.05,
        *,
        layer_decay: float = 0.75,
        min_scale: float = 0.0,
        no_weight_decay: Collection[str] = (),
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser, with a learning rate that falls towards the input.

        See `effnet_fast.models.param_groups.param_groups`.
        """
        return param_groups(
            self,
            lr,
            weight_decay,
            layer_decay=layer_decay,
            min_scale=min_scale,
            no_weight_decay=no_weight_decay,
        )


def _set_momentum(features: nn.Module, momentum: float) -> None:
    """Sets the momentum of the BatchNorm behind each expansion, which depthwise layers follow."""
    for module in features.modules():
        if isinstance(module, ResidualBlock):
            conv, norm, *_ = module.block[0].children()
            if getattr(conv, "groups", 0) == 1 and isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum


def init_parameters(module: nn.Module) -> None:
    """torchvision's initialisation, which does not divide a depthwise fan-out by the groups."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        if module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        limit = 1.0 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -limit, limit)
        nn.init.zeros_(module.bias)


def find_variant(variant: Variant | str) -> Variant:
    """The variant of a name; ValueError for an unknown one."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


def check_count(name: str, count: int, least: int = 1) -> None:
    """Raises ValueError for anything but an int of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {count!r}")


def check_probability(name: str, probability: float) -> None:
    """Raises ValueError for anything but a number between 0 and 1."""
    if not isinstance(probability, (int, float)) or not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {probability!r}")


def _check_backend(backend: str) -> None:
    if not isinstance(backend, str):
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
    backends.parse(backend)


def check_memory(memory: str) -> None:
    """Raises ValueError for anything but one of MEMORY_MODES."""
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}, got {memory!r}")
