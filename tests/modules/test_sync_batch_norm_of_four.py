"""SyncBatchNorm and DistributedDataParallel in four processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import synced
from effnet_fast.models.variants import VARIANTS
from networks import TINY, assert_alike, pair, random_images, trio
from synced import Job, calm
from tolerances import assert_parity

WORLD = 4
RESOLUTION = 32
X = random_images(14, RESOLUTION)
COUNTS = 3, 5, 2, 4
SHARES = synced.shares(X, *COUNTS)

pytestmark = pytest.mark.slow


def groups_of_two(model: nn.Module) -> None:
    """Every second norm meets one other process alone."""
    groups = [dist.new_group([rank, rank + 1]) for rank in range(0, WORLD, 2)]
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    for norm in norms[::2]:
        norm.process_group = groups[dist.get_rank() // 2]


def test_groups_that_differ_between_layers(tmp_path: Any) -> None:
    """Fused and by the reference: statistics and gradients of the same groups."""
    model = calm(pair(TINY).actual)
    jobs = {
        "fused": Job(model, SHARES, groups_of_two),
        "reference": Job(copy.deepcopy(model), SHARES, groups_of_two, synced.reference),
    }
    for found in synced.run(WORLD, tmp_path, jobs):
        results, calls = zip(*(found[name] for name in jobs), strict=True)
        assert [call["reference"] == 0 for call in calls] == [True, False]
        assert_alike(*results)


def network() -> Any:
    """B0 as published, in training and without random draws."""
    return calm(trio(VARIANTS["b0"], RESOLUTION).actual)


def _ddp_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        model = DistributedDataParallel(network())
        # On a CPU DistributedDataParallel refuses what is converted before.
        nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
        y = model(SHARES[rank])
        # It averages gradients; the loss is a sum over all images.
        (y * synced.grad_of(y, sum(COUNTS[:rank]))).sum().mul(WORLD).backward()
        grads = {f"grad {k}": p.grad for k, p in model.module.named_parameters()}
        buffers = {f"buffer {k}": b for k, b in model.module.named_buffers()}
        torch.save({"y": y.detach(), **grads, **buffers}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_data_parallel_is_one_process_on_the_joined_batch(tmp_path: Any) -> None:
    """Gradients, which are the same in every process, and running statistics."""
    torch.multiprocessing.spawn(_ddp_process, (str(tmp_path),), nprocs=WORLD)
    ranks: list[dict[str, Tensor]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, tensor in ranks[0].items():
        if name != "y":
            assert all(tensor.equal(rank[name]) for rank in ranks), name
    actual = ranks[0] | {"y": torch.cat([rank["y"] for rank in ranks])}
    three = trio(VARIANTS["b0"], RESOLUTION)
    stock, exact = (synced.alone(calm(m), X) for m in (three.stock, three.exact))
    for results in (stock, exact):
        del results["grad x"]
    assert_parity(actual, stock, exact)
