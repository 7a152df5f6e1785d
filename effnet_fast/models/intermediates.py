"""The feature maps inside a classifier: to give them out, and to do without what follows them.

Source: forward_intermediates and prune_intermediate_layers in timm/models/efficientnet.py,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effnet_fast.models.backbone import Backbone
from effnet_fast.models.execution import on_backend
from effnet_fast.models.feature_info import OutIndices, take_indices
from effnet_fast.modules import in_turn


class Intermediates(Backbone):
    """Base of `EfficientNet`: its methods about the maps that `feature_info` lists."""

    if TYPE_CHECKING:  # TorchScript cannot read what is postponed
        num_features: int
        head_hidden_size: int

    def forward_intermediates(
        self,
        x: Tensor,
        indices: OutIndices | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        extra_blocks: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last feature map, and those on the way.

        Args:
            x: [N,in_chans,H,W].
            indices: which of the maps that `feature_info` lists: None for all, an int for the last
                n, or places, counted from the end if negative.
            norm: kept for timm's signature; maps end in their own normalisation.
            stop_early: run no stage after the last requested map; without the last stage the head
                does not run either.
            output_fmt: "NCHW", the order of the dimensions.
            intermediates_only: leave the last feature map out.
            extra_blocks: count stem and every stage instead, eight in the published networks.

        Returns:
            (x, maps) with x from `forward_features` and maps in the order of the network; or maps.

        Raises:
            ValueError: another output_fmt, or indices that are empty or repeated.
            IndexError, TypeError: indices outside the maps, or not ints.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        info = self.feature_info.stages if extra_blocks else self.feature_info.info
        taken = self._stages_of(info, take_indices(len(info), indices))
        if torch.compiler.is_compiling():
            x, maps = self._walk(x, taken, stop_early)
        else:
            with on_backend(self):
                x, maps = self._walk(x, taken, stop_early)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: OutIndices | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
        extra_blocks: bool = False,
    ) -> list[int]:
        """Removes, in place, the layers that some of the maps do without, as timm's wrappers ask.

        The last convolution goes with the last stage, with the classifier, or with `prune_norm`;
        the classifier goes with the last convolution. `forward_features` then ends at the last map
        that is left, and `num_features` is the number of its channels.

        Args:
            indices, extra_blocks: as in `forward_intermediates`.
            prune_norm: remove the last convolution.
            prune_head: remove the classifier and the pooling.

        Returns:
            The places of the maps, for `forward_intermediates`, in the order of the network.

        Raises:
            ValueError, IndexError, TypeError: as `forward_intermediates`.
        """
        info = self.feature_info.stages if extra_blocks else self.feature_info.info
        places = take_indices(len(info), indices)
        last = self._stages_of(info, places)[-1]
        if prune_norm or prune_head or last < self._count_stages():
            del self.features[last + 1 :]
            self.num_features = self.head_hidden_size = self.feature_info.stages[last]["num_chs"]
            self._own_plan.forget()
            self.reset_classifier(0, "")
        return places

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, as `EfficientNet` makes it."""
        raise NotImplementedError

    def _stages_of(self, info: Any, places: list[int]) -> list[int]:
        """The children of `features` that maps come from; IndexError for one that was removed."""
        stages: list[int] = [info[place]["stage"] for place in places]
        if stages[-1] >= len(self.features):
            raise IndexError(
                f"feature map {places[-1]} comes from features.{stages[-1]}, and "
                f"{len(self.features)} children of features are left"
            )
        return stages

    def _walk(self, x: Tensor, taken: list[int], stop_early: bool) -> tuple[Tensor, list[Tensor]]:
        children = list(self.features)
        last = taken[-1] + 1
        # The head comes after the stages.
        if stop_early and last < len(self.feature_info.stages):
            children = children[:last]
        y, maps = in_turn.run(children, self._prepared(x), taken)
        finished = [self._finished(m, x, i) for m, i in zip(maps, taken, strict=True)]
        return self._finished(y, x, len(children) - 1), finished
