"""Deployed networks and threads: their number, callers side by side, and memory over many calls."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast.backends import native
from effnet_fast.models import VARIANTS, EfficientNet, EfficientNetFeatures
from networks import TINY, pair, random_images

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def network() -> nn.Module:
    return pair().actual


@dtypes
def test_results_do_not_depend_on_the_number(dtype: torch.dtype) -> None:
    deployed, x = effnet_fast.deploy(network(), dtype), random_images(5, 48)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(deployed(x))
    assert all(torch.equal(y, results[0]) for y in results)


def test_concurrent_callers() -> None:
    """Eight at once, while the weights are refreshed."""
    deployed = effnet_fast.deploy(network())
    images = [random_images(1 + i % 3, 48 + i, seed=i) for i in range(8)]
    expected = [deployed(x) for x in images]
    done = threading.Event()

    def refresh() -> None:
        while not done.is_set():
            deployed.refresh()

    refresher = threading.Thread(target=refresh)
    refresher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                for y, want in zip(pool.map(deployed, images), expected, strict=True):
                    assert torch.equal(y, want)
    finally:
        done.set()
        refresher.join()


@pytest.mark.slow
def test_other_threads_run_meanwhile() -> None:
    """Within an interval in which Python takes the lock from nobody who holds it."""
    deployed, x = effnet_fast.deploy(EfficientNet(VARIANTS["b0"]).eval()), random_images(2, 224)
    counts, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1
            time.sleep(1e-3)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    sys.setswitchinterval(10)
    try:
        counter.start()
        before = counts[0]
        for _ in range(5):
            deployed(x)
        during = counts[0] - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert during > 0


def kept_bytes(call: Callable[[], Any]) -> int:
    """Scratch memory that a thread keeps after this call, its first."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
        return pool.submit(native.load().kept_bytes).result()


def test_memory_of_more_images() -> None:
    """Beyond those at once an image takes what the early blocks leave of it, and its features."""
    deployed = effnet_fast.deploy(network())
    some, more = (kept_bytes(lambda n=n: deployed(random_images(n, 96))) for n in (16, 48))
    early, boundary, pooled = 48 * 48 * 16 * 4, 12 * 12 * 16 * 4, 320 * 4
    assert 32 * pooled < more - some <= 32 * (boundary + pooled) < 32 * early


@pytest.mark.slow
def test_large_memory_is_given_back() -> None:
    deployed, x = effnet_fast.deploy(network()), random_images(1, 2048)
    assert kept_bytes(lambda: deployed(x[..., :512, :512])) > 1 << 20
    assert kept_bytes(lambda: deployed(x)) == 0


def test_calls_are_counted() -> None:
    """Those that run at this moment: they share the cores."""
    extension, deployed = native.load(), effnet_fast.deploy(network())
    images, most = random_images(2, 96), 0
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(deployed, images) for _ in range(200)]
        while not all(call.done() for call in calls):
            most = max(most, extension.running_calls())
    assert 1 <= most <= 4
    assert extension.running_calls() == 0


@pytest.mark.exhaustive
def test_memory_does_not_grow() -> None:
    deployed = effnet_fast.deploy(network())
    encoder = effnet_fast.deploy(EfficientNetFeatures(TINY).eval(), torch.bfloat16)
    x = random_images(1, 32)

    def call(times: int) -> int:
        for _ in range(times):
            deployed(x)
            encoder(x)
        return resident_bytes()

    before = call(500)
    assert call(5000) - before < 1 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_child_forked_while_another_thread_packs_does_not_hang() -> None:
    """As a data loader's worker can be; the network's own plan has such locks too."""
    model = network()
    deployed, x = effnet_fast.deploy(model), random_images(1, 32)
    with torch.no_grad():
        expected = deployed(x), model(x)
    locks = [keeper._lock for keeper in (deployed._packed, model._own_plan)]
    locks += [keeper.snapshot._lock for keeper in (deployed._packed, model._own_plan)]
    held, done = threading.Event(), threading.Event()

    def pack() -> None:
        with locks[0], locks[1], locks[2], locks[3]:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=pack)
    thread.start()
    assert held.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        deployed.refresh()
        with torch.no_grad():
            results = deployed(x), model(x)
        os._exit(0 if all(map(torch.equal, results, expected)) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
