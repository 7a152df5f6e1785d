"""How each family names the parameters of an EfficientNet, and the conversion between any two.

All families register their modules in the same order, so two namings are two lists of modules of
equal length. Only the weights of NVIDIA's squeeze-and-excitation have another shape: they are
linear layers, [R,C] for [R,C,1,1].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from effnet_fast.checkpoints.families import FAMILIES, check_family
from effnet_fast.checkpoints.namings import (
    DENSE,
    DEPTHWISE,
    EXPAND,
    KINDS,
    NAMINGS,
    PROJECT,
    STEM_KEYS,
    Naming,
)

SHOWN = 3  # names that an error message gives of each kind
LONGEST = 200  # letters of such a name, which a file can make as long as it likes
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The kind of each block of each stage: all that the list of modules depends on.
Structure = list[list[str]]
Shapes = dict[str, list[torch.Size]]  # of a block's modules, of the weight if it is there
_OLD_NVIDIA_STAGE = re.compile(r"^layer(\d+)\.")  # "layer1." of the releases 20.12 and 21.03


def naming_of(state: Mapping[str, Tensor]) -> str:
    """The naming that a state dict follows.

    Raises:
        ValueError: it has the stem's weight under no known name.
    """
    for key, names in STEM_KEYS.items():
        if key in state:
            return next((name for name in names[1:] if _has_blocks(state, name)), names[0])
    raise ValueError(f"not an EfficientNet's state dict: none of {', '.join(STEM_KEYS)} is in it")


def _has_blocks(state: Mapping[str, Tensor], naming: str) -> bool:
    """Whether a block is named as in this naming, which has the same stem as another."""
    pattern = NAMINGS[naming].block_pattern
    return any(pattern.fullmatch(key) for key in state)


def structure_of(state: Mapping[str, Tensor], naming: str) -> Structure:
    """Which blocks there are in each stage, and of which kind they are.

    Raises:
        ValueError: the tensors that show it are missing.
    """
    rules = NAMINGS[naming]
    pattern = rules.block_pattern
    found: dict[tuple[int, int], Shapes] = {}
    for key, value in state.items():
        if match := pattern.fullmatch(key):
            shapes = found.setdefault(_place(match), {}).setdefault(match["module"], [])
            if key.endswith(".weight"):
                shapes.append(value.shape)
    squeezes = any(not rules.squeeze.isdisjoint(modules) for modules in found.values())
    kinds = {place: _kind(rules, found[place], squeezes) for place in sorted(found)}
    if not rules.has_stage:
        return _split(state, list(kinds.values()), rules)
    stages: Structure = []
    for (stage, number), kind in kinds.items():
        block = number - sum(map(len, stages[:stage])) if rules.has_index else number
        if stage < 0:  # torchvision's features.0 is the stem
            raise ValueError(f"no block belongs at {_prefix(rules, stage, number, number)}*")
        if stage > len(stages) or block != (len(stages[stage]) if stage < len(stages) else 0):
            raise ValueError(
                f"no tensors of the block before {_prefix(rules, stage, number, number)}*"
            )
        if stage == len(stages):
            stages.append([])
        stages[stage].append(kind)
    return stages


def _kind(rules: Naming, modules: Shapes, squeezes: bool) -> str:
    """The kind of block that these modules make up: it has most of them, and little beyond."""

    def agreement(kind: str) -> tuple[int, int]:
        roles = dict(zip(rules.blocks[kind], KINDS[kind], strict=True))
        fitting = [m for m in modules if m in roles and _may_be(roles[m], modules[m])]
        return len(fitting), -len(roles)

    return max((k for k in rules.blocks if _may_be_among(k, squeezes)), key=agreement)


def _may_be_among(kind: str, squeezes: bool) -> bool:
    """Whether there may be such blocks in a network whose MBConv squeeze, or do not."""
    return "depthwise" not in KINDS[kind] or ("reduce" in KINDS[kind]) == squeezes


def _may_be(role: str, shapes: list[torch.Size]) -> bool:
    """Whether a convolution of this role has weights of these shapes.

    Names alone do not tell a depthwise convolution, which has a group for every channel, and a
    dense one, which looks at neighbours, from an expansion.
    """
    if role not in (EXPAND[0], DEPTHWISE[0], PROJECT[0], DENSE[0]):
        return True
    return all(_fits(role, s) for s in shapes if len(s) == 4)


def _fits(role: str, shape: torch.Size) -> bool:
    """Whether a weight's shape fits its role, in groups and in size."""
    if (shape[1] == 1) != (role == DEPTHWISE[0]):
        return False
    return role == DEPTHWISE[0] or (shape[2:] != (1, 1)) == (role == DENSE[0])


def convert(
    state: Mapping[str, Tensor], to: str = "torchvision", source: str | None = None
) -> dict[str, Tensor]:
    """Renames a state dict; the tensors are those given or views of them, in the same order.

    Names do not hold padding and BN constants: another family's network computes the same numbers
    only where these agree (see `families.FAMILIES`).

    Args:
        state: the state dict of an EfficientNet, in any naming.
        to: "torchvision", "timm" (or "timm_tf", which has the same names), "lukemelas", "monai",
            "nvidia" or "transformers".
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
    base = NAMINGS[found].base
    if base and NAMINGS[found].stem_key not in state:  # saved without the classifier around it
        classifier = NAMINGS[found].classifier
        state = {
            key if key.startswith(f"{classifier}.") else f"{base}{key}": value
            for key, value in state.items()
        }
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
    stage = int(groups["after"]) - 1 if "after" in groups else int(groups.get("stage", 0))
    if "letter" in groups:
        return stage, ord(groups["letter"]) - ord("a")
    return stage, int(groups["index" if "index" in groups else "block"])


def _split(state: Mapping[str, Tensor], blocks: list[str], rules: Naming) -> Structure:
    """Stages of blocks that are counted through: each begins where the shape of a block changes."""
    stages: Structure = []
    previous = None
    for index, kind in enumerate(blocks):
        prefix = _prefix(rules, 0, index, index)
        keys = [f"{prefix}{rules.in_block(role)}.weight" for role in (PROJECT[0], DEPTHWISE[0])]
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"{missing[0]} is missing, without which stages cannot be told apart")
        alike = (state[keys[0]].shape[:1], state[keys[1]].shape[2:], kind)
        if alike != previous:
            stages.append([])
            previous = alike
        stages[-1].append(kind)
    return stages


def _prefix(rules: Naming, stage: int, block: int, index: int = 0) -> str:
    letter = chr(ord("a") + block)
    return rules.block.format(stage=stage, after=stage + 1, block=block, index=index, letter=letter)


def _modules(naming: str, structure: Structure) -> Iterator[str]:
    """The modules that have parameters, in the order in which every family registers them."""
    rules = NAMINGS[naming]
    yield from rules.stem
    index = 0
    for stage, blocks in enumerate(structure):
        for block, kind in enumerate(blocks):
            prefix = _prefix(rules, stage, block, index)
            if kind not in rules.blocks:
                raise ValueError(f"{naming} has no FusedMBConv, and so no names for EfficientNetV2")
            yield from (f"{prefix}{module}" for module in rules.blocks[kind])
            index += 1
    yield from (name.format(head=len(structure) + 1) for name in rules.head)
    yield rules.classifier


def _reshape_squeeze_excite(state: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The weights of squeeze-and-excitation as [R,C] for linear layers, else as [R,C,1,1]."""
    rules = NAMINGS[naming]
    names = tuple(f"{name}.weight" for name in rules.squeeze)  # Keras's blocks end without a dot
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
