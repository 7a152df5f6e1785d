"""Runs on images of which some, or all, cannot be read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from effnet_fast.training.runs.loop import train
from training_runs import SMALL, make_data

ONE: dict[str, Any] = {**SMALL, "epochs": 1}


def spoil(folder: Path) -> list[str]:
    """Makes all images of a folder unreadable; their paths."""
    paths = sorted(folder.rglob("*.png"))
    for path in paths:
        path.write_bytes(b"no image")
    return [str(path) for path in paths]


def named(run: Path) -> list[str]:
    """The paths in a run's unreadable.csv."""
    with open(run / "unreadable.csv", newline="") as file:
        return sorted(row["path"] for row in csv.DictReader(file))


def test_validation_images_are_named_and_counted(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=2)
    spoiled = spoil(data / "val" / "red")
    metrics = train(data, tmp_path / "run", **ONE)
    assert named(tmp_path / "run") == spoiled
    assert metrics["unreadable"] == len(spoiled)
    assert metrics["loss"] > 0


def test_no_validation_image_can_be_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=1)
    spoiled = spoil(data / "val")
    metrics = train(data, tmp_path / "run", **ONE)
    assert (metrics["loss"], metrics["top1"], metrics["top5"]) == (None, None, None)
    assert metrics["unreadable"] == len(spoiled)


def test_no_training_image_can_be_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=2, val=1)
    first = spoil(data / "train")[0]
    with pytest.raises(ValueError, match="no training image can be read") as caught:
        train(data, tmp_path / "run", **ONE)
    assert str(Path(first).parent.parent) in str(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()
