"""What may reach an engine: images that have memory, and no sizes but those that were packed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import effnet_fast
from effnet_fast.inference import snapshot
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, calibrate, random_images


class Plain(Tensor):
    """A subclass with memory of its own."""


@pytest.fixture
def model() -> EfficientNet:
    model = EfficientNet(TINY, num_classes=10)
    calibrate(model, random_images(8, 32))
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(x: Tensor) -> Any:
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])


def fake(x: Tensor) -> Any:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


WITHOUT_MEMORY: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "fake": (fake, TypeError, "x is a FakeTensor, allowed is a torch.Tensor"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), TypeError, "is a MaskedTensor"),
    "subclass": (lambda x: x.as_subclass(Plain), TypeError, "is a Plain, allowed"),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape), RuntimeError, "has no memory"),
    "functional": (torch._to_functional_tensor, RuntimeError, "no memory"),
    "freed": (freed, RuntimeError, "has no memory"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "no memory that kernels read"),
    "meta": (lambda x: x.to("meta"), RuntimeError, "x is on meta, the deployed network on cpu"),
}


@pytest.mark.filterwarnings("ignore")  # of masked tensors, that they are a prototype
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_deploy_refuses_what_has_no_memory(model: EfficientNet, x: Tensor, kind: str) -> None:
    make, error, text = WITHOUT_MEMORY[kind]
    fast = effnet_fast.deploy(model)
    given = make(x)
    with pytest.raises(error, match=text):
        fast(given)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_deploy_refuses_distributed_tensors(model: EfficientNet, x: Tensor, group: None) -> None:
    with pytest.raises(TypeError, match="x is a DTensor, allowed is"):
        effnet_fast.deploy(model)(distributed(x))


def test_the_own_plan_leaves_zeros_to_pytorch(model: EfficientNet, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(torch.zeros_like(x))
        zeros = torch._efficientzerotensor(x.shape)
        torch.testing.assert_close(model(zeros), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError):
            model(freed(x)[:0].expand(0, 4, 32, 32))


@pytest.mark.parametrize("deployed", [False, True], ids=["plain", "deploy"])
def test_a_sign_in_a_bit_is_read(model: EfficientNet, deployed: bool) -> None:
    """The imaginary part of a conjugate is such a tensor."""
    x = torch.randn(2, 3, 32, 32, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    run = effnet_fast.deploy(model) if deployed else model
    with torch.no_grad():
        assert torch.equal(run(x), run(x.clone()))
        assert not torch.allclose(run(x), run(-x.clone()), rtol=1e-2)


@pytest.fixture
def packed_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shapes that engines gave."""
    seen: list[tuple[Any, ...]] = []
    original = snapshot.CpuEngine.__call__

    def call(self: Any, x: Tensor, dtype: torch.dtype) -> Any:
        y, maps = original(self, x, dtype)
        seen.append((None if y is None else tuple(y.shape), [tuple(m.shape) for m in maps]))
        return y, maps

    monkeypatch.setattr(snapshot.CpuEngine, "__call__", call)
    return seen


def edit_after_the_check(monkeypatch: pytest.MonkeyPatch, edit: Callable[[], None]) -> None:
    """Between the check of the weights and the call, as another thread could."""
    original = snapshot.Snapshot.is_fresh

    def is_fresh(self: Any, model: Any) -> bool:
        fresh = original(self, model)
        edit()
        return fresh

    monkeypatch.setattr(snapshot.Snapshot, "is_fresh", is_fresh)


def test_a_classifier_replaced_after_the_check(
    model: EfficientNet, x: Tensor, monkeypatch: pytest.MonkeyPatch, packed_runs: list[Any]
) -> None:
    fast = effnet_fast.deploy(model)
    expected = fast(x)
    layer: Any = model.classifier[1]
    small = nn.Parameter(layer.weight.detach()[:2].clone()), nn.Parameter(torch.zeros(2))

    def edit() -> None:
        layer.weight, layer.bias = small

    edit_after_the_check(monkeypatch, edit)
    assert torch.equal(fast(x), expected)
    assert packed_runs[-1] == ((2, 10), [])


def test_attributes_set_after_the_check(
    model: EfficientNet, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = EfficientNetFeatures(TINY).eval()
    fast = effnet_fast.deploy(encoder)
    expected = fast(x)

    def edit() -> None:
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.in_channels = module.out_channels = 1

    edit_after_the_check(monkeypatch, edit)
    for y, again in zip(fast(x), expected, strict=True):
        assert torch.equal(y, again)


def test_attributes_that_contradict_the_weights(model: EfficientNet, x: Tensor) -> None:
    """Stock does not look at them: so does a plain model; deploy refuses to pack them."""
    fast = effnet_fast.deploy(model)
    with torch.no_grad():
        expected = model(x)
        model.features[-1][0].out_channels = 4
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"weight has shape \[320, .*\], not \[4,"):
        fast(x)
    model.features[-1][0].out_channels = 320
    model.features[0][0].in_channels = 1
    with pytest.raises(RuntimeError, match="cannot be deployed"):
        fast(x[:, :1])


@pytest.mark.slow
def test_a_classifier_that_another_thread_replaces(model: EfficientNet, x: Tensor) -> None:
    fast = effnet_fast.deploy(model)
    layer: Any = model.classifier[1]
    big = layer.weight, layer.bias
    small = tuple(nn.Parameter(t.detach()[:2].clone()) for t in big)
    done = threading.Event()

    def edit() -> None:
        while not done.is_set():
            for layer.weight, layer.bias in (small, big):
                done.wait(0.001)

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        for _ in range(300):
            with contextlib.suppress(RuntimeError):  # weight and bias of two, for a moment
                assert fast(x).shape[1] in (2, 10)
    finally:
        done.set()
        editor.join()
