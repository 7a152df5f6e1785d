"""A small network with class names and its own preset, pictures for it, and files of answers."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from effnet_fast import EfficientNet, checkpoints
from effnet_fast.checkpoints.facts import FACTS_ENTRY, Facts
from effnet_fast.cli import bench, common
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images

SIDE = 40
CLASSES = ("ash", "birch", "cedar", "dogwood", "elm", "fir", "gum")
PRESET = {"crop": SIDE, "resize": 48, "resolution": SIDE, "interpolation": "bicubic"}


def picture(number: int, width: int = 64, height: int = 50) -> Image.Image:
    """A picture that no other number gives."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    model = common.build_model(VARIANTS["lite0"], "reference", len(CLASSES))
    preset = images.ImageClassification(crop_size=SIDE, resize_size=48)
    bench.calibrate(model, torch.stack([preset(picture(i)) for i in range(8)]))
    # Seven classes that all occur: each logit is centred on pictures that the tests use.
    with torch.inference_mode():
        logits = model(torch.stack([preset(picture(i)) for i in range(40)]))
        model.classifier[1].bias -= logits.mean(0)
        model.classifier[1].weight *= 4
        model.classifier[1].bias *= 4
    return model.state_dict()


def checkpoint(path: Path, seed: int = 0) -> Path:
    """Writes the network; another seed gives other weights."""
    state = {name: tensor.clone() for name, tensor in _state().items()}
    if seed:
        state["classifier.1.bias"] += seed
    facts = Facts(classes=CLASSES, images=PRESET)
    checkpoints.save(state, path, {FACTS_ENTRY: facts.as_text()})
    return path


def network(path: Path) -> EfficientNet:
    """The network of a checkpoint, in eval mode."""
    return EfficientNet.from_checkpoint(path).eval()


def pictures(folder: Path, count: int, *, broken: tuple[int, ...] = ()) -> list[str]:
    """Writes pictures, in two folders; their paths in sorted order."""
    for i in range(count):
        path = folder / ("left" if i % 2 else "right") / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:150])
    return sorted(str(path) for path in folder.rglob("*.jpg"))


def by_class(folder: Path, model: EfficientNet, count: int) -> dict[str, list[str]]:
    """Writes pictures into folders of the classes that the network gives them."""
    preset = images.preset(model.variant)
    found: dict[str, list[str]] = {name: [] for name in CLASSES}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i in range(count):
        picture(i).save(folder / "new.png")
        with torch.inference_mode():
            place = int(model(preset(images.load(folder / "new.png"))[None]).argmax())
        path = folder / CLASSES[place] / f"{i}.png"
        shutil.move(folder / "new.png", path)
        found[CLASSES[place]].append(str(path))
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of answers: path, reason, and classes with probabilities or features."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [_plain(line) for line in lines]
    if path.suffix == ".parquet":
        found = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with path.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
    return [_from_columns(row) for row in found]


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    top = line.get("top") or []
    return {
        "path": line["path"],
        "reason": line["reason"],
        "top": [(entry["class"], entry["label"], entry["probability"]) for entry in top],
        "features": line.get("features"),
    }


def _from_columns(row: dict[str, Any]) -> dict[str, Any]:
    ranks = [name.removeprefix("class_") for name in row if name.startswith("class_")]
    top = [(row[f"class_{i}"], row[f"label_{i}"], row[f"probability_{i}"]) for i in ranks]
    features = row.get("features")
    if any(name.startswith("feature_") for name in row):
        values = [value for name, value in row.items() if name.startswith("feature_")]
        features = [float(value) for value in values] if values[0] else None
    return {
        "path": row["path"],
        "reason": row["reason"] or None,
        "top": [(int(c), name, float(p)) for c, name, p in top if c not in (None, "")],
        "features": features,
    }
