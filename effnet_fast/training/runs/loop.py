"""`train`: a network on a folder of images, safely; what the command line calls."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

import effnet_fast
from effnet_fast.models import EfficientNet
from effnet_fast.models.variants import Variant
from effnet_fast.training.runs import freezing, network, run_folder, state
from effnet_fast.training.runs.feeding import RANK_SEEDS, Feed, Images
from effnet_fast.training.runs.processes import Processes, restarts
from effnet_fast.training.runs.recipe import DEFAULT_RECIPE, Recipe, read_recipe
from effnet_fast.training.runs.run_folder import RunFolder
from effnet_fast.training.runs.settings import LARGEST_SEED, Settings, check_same, described
from effnet_fast.training.runs.trainer import OnStep, Trainer


def train(
    data: Any,
    out: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] = DEFAULT_RECIPE,
    val: Any = None,
    model: str | Variant | None = Settings.model,
    weights: str | os.PathLike[str] | None = Settings.weights,
    resolution: int | None = Settings.resolution,
    seed: int = Settings.seed,
    precision: str = Settings.precision,
    memory: str = Settings.memory,
    grad_checkpointing: bool = Settings.grad_checkpointing,
    backend: str = Settings.backend,
    device: str = Settings.device,
    strategy: str = Settings.strategy,
    workers: int | None = Settings.workers,
    unreadable_limit: int | None = Settings.unreadable_limit,
    save_minutes: float = Settings.save_minutes,
    resume: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Trains a network; its weights and metrics are in the folder `out` afterwards.

    Under torchrun the processes train together. A run that ended early (a signal, a full disk, a
    killed process) is continued by the same call with resume=True: on a CPU with the same losses,
    bit for bit, as if nothing had happened.

    Args:
        data: as for `sources.open_images`; a folder may hold `train` and `val` (or `test`).
        out: the run's folder; `run_folder` says what is in it. It must be empty or not there,
            unless the run is resumed.
        recipe: "finetune", "paper", "quick", or a file that ends in .toml.
        val: validation images that are not in `data`.
        model, weights, resolution, seed, precision, memory, grad_checkpointing, backend, device,
            strategy, workers, unreadable_limit, save_minutes: see `Settings`.
        resume: continues the run in `out`; begins one where there is none.
        progress: shows a line on stderr.
        on_step: called with the number of steps and the mean loss of the last one.
        changes: fields of `Recipe` that replace the recipe's.

    Returns:
        "epochs", "steps", "top1" and "top5" (fractions) and "loss" of the validation images (None
        without any), "train_loss" of the last epoch, "images_per_second" of training, "seconds",
        "unreadable" (images), "model", "recipe", "classes", "out".

    Raises:
        ImportError: accelerate is missing, or what the recipe needs.
        OSError, ValueError: bad arguments or data; the folder is not empty, or another process
            trains in it; the message names what was given. `trainer.LossError`, a ValueError: the
            loss is no number.
        processes.StoppedError: SIGTERM or SIGINT ended the run after a whole step, whose state is
            saved.
    """
    settings = Settings(
        model=model,
        weights=None if weights is None else os.fspath(weights),
        resolution=resolution,
        seed=seed,
        precision=precision,
        memory=memory,
        grad_checkpointing=grad_checkpointing,
        backend=backend,
        device=device,
        strategy=strategy,
        workers=workers,
        unreadable_limit=unreadable_limit,
        save_minutes=save_minutes,
    )
    read = read_recipe(recipe, changes)
    with contextlib.ExitStack() as stack:
        processes = Processes(device, precision, strategy)
        stack.callback(processes.close)
        folder = RunFolder(out)
        stack.callback(folder.close)
        again = resume or restarts() > 0
        before = processes.from_main(lambda: folder.open(resume=again))
        now = described(data, val, settings, os.fspath(recipe), read, processes.world, before)
        if before:
            check_same(before, now)
        if before and before["metrics"] is not None:
            return {**before["metrics"], "out": os.fspath(out)}
        images = Images(data, val)
        _check_images(before, images)
        found = _state_of(folder, processes)
        net = _network(settings, read, images, processes, found)
        now |= _facts(net, images)
        state.seed_everything((seed + RANK_SEEDS * (1 + processes.rank)) % LARGEST_SEED)
        feed = Feed(images, read, settings, network.preset_of(net), processes)
        stack.callback(feed.close)
        options: dict[str, Any] = {
            "unreadable_limit": unreadable_limit,
            "save_seconds": 60.0 * save_minutes,
            "silent": not progress,
            "on_step": on_step,
        }
        trainer = Trainer(
            net, read, feed, folder, processes, weights=images.class_weights(read), **options
        )
        if found is not None:
            trainer.load(found)
            del found
        if processes.is_main:
            folder.write_description({**now, "metrics": None})
        metrics = {**trainer.run(), **_names(now), "out": os.fspath(out)}
        if processes.is_main:
            folder.write_description({**now, "metrics": metrics})
            (folder / run_folder.STATE).unlink(missing_ok=True)
        return metrics


def _names(now: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": now["model"], "recipe": now["recipe"], "classes": len(now["classes"])}


def _state_of(folder: RunFolder, processes: Processes) -> dict[str, Any] | None:
    """The state that the run continues from, in every process.

    Raises:
        ValueError: some processes see it, and others do not.
    """
    found = state.load(folder / run_folder.STATE)
    if len(set(processes.gather(found is None))) > 1:
        raise ValueError(f"{folder.path} must be on a file system that all processes see")
    return found


def _network(
    settings: Settings,
    recipe: Recipe,
    images: Images,
    processes: Processes,
    found: Mapping[str, Any] | None,
) -> EfficientNet:
    """The network on the device, ready to be trained; that of a state needs no file of weights."""
    options: dict[str, Any] = {"backend": settings.backend, "memory": settings.memory}
    if found is not None:
        net = network.rebuild(found["network"], recipe, **options)
    else:
        state.seed_everything(settings.seed)
        options["resolution"] = settings.resolution
        net = network.build(settings.model, settings.weights, recipe, images.classes, **options)
    net.to(processes.device)
    if not processes.is_sharded:  # fully_shard takes contiguous parameters alone
        plain: Any = net  # PyTorch's annotations leave memory_format out
        plain.to(memory_format=torch.channels_last)
    freezing.apply(net, recipe)
    if settings.grad_checkpointing:
        net.set_grad_checkpointing()
    return net


def _facts(net: EfficientNet, images: Images) -> dict[str, Any]:
    """What run.json has beside the arguments."""
    variant = net.variant
    preset = {
        name: getattr(variant, name)
        for name in ("resize", "crop", "mean", "std", "interpolation", "squash")
    }
    return {
        "model": variant.name,
        "classes": list(images.classes),
        "preset": preset,
        "images": images.counts(),
        "images_sha256": images.digest(),
        "versions": {
            "effnet_fast": effnet_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _check_images(before: Mapping[str, Any], images: Images) -> None:
    """Refuses to resume a run whose images are no longer those that it began with."""
    if not before:
        return
    for name, now in (("images", images.counts()), ("classes", list(images.classes))):
        if before[name] != now:
            raise ValueError(
                f"the {name} have changed since the run began: {before[name]}, now {now}"
            )
    if before.get("images_sha256", digest := images.digest()) != digest:
        raise ValueError(
            "the images have changed since the run began: as many, of other names or labels"
        )
