"""What happens to a batch on the device: flip, RandAugment, mixing, erasing, normalisation.

Flip, mixup and normalisation need the core's packages alone; RandAugment, cutmix and erasing run
in kornia.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.training.extras import require

DRAWS = 8  # of RandAugment's operations per batch; images that share one are computed together
MAGNITUDES = 30  # RandAugment's scale, which ends before this
ERASED = (0.02, 0.33)  # share of an image's area; torchvision's and the paper's default
ERASED_RATIO = (0.3, 3.3)  # of the rectangle's sides


class Augmentation(nn.Module):
    """A training batch of uint8 pixels, augmented and normalised on its device.

    The order: flip, RandAugment, normalisation, erasing (to 0, the mean colour), mixing. Random
    numbers come from a generator of its own, whose state is part of `state_dict()`; other
    generators are left as they are.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
        num_classes: of the targets that mixing makes.
        flip: probability that an image is mirrored.
        randaugment: number of operations, and their magnitude between 0 and 30; or None. The
            operations are drawn 8 times per batch at most.
        mixup, cutmix: alpha of the Beta distribution; 0 does without. With both, each batch is
            mixed by one or the other.
        erasing: probability that a rectangle of an image is erased.
        seed: of the generator.

    Raises:
        ValueError: an argument out of range.
        ImportError: RandAugment, cutmix or erasing without kornia.

    Source: RandAugment, arXiv 1909.13719; mixup, arXiv 1710.09412; cutmix, arXiv 1905.04899;
        random erasing, arXiv 1708.04896.
    """

    mean: Tensor
    std: Tensor

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
        for name, value in (("flip", flip), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not value >= 0:
                raise ValueError(f"{name} must be an alpha of at least 0, got {value!r}")
        if randaugment is not None and not (
            randaugment[0] >= 1 and 0 < randaugment[1] < MAGNITUDES
        ):
            raise ValueError(
                "randaugment must be a number of operations of at least 1, and a magnitude "
                f"between 0 and {MAGNITUDES}; got {randaugment!r}"
            )
        self.num_classes = num_classes
        self.flip, self.mixup, self.cutmix = flip, mixup, cutmix
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.generator = torch.Generator().manual_seed(seed)
        self._randaugment: Any = None
        self._erasing: Any = None
        self._cutmix: Any = None
        if randaugment is not None:
            auto = require("kornia.augmentation.auto", "train")
            count, magnitude = randaugment
            # Matrices of the operations are of no use here.
            self._randaugment = auto.RandAugment(
                count, magnitude, transformation_matrix_mode="skip"
            )
        if erasing:
            kornia = require("kornia.augmentation", "train")
            self._erasing = kornia.RandomErasing(scale=ERASED, ratio=ERASED_RATIO, p=erasing)
        if cutmix:
            kornia = require("kornia.augmentation", "train")
            self._cutmix = kornia.RandomCutMixV2(
                beta=cutmix, p=1.0, data_keys=["input", "class"], use_correct_lambda=True
            )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Args:
            images: uint8 [N,3,R,R].
            labels: int64 [N].

        Returns:
            float32 [N,3,R,R], channels_last, normalised; and labels as they are or, where the
            batch was mixed, a probability per class, float32 [N,num_classes].
        """
        with self._own_random_numbers(images.device):
            x = images.to(torch.float32) / 255
            if self.flip:
                turned = torch.rand(len(x)).to(x.device) < self.flip
                x = torch.where(turned[:, None, None, None], x.flip(-1), x)
            if self._randaugment is not None and len(x):
                size = -(-len(x) // DRAWS)
                x = torch.cat([self._randaugment(part) for part in x.split(size)]).clamp(0, 1)
            x = (x - self.mean) / self.std
            if self._erasing is not None and len(x):
                x = self._erasing(x)
            targets = labels
            if (self.mixup or self.cutmix) and len(x):
                x, targets = self._mix(x, labels)
        return x.contiguous(memory_format=torch.channels_last), targets

    def _mix(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes every image with the one before it, or pastes a part of another one into it."""
        # A draw in both cases, so that what follows does not depend on the settings.
        cuts = torch.rand(()).item() < 0.5
        if self.cutmix and (cuts or not self.mixup):
            x, mixed = self._cutmix(x, labels)
            first, second, share = mixed[0].unbind(1)
            return x, self._targets(first.long(), second.long(), share)
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().to(x.device)
        x = x * share + x.roll(1, 0) * (1 - share)
        return x, self._targets(labels, labels.roll(1, 0), share.expand(len(labels)))

    def _targets(self, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        """Probabilities [N,num_classes]: the first class's share, the second has the rest."""
        one, other = (F.one_hot(labels, self.num_classes) for labels in (first, second))
        return one * share[:, None] + other * (1 - share[:, None])

    @contextlib.contextmanager
    def _own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Seeds the global generators, which kornia uses, from the own one, and takes it back."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the generator's state."""
        self.generator.set_state(state.cpu())
