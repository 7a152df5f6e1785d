"""The plans that networks make for their own forward in eval mode: when, and when not."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import networks
import surgery
from allocations import standing_bytes
from effnet_fast import use_backend
from effnet_fast.inference import own_plan
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.inference.parts import METHODS
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, pair, random_images, trio
from one_block import ISAS
from tolerances import assert_no_worse_than

X = random_images(2, 48)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[CpuEngine]:
    """The plan of every forward that was run by one."""
    seen: list[CpuEngine] = []
    original = CpuEngine.__call__

    def call(self: CpuEngine, *args: Any) -> Any:
        seen.append(self)
        return original(self, *args)

    monkeypatch.setattr(CpuEngine, "__call__", call)
    return seen


def infer(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def network() -> EfficientNet:
    model = pair().actual
    assert isinstance(model, EfficientNet)
    return model


class TestNumbers:
    @pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
    @pytest.mark.parametrize("isa", ISAS)
    def test_parity(self, isa: str, autocast: bool, runs: list[CpuEngine]) -> None:
        models = trio()
        exact = infer(models.exact, X.double())
        with use_backend(f"cpu:{isa}"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, stock = infer(models.actual), infer(models.stock)
        assert len(runs) == 1
        assert_no_worse_than(y, stock, exact)

    def test_bf16_model(self, runs: list[CpuEngine]) -> None:
        models = trio()
        for model in models.models[:2]:
            model.bfloat16()
        exact = infer(copy.deepcopy(models.stock).double(), X.bfloat16().double())
        y, stock = (infer(model, X.bfloat16()) for model in models.models[:2])
        assert len(runs) == 1
        assert_no_worse_than(y, stock, exact)

    def test_encoder(self, runs: list[CpuEngine]) -> None:
        model = EfficientNetFeatures(TINY, out_indices=(0, 2, 4)).eval()
        model.load_state_dict(networks.calibrated_state(TINY))
        maps = infer(model)
        model.plan = False
        named = ({f"map {i}": m for i, m in enumerate(found)} for found in (maps, infer(model)))
        networks.assert_alike(*named)
        assert len(runs) == 1
        assert all(m.is_contiguous() for m in maps)

    def test_forwards_are_equal_to_the_bit(self, runs: list[CpuEngine]) -> None:
        model = network()
        first = infer(model)
        assert all(torch.equal(infer(model), first) for _ in range(3))
        assert torch.equal(infer(copy.deepcopy(model)), first)
        assert len(runs) == 5


class TestWhen:
    CONTEXTS: ClassVar[dict[str, Callable[[], Any]]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }

    @pytest.mark.parametrize("name", CONTEXTS)
    def test_used(self, name: str, runs: list[CpuEngine]) -> None:
        model = network()
        with self.CONTEXTS[name]():
            model(X)
        assert len(runs) == 1
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model(X)
        assert len(runs) == 1, "a graph could be wanted further on"

    def test_not_used(self, runs: list[CpuEngine]) -> None:
        model = network()
        model(X)  # records a graph
        infer(copy.deepcopy(model).train())
        with use_backend("reference"):
            infer(model)
        infer(model.half(), X.half())
        infer(model.double(), X.double())
        model.float().backend = "reference"
        infer(model)
        model.backend = "auto"
        with torch.autocast("cpu", torch.float16):
            infer(model)
        assert not runs
        infer(model)
        assert len(runs) == 1

    def test_who_records_operators_sees_them(self, runs: list[CpuEngine]) -> None:
        class Counter(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                self.calls += 1
                return func(*args, **(kwargs or {}))

        model, counter = network(), Counter()
        with counter:
            infer(model)
        assert counter.calls > 10
        torch.func.vmap(lambda x: infer(model, x[None]))(X)
        assert not runs

    @pytest.mark.parametrize("path", ["features", "features.2", "features.5.1.block.0.1"])
    def test_hooks(self, path: str, runs: list[CpuEngine]) -> None:
        """Called as ever; once they are gone, the plan comes back by itself."""
        model, calls = network(), []
        infer(model)
        handle = model.get_submodule(path).register_forward_hook(lambda *args: calls.append(1))
        for _ in range(3):
            infer(model)
        # `features` has a plan of its own, around which its hook is called; a stage's hook is
        # called on what the plan shows of it.
        assert (len(calls), len(runs)) == (3, 1 if "block" in path else 4)
        handle.remove()
        for _ in range(own_plan.LONGEST_WAIT + 1):
            infer(model)
        assert len(runs) > 1

    @pytest.mark.parametrize("path", ["avgpool", "classifier", "classifier.1"])
    def test_hooks_behind_the_features(self, path: str, runs: list[CpuEngine]) -> None:
        """What stands there runs as it is, on what the plan gives."""
        models, calls = pair(), []
        for model in models.models:
            module = model.get_submodule(path)
            module.register_forward_hook(lambda m, x, y: calls.append(y) or 2 * y)
        networks.assert_alike(*({"y": infer(model)} for model in models.models))
        networks.assert_alike(*({"shown": y} for y in calls))
        assert len(runs) == 1

    @pytest.mark.parametrize("path", ["classifier.0", "features.5.1.stochastic_depth"])
    def test_probability_alone(self, path: str, runs: list[CpuEngine]) -> None:
        """Of a layer in training mode, which drops nothing as long as it is 0."""
        model = network()
        layer = model.get_submodule(path).train()
        layer.p = 0.0
        assert torch.equal(infer(model), infer(model))
        assert len(runs) == 2
        layer.p = 0.5
        torch.manual_seed(3)
        y = [infer(model) for _ in range(4)]
        assert any(not torch.equal(y[0], other) for other in y)

    def test_dropout_that_is_wanted(self, runs: list[CpuEngine]) -> None:
        model = network()
        infer(model)
        model.classifier[0].train()
        model.classifier[0].p = 0.5
        y = infer(model)
        assert len(runs) == 2
        assert not torch.equal(infer(model), y)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: surgery.set_item(m.features[0], 2, nn.ReLU()),
            lambda m: surgery.patch_forward(m.features[3], 0.5),
            lambda m: surgery.parametrize_all(m.features[2][0].block[1]),
            lambda m: setattr(m.features[2][0].block[1][0], "stride", (1, 1)),
            lambda m: setattr(m.features[5][1], "use_res_connect", False),
            lambda m: m.features[3].train(),
        ],
        ids=["layer", "forward", "parametrized", "stride", "residual", "training"],
    )
    def test_surgery_between_calls(self, change: Callable[[nn.Module], object]) -> None:
        models = pair()
        before = infer(models.actual)
        models.apply(change)
        y, stock = (infer(model) for model in models.models)
        networks.assert_alike({"y": y}, {"y": stock})
        assert not torch.equal(y, before)

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_methods_of_a_subclass(self, name: str, runs: list[CpuEngine]) -> None:
        """They are called, and use the plan of what they call: of the network, or its features."""
        kind = EfficientNetFeatures if name == "_maps" else EfficientNet

        def doubled(self: Any, *args: Any) -> Any:
            y = getattr(kind, name)(self, *args)
            return [2 * m for m in y] if isinstance(y, list) else 2 * y

        state = networks.calibrated_state(TINY)
        results = []
        for cls in (type("Doubled", (kind,), {name: doubled}), kind):
            model = cls(TINY).eval()
            model.load_state_dict(state)
            if cls is kind:
                model.plan = False
                setattr(model, name, doubled.__get__(model))
            y = infer(model)
            results.append({str(i): m for i, m in enumerate(y if isinstance(y, list) else [y])})
        networks.assert_alike(*results)
        assert len(runs) == (name != "_maps")

    def test_a_forward_around_it(self, runs: list[CpuEngine]) -> None:
        """As Accelerate's prepare sets one on the instance for bf16, and unwrap_model leaves it."""
        model = network()

        @functools.wraps(EfficientNet.forward)
        def forward(self: EfficientNet, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return 2 * EfficientNet.forward(self, x)

        with torch.autocast("cpu", torch.bfloat16):
            plain = infer(model)
        model.forward = types.MethodType(forward, model)
        assert torch.equal(infer(model), 2 * plain)
        model.forward = types.MethodType(EfficientNet.forward, model)
        infer(model)
        assert len(runs) == 3

    @pytest.mark.parametrize("path", ["features.2.0.block.1.1", "classifier.1.bias"])
    def test_dtypes_that_pytorch_refuses(self, path: str) -> None:
        """A part in float64 is an error, as it is without a plan."""
        model = network()
        infer(model)
        part = model.get_submodule(path.removesuffix(".bias"))
        if path.endswith("bias"):
            part.bias = nn.Parameter(part.bias.detach().double())
        else:
            part.double()
        with pytest.raises(RuntimeError, match="dtype"):
            infer(model)

    def test_switched_off(self, runs: list[CpuEngine]) -> None:
        model = network()
        infer(model)
        model.plan = False
        infer(model)
        assert model._own_plan.snapshot is None
        assert not copy.deepcopy(model).plan
        infer(copy.deepcopy(model))
        assert len(runs) == 1

    @pytest.mark.parametrize("shape", [(0, 3, 48, 48), (2, 4, 48, 48), (2, 3, 0, 48), (3, 48, 48)])
    def test_errors_and_empty_results_are_pytorchs(self, shape: tuple[int, ...]) -> None:
        models = pair()
        infer(models.actual)
        x = torch.zeros(shape)
        outcomes = []
        for model in models.models:
            try:
                outcomes.append(infer(model, x).shape)
            except (RuntimeError, ValueError) as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


class TestPacking:
    def test_weights_seen_twice_where_packing_was_wasted(self, runs: list[CpuEngine]) -> None:
        """One forward after each step of training does not pack each time."""
        models = pair()

        def step(model: nn.Module) -> None:
            with torch.no_grad():
                model.classifier[1].weight.mul_(1.5)

        for _ in range(6):
            models.apply(step)
            networks.assert_alike(*({"y": infer(model)} for model in models.models))
        assert len(runs) == own_plan.WASTED
        for _ in range(3):
            networks.assert_alike(*({"y": infer(model)} for model in models.models))
        assert len(runs) == own_plan.WASTED + 3
        models.apply(step)
        networks.assert_alike(*({"y": infer(model)} for model in models.models))
        assert len(runs) == own_plan.WASTED + 4, "three calls were worth the packing"

    def test_packed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[bool] = []
        original = CpuEngine.__init__
        monkeypatch.setattr(
            CpuEngine,
            "__init__",
            lambda self, n, b, i: made.append(b) or original(self, n, b, i),
        )
        model = network()
        for _ in range(3):
            infer(model)
            with torch.autocast("cpu", torch.bfloat16):
                infer(model)
            model.train().eval() if len(made) > 2 else None
        assert made == [False, True]

    def test_training_frees_what_is_packed(self) -> None:
        model = network()
        infer(model)
        seen = weakref.ref(model._own_plan.snapshot)
        assert seen() is not None
        model.train()
        assert seen() is None

    @pytest.mark.parametrize(
        ("dtype", "share"), [(torch.float32, (0.9, 1.1)), (torch.bfloat16, (0.8, 1.0))], ids=str
    )
    def test_memory(self, dtype: torch.dtype, share: tuple[float, float]) -> None:
        """Nearly the parameters', in bf16 too: projections are kept in fp32 as well."""
        model = EfficientNet("b0").eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            infer(model)
        (engine,) = model._own_plan.snapshot.engines.values()
        assert share[0] < engine.nbytes / standing_bytes(model) < share[1]

    def test_does_not_travel(self) -> None:
        model = network()
        before = list(model.state_dict())
        infer(model)
        assert list(model.state_dict()) == before
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            snapshot = other._own_plan.snapshot
            assert snapshot is None or other.features is model.features
            assert torch.equal(infer(other), infer(model))

    @pytest.mark.slow
    def test_networks_are_freed(self) -> None:
        """At once; and by the garbage collector where a child leads back to its network."""
        model = network()
        infer(model)
        gone = weakref.ref(model)
        del model
        assert gone() is None
        model = network()
        model.features[1].owner = [model]
        infer(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
