"""What `_C.Network` refuses before a wrong address could be written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effnet_fast.backends import native
from effnet_fast.inference import cpu_packing
from effnet_fast.inference.network_spec import spec_of
from effnet_fast.inference.sizes import weight_of
from effnet_fast.models import EfficientNet
from effnet_fast.reference.activations import kernel_activation
from networks import TINY


def native_network(
    taps: tuple[int, int, int],
    head: bool = True,
    classifier: bool = True,
    tap_weight: float = 0.5,
    head_channels: int | None = None,
    features: int = 320,
) -> Any:
    """TINY with the taps of its stem, first and last block, and one weight of the stem.

    Args:
        head_channels: of which the head claims to have more than it has.
        features: that the classifier takes.
    """
    extension = native.load()
    torch.manual_seed(0)
    model = EfficientNet(TINY).eval()
    with torch.no_grad():
        model.features[0][0].weight[1, 0, 0, 0] = tap_weight
    network = spec_of(model)
    packed = cpu_packing.Packed(cpu_packing.Format(False, extension.network_tile_units("")))
    cpu_packing.pack_stem(packed, network.stem)
    shown = [taps[1], *[-1] * (len(network.blocks) - 2), taps[2]]
    for block, tap in zip(network.blocks, shown, strict=True):
        cpu_packing.pack_block(packed, block.layers, tap)
    assert network.head
    assert network.linear is not None
    cpu_packing.pack_head(packed, network.head)
    weight = network.linear.weight[:, :features]
    cpu_packing.pack_classifier(packed, weight, network.linear.bias)
    if head_channels is not None:
        packed.head = extension.HeadLayer(
            in_channels=weight_of(network.head).shape[1],
            out_channels=head_channels,
            activation=kernel_activation("silu"),
            weight=packed.keep(torch.zeros(4)),
            shift=packed.keep(torch.zeros(4)),
        )
    parts = packed.head if head else None, packed.classifier if classifier else None
    return extension.Network("", False, packed.nbytes, packed.stem, taps[0], packed.blocks, *parts)


def run(
    network: Any, y: torch.Tensor | None, taps: list[torch.Tensor], x: torch.Tensor | None = None
) -> None:
    x = torch.ones(1, 3, 32, 32) if x is None else x
    places = [(tap.data_ptr(), tap.nbytes) for tap in taps]
    place = (0, 0) if y is None else (y.data_ptr(), y.nbytes)
    network.run(tuple(x.shape), x.data_ptr(), False, x.stride(), place, places, 1)


@pytest.mark.parametrize("taps", [(1, -1, -1), (-1, 0, 2), (0, 0, -1), (2, 1, 1)], ids=str)
def test_taps_are_numbered(taps: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="taps must be 0, 1, 2"):
        native_network(taps)


def test_every_tap_has_an_output() -> None:
    with pytest.raises(ValueError, match="an output is missing"):
        run(native_network((0, -1, -1)), torch.zeros(1, 1000), [])


@pytest.mark.slow
def test_the_last_output_needs_a_head() -> None:
    with pytest.raises(ValueError, match="a classifier needs a head"):
        native_network((0, -1, -1), head=False)
    network = native_network((0, -1, -1), head=False, classifier=False)
    stem = torch.zeros(1, 16, 16, 8)
    with pytest.raises(ValueError, match="without a head"):
        run(network, torch.zeros(1, 1000), [stem])
    stem.fill_(torch.nan)
    run(network, None, [stem])
    assert stem.isfinite().all()


def test_the_pooled_head_is_an_output() -> None:
    y = torch.full((1, 320), torch.nan)
    run(native_network((-1, -1, -1), classifier=False), y, [])
    assert y.isfinite().all()


def test_an_infinite_weight_of_the_stem_counts_inside_of_the_image_alone() -> None:
    """Its products with the padding are nothing, not NaN."""
    zero, infinite = torch.empty(1, 16, 16, 8), torch.empty(1, 16, 16, 8)
    for value, stem in ((0.0, zero), (float("inf"), infinite)):
        network = native_network((0, -1, -1), head=False, classifier=False, tap_weight=value)
        run(network, None, [stem])
    met = torch.zeros(16, 16, 8, dtype=torch.bool)
    met[1:, 1:, 1] = True
    assert not infinite[0][met].isfinite().any()
    torch.testing.assert_close(infinite[0][~met], zero[0][~met])


@pytest.mark.parametrize(
    ("y", "tap", "images"),
    [
        ((1, 999), (1, 16, 16, 8), (1, 3, 32, 32)),
        ((2, 1000), (1, 16, 16, 8), (1, 3, 32, 32)),
        ((1, 1000), (1, 16, 16, 7), (1, 3, 32, 32)),
        ((1, 1000), (1, 16, 16, 8), (1, 3, 34, 32)),
        ((1, 1000), (1, 16, 16, 8), (2, 3, 32, 32)),
    ],
    ids=str,
)
def test_results_have_their_size(y: Any, tap: Any, images: Any) -> None:
    network = native_network((0, -1, -1))
    run(network, torch.zeros(1, 1000), [torch.zeros(1, 16, 16, 8)])
    with pytest.raises(ValueError, match="a result is of another size"):
        run(network, torch.zeros(y), [torch.zeros(tap)], torch.ones(images))


def test_images_have_the_stem_s_channels_and_a_possible_size() -> None:
    network = native_network((-1, -1, -1))
    for channels in (1, 4):
        with pytest.raises(ValueError, match="the images have other channels"):
            run(network, torch.zeros(1, 1000), [], torch.ones(1, channels, 32, 32))
    one = torch.ones(1, 3, 1, 1)
    for shape in ((1, 3, 1 << 30, 1 << 30), (1 << 40, 3, 32, 32), (1, 3, 1 << 40, 1)):
        with pytest.raises(ValueError, match="the images are too large"):
            run(network, torch.zeros(1, 1000), [], one.expand(shape))


def test_packed_tensors_have_the_size_of_their_layers() -> None:
    with pytest.raises(ValueError, match="a tensor is not as large as its layer says"):
        native_network((-1, -1, -1), head_channels=321)
    with pytest.raises(ValueError, match="a layer does not fit the one before it"):
        native_network((-1, -1, -1), features=319)


def product(kind: str = "Product", **changed: Any) -> Any:
    """A product of 16 x 16, and what is changed of it; None leaves a field out."""
    kept = torch.zeros(256)
    tensor = kept.data_ptr(), kept.nbytes
    fields = {"in_channels": 16, "out_channels": 16, "weight": tensor, "shift": tensor} | changed
    return getattr(native.load(), kind)(**{k: v for k, v in fields.items() if v is not None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shift": None}, "Product lacks shift"),
        ({"bias": 1}, "Product has no bias"),
        ({"weight": "here"}, "Product's weight is of a wrong type"),
        ({"in_channels": 1.5}, "Product's in_channels is of a wrong type"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(changed: dict[str, Any], message: str) -> None:
    product()
    with pytest.raises(TypeError, match=message):
        product(**changed)


def test_sizes_and_layers_are_checked() -> None:
    with pytest.raises(ValueError, match="Product's out_channels is too small"):
        product(out_channels=0)
    with pytest.raises(TypeError, match="BlockLayer lacks in_channels"):
        native.load().BlockLayer()
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        native.load().Network("", False, 0, product(), -1, [], None, None)


def test_unknown_kinds_of_activations_and_gates() -> None:
    product("HeadLayer", activation=kernel_activation("relu6"))
    for kind in (-1, 3):
        with pytest.raises(ValueError, match=r"must be 0 \(silu\), 1 \(clamp\)"):
            product("HeadLayer", activation=(kind, 0.0, 6.0))
    with pytest.raises(TypeError, match="HeadLayer's activation is of a wrong type"):
        product("HeadLayer", activation="relu6")
    vector = torch.zeros(16).data_ptr()
    excite = native.load().excite
    for gate in (-1, 2):
        with pytest.raises(ValueError, match=r"must be 0 \(sigmoid\) or 1 \("):
            excite("", 1, 1, 1, False, *[vector] * 7, kernel_activation("silu"), gate, 1)
