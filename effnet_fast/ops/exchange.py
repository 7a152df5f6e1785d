"""What one BatchNorm in training tells the other processes of its group, in one call of an op.

Between two passes of an op: the norm [5,C] of a process's own values becomes that of all, and the
sums [2,C] inside dz become those of all. The kernels divide these sums by the number of values that
they see, so that the sums come back with the share of this process in the number of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops.norms import MEAN, RSTD
from effnet_fast.reference.sync_batch_norm import Group, add_up, merge, unbiased


class Exchange:
    """One BatchNorm's, in one forward and the backward of it.

    Args:
        group: a process group whose processes all run the same op now, None for all processes.

    Attributes:
        correction: the factor from the biased variance to the unbiased one, once forward has run.
        is_empty: whether no process has any value; False on a GPU, where nobody waits to know.
    """

    correction: float | Tensor = 1.0
    is_empty = False
    _share: Tensor

    def __init__(self, group: Group) -> None:
        self._group = group

    def merge(
        self, norm: Tensor, z: Tensor, eps: float, bn_weight: Tensor | None, bn_bias: Tensor | None
    ) -> Tensor:
        """The norm [5,C] by the values of all processes, from that by those of z [N,C,H,W]."""
        count = z.numel() // z.shape[1]
        mean, var, total = merge(norm[MEAN], norm[RSTD], count, eps, self._group)
        self._share = count / total.clamp_min(1.0)
        self.correction = unbiased(total)
        if total.device.type == "cpu":
            self.correction, self.is_empty = self.correction.item(), total.item() == 0
        rstd = (var + eps).rsqrt()
        scale = rstd if bn_weight is None else rstd * bn_weight
        shift = -mean * scale if bn_bias is None else bn_bias - mean * scale
        return torch.stack((scale, shift, mean, rstd, var)).to(norm.dtype)

    def sums(self, sums: Tensor, norm: Tensor) -> Tensor:
        """The sums [2,C] of all processes times this one's share, from its own.

        norm: what `merge` gave.
        """
        return (add_up(sums, norm[RSTD], self._group) * self._share).to(sums.dtype)
