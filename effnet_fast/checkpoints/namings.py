"""The names of modules of every family, as tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

EXPAND, DEPTHWISE = ("expand", "expand_norm"), ("depthwise", "depthwise_norm")
SQUEEZE, PROJECT = ("reduce", "excite"), ("project", "project_norm")
DENSE = ("dense", "dense_norm")
# What the modules of a block are, in their order, by the kind of block. Either all MBConv of a
# network have squeeze-and-excitation, or none has.
KINDS = MappingProxyType(
    {
        "expanded": EXPAND + DEPTHWISE + SQUEEZE + PROJECT,
        "plain": DEPTHWISE + SQUEEZE + PROJECT,
        "expanded_lite": EXPAND + DEPTHWISE + PROJECT,
        "plain_lite": DEPTHWISE + PROJECT,
        "fused": DENSE + PROJECT,
        "dense": DENSE,
    }
)


@dataclass(frozen=True)
class Naming:
    """Names of modules; {stage}, {after} = stage + 1, {block} and {index} count from 0.

    {letter} is the block as a letter.
    """

    stem: tuple[str, str]  # convolution and norm
    block: str  # what names within a block begin with; {index} counts over all stages
    blocks: Mapping[str, tuple[str, ...]]  # by kind, what KINDS has, under the names in a block
    head: tuple[str, str]  # convolution and norm; {head} is the stage after the last, plus 1
    classifier: str  # the linear layer
    linear_se: bool = False  # whether squeeze and excite are linear layers
    base: str = ""  # what names of all but the classifier begin with, where a classifier is there

    def in_block(self, role: str) -> str:
        """What a module of this role is called in a block of whatever kind."""
        return next(
            name
            for kind, names in self.blocks.items()
            for name, own in zip(names, KINDS[kind], strict=True)
            if own == role
        )

    @property
    def has_index(self) -> bool:
        """Whether blocks are counted through all stages."""
        return "{index}" in self.block

    @property
    def has_stage(self) -> bool:
        """Whether the names of blocks have their stage."""
        return "{stage}" in self.block or "{after}" in self.block

    @property
    def squeeze(self) -> frozenset[str]:
        """The names of the two layers of squeeze-and-excitation, in any kind of block."""
        return frozenset(
            name
            for kind, names in self.blocks.items()
            for name, role in zip(names, KINDS[kind], strict=True)
            if role in SQUEEZE
        )

    @property
    def stem_key(self) -> str:
        """The name of the stem's weight, which no other naming has."""
        return f"{self.stem[0]}.weight"

    @property
    def block_pattern(self) -> re.Pattern[str]:
        """Matches the name of a tensor within a block; its last group is the module in there."""
        pattern = re.escape(self.block).replace(r"\{", "{").replace(r"\}", "}")
        pattern = pattern.replace("{letter}", "(?P<letter>[a-z])")
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", pattern)
        return re.compile(rf"{pattern}(?P<module>.+)\.\w+")


def _blocks(
    expanded: tuple[str, ...], plain: tuple[str, ...], **others: tuple[str, ...]
) -> Mapping[str, tuple[str, ...]]:
    """Names by kind; blocks without squeeze-and-excitation just lack it unless told otherwise."""
    lite = {"expanded_lite": expanded[:4] + expanded[6:], "plain_lite": plain[:2] + plain[4:]}
    return MappingProxyType({"expanded": expanded, "plain": plain, **lite, **others})


_LUKEMELAS_BLOCK = (
    *("_expand_conv", "_bn0", "_depthwise_conv", "_bn1"),
    *("_se_reduce", "_se_expand", "_project_conv", "_bn2"),
)
_KERAS_BLOCK = (
    *("expand_conv", "expand_bn", "dwconv", "bn"),
    *("se_reduce", "se_expand", "project_conv", "project_bn"),
)
_TRANSFORMERS_BLOCK = (
    *("expansion.expand_conv", "expansion.expand_bn"),
    *("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
    *("squeeze_excite.reduce", "squeeze_excite.expand"),
    *("projection.project_conv", "projection.project_bn"),
)
_NVIDIA_BLOCK = (
    *("expand.conv", "expand.bn", "depsep.conv", "depsep.bn"),
    *("se.squeeze", "se.expand", "proj.conv", "proj.bn"),
)
NAMINGS = MappingProxyType(
    {
        "torchvision": Naming(
            stem=("features.0.0", "features.0.1"),
            block="features.{after}.{block}.block.",
            blocks=_blocks(
                expanded=("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
                plain=("0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"),
                expanded_lite=("0.0", "0.1", "1.0", "1.1", "2.0", "2.1"),
                plain_lite=("0.0", "0.1", "1.0", "1.1"),
                fused=("0.0", "0.1", "1.0", "1.1"),
                dense=("0.0", "0.1"),
            ),
            head=("features.{head}.0", "features.{head}.1"),
            classifier="classifier.1",
        ),
        "timm": Naming(
            stem=("conv_stem", "bn1"),
            block="blocks.{stage}.{block}.",
            blocks=_blocks(
                expanded=(
                    *("conv_pw", "bn1", "conv_dw", "bn2"),
                    *("se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
                ),
                plain=("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"),
                fused=("conv_exp", "bn1", "conv_pwl", "bn2"),
                dense=("conv", "bn1"),
            ),
            head=("conv_head", "bn2"),
            classifier="classifier",
        ),
        "lukemelas": Naming(
            stem=("_conv_stem", "_bn0"),
            block="_blocks.{index}.",
            blocks=_blocks(_LUKEMELAS_BLOCK, _LUKEMELAS_BLOCK[2:]),
            head=("_conv_head", "_bn1"),
            classifier="_fc",
        ),
        "monai": Naming(
            stem=("_conv_stem", "_bn0"),
            block="_blocks.{stage}.{index}.",
            blocks=_blocks(_LUKEMELAS_BLOCK, _LUKEMELAS_BLOCK[2:]),
            head=("_conv_head", "_bn1"),
            classifier="_fc",
        ),
        "nvidia": Naming(
            stem=("stem.conv", "stem.bn"),
            block="layers.{stage}.block{block}.",
            blocks=_blocks(_NVIDIA_BLOCK, _NVIDIA_BLOCK[2:]),
            head=("features.conv", "features.bn"),
            classifier="classifier.fc",
            linear_se=True,
        ),
        "keras": Naming(  # of the layers; `keras_files` gives their variables PyTorch's names
            stem=("stem_conv", "stem_bn"),
            block="block{after}{letter}_",
            blocks=_blocks(_KERAS_BLOCK, _KERAS_BLOCK[2:]),
            head=("top_conv", "top_bn"),
            classifier="predictions",
        ),
        "transformers": Naming(
            stem=("efficientnet.embeddings.convolution", "efficientnet.embeddings.batchnorm"),
            block="efficientnet.encoder.blocks.{index}.",
            blocks=_blocks(_TRANSFORMERS_BLOCK, _TRANSFORMERS_BLOCK[2:]),
            head=("efficientnet.encoder.top_conv", "efficientnet.encoder.top_bn"),
            classifier="classifier",
            base="efficientnet.",
        ),
    }
)
# Whose the stem's weight may be, the longer name first where one ends with another: of a network
# that is a classifier's base, and of the base alone.
STEM_KEYS: dict[str, tuple[str, ...]] = {}
for _name, _naming in NAMINGS.items():
    for _key in dict.fromkeys((_naming.stem_key, _naming.stem_key.removeprefix(_naming.base))):
        STEM_KEYS[_key] = (*STEM_KEYS.get(_key, ()), _name)
