"""BatchNorm by the batches of all processes of a group, and what the processes tell each other.

What they exchange is what `torch.nn.SyncBatchNorm` exchanges, call for call: in forward a gather of
mean, rstd and count, [2C+1], in backward a sum of [2C]. A process whose module runs PyTorch's own
code, as for a hook that it alone has, therefore meets processes whose modules run fused.

Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), of two parts,
here of as many as there are processes; torch/nn/modules/_functions.py of torch 2.11 to 2.13.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = Any  # a process group


class Merged(NamedTuple):
    """Of the values of all processes, in float64: equal in every bit in each of them."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    total: Tensor  # the number of values per channel, 0 where no process has any


def merge(mean: Tensor, rstd: Tensor, count: int, eps: float, group: Group) -> Merged:
    """Mean and variance of the values that all processes have.

    Args:
        mean, rstd: [C] of this process's values, fp32 or fp64; not read where there are none.
        count: of this process's values per channel.
        eps: what rstd = (var + eps) ** -0.5 has, the same in every process.
        group: whose processes all call this.
    """
    channels = mean.numel()
    own = mean.new_zeros(2 * channels + 1)
    if count:
        torch.cat((mean, rstd, mean.new_full((1,), count)), out=own)
    means, rstds, counts = _gathered(own, group).double().split((channels, channels, 1), 1)
    total = counts.sum()
    divisor = total.clamp_min(1.0)
    merged = (counts * means).sum(0) / divisor
    var = (rstds.pow(-2) - eps).clamp_min(0.0)
    terms = torch.where(counts > 0, counts * (var + (means - merged).square()), 0.0)
    return Merged(merged, terms.sum(0) / divisor, total)


def _gathered(own: Tensor, group: Group) -> Tensor:
    """Row [n] of each process in the order of their ranks, by the call that PyTorch's layer does.

    The gloo backend has no gather into one tensor.
    """
    size = dist.get_world_size(group)
    if own.device.type == "cpu" or dist.get_backend(group) == "gloo":
        rows = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(rows, own, group)
        return torch.stack(rows)
    rows_in_one = own.new_empty(size * own.numel())
    dist.all_gather_into_tensor(rows_in_one, own, group)
    return rows_in_one.view(size, -1)


def add_up(sums: Tensor, rstd: Tensor, group: Group) -> Tensor:
    """The sums [2,C] over all processes, of du and of du * zh, from those of this process.

    rstd [C] is by the values of all. PyTorch's layer sends sums of du * (z - mean).
    """
    scale = torch.stack((torch.ones_like(rstd), rstd)).double()
    sent = (sums.double() / scale).to(sums.dtype).flatten()
    dist.all_reduce(sent, dist.ReduceOp.SUM, group)
    return sent.view_as(sums).double() * scale


def unbiased(count: Tensor) -> Tensor:
    """The factor from the biased variance of so many values to the unbiased one; 1 of one value.

    0 of none.
    """
    return count / (count - 1.0).clamp_min(1.0)


class _SyncBatchNorm(torch.autograd.Function):
    """Returns (y, mean, var, correction), the latter three as `Merged` and `unbiased`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        mean = var = x.new_zeros(x.shape[1], dtype=dtype)
        if count:
            var, mean = torch.var_mean(x.to(dtype), dims, correction=0)
        merged = merge(mean, (var + eps).rsqrt(), count, eps, group)
        mean, var = merged.mean.to(dtype), merged.var.to(dtype)
        ctx.save_for_backward(x, weight, mean, (merged.var + eps).rsqrt().to(dtype))
        ctx.group, ctx.count, ctx.dims = group, merged.total.clamp_min(1.0), dims
        ctx.dtypes = [None if v is None else v.dtype for v in (weight, bias)]
        y = torch.empty_like(x)
        if count:
            scale, shift = (None if v is None else v.to(dtype) for v in (weight, bias))
            y = F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, unbiased(merged.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.dim() - 2)]
        zh = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        du = grad_y.to(mean.dtype)
        sums = torch.stack((du.sum(ctx.dims), (du * zh).sum(ctx.dims)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            shift, slope = (add_up(sums, rstd, ctx.group) / ctx.count).to(mean.dtype)
            scale = rstd if weight is None else rstd * weight
            dz = du - shift.view(shape) - zh * slope.view(shape)
            grad_x = (dz * scale.view(shape)).to(x.dtype)
        needs, dtypes = ctx.needs_input_grad, ctx.dtypes
        return (
            grad_x,
            sums[1].to(dtypes[0]) if needs[1] else None,
            sums[0].to(dtypes[1]) if needs[2] else None,
            None,
            None,
        )


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, group: Group = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm by the batches of all processes of a group, each of which has one of its own.

    The gradients of weight and bias are those of this process's result alone, as of PyTorch's
    layer: DistributedDataParallel averages them. There is no second derivative.

    Args:
        x: [N,C,...], any floating dtype; N may differ from process to process and be 0.
        weight, bias: [C], or None for 1 and 0.
        eps: added to the variance, the same in every process.
        group: a process group whose processes all call this, None for all processes.

    Returns:
        y, of x's shape and dtype; mean and biased variance [C] over all processes, fp32 or wider;
        the factor that makes the variance unbiased, 0 where no process has a value.

    Source: Ioffe & Szegedy (arXiv 1502.03167); `torch.nn.SyncBatchNorm`, which runs on GPUs alone.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _SyncBatchNorm.apply(x, weight, bias, eps, group)
    return found
