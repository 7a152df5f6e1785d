"""How each family names the parameters of an EfficientNet, and the conversion between any two.

All families register their modules in the same order, so two namings are two lists of modules of
equal length. Only the weights of NVIDIA's squeeze-and-excitation have another shape: they are
linear layers, [R,C] for [R,C,1,1].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from effnet_fast.checkpoints.families import FAMILIES, check_family

SHOWN = 3  # names that an error message gives of each kind
LONGEST = 200  # letters of such a name, which a file can make as long as it likes
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Kinds of blocks: an MBConv with and without expansion, a FusedMBConv with and without projection.
EXPANDED, PLAIN, FUSED, DENSE = "expanded", "plain", "fused", "dense"
# The kind of each block of each stage: all that the list of modules depends on.
Structure = list[list[str]]


@dataclass(frozen=True)
class Naming:
    """Names of modules; {stage}, {after} = stage + 1, {block} and {index} count from 0."""

    stem: tuple[str, str]  # convolution and norm
    block: str  # what names within a block begin with; {index} counts over all stages
    # By kind, the modules of a block in order. EXPANDED: expand, norm, depthwise, norm, squeeze,
    # excite, project, norm; PLAIN: the same without expansion; FUSED: dense, norm, project, norm;
    # DENSE: dense, norm.
    kinds: Mapping[str, tuple[str, ...]]
    head: tuple[str, str]  # convolution and norm; {head} is the stage after the last, plus 1
    classifier: str  # the linear layer
    linear_se: bool = False  # whether squeeze and excite are linear layers

    @property
    def stem_key(self) -> str:
        """The name of the stem's weight, which no other naming has."""
        return f"{self.stem[0]}.weight"

    @property
    def block_pattern(self) -> re.Pattern[str]:
        """Matches the name of a tensor within a block; its last group is the module in there."""
        pattern = re.escape(self.block).replace(r"\{", "{").replace(r"\}", "}")
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", pattern)
        return re.compile(rf"{pattern}(?P<module>.+)\.\w+")


_LUKEMELAS_BLOCK = (
    *("_expand_conv", "_bn0", "_depthwise_conv", "_bn1"),
    *("_se_reduce", "_se_expand", "_project_conv", "_bn2"),
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
            kinds={
                EXPANDED: ("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
                PLAIN: ("0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"),
                FUSED: ("0.0", "0.1", "1.0", "1.1"),
                DENSE: ("0.0", "0.1"),
            },
            head=("features.{head}.0", "features.{head}.1"),
            classifier="classifier.1",
        ),
        "timm": Naming(
            stem=("conv_stem", "bn1"),
            block="blocks.{stage}.{block}.",
            kinds={
                EXPANDED: (
                    *("conv_pw", "bn1", "conv_dw", "bn2"),
                    *("se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
                ),
                PLAIN: ("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"),
                FUSED: ("conv_exp", "bn1", "conv_pwl", "bn2"),
                DENSE: ("conv", "bn1"),
            },
            head=("conv_head", "bn2"),
            classifier="classifier",
        ),
        "lukemelas": Naming(
            stem=("_conv_stem", "_bn0"),
            block="_blocks.{index}.",
            kinds={EXPANDED: _LUKEMELAS_BLOCK, PLAIN: _LUKEMELAS_BLOCK[2:]},
            head=("_conv_head", "_bn1"),
            classifier="_fc",
        ),
        "nvidia": Naming(
            stem=("stem.conv", "stem.bn"),
            block="layers.{stage}.block{block}.",
            kinds={EXPANDED: _NVIDIA_BLOCK, PLAIN: _NVIDIA_BLOCK[2:]},
            head=("features.conv", "features.bn"),
            classifier="classifier.fc",
            linear_se=True,
        ),
    }
)
STEM_KEYS = {naming.stem_key: name for name, naming in NAMINGS.items()}
_OLD_NVIDIA_STAGE = re.compile(r"^layer(\d+)\.")  # "layer1." of the releases 20.12 and 21.03


def naming_of(state: Mapping[str, Tensor]) -> str:
    """The naming that a state dict follows.

    Raises:
        ValueError: it has the stem's weight under no known name.
    """
    for key, name in STEM_KEYS.items():
        if key in state:
            return name
    raise ValueError(f"not an EfficientNet's state dict: none of {', '.join(STEM_KEYS)} is in it")


def structure_of(state: Mapping[str, Tensor], naming: str) -> Structure:
    """Which blocks there are in each stage, and of which kind each is.

    Raises:
        ValueError: the tensors that show it are missing.
    """
    rules = NAMINGS[naming]
    pattern = rules.block_pattern
    found: dict[tuple[int, int], set[str]] = {}
    for key in state:
        if match := pattern.fullmatch(key):
            found.setdefault(_place(match), set()).add(match["module"])
    if naming == "lukemelas":
        blocks = [
            _kind(state, rules, _prefix(rules, 0, 0, index), modules)
            for (_, index), modules in sorted(found.items())
        ]
        return _split(state, blocks)
    stages: Structure = []
    for (stage, block), modules in sorted(found.items()):
        prefix = _prefix(rules, stage, block)
        if stage < 0:  # torchvision's features.0 is the stem
            raise ValueError(f"no block belongs at {prefix}*")
        if stage > len(stages) or block > (len(stages[stage]) if stage < len(stages) else 0):
            raise ValueError(f"no tensors of the block before {prefix}*")
        if stage == len(stages):
            stages.append([])
        stages[stage].append(_kind(state, rules, prefix, modules))
    return stages


def _kind(state: Mapping[str, Tensor], rules: Naming, prefix: str, modules: set[str]) -> str:
    """The kind of a block that has tensors of these modules.

    Some kinds have all the names of others; the shape of the first weight tells these apart.

    Raises:
        ValueError: that weight is missing where it would decide.
    """
    known = modules & set().union(*rules.kinds.values())
    possible = {kind: names for kind, names in rules.kinds.items() if known <= set(names)}
    if not possible:  # names of several kinds: those beside the nearest one are unknown
        return max(rules.kinds, key=lambda kind: len(known & set(rules.kinds[kind])))
    if len(possible) == 1:
        return next(iter(possible))
    first = {kind: f"{prefix}{names[0]}.weight" for kind, names in possible.items()}
    fitting = [kind for kind, key in first.items() if key in state and _begins(kind, state[key])]
    kind = min(fitting or possible, key=lambda kind: len(possible[kind]))
    if first[kind] not in state:
        raise ValueError(f"{first[kind]} is missing, without which blocks cannot be told apart")
    return kind


def _begins(kind: str, weight: Tensor) -> bool:
    """Whether a block of this kind can begin with this weight [Cout,Cin/groups,K,K]."""
    if weight.dim() != 4:  # no block does: the check against a model will say so
        return True
    is_pointwise = tuple(weight.shape[2:]) == (1, 1)
    is_dense = weight.shape[1] > 1 and not is_pointwise
    begins = {EXPANDED: is_pointwise, PLAIN: weight.shape[1] == 1, FUSED: is_dense, DENSE: is_dense}
    return begins[kind]


def convert(
    state: Mapping[str, Tensor], to: str = "torchvision", source: str | None = None
) -> dict[str, Tensor]:
    """Renames a state dict; the tensors are those given or views of them, in the same order.

    Names do not hold padding and BN constants: another family's network computes the same numbers
    only where these agree (see `families.FAMILIES`).

    Args:
        state: the state dict of an EfficientNet, in any naming.
        to: "torchvision", "timm" (or "timm_tf", which has the same names), "lukemelas" or "nvidia".
        source: the naming of `state`; None reads it from the names.

    Raises:
        ValueError: unknown `to` or `source`; `state` is of another naming; or it holds names that
            an EfficientNet does not have there, of which the first are given.
    """
    check_family(to, argument="to")
    found, target = naming_of(state), FAMILIES[to].naming
    if source is not None:
        check_family(source, argument="source")
        if FAMILIES[source].naming != found:
            raise ValueError(f"parameters are named as {found} names them, not as {source} does")
    if found == target:
        return dict(state)
    if found == "nvidia":
        keys = [
            _OLD_NVIDIA_STAGE.sub(lambda match: f"layers.{int(match[1]) - 1}.", key)
            for key in state
        ]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise ValueError(f"{len(twice)} names are given twice ({first_of(twice)})")
        state = dict(zip(keys, state.values(), strict=True))
    structure = structure_of(state, found)
    names = dict(zip(_modules(found, structure), _modules(target, structure), strict=True))
    converted, unknown = {}, []
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if module not in names or leaf not in _LEAVES:
            unknown.append(key)
            continue
        converted[f"{names[module]}.{leaf}"] = value
    if unknown:
        raise ValueError(
            f"{len(unknown)} names that {found}'s EfficientNet lacks ({first_of(unknown)})"
        )
    return _reshape_squeeze_excite(converted, target)


def complete(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision-named state dict in the order of the network, with every count of batches.

    safetensors files have another order. Older checkpoints lack the counts (num_batches_tracked);
    missing ones become 0.
    """
    names = list(state)
    for key in state:
        module, _, leaf = key.rpartition(".")
        count = f"{module}.num_batches_tracked"
        if leaf == "running_var" and count not in state:
            names.append(count)
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in names))
    order = {name: i for i, name in enumerate(_modules("torchvision", _structure_or_none(state)))}
    rank = {name: order.get(name, len(order) + i) for i, name in enumerate(modules)}
    leaves = {leaf: i for i, leaf in enumerate(_LEAVES)}

    def place(key: str) -> tuple[int, int]:
        module, _, leaf = key.rpartition(".")
        return rank[module], leaves.get(leaf, len(leaves))

    return {
        key: state[key] if key in state else torch.zeros((), dtype=torch.long)
        for key in sorted(names, key=place)
    }


def _structure_or_none(state: Mapping[str, Tensor]) -> Structure:
    try:
        return structure_of(state, "torchvision")
    except ValueError:  # the check against a model will name what is missing
        return []


def _place(match: re.Match[str]) -> tuple[int, int]:
    """Stage and block of a name; the flat index as the block of stage 0."""
    groups = match.groupdict()
    if "index" in groups:
        return 0, int(groups["index"])
    stage = int(groups["after"]) - 1 if "after" in groups else int(groups["stage"])
    return stage, int(groups["block"])


def _split(state: Mapping[str, Tensor], blocks: list[str]) -> Structure:
    """Stages of blocks that are counted through: each begins where the shape of a block changes."""
    stages: Structure = []
    previous = None
    for index, block in enumerate(blocks):
        prefix = f"_blocks.{index}."
        keys = [f"{prefix}_project_conv.weight", f"{prefix}_depthwise_conv.weight"]
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"{missing[0]} is missing, without which stages cannot be told apart")
        kind = (state[keys[0]].shape[:1], state[keys[1]].shape[2:], block)
        if kind != previous:
            stages.append([])
            previous = kind
        stages[-1].append(block)
    return stages


def _prefix(rules: Naming, stage: int, block: int, index: int = 0) -> str:
    return rules.block.format(stage=stage, after=stage + 1, block=block, index=index)


def _modules(naming: str, structure: Structure) -> Iterator[str]:
    """The modules that have parameters, in the order in which every family registers them."""
    rules = NAMINGS[naming]
    yield from rules.stem
    index = 0
    for stage, blocks in enumerate(structure):
        for block, kind in enumerate(blocks):
            prefix = _prefix(rules, stage, block, index)
            if kind not in rules.kinds:
                raise ValueError(f"{naming} has no FusedMBConv, and so no names for EfficientNetV2")
            yield from (f"{prefix}{module}" for module in rules.kinds[kind])
            index += 1
    yield from (name.format(head=len(structure) + 1) for name in rules.head)
    yield rules.classifier


def _reshape_squeeze_excite(state: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The weights of squeeze-and-excitation as [R,C] for linear layers, else as [R,C,1,1]."""
    rules = NAMINGS[naming]
    squeezes = (*rules.kinds[EXPANDED][4:6], *rules.kinds[PLAIN][2:4])
    names = tuple(f".{name}.weight" for name in squeezes)
    for key, value in state.items():
        if not key.endswith(names):
            continue
        if rules.linear_se and value.shape[2:] == (1, 1):
            state[key] = value[:, :, 0, 0]
        elif not rules.linear_se and value.dim() == 2:
            state[key] = value[:, :, None, None]
    return state


def first_of(items: list[str]) -> str:
    """The first few of the names, for an error message."""
    shown = [item if len(item) <= LONGEST else f"{item[:LONGEST]}..." for item in items[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(items) > SHOWN else "")
