"""The images of a run: its lists, their crops, and batches on the device."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.training.answers.evaluation import Truth
from effnet_fast.training.answers.inference import Answering, Read, computed
from effnet_fast.training.answers.metrics import TOP, Tally
from effnet_fast.training.data.augmentation import Augmentation
from effnet_fast.training.data.decoding import EvaluationCrop, TrainingCrop
from effnet_fast.training.data.loading import Batch, Loader
from effnet_fast.training.data.sampling import EpochSampler, dealt
from effnet_fast.training.data.sources import TABLES, open_images, splits
from effnet_fast.training.runs import freezing
from effnet_fast.training.runs.processes import Processes
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.settings import Settings

RANDAUGMENT_OPERATIONS = 2
STRIDE = 32  # of the network's last map
RANK_SEEDS = 1_000_003  # apart, so that processes augment differently


class Images:
    """Training images, and validation images where there are any.

    Args:
        data: as for `sources.open_images`; the folder may hold `train` and `val` (or `test`).
        val: validation images elsewhere; None takes those of `data`.

    Attributes:
        classes: names, in the order of the logits.

    Raises:
        OSError, ValueError: as `open_images`; images without labels.
    """

    def __init__(self, data: Any, val: Any = None) -> None:
        self.train: Any = open_images(data, split="train")
        if self.train.labels is None:
            raise ValueError(
                f"{data}: the images have no labels, which training needs: a folder per class, or "
                "a table with the column label; a dataset from Python has them as `targets`"
            )
        highest = max(self.train.labels, default=0)
        self.classes: tuple[str, ...] = self.train.classes or tuple(map(str, range(highest + 1)))
        self.val: Any = None
        if val is not None:
            self.val = open_images(val, classes=self.classes)
        elif _may_hold_validation(data):
            self.val = open_images(data, split="val", classes=self.classes)
            if list(self.val.paths) == list(self.train.paths):  # a table without splits
                self.val = None
        if self.val is not None and self.val.labels is None:
            raise ValueError(f"{val or data}: the validation images have no labels")

    def counts(self) -> dict[str, int]:
        """Numbers of images."""
        return {"train": len(self.train), "val": 0 if self.val is None else len(self.val)}

    def digest(self) -> str:
        """SHA-256 of all names and labels in their order, on which a resumed run depends."""
        found = hashlib.sha256()
        for images in (self.train, self.val):
            for path, label in zip(images.paths, images.labels, strict=True) if images else ():
                found.update(f"{label} {path}\0".encode("utf-8", "surrogateescape"))
            found.update(b"\0")
        return found.hexdigest()

    def class_weights(self, recipe: Recipe) -> Tensor | None:
        """A weight per class, float32, whose mean over the training images is 1."""
        if recipe.class_weights == "none":
            return None
        counts = Counter(self.train.labels)
        total, classes = len(self.train), len(self.classes)
        return torch.tensor([total / (classes * max(1, counts[c])) for c in range(classes)])


def _may_hold_validation(data: Any) -> bool:
    if not isinstance(data, (str, os.PathLike)):
        return False
    path = Path(data)
    return "val" in splits(path) if path.is_dir() else path.suffix.lower() in TABLES


class Feed:
    """Reads the images of this process, epoch by epoch.

    Args:
        images: of the run.
        preset: of the evaluation images, at the run's resolution.
        processes: has the device, and which images are this process's.

    Attributes:
        sampler: deals the training images; its position is part of a run's state.
        augmentation: on the device.
    """

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        settings: Settings,
        preset: ImageClassification,
        processes: Processes,
    ) -> None:
        device, rank, world = processes.device, processes.rank, processes.world
        self.recipe, self.preset = recipe, preset
        self.resolution: int = preset.crop_size[0]
        _check_statistics(len(images.train) // world, recipe, self.resolution)
        deal: Any = {"batch": recipe.batch, "rank": rank, "world": world}
        blocks = getattr(images.train, "sizes", None)  # of shards
        self.sampler = EpochSampler(len(images.train), seed=settings.seed, blocks=blocks, **deal)
        options: Any = {
            "workers": settings.workers,
            "pin": device.type == "cuda",
            "in_turn": device.type != "cuda",
        }
        self.training = Loader(images.train, seed=settings.seed, **options)
        self.validation: Loader | None = None
        self.processes = processes
        if images.val is not None:
            self.validation = Loader(images.val, **options)
            self.truth = Truth(images.val, list(images.classes), len(images.classes))
        randaugment = (RANDAUGMENT_OPERATIONS, recipe.randaugment) if recipe.randaugment else None
        self.augmentation = Augmentation(
            mean=preset.mean,
            std=preset.std,
            num_classes=len(images.classes),
            flip=recipe.flip,
            randaugment=randaugment,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            erasing=recipe.erasing,
            seed=settings.seed + RANK_SEEDS * rank,
        ).to(device)

    def train(self, epoch: int) -> Iterator[Batch]:
        """The training batches of an epoch, from the sampler's position on."""
        self.sampler.set_epoch(epoch)
        crop = TrainingCrop(
            freezing.resolution_of(epoch, self.recipe, self.resolution),
            scale=self.recipe.scale,
            ratio=self.recipe.ratio,
            interpolation=self.preset.interpolation,
        )
        return self.training.batches(self.sampler, crop)

    def evaluate(
        self, network: nn.Module, should_stop: Callable[[Batch], bool]
    ) -> dict[str, float | None] | None:
        """Loss and accuracy on the validation images, of all processes together.

        Args:
            network: in eval mode.
            should_stop: asked after each batch of this process, with the same answer in all.

        Returns:
            the mean "loss" (cross entropy), and "top1" and "top5" as fractions; nothing where there
            are no validation images, or none can be read; None if stopped.
        """
        if self.validation is None:
            return {}
        images, processes = self.validation.images, self.processes
        count = self.truth.count
        answering = Answering(
            network,
            images,
            self.preset,
            top=min(TOP, count),
            truth=self.truth.of,
            always=processes.is_sharded,
        )
        tally = Tally(count, matrix=False)
        order = dealt(len(images), self.recipe.batch, rank=processes.rank, world=processes.world)
        stopped = False

        def reads() -> Iterator[Read]:
            nonlocal stopped
            for batch in batches:
                yield Read.of_batch(batch)
                if stopped := should_stop(batch):
                    batches.close()

        batches: Any = self.validation.batches(order, EvaluationCrop(self.preset))
        for found in computed(answering, processes.device, reads()):
            tally.add(*found.counted())
        if stopped:
            return None
        tally.share(processes.add_up)
        if not tally.images:
            return {}
        return {"loss": tally.loss, "top1": tally.top1, "top5": tally.top5}

    def close(self) -> None:
        """Ends the worker processes."""
        self.training.close()
        if self.validation is not None:
            self.validation.close()


def _check_statistics(images: int, recipe: Recipe, resolution: int) -> None:
    """Refuses batches of a single number per channel, of which BatchNorm has no variance.

    Raises:
        ValueError: one image per step, so small that the last map is one pixel.
    """
    side = min(recipe.progressive or resolution, resolution)
    if min(images, recipe.batch) == 1 and side <= STRIDE:
        raise ValueError(
            f"one image of {side} pixels per step has one number per channel in the last layers, "
            f"and so no variance: training needs 2 images per step, or more than {STRIDE} pixels"
        )
