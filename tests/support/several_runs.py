"""What several processes of a run do together, as torchrun would start them, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import torchvision_cpu  # noqa: F401  (before any import of torchvision)
from effnet_fast.models import EfficientNet
from effnet_fast.training import train
from effnet_fast.training.runs import sharding
from effnet_fast.training.runs.feeding import Feed, Images
from effnet_fast.training.runs.optimization import make_optimizer
from effnet_fast.training.runs.processes import Processes
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.settings import Settings
from effnet_fast.training.runs.trainer import StoppedError
from networks import TINY, calibrated_state, random_images

Job = tuple[Callable[..., Any], dict[str, Any]]  # a function of this module, and its arguments


class CrashError(Exception):
    """What ends a run in the middle."""


def trained(crash: int | None = None, **arguments: Any) -> dict[str, Any]:
    """What `train` gives: metrics, the losses by step, or the error.

    crash: after which step the run ends without having saved it.
    """
    losses: dict[int, float] = {}

    def on_step(step: int, loss: float) -> None:
        losses[step] = loss
        if step == crash:
            raise CrashError

    try:
        metrics = train(on_step=on_step, **arguments)
    except (ValueError, CrashError, StoppedError) as error:
        return {"error": f"{type(error).__name__}: {error}", "losses": losses}
    return {"metrics": metrics, "losses": losses}


def network(classes: int = 3) -> EfficientNet:
    """A calibrated network, the same one at every call."""
    state = {k: v.clone() for k, v in calibrated_state(TINY).items() if "classifier" not in k}
    torch.manual_seed(0)
    model = EfficientNet(TINY, num_classes=classes)
    model.load_state_dict(state, strict=False)
    return model.eval()


def evaluated(data: str, strategy: str = "ddp", batch: int = 4) -> dict[str, float | None] | None:
    """Loss and accuracy on the validation images."""
    processes = Processes("cpu", "fp32", strategy)
    try:
        images = Images(data)
        model = network(len(images.classes))
        from effnet_fast.training.runs.network import preset_of

        settings = Settings(workers=0, device="cpu")
        feed = Feed(images, Recipe(batch=batch), settings, preset_of(model), processes)
        processes.prepare(model)
        return feed.evaluate(model.eval(), lambda _: False)
    finally:
        processes.close()


def stepped(strategy: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a random network after six steps of AdamW on batches of three: ill-conditioned."""
    processes = Processes("cpu", "fp32", strategy)
    try:
        torch.manual_seed(0)
        model = EfficientNet(TINY, num_classes=3).to(dtype).train()
        for module in model.modules():
            if type(module).__name__ in ("Dropout", "StochasticDepth"):
                module.eval()
        wrapped = processes.prepare(model)
        optimizer = make_optimizer(model, Recipe(), 3, is_sharded=processes.is_sharded)
        for step in range(6):
            x = random_images(3, 32, seed=step * processes.world + processes.rank).to(dtype)
            F.cross_entropy(wrapped(x), torch.arange(3)).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = sharding.model_state(model, processes.is_sharded)
        return {name: value.clone() for name, value in state.items()}
    finally:
        processes.close()


def _process(rank: int, world: int, folder: str, jobs: dict[str, Job]) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}  # which nobody asks
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        found = {name: job(**arguments) for name, (job, arguments) in jobs.items()}
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(world: int, folder: Path, jobs: dict[str, Job]) -> list[dict[str, Any]]:
    """Of each process, what the jobs gave, one after the other, by their names."""
    torch.multiprocessing.spawn(_process, (world, str(folder), jobs), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
