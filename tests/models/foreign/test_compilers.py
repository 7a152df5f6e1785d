"""Accelerated networks in the hands of compilers and exporters: the class's stock forward."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import effnet_fast
import foreign_networks
import networks
import tiers
from effnet_fast.models.foreign.network import plan_of
from foreign_networks import SMALL
from networks import Pair, random_images, run_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
]
X = random_images(2, 32)
OTHERS = random_images(3, 32, seed=4)
NAMES = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two(name: str) -> Pair:
    """An accelerated network that has run from its plan, and its package's."""
    models = foreign_networks.trio(name)
    with torch.no_grad():
        models.actual(X)
    assert plan_of(models.actual).snapshot
    return Pair(models.actual, models.stock)


def without_random_layers(model: nn.Module) -> None:
    """Compiled code may draw in another order."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0


def encoders() -> Pair:
    """timm's encoder, accelerated and not."""
    torch.manual_seed(0)
    stock = timm.create_model("test_efficientnet", features_only=True, out_indices=(1, 3))
    foreign_networks.calibrate(stock)
    return Pair(effnet_fast.accelerate(copy.deepcopy(stock)), stock)


def named(result: Any) -> dict[str, Tensor]:
    """Tensors by names, of logits or maps."""
    results = [result] if isinstance(result, Tensor) else [*result]
    return {f"y {index}": y.detach() for index, y in enumerate(results)}


def assert_close(call: Callable[[Tensor], Any], models: Pair, *images: Tensor) -> None:
    """Asserts that a call gives what the stock network gives."""
    for x in images:
        with torch.no_grad():
            networks.assert_alike(named(call(x)), named(models.stock(x)))


def assert_no_op_of_ours(graph: torch.fx.Graph) -> None:
    """Asserts that a graph calls PyTorch's operators alone."""
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if "effnet_fast" in target]


class Looking:
    """A compiler that runs graphs as they are, and looks at them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        assert_no_op_of_ours(graph.graph)
        return graph.forward


class TestCompile:
    @pytest.mark.slow
    @NAMES
    @pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
    def test_graphs(self, name: str, options: dict[str, bool]) -> None:
        models, backend = two(name), Looking()
        assert_close(torch.compile(models.actual, backend=backend, **options), models, X, OTHERS)
        assert len(backend.graphs) <= 2

    @NAMES
    @pytest.mark.slow
    def test_a_training_step(self, name: str) -> None:
        models = two(name).apply(without_random_layers).train()
        models.actual.compile(backend="aot_eager", fullgraph=True)
        models.assert_alike(X)

    @pytest.mark.slow
    def test_an_encoder(self) -> None:
        models = encoders()
        compiled = torch.compile(models.actual, backend="aot_eager", fullgraph=True)
        assert_close(compiled, models, X)

    @NAMES
    @pytest.mark.exhaustive
    def test_inductor(self, name: str) -> None:
        models = two(name)
        assert_close(torch.compile(models.actual), models, X, OTHERS)
        models.apply(without_random_layers).train()
        torch._dynamo.reset()
        models.actual.compile()
        # As few values as X has in the last maps make BatchNorm's gradients a matter of rounding.
        models.assert_alike(random_images(4, foreign_networks.RESOLUTION))


class TestExport:
    @NAMES
    @pytest.mark.parametrize("strict", tiers.some((False, True), (False,)))
    def test_program(self, name: str, strict: bool) -> None:
        models = two(name)
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(models.actual, (X,), dynamic_shapes=shapes, strict=strict)
        assert_no_op_of_ours(program.graph)
        assert_close(program.module(), models, X, OTHERS)

    @pytest.mark.slow
    def test_an_encoder(self) -> None:
        models = encoders()
        program = torch.export.export(models.actual, (X,))
        assert_no_op_of_ours(program.graph)
        assert_close(program.module(), models, X)

    @pytest.mark.slow
    @NAMES
    def test_training(self, name: str) -> None:
        models = two(name).apply(without_random_layers).train()
        program = torch.export.export(copy.deepcopy(models.actual), (X,))
        results = [run_network(m, X) for m in (program.module(), models.stock)]
        networks.assert_alike(*results)

    @NAMES
    @pytest.mark.exhaustive
    def test_ahead_of_time_inductor(self, name: str, tmp_path: Path) -> None:
        models = two(name)
        with torch.no_grad():
            program = torch.export.export(models.actual, (X,))
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / "network.pt2")
            )
        assert_close(torch._inductor.aoti_load_package(path), models, X)


class TestOnnx:
    def check(self, models: Pair, path_or_bytes: str | bytes, *images: Tensor) -> None:
        import onnx

        is_path = isinstance(path_or_bytes, str)
        load = onnx.load if is_path else onnx.load_model_from_string
        assert {node.domain for node in load(path_or_bytes).graph.node} == {""}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            path_or_bytes, options, providers=["CPUExecutionProvider"]
        )
        (given,) = session.get_inputs()

        def run(x: Tensor) -> list[Tensor]:
            return [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]

        assert_close(run, models, *images)

    @NAMES
    def test_torchscript_exporter(self, name: str) -> None:
        models, buffer = two(name), io.BytesIO()
        torch.onnx.export(
            models.actual, (X,), buffer, dynamo=False,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )  # fmt: skip
        self.check(models, buffer.getvalue(), X, OTHERS)

    @NAMES
    @pytest.mark.exhaustive
    def test_dynamo(self, name: str, tmp_path: Path) -> None:
        models, path = two(name), str(tmp_path / "network.onnx")
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.onnx.export(
            models.actual, (X,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        program.save(path)
        self.check(models, path, X, OTHERS)


class TestFx:
    @NAMES
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_symbolic_trace(self, name: str, training: bool) -> None:
        """Also the random draws."""
        models = two(name).train(training)
        traced = torch.fx.symbolic_trace(copy.deepcopy(models.actual))
        assert_no_op_of_ours(traced.graph)
        expected = torch.fx.symbolic_trace(copy.deepcopy(models.stock))
        networks.assert_alike(run_network(traced, X), run_network(expected, X))

    @pytest.mark.parametrize(
        ("name", "nodes"),
        [
            ("torchvision small", {"features.3": "a", "features.5": "b"}),
            ("test_efficientnet", {"blocks.2": "a", "bn2": "b"}),
        ],
    )
    def test_feature_extraction_by_torchvision(self, name: str, nodes: dict[str, str]) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        models = two(name)
        actual, expected = (create_feature_extractor(m, nodes)(X) for m in models.models)
        networks.assert_alike(named(actual.values()), named(expected.values()))

    def test_feature_extraction_by_timm(self) -> None:
        """Whose tracer keeps timm's own layers whole."""
        from timm.models import FeatureGraphNet

        models = two("test_efficientnet")
        graph = FeatureGraphNet(models.actual, out_indices=(0, 2))
        expected = FeatureGraphNet(models.stock, out_indices=(0, 2))
        networks.assert_alike(named(graph(X)), named(expected(X)))


class TestTorchScript:
    @NAMES
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_trace(self, name: str, training: bool) -> None:
        models = two(name).apply(without_random_layers).train(training)
        state = copy.deepcopy(models.actual.state_dict())
        traced = torch.jit.trace(models.actual, X, check_trace=False)
        assert "effnet_fast::" not in str(traced.inlined_graph)
        models.actual.load_state_dict(state)  # tracing in training moves the statistics
        networks.assert_alike(run_network(traced, X), run_network(models.stock, X))
        if not training:
            assert_close(traced, models, OTHERS)

    @NAMES
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_script(self, name: str, training: bool) -> None:
        models = two(name).apply(without_random_layers)
        scripted = torch.jit.script(models.actual)
        assert "effnet_fast::" not in str(scripted.inlined_graph)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        models.train(training)
        expected = run_network(models.stock, X)
        for module in (torch.jit.load(buffer), scripted):
            networks.assert_alike(run_network(module.train(training), X), expected)

    def test_script_of_a_forward_that_was_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = two("test_efficientnet")
        monkeypatch.setattr(type(models.stock), "forward", lambda self, x: self.bn2(x))
        with pytest.raises(RuntimeError, match=r"effnet_fast\.restore"):
            torch.jit.script(nn.Sequential(models.actual))

    @pytest.mark.filterwarnings("ignore:Encountering a list")
    def test_an_encoder(self) -> None:
        models = encoders()
        assert_close(torch.jit.trace(models.actual, X), models, X, OTHERS)
        assert_close(torch.jit.script(models.actual), models, X, OTHERS)
