"""Networks fit for comparison: the same state in effnet_fast, in torchvision, and in float64.

A freshly initialised EfficientNet cannot tell a right implementation from a wrong one: with
made-up BN statistics rounding errors grow past the logits themselves, and with the initial ones
every image gives the same logits. So the last BN of each block is scaled down to a quarter, which
lets the residual path dominate, and the statistics are those of a few images at the resolution of
the test (B0 then errs by 1e-6 in float32, B7 by 1e-5, and images differ by about 1).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import efficientnet as torchvision_efficientnet

from effnet_fast.models import VARIANTS, EfficientNet, Variant
from effnet_fast.models.variants import B0_STAGES
from tolerances import assert_parity

if TYPE_CHECKING:
    from typing_extensions import Self

CALIBRATION_IMAGES = 8
ALIKE = 1e-3  # relative rms; float32 errs by 1e-5 in these networks
PUBLISHED = tuple(f"b{i}" for i in range(8))  # torchvision's
LITES = tuple(f"lite{i}" for i in range(5))
PARAMETERS = {
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}
# Ten blocks of every kind (with and without expansion, residual, stride) in a few milliseconds.
TINY = replace(VARIANTS["b0"], name="tiny", width=0.25, depth=0.5, resolution=48)
# Four blocks, for what takes long per operator: compilers.
MINI = replace(TINY, name="mini", depth=1.0, resolution=32, baseline=B0_STAGES[:3])


def reduced_resolution(variant: Variant) -> int:
    """About half the variant's resolution, at most 161, so that B7 runs in a second."""
    return min(variant.resolution // 2, 160) + 1


def random_images(count: int, resolution: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images [count,channels,resolution,resolution] of mean 0 and variance 1, NCHW, fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, resolution, resolution, generator=generator)


def torchvision_network(variant: Variant, **kwargs: object) -> nn.Module:
    """torchvision's network for a variant that need not be one of its own."""
    if variant == VARIANTS.get(variant.name) and variant.name in PUBLISHED:
        return getattr(torchvision.models, f"efficientnet_{variant.name}")(**kwargs)
    stages = [
        torchvision_efficientnet.MBConvConfig(
            stage.expand_ratio,
            stage.kernel,
            stage.stride,
            stage.in_channels,
            stage.out_channels,
            stage.repeats,
            width_mult=variant.width,
            depth_mult=variant.depth,
        )
        for stage in variant.baseline
    ]
    kwargs.setdefault(
        "norm_layer",
        functools.partial(nn.BatchNorm2d, eps=variant.bn_eps, momentum=variant.bn_momentum),
    )
    model = torchvision_efficientnet.EfficientNet(stages, variant.dropout, **kwargs)
    if variant.padding == "same":
        pad_same(model)
    return model


def pad_same(model: nn.Module) -> None:
    """Gives torchvision's network timm's SAME padding where it strides, in place."""
    from timm.layers import Conv2dSame  # importing timm costs seconds

    for module in model.modules():
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1):
                same = Conv2dSame(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    conv.stride,
                    groups=conv.groups,
                    bias=False,
                )
                same.weight = conv.weight
                setattr(module, name, same)


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Makes a torchvision EfficientNet well-conditioned, in place; leaves it in eval mode."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, torchvision_efficientnet.MBConv):
            module.block[-1][1].weight.data.mul_(0.25)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            momenta[module], module.momentum = module.momentum, 1.0
        elif isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.eval()
    with torch.no_grad():
        model(images)
    for module, momentum in momenta.items():
        module.momentum = momentum
        module.num_batches_tracked.zero_()
    model.eval()


@functools.lru_cache(maxsize=2)
def _calibrated_state(variant: Variant, resolution: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision_network(variant)
    model = model.to(memory_format=torch.channels_last)
    calibrate(model, random_images(CALIBRATION_IMAGES, resolution, seed=1))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def calibrated_state(variant: Variant, resolution: int | None = None) -> dict[str, Tensor]:
    """A well-conditioned torchvision state dict of the variant; the caller owns the tensors."""
    state = _calibrated_state(variant, resolution or variant.resolution)
    return {name: tensor.clone() for name, tensor in state.items()}


@functools.cache
def _skeleton(variant: Variant, build: Callable[[Variant], nn.Module]) -> nn.Module:
    """The network without memory behind it: copying one is faster than building it anew."""
    with torch.device("meta"):
        return build(variant).eval()


def _network_with(
    variant: Variant, build: Callable[[Variant], nn.Module], state: dict[str, Tensor]
) -> nn.Module:
    """The network in eval mode, carrying a copy of `state`."""
    model = copy.deepcopy(_skeleton(variant, build))
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(True)


@dataclass(frozen=True)
class Pair:
    """The same network twice: ours and torchvision's, in float32."""

    actual: nn.Module
    stock: nn.Module

    @property
    def models(self) -> tuple[nn.Module, ...]:
        return (self.actual, self.stock)

    def train(self, mode: bool = True) -> Self:
        for model in self.models:
            model.train(mode)
        return self

    def apply(self, change: Callable[[nn.Module], object]) -> Self:
        """Applies the same change to all; random draws in it are the same for each."""
        for model in self.models:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                change(model)
        return self

    def assert_alike(self, x: Tensor, *, backward: bool = True) -> dict[str, Tensor]:
        """Runs both on x and compares all results as assert_alike does; returns ours."""
        actual, stock = (run_network(model, x, backward) for model in self.models)
        assert_alike(actual, stock)
        return actual


@dataclass(frozen=True)
class Trio(Pair):
    """A pair, and torchvision's network in float64."""

    exact: nn.Module

    @property
    def models(self) -> tuple[nn.Module, ...]:
        return (self.actual, self.stock, self.exact)

    def assert_parity(self, *images: Tensor, backward: bool = True) -> None:
        """Runs the three on each batch in turn and holds ours to the rule of parity.

        What stock's error is depends on the order in which it happens to add: the larger of
        those in its two layouts counts. The errors of a tensor of few elements, as the gradient of
        a bias in squeeze-and-excitation, are a matter of luck in one batch: give several then, and
        the rule is held over all of them.
        """
        actual = _run_all(self.actual, images, backward)
        exact = _run_all(self.exact, [x.double() for x in images], backward)
        before = copy.deepcopy(self.stock.state_dict())
        stock = _run_all(self.stock, images, backward)
        self.stock.load_state_dict(before)
        images = tuple(x.to(memory_format=torch.channels_last) for x in images)
        for name, tensor in _run_all(self.stock, images, backward).items():
            if rms(tensor - exact[name]) > rms(stock[name] - exact[name]):
                stock[name] = tensor
        assert_parity(actual, stock, exact)


def _run_all(model: nn.Module, images: Sequence[Tensor], backward: bool) -> dict[str, Tensor]:
    """`run_network` on each batch in turn, its results stacked."""
    results = [run_network(model, x, backward) for x in images]
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def pair(variant: Variant = TINY, resolution: int | None = None) -> Pair:
    """A well-conditioned pair in eval mode, at the variant's resolution unless told another."""
    state = calibrated_state(variant, resolution)
    return Pair(
        _network_with(variant, EfficientNet, state),
        _network_with(variant, torchvision_network, state),
    )


def trio(variant: Variant = TINY, resolution: int | None = None) -> Trio:
    """A well-conditioned trio in eval mode, at the variant's resolution unless told another."""
    two = pair(variant, resolution)
    return Trio(two.actual, two.stock, copy.deepcopy(two.stock).double())


def run_network(model: nn.Module, x: Tensor, backward: bool = True) -> dict[str, Tensor]:
    """Output, gradients of input and parameters, and buffers after one pass under seed 0.

    The gradient given to the output is a fixed random one. Names are "y", "grad x", "grad NAME"
    and "buffer NAME"; gradients that stay None are left out.
    """
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = x.detach().clone().requires_grad_(backward)
        y = model(x)
        results = {"y": y.detach().clone()}
        if backward:
            generator = torch.Generator().manual_seed(2)
            grad_y = torch.randn(y.shape, generator=generator).to(y.dtype)
            y.backward(grad_y)
            grads = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
            results |= {f"grad {k}": v.clone() for k, v in grads.items() if v is not None}
    return results | {f"buffer {k}": v.clone() for k, v in model.named_buffers()}


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def assert_alike(actual: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    """Asserts that two runs compute the same thing, whatever the rounding.

    For comparing what is computed, not how precisely: errors of meaning are of the order of the
    tensor itself. A tensor that vanishes but for rounding (the gradient of a bias ahead of a
    norm, the mean of normalised values) is judged by the largest of its kind.
    """
    assert list(actual) == list(stock)
    largest: dict[str, float] = {}
    for name, tensor in stock.items():
        kind = name.split(" ")[0]
        largest[kind] = max(largest.get(kind, 0.0), rms(tensor))
    for name, tensor in actual.items():
        expected = stock[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        if not tensor.is_floating_point():
            assert torch.equal(tensor, expected), name
            continue
        error, scale = rms(tensor - expected), rms(expected) + 0.01 * largest[name.split(" ")[0]]
        assert error <= ALIKE * scale, f"{name}: rms error {error:.2e} of {scale:.2e}"
