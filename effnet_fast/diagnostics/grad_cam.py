"""Grad-CAM: which parts of an image speak for a class.

    cam = relu(sum_k alpha_k A_k),   alpha_k = mean over places of d logit / d A_k

with A the last feature map [K,h,w]. Only pooling and classifier are differentiated, so the network
itself runs as in inference.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization" (arXiv 1610.02391), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.models.efficientnet import EfficientNet

if TYPE_CHECKING:
    from PIL import Image

OPACITY = 0.65  # of the colours where the map is 1
# Red, green and blue at equal steps from 0 to 1: dark violet, magenta, orange, light yellow. Each
# is brighter than the one before, so that the order shows without colours, too.
ANCHORS = ((20, 11, 53), (101, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))


def grad_cam(model: EfficientNet, x: Tensor, classes: Sequence[int] | None = None) -> Tensor:
    """The maps of images, from 0 to 1 each; 0 everywhere where nothing speaks for the class.

    Args:
        model: in eval mode, with pooling and a classifier. It stays as it is.
        x: images [N,C,H,W].
        classes: one for each image; None means each image's likeliest.

    Returns:
        [N,H,W] in fp32, resized from the network's map (a 32nd of the side) by bilinear
        interpolation.

    Raises:
        TypeError: model is no `EfficientNet`.
        ValueError: it is in training mode, or has no classifier; not one class for each image, or
            one that the network does not have.
    """
    if not isinstance(model, EfficientNet):
        raise TypeError(f"grad_cam takes an EfficientNet, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if model.num_classes == 0:
        raise ValueError("the model has no classifier: no logit can be explained")
    with torch.no_grad():
        features = model.forward_features(x)
    with torch.inference_mode(False), torch.enable_grad():
        features = features.detach().clone().requires_grad_()
        logits = model.forward_head(features)
        chosen = _chosen(logits, classes)
        (gradient,) = torch.autograd.grad(logits[torch.arange(len(x)), chosen].sum(), features)
    weights = gradient.float().mean((2, 3), keepdim=True)
    cam = (weights * features.detach().float()).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax((1, 2), keepdim=True)
    return cam / torch.where(peak > 0, peak, 1.0)


def _chosen(logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """The class of each image [N]."""
    if classes is None:
        return logits.argmax(1)
    count, known = logits.shape
    if len(classes) != count:
        raise ValueError(f"{len(classes)} classes were given for {count} images")
    for index in classes:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < known:
            raise ValueError(f"a class must be an int from 0 to {known - 1}, got {index!r}")
    return torch.tensor(classes, device=logits.device)


def colours(values: np.ndarray) -> np.ndarray:
    """uint8 [...,3], red green blue, of values from 0 to 1."""
    steps = np.linspace(0.0, 1.0, len(ANCHORS))
    channels = [np.interp(values, steps, channel) for channel in zip(*ANCHORS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(image: Image.Image, cam: Tensor) -> Image.Image:
    """The image under the colours of a map, the more opaque the larger the map.

    Args:
        image: of any mode.
        cam: [H,W] of the image's size, from 0 to 1.

    Raises:
        ValueError: the map has another size.
    """
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    values = cam.detach().float().cpu().numpy()
    if values.shape != pixels.shape[:2]:
        raise ValueError(
            f"the map is {values.shape[1]}x{values.shape[0]} pixels, the image "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    opacity = OPACITY * values[..., None]
    mixed = (1 - opacity) * pixels + opacity * colours(values)
    return Image.fromarray(mixed.round().astype(np.uint8))
