"""One step of the optimizer: the gradients of the readable images of all processes, and the update.

The gradient is that of the mean loss over these images, wherever they were read. Each process has
divided its sum by the images that the step was to have; the rest is made up once all know how many
could be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from effnet_fast.training.data.augmentation import Augmentation
from effnet_fast.training.data.loading import Batch
from effnet_fast.training.runs.optimization import local
from effnet_fast.training.runs.processes import Processes
from effnet_fast.training.runs.recipe import Recipe


class Steps:
    """Takes steps.

    Args:
        raw: the network.
        model: the network as `processes` prepared it, in training mode.
        optimizer: over its parameters.
        augmentation: on the device.
        weights: of the classes, float32 [classes], or None.
    """

    def __init__(
        self,
        raw: nn.Module,
        model: nn.Module,
        optimizer: Optimizer,
        augmentation: Augmentation,
        recipe: Recipe,
        processes: Processes,
        weights: Tensor | None,
    ) -> None:
        self.raw, self.model, self.recipe, self.processes = raw, model, recipe, processes
        self.plain_optimizer = optimizer
        self.optimizer = processes.prepare_optimizer(optimizer)
        self.augmentation, self.device = augmentation, processes.device
        self.weights = None if weights is None else weights.to(self.device)
        self.parameters = [p for p in raw.parameters() if p.requires_grad]
        self._buffers: list[Tensor] = []  # as they were before a step without an image

    def backward(self, group: Sequence[Batch]) -> Tensor:
        """Adds up the gradients of the batches of a step; this process's loss, float64 [].

        Of several processes all call the network as often, with no image where none can be read.
        """
        is_alone = self.processes.world == 1
        total = _images(group) if is_alone else sum(batch.total for batch in group)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._buffers = []
        if not _images(group) and not is_alone:
            self._buffers = [buffer.clone() for buffer in self.raw.buffers()]
        for index, batch in enumerate(group):
            if not len(batch.images) and is_alone:
                continue
            is_last = index == len(group) - 1
            with self.processes.synchronising(self.model, is_last), self._without_values(batch):
                losses = self.losses(batch)
                # Processes average their gradients; the sum over all images counts each once.
                share = losses.sum() * (self.processes.world / total)
                self.processes.accelerator.backward(share)
            loss += losses.detach().sum()
        return loss

    @contextlib.contextmanager
    def _without_values(self, batch: Batch) -> Iterator[None]:
        """Without an image BatchNorms have no statistics, unless others share theirs."""
        is_empty = not len(batch.images) and not self.recipe.sync_bn
        if is_empty:
            self.model.eval()
        try:
            yield
        finally:
            if is_empty:
                self.model.train()

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each image, float32 [N]."""
        x, targets = self.augmentation(
            batch.images.to(self.device, non_blocking=True),
            batch.labels.to(self.device, non_blocking=True),
        )
        with self.processes.accelerator.autocast():
            logits = self.model(x)
        return F.cross_entropy(
            logits.float(),
            targets,
            weight=self.weights,
            label_smoothing=self.recipe.label_smoothing,
            reduction="none",
        )

    def update(self, group: Sequence[Batch], images: Tensor) -> bool:
        """Moves the weights by the gradients; False where no process has read an image.

        Args:
            images: that all processes have read, float64 []. A GPU is waited for only by a process
                that has read none: the others know that there are some.
        """
        is_empty = not _images(group) and not images.item()
        if is_empty:
            for buffer, before in zip(self.raw.buffers(), self._buffers, strict=False):
                buffer.copy_(before)
            self.plain_optimizer.zero_grad()
            self.plain_optimizer.step()  # without gradients it moves nothing
            return False
        self._make_up(sum(batch.total for batch in group), images)
        if self.recipe.clip:
            self.processes.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def _make_up(self, total: int, images: Tensor) -> None:
        """Makes gradients of a sum over `total` those of the mean over the images."""
        if self.processes.world == 1:
            return  # it was divided by them
        factor: Any = (total / images).float()
        if self.device.type == "cpu":
            factor = total / images.item()
            if factor == 1.0:
                return
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, factor)


def _images(group: Sequence[Batch]) -> int:
    """Images of the batches that could be read."""
    return sum(len(batch.images) for batch in group)
