"""What a second run repeats: modules that run twice, runs that fail, and other threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import use_backend
from effnet_fast.modules import checkpointing, repetition
from effnet_fast.modules.layers import MBConv, MBConvConfig

Step = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]


def block_of() -> MBConv:
    torch.manual_seed(0)
    return MBConv(MBConvConfig(4, 3, 1, 8, 8), 0.0, nn.BatchNorm2d)


def images(seed: int = 0) -> Tensor:
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def results_of(block: nn.Module, x: Tensor, y: Tensor) -> Step:
    assert x.grad is not None
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(block.named_buffers())}


def assert_same(actual: Step, expected: Step) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def twice(block: nn.Module) -> Function:
    return lambda x: block(block(x))


def fused_then_stock(block: nn.Module) -> Function:
    def run(x: Tensor) -> Tensor:
        h = block(x)
        with use_backend("reference"):
            return block(h)

    return run


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("make", [twice, fused_then_stock])
def test_a_module_that_runs_twice(make: Callable[[nn.Module], Function], memory: str) -> None:
    """Each of its runs is repeated as it was, whatever its `memory` is by then."""
    steps = []
    for checkpointed in (True, False):
        block, x = block_of(), images()
        function = make(block)
        y = checkpointing.run(function, block, x) if checkpointed else function(x)
        block.memory = memory
        y.square().sum().backward()
        steps.append(results_of(block, x, y))
    assert_same(*steps)
    counts = [b for name, b in steps[0].items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {2}


@pytest.mark.parametrize("in_second_run", [False, True])
def test_a_run_that_fails_leaves_nothing_behind(in_second_run: bool) -> None:
    block, x = block_of(), images()
    buffers = dict(block.named_buffers())
    runs: list[int] = []

    def fail(x: Tensor) -> Tensor:
        runs.append(1)
        h = block(x)
        if len(runs) == 1 + in_second_run:
            raise RuntimeError("on purpose")
        return block(h)

    with pytest.raises(RuntimeError, match="on purpose"):
        checkpointing.run(fail, block, x).square().sum().backward()
    assert (repetition.thread.recorded, repetition.thread.repeated) == (None, None)
    assert all(buffer is buffers[name] for name, buffer in block.named_buffers())


def test_an_outer_recording_outlives_an_inner_one() -> None:
    block, x = block_of(), images()
    outer: list[repetition.Choice] = []

    def fail() -> None:
        with repetition.recording([]):
            block(x)
            raise RuntimeError("on purpose")

    with repetition.recording(outer):
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        block(x)
    assert [choice.module for choice in outer].count(block) == 1


def in_threads(*functions: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_with_modules_of_their_own() -> None:
    blocks = [block_of() for _ in range(2)]
    alone = copy.deepcopy(blocks)
    steps: dict[int, Step] = {}

    def train(index: int, block: nn.Module) -> None:
        for _ in range(5):
            x = images(index)
            y = checkpointing.run(twice(block), block, x)
            y.square().sum().backward()
        steps[index] = results_of(block, x, y)

    in_threads(*(lambda i=i, b=b: train(i, b) for i, b in enumerate(blocks)))
    together = dict(steps)
    for index, block in enumerate(alone):
        train(index, block)
        assert_same(together[index], steps[index])


def test_second_runs_of_one_module_in_two_threads() -> None:
    """The module has its own buffers back when both have ended, the one that began first before."""
    block = block_of()
    buffers = dict(block.named_buffers())
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))
    mine = threading.local()

    def await_other(event: threading.Event) -> None:
        assert event.wait(60)

    def meet(x: Tensor) -> Tensor:
        if getattr(mine, "is_first", None):
            first_inside.set()
            await_other(second_inside)
        elif hasattr(mine, "is_first"):
            second_inside.set()
            await_other(first_done)
        return block(x)

    def train(is_first: bool) -> None:
        y = checkpointing.run(meet, block, images())
        mine.is_first = is_first
        if not is_first:
            await_other(first_inside)
        y.sum().backward()
        if is_first:
            first_done.set()

    in_threads(lambda: train(True), lambda: train(False))
    assert all(buffer is buffers[name] for name, buffer in block.named_buffers())
