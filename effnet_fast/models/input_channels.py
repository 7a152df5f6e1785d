"""Stem weights for images of another number of channels than they were trained on.

Source: adapt_input_conv in timm/models/_manipulate.py,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """The weight of a convolution over Cin channels, for images of `in_chans` channels.

    One channel takes the sum over Cin: a grey image then has the same output as before when it was
    repeated over Cin channels. Other numbers repeat the channels in turn and scale them
    by Cin / in_chans, so that activations keep their size. float16 and bfloat16 are computed in
    float32.

    Args:
        weight: [Cout,Cin,K,K], floating point.
        in_chans: channels of the images, at least 1.

    Returns:
        [Cout,in_chans,K,K] in the weight's dtype and on its device; `weight` itself where
        Cin == in_chans.

    Raises:
        ValueError: a weight that is not 4-D and floating point, or in_chans that is not an int of
            at least 1.
    """
    if weight.ndim != 4 or not weight.is_floating_point() or weight.shape[1] < 1:
        raise ValueError(
            "weight must be floating point of shape [Cout,Cin,K,K], got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    if isinstance(in_chans, bool) or not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f"in_chans must be an int of at least 1, got {in_chans!r}")
    trained_chans = weight.shape[1]
    if in_chans == trained_chans:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_chans == 1:
        adapted = wide.sum(dim=1, keepdim=True)
    else:
        source = torch.arange(in_chans, device=weight.device) % trained_chans
        adapted = wide[:, source] * (trained_chans / in_chans)
    return adapted.to(weight.dtype)
