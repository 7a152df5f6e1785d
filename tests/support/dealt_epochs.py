"""A process of a few that share an epoch: `python dealt_epochs.py FOLDER MEETING RANK WORLD`.

Every process reads its batches and computes the gradients of a linear layer on them under gloo.
The first one prints, as JSON, which images all of them read, and how far the gradients lie from
those of the joined batches.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from effnet_fast.training.data.decoding import TrainingCrop
from effnet_fast.training.data.loading import Batch, Loader
from effnet_fast.training.data.sampling import EpochSampler
from effnet_fast.training.data.sources import ShardList, open_images

BATCH, SIDE, SEED, EPOCHS = 4, 8, 7, 2


def gradient(layer: torch.nn.Linear, batch: Batch, total: int, world: int) -> torch.Tensor:
    """Of the mean loss over `total` images, as far as this batch goes; DDP divides by `world`."""
    layer.zero_grad()
    x = batch.images.flatten(1).float() / 255
    (F.cross_entropy(layer(x), batch.labels, reduction="sum") * world / total).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


def main(data: str, meeting: str, rank: int, world: int) -> None:
    """Reads EPOCHS epochs."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3 * SIDE * SIDE, 3)
    images = open_images(data)
    blocks = images.sizes if isinstance(images, ShardList) else None
    read, worst = [], 0.0
    with Loader(images, seed=SEED) as loader, Loader(images, seed=SEED) as joined:
        for epoch in range(EPOCHS):
            sampler = EpochSampler(
                len(images), batch=BATCH, seed=SEED, rank=rank, world=world, blocks=blocks
            )
            sampler.set_epoch(epoch)
            for batch in loader.batches(sampler, TrainingCrop(SIDE)):
                own: list[list[int]] = [[] for _ in range(world)]
                dist.all_gather_object(own, batch.indices.tolist())
                mine = gradient(layer, batch, batch.total, world)
                dist.all_reduce(mine)
                together = [i for indices in own for i in indices]
                (whole,) = joined.batches([together], TrainingCrop(SIDE), epoch=epoch)
                exact = gradient(layer, whole, batch.total, 1)
                worst = max(worst, float((mine / world - exact).norm() / exact.norm()))
                read.append(own)
    if rank == 0:
        print(json.dumps({"read": read, "worst": worst}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
