"""The cache of CUDA graphs, on a device that only pretends to capture."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from effnet_fast.inference.cuda_graphs import PATIENCE, WAITING, Graphs, recorder_of
from recorder import FakeRecorder


def double(x: Tensor) -> list[Tensor]:
    assert x.is_contiguous(memory_format=torch.channels_last)
    return [2 * x, x.sum((2, 3))]


def cache(limit: int = 8, **options: Any) -> tuple[Graphs, FakeRecorder]:
    recorder = FakeRecorder()
    return Graphs(double, torch.float32, recorder, limit, **options), recorder


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def check(graphs: Graphs, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Runs x and holds the results to the function's own."""
    results = graphs.run(x, dtype)
    assert results is not None
    expected = double(x.float().contiguous(memory_format=torch.channels_last))
    for y, want in zip(results, expected, strict=True):
        assert y.dtype is dtype
        assert y.stride() == want.stride()
        assert torch.equal(y, want.to(dtype))
    return results


def test_a_shape_is_captured_once_and_replayed_with_other_images() -> None:
    graphs, recorder = cache()
    for seed in range(4):
        check(graphs, images(2, seed))
    assert recorder.log == ["record", "mark", *["wait", "replay", "mark"] * 3]
    check(graphs, images(3))
    check(graphs, images(2))
    assert (recorder.count("record"), len(graphs)) == (2, 2)


def test_results_are_the_callers() -> None:
    graphs, _ = cache()
    results = [check(graphs, images(2, seed)) for seed in range(3)]
    for seed, (y, total) in enumerate(results):
        assert torch.equal(y, 2 * images(2, seed))
        y.zero_()
        total.zero_()
    check(graphs, images(2, 5))


def test_dtype_and_strides_are_no_part_of_the_key() -> None:
    graphs, recorder = cache()
    x = images(2)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x.half()):
        for dtype in (torch.float32, torch.float16):
            check(graphs, given, dtype)
    check(graphs, images(4)[::2])
    check(graphs, x[:1].expand(2, -1, -1, -1))
    assert recorder.count("record") == 1


def test_settings_are() -> None:
    setting = ["ieee"]
    graphs, recorder = cache(settings=lambda: (setting[0],))
    for name in ("ieee", "tf32", "ieee", "tf32"):
        setting[0] = name
        check(graphs, images(2))
    assert recorder.count("record") == 2


def test_shapes_in_turn_beyond_the_bound_are_launched() -> None:
    """One more than there is room for: none of the graphs loses its place."""
    graphs, recorder = cache(2)
    for _ in range(5 * PATIENCE):
        check(graphs, images(1))
        check(graphs, images(2))
        assert graphs.run(images(3), torch.float32) is None
    assert (recorder.count("record"), len(graphs)) == (2, 2)


def test_a_shape_that_stays_takes_the_place_of_the_idle_one() -> None:
    graphs, recorder = cache(2)
    for n in (1, 2, 1):  # 2 is the least recently used
        check(graphs, images(n))
    for _ in range(PATIENCE - 1):
        assert graphs.run(images(3), torch.float32) is None
        check(graphs, images(1))
    assert recorder.count("finish") == 0
    check(graphs, images(3))
    place = recorder.log.index("finish")
    assert recorder.log[place : place + 2] == ["finish", "record"]
    replays = recorder.count("replay")
    check(graphs, images(1))
    check(graphs, images(3))
    assert (recorder.count("replay"), len(graphs)) == (replays + 2, 2)
    assert graphs.run(images(2), torch.float32) is None


def test_calls_before_the_idle_graphs_last_use_do_not_count() -> None:
    graphs, _ = cache(1)
    check(graphs, images(1))
    for _ in range(3):
        for _ in range(PATIENCE - 1):
            assert graphs.run(images(2), torch.float32) is None
        check(graphs, images(1))
    for _ in range(PATIENCE - 1):
        assert graphs.run(images(2), torch.float32) is None
    check(graphs, images(2))


def test_what_waits_is_bounded() -> None:
    graphs, _ = cache(1)
    for n in range(1, 3 * WAITING):
        graphs.run(images(n), torch.float32)
    assert len(graphs._waiting) <= WAITING


def test_while_the_caller_captures_nothing_is_touched() -> None:
    graphs, recorder = cache()
    check(graphs, images(2))
    log = list(recorder.log)
    recorder.captures = True
    for n in (2, 3):
        assert graphs.run(images(n), torch.float32) is None
    assert recorder.log == log
    recorder.captures = False
    check(graphs, images(2))


def test_closed() -> None:
    graphs, recorder = cache()
    check(graphs, images(2))
    graphs.close()
    assert (len(graphs), recorder.log[-1]) == (0, "finish")
    assert graphs.run(images(2), torch.float32) is None


def test_a_failed_capture_leaves_nothing() -> None:
    graphs, recorder = cache()
    recorder.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run(images(2), torch.float32)
    assert len(graphs) == 0
    recorder.failure = None
    for _ in range(2):
        check(graphs, images(2))
    assert recorder.count("replay") == 1


def test_inference_mode_inside_and_out() -> None:
    graphs, _ = cache()
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            check(graphs, images(2, int(inference)))


def test_concurrent_callers_do_not_meet() -> None:
    def slow(x: Tensor) -> list[Tensor]:
        time.sleep(1e-3)
        return double(x)

    recorder = FakeRecorder()
    graphs = Graphs(slow, torch.float32, recorder, 2)

    def call(seed: int) -> bool:
        x = images(1 + seed % 3, seed)
        results = graphs.run(x, torch.float32)
        return results is None or torch.equal(results[0], 2 * x)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(160)))
    assert recorder.overlaps == 0
    assert recorder.count("replay") > 50


def test_images_are_lent_to_the_calling_stream() -> None:
    graphs, recorder = cache()
    for _ in range(2):
        check(graphs, images(2))
    assert {tensor.shape for tensor in recorder.lent} == {images(2).shape}
    assert len({tensor.data_ptr() for tensor in recorder.lent}) == 1


def test_cpus_have_no_graphs() -> None:
    assert recorder_of(torch.device("cpu")) is None
