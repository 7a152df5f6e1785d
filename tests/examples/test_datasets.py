"""The scripts that write data sets as folders."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path: Path) -> None:
    counts = script("digits").write(tmp_path, 40)
    assert counts == {"train": 30, "val": 10}
    digits = load_digits()
    for path in tmp_path.glob("*/*/*.png"):
        index, label = int(path.stem), int(path.parent.name)
        assert label == digits.target[index]
        assert (path.parents[1].name == "val") == (index % 4 == 3)
        values = np.asarray(Image.open(path)).astype(float) * 16 / 255
        assert abs(values - digits.images[index]).max() < 0.1


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.tobytes())


def test_fashion_mnist(tmp_path: Path) -> None:
    module = script("fashion_mnist")
    rng = np.random.default_rng(0)
    source, kept = tmp_path / "source", {}
    source.mkdir()
    for split, name in module.SPLITS.items():
        images = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        labels = (np.arange(12) % 10).astype(np.uint8)
        (source / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (source / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        kept[split] = images
    counts = module.write(source, tmp_path / "out", 11)
    assert counts == {"train": 11, "val": 11}
    for split, images in kept.items():
        folders = sorted(path.name for path in (tmp_path / "out" / split).iterdir())
        assert folders == sorted(module.CLASSES)
        path = tmp_path / "out" / split / "Ankle boot" / "00009.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[9])


@pytest.mark.parametrize("content", [b"\0\0\x0d\x01\0\0\0\1\1", b"\0\0\x08\x01\0\0\0\5\1", b"no"])
def test_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"x\.gz: "):
        script("fashion_mnist").read_idx(tmp_path / "x.gz")
