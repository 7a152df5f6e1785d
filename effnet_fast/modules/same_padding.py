"""TensorFlow's SAME padding: the output has ceil(size / stride) rows, and the odd one falls behind.

It differs from padding (K-1)//2 on both sides only where the stride is above 1 and the size a
multiple of it: at stride 2 a 3x3 kernel then pads (0, 1), a 5x5 kernel (1, 2).

Source: "Notes on padding", https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `size` values, all in pixels.

    `size` may be a symbol: no branch depends on it, and a convolution's size of output, size plus
    padding, cancels to ceil(size / stride), about which torch.export can reason.
    """
    total = (size - 1) // stride * stride + kernel - size
    if kernel < stride:
        total = max(total, 0)
    return total // 2, total - total // 2


def even_padding(kernel: int, stride: int) -> tuple[int, int]:
    """SAME padding of sizes that the stride divides, before and after."""
    return same_padding(stride, kernel, stride)


class Conv2dSame(nn.Conv2d):
    """nn.Conv2d with SAME padding, which depends on the size of the input.

    x [N,Cin,H,W] -> y [N,Cout,ceil(H/stride),ceil(W/stride)]. Parameters and state dict are those
    of nn.Conv2d.

    Attributes:
        sides: (left, right, top, bottom) padding of an input of any size; None for SAME.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as
            nn.Conv2d.
        sides: the attribute.

    Raises:
        TypeError: `padding` is given.
    """

    if TYPE_CHECKING:  # TorchScript cannot read what is postponed
        sides: tuple[int, int, int, int] | None
    else:
        sides = None  # of those in pickles that lack it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        *,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        sides: tuple[int, int, int, int] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        if self.sides is not None:
            return self._conv_forward(F.pad(input, self.sides), self.weight, self.bias)
        height = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        width = self.dilation[1] * (self.kernel_size[1] - 1) + 1
        top, bottom = same_padding(input.shape[2], height, self.stride[0])
        left, right = same_padding(input.shape[3], width, self.stride[1])
        return self._conv_forward(F.pad(input, (left, right, top, bottom)), self.weight, self.bias)

    def extra_repr(self) -> str:
        padding = "same" if self.sides is None else self.sides
        return f"{super().extra_repr()}, padding={padding}"
