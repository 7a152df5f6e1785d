"""Networks trained in several processes with SyncBatchNorm, and in one on the joined batch.

A job is run by every process on its share of the batch, after the job before; results come back
through files. Losses are sums over images, so that the gradients of the processes add up to those
of the joined batch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import effnet_fast
import torchvision_cpu  # noqa: F401  (before any import of torchvision)
from effnet_fast.modules import sync_batch_norm
from effnet_fast.ops.exchange import Exchange

Results = dict[str, Tensor]
Change = Callable[[nn.Module], object]


def nothing(_: object) -> None:
    """Changes nothing."""


def calm(model: nn.Module) -> nn.Module:
    """In training, without random draws."""
    model.train()
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.eval()
    return model


def reference() -> contextlib.AbstractContextManager[Any]:
    return effnet_fast.use_backend("reference")


@dataclass(frozen=True)
class Job:
    """What the processes run.

    Attributes:
        model: in training mode, with BatchNorm2d, which becomes SyncBatchNorm.
        shares: images of each process.
        prepare: called in each process with the converted model.
        around: a context in which it runs.
    """

    model: nn.Module
    shares: tuple[Tensor, ...]
    prepare: Change = nothing
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def shares(x: Tensor, *counts: int) -> tuple[Tensor, ...]:
    """Images for each process, so many of x [N,C,H,W] in order."""
    return x.split(list(counts))


def grad_of(y: Tensor, first: int) -> Tensor:
    """A fixed random gradient of the results y of images `first` and on."""
    rows = []
    for place in range(first, first + len(y)):
        generator = torch.Generator().manual_seed(place)
        rows.append(torch.randn(y.shape[1:], generator=generator))
    return torch.stack(rows).to(y.dtype) if rows else torch.zeros_like(y)


def step(model: nn.Module, x: Tensor, first: int = 0) -> Results:
    """Results as of `networks.run_network`; x are the images `first` and on of the batch."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(grad_of(y, first))
    grads = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    found = {"y": y.detach().clone()}
    found |= {f"grad {k}": v.clone() for k, v in grads.items() if v is not None}
    return found | {f"buffer {k}": v.clone() for k, v in model.named_buffers()}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many BatchNorms the fused passes and the reference's forward ran."""
    calls = {"fused": 0, "reference": 0}
    merge, forward = Exchange.merge, sync_batch_norm.forward

    def fused(*arguments: Any) -> Tensor:
        calls["fused"] += 1
        return merge(*arguments)

    @functools.wraps(forward)
    def served(*arguments: Any) -> Tensor:
        calls["reference"] += 1
        return forward(*arguments)

    Exchange.merge, sync_batch_norm.forward = fused, served  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Exchange.merge, sync_batch_norm.forward = merge, forward  # type: ignore[method-assign]


def _process(rank: int, world: int, folder: str, jobs: dict[str, Job]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        found = {}
        for name, job in jobs.items():
            # What a process is sent lies in memory that it shares with the others.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(job.model))
            job.prepare(model)
            first = sum(map(len, job.shares[:rank]))
            with job.around(), counted() as calls:
                results = step(model, job.shares[rank], first)
            found[name] = results, calls
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(world: int, folder: Path, jobs: dict[str, Job]) -> list[dict[str, tuple[Results, Any]]]:
    """Of each process, by the jobs' names, its results and how many norms ran how."""
    torch.multiprocessing.spawn(_process, (world, str(folder), jobs), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def joined(ranks: list[Results]) -> Results:
    """The results of the processes as those of one: images in a row, gradients added up.

    Raises:
        AssertionError: the buffers of two processes differ in a bit.
    """
    found = {}
    for name, first in ranks[0].items():
        each = [results[name] for results in ranks]
        if name in ("y", "grad x"):
            found[name] = torch.cat(each)
        elif name.startswith("grad "):
            found[name] = torch.stack(each).double().sum(0).to(first.dtype)
        else:
            assert all(first.equal(other) for other in each), f"{name} differs"
            found[name] = first
    return found


def alone(model: nn.Module, x: Tensor) -> Results:
    """What a copy of the model gives in this process on the whole batch."""
    dtype = next(model.parameters()).dtype
    return step(copy.deepcopy(model), x.to(dtype))
