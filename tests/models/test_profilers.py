"""What profilers, counters of operations and tools that draw graphs see of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import effnet_fast
import foreign_networks
import networks
from effnet_fast.inference import snapshot
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from foreign_networks import SMALL
from networks import MINI, Pair, random_images

X = random_images(2, 32)
OURS = "effnet_fast::"


def own() -> nn.Module:
    return EfficientNet(MINI).eval()


def without_global_pool() -> nn.Module:
    return EfficientNet(MINI, num_classes=0, global_pool="").eval()


def encoder() -> nn.Module:
    return EfficientNetFeatures(MINI, out_indices=(1, 2)).eval()


def small(name: str) -> Pair:
    models = foreign_networks.trio(name)
    return Pair(models.actual, models.stock)


def ranges(call: Callable[[], Any]) -> dict[str, list[Any]]:
    """The shapes of what a profiler sees of this package, by its names."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    rows = profiler.key_averages(group_by_input_shape=True)
    return {row.key: row.input_shapes for row in rows if row.key.startswith(OURS)}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (own, "EfficientNet mini"),
        (without_global_pool, "EfficientNet mini"),
        (encoder, "EfficientNetFeatures mini"),
        (lambda: small("torchvision small").actual, "EfficientNet"),
    ],
    ids=["own", "unpooled", "encoder", "torchvision"],
)
def test_plan_and_deploy_are_ranges(make: Callable[[], Any], name: str) -> None:
    model = make()
    deployed = effnet_fast.deploy(model)
    with torch.no_grad():
        for call, caller in ((model, "plan"), (deployed, "deploy")):
            seen = ranges(lambda call=call: call(X))
            assert seen[f"{OURS}{caller} {name}"] == [[2, 3, 32, 32]]
            # A last convolution in front of an unpooled map is a module, with its own op.
            assert len(seen) == (2 if make is without_global_pool else 1)


def test_without_a_profiler_there_is_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a range was opened")

    monkeypatch.setattr(snapshot, "_RecordFunctionFast", fail)
    with torch.no_grad():
        own()(X)
    effnet_fast.deploy(own())(X)


def test_passes_of_training_are_ranges() -> None:
    model = own().train()
    seen = ranges(lambda: model(X).sum().backward())
    for step in ("expand", "depthwise", "squeeze", "project", "finish"):
        assert seen[f"{OURS}mbconv_{step}"][0]
        backward = "excite" if step == "squeeze" else step
        assert seen[f"{OURS}mbconv_{backward}_backward"][0]


def nodes(y: Tensor) -> Iterator[Node]:
    """The nodes of a graph."""
    seen: set[Any] = {y.grad_fn}
    left = [*seen]
    while left:
        node = left.pop()
        yield node
        found = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= found
        left += found


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["own", *SMALL])
def test_every_saved_tensor_is_one(name: str, training: bool, memory: str) -> None:
    """torchviz asks them for their sizes."""
    model = own() if name == "own" else small(name).actual
    effnet_fast.accelerate(model, memory=memory).train(training)
    saved = [n.saved_tensors for n in nodes(model(X).sum()) if hasattr(n, "saved_tensors")]
    assert len(saved) > 4
    assert all(isinstance(tensor, Tensor) for tensors in saved for tensor in tensors)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SMALL)
def test_counted_operations_are_stocks(name: str, training: bool) -> None:
    """A counter meets every operator, also where a plan is ready."""
    models, counts = small(name), []
    with torch.no_grad():
        models.actual(X)
    for model in models.train(training).models:
        with FlopCounterMode(display=False) as counter:
            networks.run_network(model, X, training)
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]
    assert sum(counts[0]["Global"].values()) > 0
