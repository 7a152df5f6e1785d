"""What happens to a batch on the device: flip, RandAugment, mixing, erasing, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Augmentation(nn.Module):
    """A training batch of uint8 pixels, augmented and normalised on its device.

    Random numbers come from a generator of its own: its state is part of `state_dict()`.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
        num_classes: of the targets that mixing makes.
        flip: probability that an image is mirrored.
        randaugment: (number of operations, magnitude from 0 to 30), or None. Needs kornia.
        mixup, cutmix: alpha of the Beta distribution; 0 does without. Needs kornia. With both, a
            batch is mixed by one or the other.
        erasing: probability that a rectangle of an image is erased. Needs kornia.
        seed: of the generator.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        flip: float = 0.5,
        randaugment: tuple[int, float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erasing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.flip = flip
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Args:
            images: uint8 [N,3,R,R].
            labels: int64 [N].

        Returns:
            float32 [N,3,R,R], channels_last, normalised; and labels as they are or, where the
            batch was mixed, a probability per class, float32 [N,num_classes].
        """
        x = images.to(torch.float32) / 255
        turned = torch.rand(len(x), generator=self.generator) < self.flip
        x = torch.where(turned.to(x.device)[:, None, None, None], x.flip(-1), x)
        x = (x - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last), labels

    def get_extra_state(self) -> Any:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        """Takes the generator's state."""
        self.generator.set_state(state)
