"""A folder of transformers' EfficientNet: its config.json and preprocessor_config.json, both ways.

Source: transformers 5.24, models/efficientnet (EfficientNetConfig, EfficientNetImageProcessor).
Its blocks that stride pad as SAME padding does for even sizes, except those that the config lists
in `depthwise_padding`, which pad alike on both sides; the stem pads as for even sizes. That is the
padding that SAME gives images of one side: `padded_as`, which every image gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from effnet_fast.checkpoints.facts import LARGEST, Facts, checked, is_count, is_number

MODEL_TYPE = "efficientnet"
ARCHITECTURE = "EfficientNetForImageClassification"
PROCESSOR = "EfficientNetImageProcessor"
PROCESSOR_FILE = "preprocessor_config.json"
# A configuration's entries that a network here has no other value of.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "depth_divisor": (8,),
    "squeeze_expansion_ratio": (0.25,),
    "pooling_type": ("mean",),
}
# EfficientNetConfig's own values, for entries that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "depthwise_padding": [],
    "hidden_dim": 2560,
    "image_size": 600,
    "batch_norm_eps": 1e-3,
    "batch_norm_momentum": 0.99,
    "dropout_rate": 0.5,
}
EXPAND_BN_MOMENTUM = 0.1  # PyTorch's own: the configuration's is not given to expansions
BLOCKS = 10_000  # in a network, at most
HEAD = 1280  # channels before the classifier, times the width
RESAMPLINGS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TABLE = ("expand_ratios", "kernel_sizes", "strides", "in_channels", "out_channels")


def is_config(config: object) -> bool:
    """Whether a config.json is of transformers' EfficientNet."""
    return isinstance(config, Mapping) and config.get("model_type") == MODEL_TYPE


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Facts:
    """What the two files say.

    Args:
        config: the content of config.json.
        processor: that of preprocessor_config.json, where there is one.

    Raises:
        ValueError: a value out of its range, or of which there is no network here.
    """
    for name, allowed in FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, allowed))}, got {config[name]!r}"
            )
    given = {name: config.get(name, value) for name, value in DEFAULTS.items()}
    table = _table(given)
    side = _side("image_size", given["image_size"])
    network = {
        "bn_eps": given["batch_norm_eps"],
        "bn_momentum": given["batch_norm_momentum"],
        "expand_bn_momentum": EXPAND_BN_MOMENTUM,
        "padded_as": _padded_as(given["depthwise_padding"], table),
        "dropout": given["dropout_rate"],
    }
    images = {"resolution": side, "resize": side, "crop": side, "squash": True}
    if processor is not None:
        images |= _images(processor)
    return Facts(_classes(config), checked("images", images), checked("network", network), table)


def _table(given: Mapping[str, Any]) -> dict[str, Any]:
    columns = [given[name] for name in (*TABLE, "num_block_repeats")]
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns}
    if len(lengths) > 1 or 0 in lengths:
        names = ", ".join((*TABLE, "num_block_repeats"))
        raise ValueError(f"{names} must be lists of one length")
    table = {
        "width": given["width_coefficient"],
        "depth": given["depth_coefficient"],
        "head": given["hidden_dim"],
        "baseline": list(zip(*columns, strict=True)),
    }
    table = checked("table", table)
    if sum(-int(-table["depth"] * stage[5] // 1) for stage in table["baseline"]) > BLOCKS:
        raise ValueError(f"the configuration is of a network of more than {BLOCKS} blocks")
    return table


def _strides(table: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The index of each stage's first block, counted through, and its stride."""
    found, index = [], 0
    for stage in table["baseline"]:
        found.append((index, stage[2]))
        index += -int(-table["depth"] * stage[5] // 1)  # rounded up
    return found


def _padded_as(listed: Any, table: Mapping[str, Any]) -> int:
    """The side of images, of which SAME padding is that of the blocks.

    Found from the last block that strides to the first: where the listed ones begin with an odd
    side, the side before, which was halved, can be chosen odd or even.
    """
    if not isinstance(listed, (list, tuple)) or not all(type(index) is int for index in listed):
        raise ValueError(f"depthwise_padding must be a list of blocks, got {str(listed)[:100]!r}")
    side = 2
    for index, stride in reversed(_strides(table)):
        if stride == 2:
            side = 2 * side - (index in listed)
    return 2 * side


def depthwise_padding(side: int, table: Mapping[str, Any]) -> list[int]:
    """The blocks whose input has an odd side where images have this one."""
    side, found = (side + 1) // 2, []
    for index, stride in _strides(table):
        if stride == 2:
            if side % 2:
                found.append(index)
            side = (side + 1) // 2
    return found


def _side(name: str, size: Any) -> int:
    """The side of a square: a number, two, or a mapping of height and width."""
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = set(size) if isinstance(size, (list, tuple)) and len(size) == 2 else {size}
    if len(sides) != 1 or not is_count(side := sides.pop()):
        raise ValueError(
            f"{name} must be the side of a square between 1 and {LARGEST}, got {str(size)[:100]}"
        )
    return side


def _images(processor: Mapping[str, Any]) -> dict[str, Any]:
    """How its image processor prepares images, as fields of `models.Variant`."""
    given = {
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "include_top": True,
        "rescale_offset": False,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        **processor,
    }
    resample = given["resample"]
    if type(resample) is not int or resample not in RESAMPLINGS:
        raise ValueError(
            f"resample must be one of {', '.join(map(str, RESAMPLINGS))}, got {str(resample)[:100]}"
        )
    images: dict[str, Any] = {"interpolation": RESAMPLINGS[resample]}
    if given["do_resize"]:
        size = given.get("size", 346)
        squash = not (isinstance(size, Mapping) and size.keys() == {"shortest_edge"})
        resize = crop = _side("size", size if squash else size["shortest_edge"])
        if given["do_center_crop"]:
            crop = _side("crop_size", given.get("crop_size", 289))
        elif not squash:
            raise ValueError("size must name height and width where images are not cropped")
        images |= {"resize": resize, "crop": crop, "resolution": crop, "squash": squash}
    mean, std, factor = given["image_mean"], given["image_std"], given["rescale_factor"]
    # (x * scale - offset - mean) / std, by std once more for a classifier, of images over [0, 1].
    scale = 255 * factor if is_number(factor) and given["do_rescale"] else 255.0
    offset = 1 if given["rescale_offset"] and given["do_rescale"] else 0
    lists = [list(v) if isinstance(v, (list, tuple)) else [v] * 3 for v in (mean, std)]
    if not scale or not all(map(is_number, lists[0] + lists[1])):
        raise ValueError("image_mean, image_std and rescale_factor must be numbers")
    if not given["do_normalize"]:
        lists[0] = [0.0] * len(lists[0])
    power = bool(given["do_normalize"]) + bool(given["include_top"])
    images["mean"] = [(value + offset) / scale for value in lists[0]]
    images["std"] = [value**power / scale for value in lists[1]]
    return images


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in id2label, unless they are transformers' own LABEL_0 and so on, or have gaps."""
    labels = config.get("id2label")
    if not isinstance(labels, Mapping):
        return ()
    names = [labels.get(str(i), labels.get(i)) for i in range(len(labels))]
    if not all(isinstance(name, str) for name in names):
        return ()
    if names == [f"LABEL_{i}" for i in range(len(names))]:
        return ()
    return tuple(str(name) for name in names)


def _rounded(channels: float) -> int:
    """A multiple of 8 near a number of channels, as `round_filters` has it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class Network(Protocol):
    """What a configuration says of a network: a `models.Variant`."""

    @property
    def width(self) -> float: ...
    @property
    def depth(self) -> float: ...
    @property
    def resolution(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def bn_eps(self) -> float: ...
    @property
    def bn_momentum(self) -> float: ...
    @property
    def resize(self) -> int: ...
    @property
    def crop(self) -> int: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def baseline(self) -> Sequence[Any]: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def squash(self) -> bool: ...
    @property
    def padded_as(self) -> int | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def squeeze(self) -> bool: ...
    @property
    def has_fused(self) -> bool: ...
    @property
    def head_channels(self) -> int: ...


def config_of(
    network: Network, channels: int, num_classes: int, classes: Sequence[str]
) -> dict[str, Any]:
    """config.json of a network.

    Args:
        channels: of the images.
        classes: their names; without any, transformers makes some up.

    Raises:
        ValueError: transformers has no such network.
    """
    if network.has_fused or not network.squeeze or network.activation != "silu":
        raise ValueError(
            "transformers has EfficientNets with SiLU and squeeze-and-excitation alone"
        )
    head = _rounded(HEAD * network.width)
    if network.head_channels != head:
        raise ValueError(
            f"transformers' networks of width {network.width} have {head} channels before the "
            f"classifier, not {network.head_channels}"
        )
    rows = [
        (s.expand_ratio, s.kernel, s.stride, s.in_channels, s.out_channels)
        for s in network.baseline
    ]
    table = {
        "depth": network.depth,
        "baseline": [
            (*row, stage.repeats) for row, stage in zip(rows, network.baseline, strict=True)
        ],
    }
    names = list(classes) or [f"LABEL_{i}" for i in range(num_classes)]
    return {
        "architectures": [ARCHITECTURE if num_classes else "EfficientNetModel"],
        "model_type": MODEL_TYPE,
        "num_channels": channels,
        "image_size": network.crop,
        "width_coefficient": network.width,
        "depth_coefficient": network.depth,
        "hidden_dim": network.head_channels,
        **{name: list(column) for name, column in zip(TABLE, zip(*rows, strict=True), strict=True)},
        "num_block_repeats": [stage.repeats for stage in network.baseline],
        "depthwise_padding": depthwise_padding(network.padded_as or network.crop, table),
        "batch_norm_eps": network.bn_eps,
        "batch_norm_momentum": network.bn_momentum,
        "dropout_rate": network.dropout,
        **{name: values[0] for name, values in FIXED.items()},
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def processor_of(network: Network) -> dict[str, Any]:
    """preprocessor_config.json of a network, by which images are normalised once."""
    numbers = {name: number for number, name in RESAMPLINGS.items()}
    square = {"height": network.resize, "width": network.resize}
    return {
        "image_processor_type": PROCESSOR,
        "do_resize": True,
        "size": square if network.squash else {"shortest_edge": network.resize},
        "resample": numbers[network.interpolation],
        "do_center_crop": not network.squash or network.crop != network.resize,
        "crop_size": {"height": network.crop, "width": network.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "include_top": False,
        "image_mean": list(network.mean),
        "image_std": list(network.std),
    }
