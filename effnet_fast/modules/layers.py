"""The modules of EfficientNet: torchvision's module tree and state dict, with a forward that fuses.

Children are ordinary `nn` modules at torchvision's paths and are read at each call, so hooks,
replaced layers and slices behave as they do there. `forward_stock` runs them one by one;
`forward` lets `fused_forward` decide whether the fused ops may stand in for them.

Source: Tan & Le (arXiv 1905.11946), table 1; names and draw order as torchvision 0.28.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.modules import checkpointing, fused_forward, in_turn, observed, structure
from effnet_fast.modules.same_padding import Conv2dSame, even_padding
from effnet_fast.modules.stochastic_depth import StochasticDepth
from effnet_fast.modules.widths import round_channels
from effnet_fast.reference.activations import check_activation

PADDINGS = ("symmetric", "same", "even")
# The module of each activation by its name; "identity" is the absence of one.
ACTIVATION_LAYERS: Mapping[str, type[nn.Module] | None] = MappingProxyType(
    {name: kind for kind, name in structure.ACTIVATIONS.items()} | {"identity": None}
)


def check_padding(padding: str) -> None:
    """Raises ValueError for what is none of PADDINGS."""
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")


class Sequential(nn.Sequential):
    """nn.Sequential whose modules hand on channels_last activations where nobody can see them.

    Its result has the layout that nn.Sequential's has in stock PyTorch: contiguous for contiguous
    images and weights, channels_last where either is.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            for module in self:
                input = module(input)
            return input
        return in_turn.run(self, input)[0]


structure.SEQUENCES |= {Sequential, nn.Sequential}


class Conv2dNormActivation(nn.Sequential):
    """Convolution, normalisation and activation in a row.

    Children: "0" nn.Conv2d, "1" norm_layer(out_channels), "2" activation_layer(inplace=True);
    the latter two only where given. x [N,Cin,H,W] -> y [N,Cout,Ho,Wo].

    Args:
        in_channels, out_channels: channels of x and y.
        kernel_size: K of the square kernel.
        stride: the same in both directions.
        padding: on every side; None or "symmetric" means (K-1)//2 * dilation, "same" what
            TensorFlow means by it, and "even" what it gives even sizes, whatever the size. For
            these two the convolution is a Conv2dSame where that makes a difference.
        groups: groups of the convolution.
        norm_layer: makes the normalisation from its channels; None leaves it out.
        activation_layer: makes the activation; None leaves it out.
        dilation: dilation of the convolution.
        inplace: passed to activation_layer; None passes nothing.
        bias: bias of the convolution; None means only where there is no norm_layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        bias = norm_layer is None if bias is None else bias
        options: dict[str, Any] = {
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "bias": bias,
        }
        # At stride 1 an odd kernel is padded alike on both sides, whichever the rule.
        differs = padding in ("same", "even") and (stride != 1 or kernel_size % 2 == 0)
        if differs and padding == "even":
            sides = even_padding(dilation * (kernel_size - 1) + 1, stride)
            options["sides"] = (*sides, *sides)
        if padding is None or isinstance(padding, str):
            padding = (kernel_size - 1) // 2 * dilation
        layers: list[nn.Module] = [
            Conv2dSame(in_channels, out_channels, kernel_size, **options)
            if differs
            else nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, **options)
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.out_channels = out_channels

    def __getitem__(self, idx: Any) -> Any:
        """The child at an index; a slice gives a plain nn.Sequential of the same children."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward_stock(self, x: Tensor) -> Tensor:
        """Calls the children one after another."""
        for module in self:
            x = module(x)
        return x

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.forward_stock(input)
        return fused_forward.run(self, input)


class SqueezeExcitation(nn.Module):
    """y = x * scale_activation(fc2(activation(fc1(avgpool(x))))), x and y [N,C,H,W].

    Args:
        input_channels: C.
        squeeze_channels: channels between fc1 and fc2.
        activation: makes the activation after fc1.
        scale_activation: makes the activation after fc2.

    Source: Hu et al. (arXiv 1709.01507), figure 1.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def gate(self, x: Tensor) -> Tensor:
        """The factor of each channel: [N,C,1,1]."""
        hidden = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(hidden))

    def forward(self, input: Tensor) -> Tensor:
        return self.gate(input) * input


in_turn.gates.add(SqueezeExcitation)


@dataclass(frozen=True)
class MBConvConfig:
    """Geometry of one block, MBConv or FusedMBConv.

    Args:
        expand_ratio: expanded channels over input channels; 1 leaves the expansion out.
        kernel: K of the convolution that looks at neighbours (MBConv's is depthwise), odd.
        stride: its stride, 1 or 2.
        input_channels, out_channels: channels of the block's input and output.
        padding: its padding: "symmetric", (K-1)//2 on both sides, "same", or "even", SAME padding
            of even sizes, whatever the size.
        activation: after every convolution but a projection, one of ACTIVATION_LAYERS.
        squeeze: whether an MBConv has squeeze-and-excitation.

    Raises:
        ValueError: a field out of its range.
    """

    expand_ratio: float
    kernel: int
    stride: int
    input_channels: int
    out_channels: int
    padding: str = "symmetric"
    activation: str = "silu"
    squeeze: bool = True

    def __post_init__(self) -> None:
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {self.stride}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {self.kernel}")
        if min(self.input_channels, self.out_channels) < 1 or self.expand_ratio <= 0:
            raise ValueError(
                "channels and expand_ratio must be positive, got input_channels="
                f"{self.input_channels}, out_channels={self.out_channels}, "
                f"expand_ratio={self.expand_ratio}"
            )
        check_padding(self.padding)
        check_activation("activation", self.activation)

    @property
    def expanded_channels(self) -> int:
        """Channels between the block's first and last convolution."""
        return round_channels(self.input_channels * self.expand_ratio)

    @property
    def squeeze_channels(self) -> int:
        """Channels inside squeeze-and-excitation: a quarter of the block's input."""
        return max(1, self.input_channels // 4)

    @property
    def use_res_connect(self) -> bool:
        """Whether the block's input is added to its output."""
        return self.stride == 1 and self.input_channels == self.out_channels


def _mbconv_layers(
    config: MBConvConfig,
    norm_layer: Callable[..., nn.Module],
    se_layer: Callable[..., nn.Module],
) -> Iterator[nn.Module]:
    """The block's layers in order: [expand,] depthwise, [squeeze-excite,] project."""
    expanded = config.expanded_channels
    activation = ACTIVATION_LAYERS[config.activation]
    conv = partial(Conv2dNormActivation, norm_layer=norm_layer)
    if expanded != config.input_channels:
        yield conv(config.input_channels, expanded, kernel_size=1, activation_layer=activation)
    yield conv(
        expanded,
        expanded,
        kernel_size=config.kernel,
        stride=config.stride,
        padding=config.padding,
        groups=expanded,
        activation_layer=activation,
    )
    if config.squeeze:
        inner = nn.Identity if activation is None else partial(activation, inplace=True)
        yield se_layer(expanded, config.squeeze_channels, activation=inner)
    yield conv(expanded, config.out_channels, kernel_size=1, activation_layer=None)


class ResidualBlock(nn.Module):
    """A body with drop-path, and the input added where the shapes allow it.

    Children: `block`, the body, and `stochastic_depth`.

    Attributes:
        use_res_connect: whether the input is added.
        grad_checkpointing: whether backward computes the block's activations again.
        memory: "fast", or "lean" to save one expanded tensor less for backward.
    """

    grad_checkpointing = False
    memory = "fast"
    # Whether the body ends in a ReLU, whose gradient reads its result: nothing is added in place.
    keeps_body = False

    def __init__(
        self, config: MBConvConfig, layers: Iterable[nn.Module], stochastic_depth_prob: float
    ) -> None:
        super().__init__()
        self.use_res_connect = config.use_res_connect
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")
        self.out_channels = config.out_channels
        self.keeps_body = isinstance([*self.block[-1].children()][-1], nn.ReLU)

    def forward_stock(self, x: Tensor) -> Tensor:
        """Calls the children one after another and adds x; x itself is never written to."""
        y = self.block(x)
        if not self.use_res_connect:
            return y
        y = self.stochastic_depth(y)
        if y is x:  # a block replaced by Identity: adding in place would overwrite the input
            return y + x
        if self.keeps_body:
            return (y + x).to(y.dtype)
        y += x  # in place: keeps the body's dtype under autocast, and one tensor less alive
        return y

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.forward_stock(input)
        if self.grad_checkpointing and observed.can_run_again(input):
            return checkpointing.run(partial(fused_forward.run, self), self, input)
        return fused_forward.run(self, input)


class MBConv(ResidualBlock):
    """Inverted bottleneck, mostly with squeeze-and-excitation, x [N,Cin,H,W] -> y [N,Cout,Ho,Wo].

    Args:
        config: the block's geometry.
        stochastic_depth_prob: probability that a sample skips the block's body in training.
        norm_layer: makes a normalisation from its channels.
        se_layer: makes the squeeze-and-excitation from (channels, squeeze channels, activation=).

    Source: Tan & Le (arXiv 1905.11946), section 4; Sandler et al. (arXiv 1801.04381).
    """

    def __init__(
        self,
        config: MBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
        se_layer: Callable[..., nn.Module] = SqueezeExcitation,
    ) -> None:
        super().__init__(
            config, _mbconv_layers(config, norm_layer, se_layer), stochastic_depth_prob
        )
