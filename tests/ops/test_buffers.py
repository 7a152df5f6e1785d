"""Memory that training keeps for its next step."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import effnet_fast
from effnet_fast import EfficientNet
from effnet_fast.models import custom_variant
from effnet_fast.ops import buffers, scratch

LIKE = torch.empty(0)
SHAPE = (2, 32, 64, 96)  # 1.5 MiB in fp32
BYTES = 2 * 32 * 64 * 96 * 4
TINY = custom_variant(width=0.5, depth=0.5)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    effnet_fast.empty_cache()
    monkeypatch.setattr(buffers, "MIN_BYTES", 1 << 20)
    yield
    buffers._buffers().set_limit(buffers.limit_bytes())
    effnet_fast.empty_cache()


def kept() -> int:
    return buffers.kept_bytes()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_an_ordinary_one(dtype: torch.dtype) -> None:
    tensor = buffers.empty(LIKE.to(dtype), (4, 32, 64, 96))
    plain = torch.empty((4, 32, 64, 96), dtype=dtype, memory_format=torch.channels_last)
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (dtype, plain.shape, plain.stride())
    assert type(tensor) is Tensor
    assert not tensor._is_view()
    assert not tensor.requires_grad
    tensor.fill_(1.0)
    assert tensor.requires_grad_().square().sum().item() == tensor.numel()
    assert buffers.empty(LIKE, (1 << 20,)).stride() == (1,)
    with torch.inference_mode():
        assert buffers.empty(LIKE, SHAPE).is_inference()


def test_memory_comes_back_with_the_last_view() -> None:
    first = buffers.empty(LIKE, SHAPE)
    address, row = first.data_ptr(), first[1]
    del first
    assert kept() == 0
    second = buffers.empty(LIKE, SHAPE)
    assert second.data_ptr() != address
    del row
    assert kept() >= BYTES
    assert buffers.empty(LIKE, SHAPE).data_ptr() == address


def test_small_and_foreign_tensors_are_torchs() -> None:
    for like, shape in (
        (LIKE, (1, 8, 4, 4)),
        (LIKE.double(), SHAPE),
        (torch.empty(0, device="meta"), SHAPE),
    ):
        tensor = buffers.empty(like, shape)
        assert (tensor.dtype, tensor.device) == (like.dtype, like.device)
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert buffers.kept_bytes() == (0, 0)


def test_a_much_larger_block_is_not_taken() -> None:
    buffers.empty(LIKE, (8 << 20,))  # 32 MiB, idle from here on
    small = buffers.empty(LIKE, (1 << 20,))
    assert kept() >= 32 << 20
    half = buffers.empty(LIKE, (5 << 20,))
    assert kept() == 0
    del small
    larger = buffers.empty(LIKE, (3 << 19,))  # the block of 4 MiB is too small for 6
    assert kept() >= 4 << 20
    del half, larger


def test_what_is_kept_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    alive: list[Tensor] = []
    most = 0
    for draw in torch.randint(0, 1 << 30, (200,), generator=generator).tolist():
        if draw % 3 == 0 and alive:
            alive.pop(draw % len(alive))
        else:
            alive.append(buffers.empty(LIKE, ((1 << 18) + draw % (1 << 20),)))
        used, idle = buffers.kept_bytes()
        most = max(most, used)
        assert used + idle <= 1.25 * most
    buffers._buffers().set_limit(4 << 20)
    assert kept() <= 4 << 20
    alive.clear()
    assert buffers.kept_bytes()[0] == 0
    assert kept() <= 4 << 20
    effnet_fast.empty_cache()
    assert buffers.kept_bytes() == (0, 0)


def test_a_tensor_outlives_what_is_freed_and_ends_in_another_thread() -> None:
    tensor = buffers.empty(LIKE, SHAPE).fill_(3.0)
    effnet_fast.empty_cache()
    assert tensor.eq(3.0).all()
    holder = [tensor]
    del tensor
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert buffers.kept_bytes()[0] == 0
    assert kept() >= BYTES


def test_poisoned_memory_is_torchs() -> None:
    buffers.empty(LIKE, SHAPE).fill_(1.0)
    torch._C._set_deterministic_algorithms(True)
    try:
        assert buffers.empty(LIKE, SHAPE).isnan().all()
    finally:
        torch._C._set_deterministic_algorithms(False)


def test_a_kept_block_costs_no_page_faults() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers.empty(LIKE, (12 << 20,)).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 500  # of 12,288 pages, or of 24 large ones


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0), ("1000", 1000), ("", None), ("-1", None), ("1GB", None)]
)
def test_the_variable(text: str, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(buffers.VARIABLE, text)
    read = buffers.limit_bytes.__wrapped__
    if limit is not None:
        assert read() == limit
    elif text:
        with pytest.raises(ValueError, match=r"EFFNET_FAST_KEPT_BYTES=.*number of bytes"):
            read()
    else:
        assert read() > 1 << 27


def step(model: EfficientNet, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    loss = model(x).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads, *(b.clone() for b in model.buffers())]


def test_steps_are_those_of_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    results = []
    for limit in (0, buffers.limit_bytes()):
        monkeypatch.setattr(buffers, "limit_bytes", lambda limit=limit: limit)
        torch.manual_seed(1)
        model = EfficientNet(TINY).to(memory_format=torch.channels_last).train()
        results.append([t for _ in range(3) for t in step(model, x)])
        gc.collect()
        assert (kept() > 0) == (limit > 0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_hook_that_keeps_a_saved_tensor_keeps_its_values() -> None:
    x = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    model = EfficientNet(TINY).to(memory_format=torch.channels_last).train()
    held: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.nbytes >= buffers.MIN_BYTES:
            held.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    loss.backward()
    assert held
    for _ in range(2):
        step(model, x)
    assert all(torch.equal(tensor, copy) for tensor, copy in held)


def test_scratch_is_given_back_to_what_is_kept() -> None:
    with scratch.scope():
        scratch.empty_nhwc("a", LIKE, SHAPE).fill_(1.0)
        assert buffers.kept_bytes()[0] >= BYTES
    scratch.release()
    assert buffers.kept_bytes()[0] == 0
    assert kept() >= BYTES
