"""A network of any size as a file of random weights, which loading and training take."""

from __future__ import annotations

import os

import torch

from effnet_fast import checkpoints
from effnet_fast.checkpoints.facts import IMAGE_FIELDS
from effnet_fast.models import origin
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import Variant


def save_network(network: EfficientNet, path: str | os.PathLike[str]) -> None:
    """Writes a network's weights with its table of layers and the preset of its images.

    `EfficientNet.from_checkpoint(path)` builds it again, whatever its size.

    Args:
        network: scaled from B0, or from a table of MBConv with squeeze-and-excitation.
        path: a .safetensors file.

    Raises:
        ValueError: blocks or ends that a table in a file does not describe; another suffix.
        OSError: the file cannot be written.
    """
    if not origin.has_table(network.variant):
        raise ValueError(
            f"{network.variant.name} is no network of MBConv with SiLU, squeeze-and-excitation and "
            "symmetric padding, as a file's table describes"
        )
    if os.path.splitext(path)[1] != checkpoints.SAFETENSORS:
        raise ValueError(f"{os.fspath(path)}: the suffix must be {checkpoints.SAFETENSORS}")
    facts = origin.with_table(network._origin, network.variant)
    images = {name: getattr(network.variant, name) for name in IMAGE_FIELDS}
    facts = origin.with_images(facts, images)
    checkpoints.save(network.state_dict(), path, dict(facts))


def random_network(variant: Variant, seed: int = 0, num_classes: int = 1000) -> EfficientNet:
    """A network with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return EfficientNet(variant, num_classes=num_classes)
