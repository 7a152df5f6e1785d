"""Deployed networks on a GPU: streams, captures by the caller, memory, waiting for nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from launched import GPU_TARGETS, Target, engine_of
from networks import pair, random_images

pytestmark = pytest.mark.gpu
SLEEP = 50_000_000  # cycles: what does not wait for a stream would see what is not there yet


def network() -> nn.Module:
    return pair().actual.cuda()


def images(n: int, seed: int = 0) -> Tensor:
    return random_images(n, 48, seed=seed).cuda()


def plain(target: Target, deployed: Any) -> Any:
    """The same without graphs."""
    return target.deploy(deployed.source, deployed.dtype, graphs=0)


@GPU_TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_replay_is_the_launches(target: Target, dtype: torch.dtype) -> None:
    deployed = target.deploy(network(), dtype)
    launched = plain(target, deployed)
    for n in (2, 3):
        for seed in range(3):
            assert torch.equal(deployed(images(n, seed)), launched(images(n, seed)))
    assert len(engine_of(deployed)._graphs) == 2


@GPU_TARGETS
def test_two_streams(target: Target) -> None:
    """Each result follows its own stream's images, and the graph's memory has one user at once."""
    deployed = target.deploy(network())
    source = [images(2, seed) for seed in range(2)]
    expected = [deployed(x) for x in source]
    given = [torch.zeros_like(x) for x in source]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for x, value in zip(given, source, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(SLEEP)
                x.copy_(value)
                results.append(deployed(x))
                x.zero_()  # after the copy into the graph, in this stream's order
        torch.cuda.synchronize()
        for y, want in zip(results, expected, strict=True):
            assert torch.equal(y, want)


@GPU_TARGETS
def test_threads_with_streams_of_their_own(target: Target) -> None:
    deployed = target.deploy(network(), graphs=2)
    source = [images(1 + i % 3, i) for i in range(8)]
    expected = [deployed(x) for x in source]
    torch.cuda.synchronize()

    def call(index: int) -> Tensor:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            y = deployed(source[index])
        stream.synchronize()
        return y

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for y, want in zip(pool.map(call, range(8)), expected, strict=True):
                assert torch.equal(y, want)
            deployed.refresh()


@GPU_TARGETS
def test_more_shapes_than_graphs(target: Target) -> None:
    deployed = target.deploy(network(), graphs=3)
    launched = plain(target, deployed)
    for _ in range(2):
        for n in range(1, 7):
            assert torch.equal(deployed(images(n)), launched(images(n)))
    assert len(engine_of(deployed)._graphs) == 3


@GPU_TARGETS
def test_an_evicted_graph_and_its_successor(target: Target) -> None:
    deployed = target.deploy(network(), graphs=1)
    launched = plain(target, deployed)
    deployed(images(1))
    for seed in range(2 * effnet_fast.inference.cuda_graphs.PATIENCE):
        assert torch.equal(deployed(images(2, seed)), launched(images(2, seed)))
    assert [key[0] for key in engine_of(deployed)._graphs._graphs] == [2]


@GPU_TARGETS
def test_edit_between_replays(target: Target) -> None:
    model = network()
    deployed = target.deploy(model)
    before = [deployed(images(2)) for _ in range(2)][1]
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    for _ in range(2):
        torch.testing.assert_close(deployed(images(2)), before + 1, rtol=1e-5, atol=1e-5)


@GPU_TARGETS
def test_no_call_waits_for_the_device(target: Target) -> None:
    """Neither the watch over the weights nor a replay nor launches beyond the bound."""
    deployed = target.deploy(network(), graphs=1)
    given = [images(2), images(3)]
    for x in given * 2:
        deployed(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in given:
            deployed(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU_TARGETS
def test_inside_a_graph_of_the_callers(target: Target) -> None:
    """Its weights outlive a change of the network, which cannot be packed during a capture."""
    model = network()
    deployed = target.deploy(model)
    x = images(2)
    expected = deployed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = deployed(x)
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    assert not torch.equal(deployed(x), expected)
    torch.empty(1 << 24, device="cuda").fill_(7)  # what was freed would be written over
    graph.replay()
    assert torch.equal(y, expected)
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    with (
        pytest.raises(RuntimeError, match="call it once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        deployed(x)


@GPU_TARGETS
@pytest.mark.slow
def test_memory_does_not_grow(target: Target) -> None:
    """Over replays, launches beyond the bound, and weights packed anew."""
    model = network()
    deployed = target.deploy(model, graphs=2)
    given = [images(n) for n in (1, 2, 3)]

    def call(times: int) -> tuple[int, int]:
        for index in range(times):
            deployed(given[index % 3])
            if index % 250 == 0:
                with torch.no_grad():
                    model.classifier[1].bias.add_(0)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    call(600)
    allocated, reserved = call(600)
    after = call(1200)
    assert after[0] <= allocated
    assert after[1] <= reserved + (2 << 20)  # a segment of the allocator


@GPU_TARGETS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device alone")
def test_another_device(target: Target) -> None:
    model = pair().actual.to("cuda:1")
    deployed = target.deploy(model)
    x = random_images(2, 48).to("cuda:1")
    with torch.cuda.device(0):
        first, second = deployed(x), deployed(x)
        assert torch.cuda.current_device() == 0
    assert first.device.index == 1
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="x is on cuda:0, the deployed network on cuda:1"):
        deployed(x.to("cuda:0"))


def test_backends_for_cpus_are_refused() -> None:
    for backend in ("cpu", "reference", "simt"):
        with pytest.raises(ValueError, match=r"'auto', 'cuda' or 'triton' for a model on cuda"):
            effnet_fast.deploy(network(), backend=backend)


def test_moved_networks_are_followed() -> None:
    """To the GPU and back, each time by the plan of the device."""
    model = pair().actual
    deployed = effnet_fast.deploy(model)
    x = random_images(2, 48)
    y = deployed(x)
    model.cuda()
    torch.testing.assert_close(deployed(x.cuda()).cpu(), y, rtol=1e-3, atol=1e-3)
    model.cpu()
    assert torch.equal(deployed(x), y)
