"""torch.export, ONNX, FX and TorchScript: what comes out runs anywhere and computes the same."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import networks
import tiers
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import MINI, Pair, assert_alike, random_images, run_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
]
X = random_images(2, 32)
OTHERS = random_images(3, 32, seed=4)
pair = functools.partial(networks.pair, MINI)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert_alike({"y": actual.detach()}, {"y": expected.detach()})


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def domains(path_or_bytes: str | bytes) -> set[str]:
    """Operator sets of an ONNX model; "" is the standard one."""
    import onnx

    load = onnx.load if isinstance(path_or_bytes, str) else onnx.load_model_from_string
    model = load(path_or_bytes)
    assert not model.functions
    return {node.domain for node in model.graph.node}


class TestTorchExport:
    @pytest.mark.slow
    @pytest.mark.parametrize("strict", tiers.some((False, True), (False,)))
    def test_eval(self, strict: bool) -> None:
        models = pair()
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(
            models.actual, (X,), dynamic_shapes=({0: batch},), strict=strict
        )
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert all(target.startswith(("aten.", "<built-in")) for target in targets), targets
        for x in (X, OTHERS):
            assert_close(program.module()(x), models.stock(x))

    @pytest.mark.slow
    def test_train(self) -> None:
        """The program carries the statistics' updates and gives stock's gradients."""
        models = pair()
        for model in models.models:
            for module in model.modules():
                if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                    module.p = 0.0
        models.train()
        program = torch.export.export(copy.deepcopy(models.actual), (X,))
        results = [run_network(m, X) for m in (program.module(), models.stock)]
        assert_alike(*results)
        assert results[0]["buffer features.0.1.num_batches_tracked"] == 1

    @pytest.mark.exhaustive
    def test_core_aten_decomposition_saved_and_loaded(self, tmp_path: Path) -> None:
        models = pair()
        program = torch.export.export(models.actual, (X,)).run_decompositions()
        targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
        names = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
        assert names == {"aten"}
        torch.export.save(program, tmp_path / "tiny.pt2")
        loaded = torch.export.load(tmp_path / "tiny.pt2")
        assert_close(loaded.module()(X), models.stock(X))

    @pytest.mark.slow
    def test_encoder_with_a_named_backend(self) -> None:
        model = EfficientNetFeatures(MINI, out_indices=(1, 2), backend="cpu").eval()
        program = torch.export.export(model, (X,))
        for actual, expected in zip(program.module()(X), model(X), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_checkpointing_leaves_no_trace(self) -> None:
        models = pair()
        models.actual.set_grad_checkpointing()
        program = torch.export.export(models.actual, (X,))
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert all(target.startswith("aten.") for target in targets), targets
        assert_close(program.module()(X), models.stock(X))


class TestOnnx:
    def run(self, models: Pair, model: str | bytes, *images: Tensor) -> None:
        assert domains(model) == {""}
        run = session(model)
        (name,) = [i.name for i in run.get_inputs()]
        for x in images:
            (y,) = run.run(None, {name: x.numpy()})
            assert_close(torch.from_numpy(y), models.stock(x))

    @pytest.mark.exhaustive
    def test_dynamo(self, tmp_path: Path) -> None:
        models = pair()
        path = str(tmp_path / "tiny.onnx")
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.onnx.export(
            models.actual, (X,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
        program.save(path)
        self.run(models, path, X, OTHERS)

    @pytest.mark.slow
    def test_torchscript_exporter(self) -> None:
        models = pair()
        buffer = io.BytesIO()
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        torch.onnx.export(
            models.actual, (X,), buffer, dynamo=False,
            input_names=["x"], output_names=["y"], dynamic_axes=axes,
        )  # fmt: skip
        self.run(models, buffer.getvalue(), X, OTHERS)

    def test_encoder(self) -> None:
        model = EfficientNetFeatures(MINI, out_indices=(1, 2)).eval()
        model.load_state_dict(networks.calibrated_state(MINI))
        buffer = io.BytesIO()
        torch.onnx.export(model, (X,), buffer, dynamo=False)
        run = session(buffer.getvalue())
        maps = run.run(None, {run.get_inputs()[0].name: X.numpy()})
        for actual, expected in zip(maps, model(X), strict=True):
            assert_close(torch.from_numpy(actual), expected)


class TestFx:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_symbolic_trace(self, training: bool) -> None:
        """Also the random draws, and the layout: the graph converts images as the network does."""
        models = pair().train(training)
        traced = torch.fx.symbolic_trace(copy.deepcopy(models.actual))
        seen = []
        traced.features.get_submodule("0.0").register_forward_pre_hook(
            lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        networks.assert_alike(run_network(traced, X), run_network(models.stock, X))
        assert seen == [True]

    def test_traced_is_copied_and_pickled(self) -> None:
        models = pair()
        traced = torch.fx.symbolic_trace(models.actual)
        for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            assert_close(other(X), models.stock(X))

    def test_encoder(self) -> None:
        model = EfficientNetFeatures(MINI, out_indices=(0, 2)).eval()
        traced = torch.fx.symbolic_trace(model)
        for actual, expected in zip(traced(X), model(X), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    def test_feature_extraction_by_torchvision(self) -> None:
        """torchvision's own way to intermediate maps: nodes bear its names."""
        from torchvision.models.feature_extraction import create_feature_extractor

        models = pair()
        nodes = {"features.3": "a", "features.4": "b"}
        actual, expected = (create_feature_extractor(m, nodes)(X) for m in models.models)
        for key, tensor in expected.items():
            assert_close(actual[key], tensor)


class TestTorchScript:
    @pytest.mark.slow
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_trace(self, training: bool) -> None:
        models = pair().train(training)
        state = copy.deepcopy(models.actual.state_dict())
        traced = torch.jit.trace(models.actual, X, check_trace=False)
        models.actual.load_state_dict(state)  # tracing in training moves the statistics
        networks.assert_alike(run_network(traced, X), run_network(models.stock, X))
        if not training:
            assert_close(traced(OTHERS), models.stock(OTHERS))

    @pytest.mark.slow
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_script(self, training: bool, tmp_path: Path) -> None:
        models = pair()
        scripted = torch.jit.script(models.actual)
        scripted.save(str(tmp_path / "tiny.pt"))
        for module in (scripted, torch.jit.load(str(tmp_path / "tiny.pt"))):
            stock = copy.deepcopy(models.stock).train(training)
            networks.assert_alike(run_network(module.train(training), X), run_network(stock, X))
            module.load_state_dict(networks.calibrated_state(MINI))

    @pytest.mark.slow
    def test_script_of_same_padding(self) -> None:
        """At both sizes, since the padding depends on them."""
        model = EfficientNet(replace(MINI, padding="same")).eval()
        model.load_state_dict(networks.calibrated_state(MINI))
        scripted = torch.jit.script(model)
        for x in (X, random_images(2, 33)):
            assert_close(scripted(x), model(x))

    @pytest.mark.slow
    def test_script_of_an_encoder_and_of_unpooled_maps(self) -> None:
        model = EfficientNetFeatures(MINI, out_indices=(0, 2)).eval()
        for actual, expected in zip(torch.jit.script(model)(X), model(X), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        whole = EfficientNet(MINI, num_classes=0, global_pool="").eval()
        scripted = torch.jit.script(whole)
        torch.testing.assert_close(scripted(X), whole(X), rtol=1e-3, atol=1e-3)
