"""Which layers an encoder's feature maps come from, in timm's form.

Source: FeatureInfo and feature_take_indices in timm/models/_features.py,
https://github.com/huggingface/pytorch-image-models; encoders/efficientnet.py and
timm_efficientnet.py of segmentation_models_pytorch 0.6,
https://github.com/qubvel-org/segmentation_models.pytorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effnet_fast.models.variants import B0_STAGES, Variant

OutIndices = int | Sequence[int]
# Whose choice of the map at each stride: "timm" is the last layer there, which lukemelas's
# extract_endpoints takes, too; "smp" and "smp_timm" are segmentation_models_pytorch's own
# encoders and those that it makes of timm's network.
ENDPOINTS = ("timm", "smp", "smp_timm")


def describe(variant: Variant) -> list[dict[str, Any]]:
    """Stem and stages in order: module, its output's channels, its stride in input pixels."""
    reduction = 2
    rows = [{"module": "features.0", "num_chs": variant.stem_channels, "reduction": reduction}]
    for index, stage in enumerate(variant.stages, start=1):
        reduction *= stage.stride
        row = {"num_chs": stage.out_channels, "reduction": reduction}
        rows.append({"module": f"features.{index}", **row})
    return [{**row, "stage": stage} for stage, row in enumerate(rows)]


def ends_of(variant: Variant, endpoints: str = "timm") -> list[dict[str, Any]]:
    """The rows of the maps, one for each stride, by somebody's choice.

    A row has `block` where its map is a block's inside a stage, not the stage's.

    Args:
        endpoints: one of ENDPOINTS. smp takes the stem's map at stride 2. In its own B0, the map
            at stride 16 is that of block 8, the first of stage 5; all others end a stage.

    Raises:
        ValueError: another name.
    """
    if endpoints not in ENDPOINTS:
        raise ValueError(f"endpoints must be one of {', '.join(ENDPOINTS)}, got {endpoints!r}")
    stages = describe(variant)
    ends = {row["reduction"]: row for row in stages}  # the last of each stride
    if endpoints != "timm":
        ends[2] = stages[0]
    if endpoints == "smp" and (variant.baseline, variant.depth) == (B0_STAGES, 1.0):
        ends[16] = {**ends[16], "module": "features.5.0", "block": 0}
    return list(ends.values())


def take_indices(count: int, indices: OutIndices | None) -> list[int]:
    """The places in a list of `count`, in increasing order.

    Args:
        count: length of the list.
        indices: None for all, an int for the last n, or places, counted from the end if negative.

    Raises:
        IndexError: a place outside the list, or more than `count`.
        TypeError: places that are not ints.
        ValueError: no place, or one place twice.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= count:
            raise IndexError(f"the last {indices} of {count} feature maps: must be 1 to {count}")
        return list(range(count - indices, count))
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise TypeError(f"indices must be an int or a sequence of ints, got {indices!r}")
    taken = []
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"an index of a feature map must be an int, got {index!r}")
        if not -count <= index < count:
            raise IndexError(
                f"feature map {index} is out of range: there are {count}, {-count} to {count - 1}"
            )
        taken.append(index % count)
    if not taken or len(set(taken)) < len(taken):
        raise ValueError(f"indices must name at least one feature map, each once, got {indices!r}")
    return sorted(taken)


class FeatureInfo(list[dict[str, Any]]):
    """The feature maps: one layer at each stride, five in the published networks.

    A list of their dicts, as timm's wrappers take it.

    Args:
        stages: rows of `describe`.
        out_indices: which maps are given out, as for `take_indices`; None for all.
        ends: rows of `ends_of`; None for the last layer at each stride.

    Attributes:
        stages: stem and stages.
        info: the list itself, as in timm's class of this name: the maps, each a dict of index,
            stage, module, num_chs (C) and reduction (stride).
        out_indices: the maps given out, in increasing order.
    """

    def __init__(
        self,
        stages: list[dict[str, Any]],
        out_indices: OutIndices | None = None,
        ends: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.stages = stages
        if ends is None:
            ends = list({row["reduction"]: row for row in stages}.values())
        super().__init__({"index": index, **row} for index, row in enumerate(ends))
        self.out_indices = tuple(take_indices(len(self), out_indices))

    @property
    def info(self) -> list[dict[str, Any]]:
        return self

    def get(self, key: str, idx: OutIndices | None = None) -> Any:
        """The value of each map given out; of map `idx`, or of a list of maps, where asked for."""
        if idx is None:
            idx = self.out_indices
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in idx]

    def get_dicts(self, keys: list[str] | None = None, idx: OutIndices | None = None) -> Any:
        """The maps' dicts, or some of their keys; which maps, as for `get`."""
        if idx is None:
            idx = self.out_indices
        if isinstance(idx, int):
            row = self[idx]
            return row if keys is None else {key: row[key] for key in keys}
        return [self.get_dicts(keys, i) for i in idx]

    def places(self, variant: Variant) -> tuple[list[int], int]:
        """Where the maps given out are among the modules that are called in turn.

        Returns:
            their places, and the stage whose blocks are called one by one because a map is taken
            inside of it, or -1: stem and other stages count as one module each.
        """
        rows = self.get_dicts()
        split = next((row["stage"] for row in rows if "block" in row), -1)
        if split < 0:
            return [row["stage"] for row in rows], -1
        last = variant.stages[split - 1].repeats - 1  # so many modules more than stages
        places = []
        for row in rows:
            place: int = row["stage"] + (last if row["stage"] >= split else 0)
            places.append(place - last + row["block"] if "block" in row else place)
        return places, split

    def channels(self, idx: OutIndices | None = None) -> Any:
        """C of each map given out, or as for `get`."""
        return self.get("num_chs", idx)

    def reduction(self, idx: OutIndices | None = None) -> Any:
        """Stride of each map given out, in input pixels, or as for `get`."""
        return self.get("reduction", idx)

    def module_name(self, idx: OutIndices | None = None) -> Any:
        """Path of the module whose output each map is, or as for `get`."""
        return self.get("module", idx)
