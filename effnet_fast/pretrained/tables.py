"""The published sets of weights as data: files, accuracies and what their images need."""

from __future__ import annotations

from typing import Any, NamedTuple

HOST = "https://download.pytorch.org/models/"
REFERENCES = "https://github.com/pytorch/vision/tree/main/references/classification"
V1_RECIPE = f"{REFERENCES}#efficientnet-v1"
LITE_RECIPE = "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"
NETWORK_V2_RECIPE = f"{REFERENCES}#efficientnet-v2"
V2_RECIPE = "https://github.com/pytorch/vision/issues/3995#new-recipe-with-lr-wd-crop-tuning"


class Row(NamedTuple):
    file: str  # under HOST, without efficientnet_ and .pth; its end is the SHA-256's beginning
    top1: float  # per cent of ImageNet-1K's validation images, at this crop
    top5: float
    parameters: int
    gmac: float  # at this crop
    mebibytes: float
    resize: int  # pixels
    crop: int
    interpolation: str = "bicubic"
    recipe: str = V1_RECIPE
    least: int = 1  # side of an image that the network takes, pixels
    normalisation: dict[str, Any] | None = None  # mean and std, where not ImageNet's


_V2_IMAGES: dict[str, Any] = {"recipe": NETWORK_V2_RECIPE, "least": 33}
ROWS = {
    # file                             top-1   top-5   parameters GMAC  MiB     resize crop
    "b0_v1": Row("b0_rwightman-7f5810bc", 77.692, 93.532, 5_288_548, 0.386, 20.451, 256, 224),
    "b1_v1": Row("b1_rwightman-bac287d4", 78.642, 94.186, 7_794_184, 0.687, 30.134, 256, 240),
    "b1_v2": Row(
        *("b1-c27df63c", 79.838, 94.934, 7_794_184, 0.687, 30.136, 255, 240),
        interpolation="bilinear",
        recipe=V2_RECIPE,
    ),
    "b2_v1": Row("b2_rwightman-c35c1473", 80.608, 95.310, 9_109_994, 1.088, 35.174, 288, 288),
    "b3_v1": Row("b3_rwightman-b3899882", 82.008, 96.054, 12_233_232, 1.827, 47.184, 320, 300),
    "b4_v1": Row("b4_rwightman-23ab8bcd", 83.384, 96.594, 19_341_616, 4.394, 74.489, 384, 380),
    "b5_v1": Row("b5_lukemelas-1a07897c", 83.444, 96.628, 30_389_784, 10.266, 116.864, 456, 456),
    "b6_v1": Row("b6_lukemelas-24a108a5", 84.008, 96.916, 43_040_704, 19.068, 165.362, 528, 528),
    "b7_v1": Row("b7_lukemelas-c5b4e57e", 84.122, 96.908, 66_347_960, 37.746, 254.675, 600, 600),
    "v2_s": Row(
        *("v2_s-dd5fe13b", 84.228, 96.878, 21_458_488, 8.366, 82.704, 384, 384),
        **_V2_IMAGES,
        interpolation="bilinear",
    ),
    "v2_m": Row(
        *("v2_m-dc08266a", 85.112, 97.156, 54_139_356, 24.582, 208.01, 480, 480),
        **_V2_IMAGES,
        interpolation="bilinear",
    ),
    "v2_l": Row(
        *("v2_l-59c71312", 85.808, 97.788, 118_515_272, 56.08, 454.573, 480, 480),
        **_V2_IMAGES,
        normalisation={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ),
}


class LiteRow(NamedTuple):
    size: str  # "lite0"
    hash: str  # the file's SHA-256 begins so
    top1: float  # per cent, of TensorFlow's checkpoint
    parameters: int
    gmac: float  # at this crop
    mebibytes: float
    crop: int  # pixels


# TensorFlow resizes to 32 pixels more than it crops, bicubically, and normalises to mean 127 and
# standard deviation 128 of 255: preprocessing.py and lite/efficientnet_lite_builder.py there.
LITE_BORDER = 32
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
LITE_ROWS = {
    "lite0_v1": LiteRow("lite0", "57934424", 75.1, 4_652_008, 0.385, 17.954, 224),
    "lite1_v1": LiteRow("lite1", "77cc7160", 76.7, 5_416_680, 0.600, 20.930, 240),
    "lite2_v1": LiteRow("lite2", "9656183e", 77.6, 6_092_072, 0.860, 23.524, 260),
}
