"""A missing package is named together with the extra that brings it."""

import subprocess
import sys

import pytest

from effnet_fast import training
from effnet_fast.training.data.augmentation import Augmentation
from effnet_fast.training.data.sources import open_images
from effnet_fast.training.extras import require

CORE = """
import sys
from effnet_fast.training.data import augmentation, loading, sampling, sources
heavy = {"accelerate", "kornia", "webdataset", "pyarrow", "ray", "torchvision", "timm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_returns_the_module():
    assert require("json.decoder", "train") is sys.modules["json.decoder"]


def test_names_the_extra():
    with pytest.raises(
        ImportError, match=r"^this needs nowhere: pip install 'effnet-fast\[ray\]'$"
    ):
        require("nowhere.part", "ray")


def test_what_an_installed_package_lacks_is_not_blamed_on_it(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import nowhere_else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nowhere_else"):
        require("halfway", "train")


@pytest.fixture
def bare(monkeypatch):
    """As if only the core's dependencies were installed."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("kornia", "pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("kornia", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("options", [{"randaugment": (2, 9)}, {"cutmix": 1.0}, {"erasing": 0.1}])
def test_augmentation_names_kornia(bare, options):
    common = {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 2}
    with pytest.raises(ImportError, match=r"needs kornia: pip install 'effnet-fast\[train\]'"):
        Augmentation(**common, **options)
    Augmentation(**common, flip=0.5, mixup=0.2)


def test_parquet_names_pyarrow(bare, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'effnet-fast\[train\]'"):
        open_images(tmp_path / "t.parquet")


def test_the_core_suffices_for_reading():
    subprocess.run([sys.executable, "-c", CORE], check=True)


def test_public_names_are_there():
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
        assert name in dir(training)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = training.nothing
