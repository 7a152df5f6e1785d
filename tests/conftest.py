"""Fixtures of every test."""

from __future__ import annotations

import io
import os
import random
import signal
from collections.abc import Iterator

# One thread for torch and OpenMP, here and in every process that a test starts: threads that wait
# for a busy core take fifty times as long. Set before torch is imported; tests of threading set
# their own number.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy
import pytest
import torch

import effnet_fast
import tiers
import torchvision_cpu  # noqa: F401  (before any import of torchvision)
from effnet_fast.cli import bench, common
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import downloads
from effnet_fast.pretrained.weights import EfficientNet_B0_Weights
from host import CONTENT, serve

# A shell lets what runs behind it ignore Ctrl-C, and every process that a test starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest selects by marks."""
    tiers.thin_out(items)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, whatever ran before it."""
    value = 0
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def exact_convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds stock's fp32 convolutions on a GPU to fp32; cuDNN's own default is TF32."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Takes back the number of threads that a test has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def b0_state():
    """A state dict of B0 whose logits depend on the image."""
    model = common.build_model(VARIANTS["b0"], "reference")
    x = bench.random_images(4, 64, torch.Generator().manual_seed(0))
    bench.calibrate(model, x)
    return model.state_dict()


@pytest.fixture(scope="session")
def b0_file(b0_state):
    """The bytes of a .pth file of `b0_state`."""
    buffer = io.BytesIO()
    torch.save(b0_state, buffer)
    return buffer.getvalue()


@pytest.fixture
def quick_retries(monkeypatch):
    """Short pauses before the next attempt, and no proxy between this machine and itself."""
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def host(quick_retries):
    """A host that serves `CONTENT`."""
    with serve(CONTENT) as host:
        yield host


@pytest.fixture
def published(quick_retries, b0_file, tmp_path, monkeypatch):
    """A host that serves `b0_file` as B0's published weights, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serve(b0_file) as host:
        url = host.url("efficientnet_b0_stand-in")
        monkeypatch.setattr(EfficientNet_B0_Weights.IMAGENET1K_V1.value, "url", url)
        yield host


def pytest_report_header() -> str:
    """Which copy of the package is tested: an installed one comes before a tree without kernels."""
    return f"effnet-fast: {effnet_fast.__version__} in {effnet_fast.__path__[0]}"
