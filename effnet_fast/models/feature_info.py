"""Which layers an encoder's feature maps come from, in timm's form.

Source: FeatureInfo and feature_take_indices in timm/models/_features.py,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effnet_fast.models.variants import Variant

OutIndices = int | Sequence[int]


def describe(variant: Variant) -> list[dict[str, Any]]:
    """Stem and stages in order: module, its output's channels, its stride in input pixels."""
    reduction = 2
    rows = [{"module": "features.0", "num_chs": variant.stem_channels, "reduction": reduction}]
    for index, stage in enumerate(variant.stages, start=1):
        reduction *= stage.stride
        row = {"num_chs": stage.out_channels, "reduction": reduction}
        rows.append({"module": f"features.{index}", **row})
    return [{**row, "stage": stage} for stage, row in enumerate(rows)]


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
    """The feature maps: the last layer at each stride, five in the published networks.

    A list of their dicts, as timm's wrappers take it.

    Args:
        stages: rows of `describe`.
        out_indices: which maps are given out, as for `take_indices`; None for all.

    Attributes:
        stages: stem and stages.
        info: the list itself, as in timm's class of this name: the maps, each a dict of index,
            stage, module, num_chs (C) and reduction (stride).
        out_indices: the maps given out, in increasing order.
    """

    def __init__(self, stages: list[dict[str, Any]], out_indices: OutIndices | None = None) -> None:
        self.stages = stages
        ends = {row["reduction"]: row for row in stages}  # the last of each stride
        super().__init__({"index": index, **row} for index, row in enumerate(ends.values()))
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

    def channels(self, idx: OutIndices | None = None) -> Any:
        """C of each map given out, or as for `get`."""
        return self.get("num_chs", idx)

    def reduction(self, idx: OutIndices | None = None) -> Any:
        """Stride of each map given out, in input pixels, or as for `get`."""
        return self.get("reduction", idx)

    def module_name(self, idx: OutIndices | None = None) -> Any:
        """Path of the module whose output each map is, or as for `get`."""
        return self.get("module", idx)
