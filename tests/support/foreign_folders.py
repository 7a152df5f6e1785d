"""Checkpoints of other packages, written by hand, so that tests of them need no package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from effnet_fast import checkpoints
from effnet_fast.models import VARIANTS, Variant

# Ten blocks of every kind, none of which but the repeated ones has a residual connection.
SMALL = replace(
    VARIANTS["b0"],
    name="small",
    width=0.5,
    depth=0.5,
    padding="same",
    bn_eps=1e-3,
    resolution=64,
    resize=64,
    crop=64,
    squash=True,
)
NAMES = ("cat", "dog", "a longer name", "ünicode")
CONFIG: dict[str, Any] = {  # as save_pretrained writes it, without what is transformers' default
    "architectures": ["EfficientNetForImageClassification"],
    "model_type": "efficientnet",
    "width_coefficient": 0.5,
    "depth_coefficient": 0.5,
    "hidden_dim": 640,
    "image_size": 64,
    "batch_norm_eps": 1e-3,
    "batch_norm_momentum": 0.99,
    "depthwise_padding": [],
    "dropout_rate": 0.2,
    "id2label": {str(i): name for i, name in enumerate(NAMES)},
    "label2id": {name: i for i, name in enumerate(NAMES)},
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 0,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "include_top": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.47853944, 0.4732864, 0.47434163],
}


def transformers_folder(
    folder: Path,
    state: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    *,
    bare: bool = False,
) -> Path:
    """A folder as `save_pretrained` writes it, of a torchvision-named state.

    Args:
        config, processor: entries that differ from those above; a processor of None is not written.
        bare: whether it is of EfficientNetModel, which has no classifier.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = checkpoints.convert(state, "transformers")
    if bare:
        named = {
            key.removeprefix("efficientnet."): value
            for key, value in named.items()
            if not key.startswith("classifier.")
        }
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return folder


def small(**changes: Any) -> Variant:
    """SMALL with other fields."""
    return replace(SMALL, **changes)
