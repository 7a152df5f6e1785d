"""Deployed networks whose kernels are launched: graphs, changes of the weights, copies, threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import networks
from edits import EDITS
from effnet_fast.inference.cuda_graphs import LIMIT
from launched import TARGETS, Target, engine_of, recorders
from networks import pair, random_images
from recorder import FakeRecorder
from tiers import some

__all__ = ["recorders"]  # a fixture
X = random_images(2, 48)


def network(target: Target) -> nn.Module:
    return pair().actual.to(target.device)


def graphs_of(deployed: nn.Module) -> int:
    """The captured shapes."""
    return len(engine_of(deployed)._graphs)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("name", some(EDITS, ("depthwise_weight", "data_replaced", "eps", "ema")))
def test_edit_is_followed(target: Target, name: str, recorders: list[FakeRecorder]) -> None:
    if target.device == "cuda" and "data" in name:
        # Reading them would wait for the device at every call.
        pytest.skip("values on a GPU are not watched: refresh() is asked for")
    models = pair().apply(lambda model: model.to(target.device))
    x = X.to(target.device)
    deployed = target.deploy(models.actual)
    deployed(x)
    before = deployed(x)
    for _ in range(2):
        models.apply(EDITS[name])
        captured, after = deployed(x), deployed(x)
        assert torch.equal(captured, after)
        networks.assert_alike({"y": after}, {"y": models.stock(x).detach()})
        assert networks.rms(after - before) > 3 * networks.ALIKE * networks.rms(before)
        before = after


@pytest.mark.slow
@TARGETS
def test_graphs_of_old_weights_are_dropped(target: Target, recorders: list[FakeRecorder]) -> None:
    model = network(target)
    deployed = target.deploy(model)
    for n in (1, 2):
        deployed(X[:n].to(target.device))
    assert graphs_of(deployed) == 2
    old = engine_of(deployed)
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    deployed(X.to(target.device))
    assert (graphs_of(deployed), len(old._graphs)) == (1, 0)
    deployed.refresh()
    assert graphs_of(deployed) == 0


@pytest.mark.slow
@TARGETS
def test_refresh_after_an_edit_through_data(target: Target, recorders: list[FakeRecorder]) -> None:
    model, x = network(target), X.to(target.device)
    deployed = target.deploy(model)
    before = deployed(x)
    model.classifier[1].weight.data[3, 5] += 10
    deployed.refresh()
    assert not torch.equal(deployed(x)[:, 3], before[:, 3])
    assert torch.equal(deployed(x)[:, 4], before[:, 4])


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("name", COPIES)
def test_copies_carry_no_graph(target: Target, name: str, recorders: list[FakeRecorder]) -> None:
    deployed, x = target.deploy(network(target), torch.float16, graphs=3), X.to(target.device)
    y = deployed(x)
    other = COPIES[name](deployed)
    assert other._packed.snapshot is None
    assert torch.equal(other(x), y)
    assert torch.equal(other(x), y)
    assert (graphs_of(other), other.graphs) == (1, 3)
    with torch.no_grad():
        other.source.classifier[1].bias.add_(1)
    assert torch.equal(deployed(x), y)
    assert not torch.equal(other(x), y)


@pytest.mark.slow
@TARGETS
def test_shapes_beyond_the_bound(target: Target, recorders: list[FakeRecorder]) -> None:
    deployed = target.deploy(network(target), graphs=2)
    plain = target.deploy(deployed.source, graphs=0)
    images = [random_images(n, 48, seed=n).to(target.device) for n in (1, 2, 3, 4)]
    expected = [plain(x) for x in images]
    for _ in range(3):
        for x, y in zip(images, expected, strict=True):
            assert torch.equal(deployed(x), y)
    assert graphs_of(deployed) == 2
    assert engine_of(plain)._graphs is None


@pytest.mark.slow
@TARGETS
def test_changed_images_and_results_of_the_callers_own(
    target: Target, recorders: list[FakeRecorder]
) -> None:
    deployed = target.deploy(network(target))
    plain = target.deploy(deployed.source, graphs=0)
    images = [random_images(2, 48, seed=seed).to(target.device) for seed in range(4)]
    results = [deployed(x) for x in images]
    for x, y in zip(images, results, strict=True):
        assert torch.equal(y, plain(x))
    assert not torch.equal(results[0], results[1])
    assert graphs_of(deployed) == 1


@pytest.mark.slow
@TARGETS
def test_concurrent_callers(target: Target, recorders: list[FakeRecorder]) -> None:
    """Eight threads, more shapes than graphs, while the weights are refreshed."""
    deployed = target.deploy(network(target), graphs=2)
    images = [random_images(1 + i % 3, 32, seed=i).to(target.device) for i in range(8)]
    expected = [deployed(x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(deployed, images))
            for y, want in zip(results, expected, strict=True):
                assert torch.equal(y, want)
            deployed.refresh()
    assert all(recorder.overlaps == 0 for recorder in recorders)


@pytest.mark.slow
@TARGETS
def test_contexts(target: Target, recorders: list[FakeRecorder]) -> None:
    """Neither autocast nor inference_mode nor a default device changes the result."""
    deployed, x = target.deploy(network(target)), X.to(target.device)
    y = deployed(x)
    autocast = torch.autocast(target.device, torch.bfloat16)
    for _ in range(2):
        with torch.inference_mode(), autocast, torch.device("meta"):
            assert torch.equal(deployed(x), y)
        assert torch.equal(deployed(x), y)
        deployed.refresh()


@pytest.mark.slow
@TARGETS
def test_results_in_the_images_dtype(target: Target, recorders: list[FakeRecorder]) -> None:
    deployed, x = target.deploy(network(target), torch.float16), X.to(target.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for _ in range(2):
            assert deployed(x.to(dtype)).dtype is dtype
    assert graphs_of(deployed) == 1


@TARGETS
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 48, 48), ValueError, "expected 4D input"),
        (torch.zeros(1, 4, 48, 48), RuntimeError, "to have 3 channels, but got 4"),
        (torch.zeros(1, 3, 48, 48, dtype=torch.float64), TypeError, "float16, got torch.float64"),
        (torch.zeros(1, 3, 48, 48, requires_grad=True), RuntimeError, "records no gradient"),
    ],
    ids=["3d", "channels", "fp64", "gradient"],
)
def test_errors(target: Target, x: Tensor, error: type[Exception], words: str) -> None:
    deployed = target.deploy(network(target))
    with pytest.raises(error, match=words):
        deployed(x.detach().to(target.device).requires_grad_(x.requires_grad))
    with pytest.raises(
        RuntimeError, match=f"x is on meta, the deployed network on {target.device}"
    ):
        deployed(torch.zeros(1, 3, 48, 48, device="meta"))


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("graphs", [-1, 1.5, True, "8"])
def test_number_of_graphs(target: Target, graphs: object) -> None:
    with pytest.raises(ValueError, match="graphs must be an int of at least 0, got"):
        target.deploy(network(target), graphs=graphs)
    assert target.deploy(network(target)).graphs == LIMIT


@TARGETS
def test_repr(target: Target) -> None:
    text = repr(target.deploy(network(target), torch.float16))
    assert text.startswith("DeployedEfficientNet(EfficientNet tiny, dtype=torch.float16, ")
    assert target.device in text
    assert text.endswith(f"backend {target.backend})")


@pytest.mark.slow
@TARGETS
def test_while_the_caller_captures(
    target: Target, recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched into the caller's graph, whose weights live on when the network changes."""
    if target.device == "cuda":
        # The recorder of these tests stands in for a device's.
        pytest.skip("tests/test_deployment_device.py captures")
    model = network(target)
    deployed = target.deploy(model)
    y = deployed(X)
    recorders[-1].captures = True
    assert torch.equal(deployed(X), y)
    assert recorders[-1].log == ["record", "mark"]
    engine = engine_of(deployed)
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    assert not torch.equal(deployed(X), y)
    assert deployed._packed._captured == [engine]
    assert copy.deepcopy(deployed)._packed._captured == []
