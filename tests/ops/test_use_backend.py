"""`use_backend`: what it decides, for how long and for whom."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import effnet_fast
from effnet_fast import ops
from effnet_fast.backends import (
    current_backend,
    use_backend,
)
from parity import SAMPLES, assert_same, run, sample, with_gradients

ANY_SAMPLE = pytest.mark.parametrize("name", SAMPLES)


def test_use_backend_nests() -> None:
    assert current_backend() == "auto"
    with use_backend("reference"):
        assert current_backend() == "reference"
        with use_backend("cpu:generic"):
            assert current_backend() == "cpu:generic"
            with use_backend("auto"):
                assert current_backend() == "auto"
            assert current_backend() == "cpu:generic"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_use_backend_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert current_backend() == "auto"


def test_use_backend_is_exported() -> None:
    assert effnet_fast.use_backend is use_backend


@ANY_SAMPLE
def test_context_decides_and_the_argument_comes_before_it(name: str) -> None:
    call = sample(name)
    wanted = with_gradients(call)
    stock = run(call, wanted=wanted)
    generic = run(call, "cpu:generic", wanted=wanted)
    assert not torch.equal(stock["y"], generic["y"])
    with use_backend("reference"):
        assert_same(run(call, "auto", wanted=wanted), stock)
        assert_same(run(call, "cpu:generic", wanted=wanted), generic)
    with use_backend("cpu:generic"):
        assert_same(run(call, "auto", wanted=wanted), generic)
        assert_same(run(call, "reference", wanted=wanted), stock)


def test_context_does_not_fall_back() -> None:
    call = sample("dwconv_eval").with_options(stride=3)
    assert_same(run(call, "auto"), run(call))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="the stride is 3"):
        run(call, "auto")


def test_use_backend_belongs_to_the_thread() -> None:
    seen = {}
    inside, done = threading.Barrier(2), threading.Barrier(2)

    def work() -> None:
        seen["at first"] = current_backend()
        with use_backend("cpu:generic"):
            inside.wait()
            done.wait()
            seen["inside"] = current_backend()

    thread = threading.Thread(target=work)
    with use_backend("reference"):
        thread.start()
        inside.wait()
        seen["elsewhere"] = current_backend()
        done.wait()
        thread.join()
    assert seen == {"at first": "auto", "inside": "cpu:generic", "elsewhere": "reference"}


def test_use_backend_belongs_to_the_task() -> None:
    async def work(backend: str) -> str:
        with use_backend(backend):
            await asyncio.sleep(0.01)
            return current_backend()

    async def both() -> list[str]:
        return await asyncio.gather(work("reference"), work("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"]


def test_backward_uses_the_backend_of_forward() -> None:
    """Autograd's own threads know no context."""
    call = sample("dwconv_train")
    tensors = call.tensors | {"x": call.x.clone().requires_grad_()}
    with use_backend("cpu:generic"):
        y = ops.dwconv_bn_silu(**tensors, **call.options)
    (grad,) = torch.autograd.grad(y, tensors["x"], torch.ones_like(y))
    expected = run(call, "cpu:generic", grad_y=torch.ones_like(y))
    assert torch.equal(grad, expected["grad x"])
