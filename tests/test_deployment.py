"""`deploy`: what it computes, which changes it follows, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import effnet_fast
import networks
from effnet_fast import use_backend
from effnet_fast.backends import native
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.modules.stochastic_depth import StochasticDepth
from networks import TINY, pair, random_images, trio
from one_block import DTYPES, ISAS
from tolerances import assert_no_worse_than

X = random_images(8, 48)  # of few logits the largest error is a matter of luck
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def network() -> EfficientNet:
    model = pair().actual
    assert isinstance(model, EfficientNet)
    return model


def stock_in(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Stock PyTorch's result in a dtype, by autocast."""
    autocast = dtype is torch.bfloat16
    with torch.no_grad(), use_backend("reference"), torch.autocast("cpu", dtype, enabled=autocast):
        return model(x)


def assert_parity(model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str = "auto") -> None:
    """Holds every output of the deployed network to the rule of parity."""
    exact = stock_in(copy.deepcopy(model).double(), x.double(), torch.float32)
    stock = stock_in(model, x, dtype)
    actual = effnet_fast.deploy(model, dtype, backend=backend)(x)
    groups = [y if isinstance(y, list) else [y] for y in (actual, stock, exact)]
    for y, stock_y, exact_y in zip(*groups, strict=True):
        assert y.dtype is x.dtype
        assert_no_worse_than(y.to(dtype), stock_y.to(dtype), exact_y)


class TestNumbers:
    @pytest.mark.parametrize("isa", ISAS)
    @dtypes
    def test_every_instruction_set(self, dtype: torch.dtype, isa: str) -> None:
        models = trio()
        y = effnet_fast.deploy(models.actual, dtype, backend=f"cpu:{isa}")(X)
        with torch.no_grad():
            exact = models.exact(X.double())
        stock = stock_in(models.stock, X, dtype)
        assert_no_worse_than(y.to(dtype), stock.to(dtype), exact)
        rounded = effnet_fast.deploy(models.actual, dtype, backend=f"cpu:{isa}")(X.bfloat16())
        assert rounded.dtype is torch.bfloat16
        assert networks.rms(rounded - y) <= 0.1 * networks.rms(y)

    def test_without_bf16_products_fp32_is_computed(self) -> None:
        model = network()
        low, full = (effnet_fast.deploy(model, d, backend="cpu:generic") for d in DTYPES[::-1])
        assert torch.equal(low(X), full(X))

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize(
        "options",
        [
            {"num_classes": 0},
            {"num_classes": 7},
            {"num_classes": 0, "global_pool": ""},
            {"num_classes": 5, "global_pool": "max"},
            {"num_classes": 5, "global_pool": "catavgmax"},
            {"in_chans": 1},
            {"in_chans": 5},
        ],
        ids=str,
    )
    def test_heads_and_input_channels(self, options: dict, dtype: torch.dtype) -> None:
        model = calibrated(EfficientNet(TINY, **options))
        x = random_images(8, 48, options.get("in_chans", 3), seed=3)
        assert_parity(model, x, dtype)

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize("change", ["linear", "deeper", "hooked", "identity"])
    def test_other_classifiers(self, change: str, dtype: torch.dtype) -> None:
        model, calls = network(), []
        features = model.head_hidden_size
        if change == "linear":
            model.classifier = nn.Linear(features, 5)
        elif change == "deeper":
            layers = (nn.Linear(features, 9), nn.ReLU(), nn.Linear(9, 4))
            model.classifier = nn.Sequential(*layers)
        elif change == "identity":
            model.classifier = nn.Identity()
        else:
            model.avgpool.register_forward_hook(lambda *args: calls.append(args))
        model.eval()
        assert_parity(model, X, dtype)
        assert len(calls) == 3 * (change == "hooked")

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize("out_indices", [None, (0,), (1, 3), (4,)], ids=str)
    def test_encoders(self, out_indices: tuple[int, ...] | None, dtype: torch.dtype) -> None:
        model = EfficientNetFeatures(TINY, out_indices=out_indices)
        model.load_state_dict(networks.calibrated_state(TINY))
        assert_parity(model.eval(), X, dtype)

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize("side", [48, 49, 51])
    def test_same_padding(self, side: int, dtype: torch.dtype) -> None:
        variant = replace(TINY, padding="same")
        model = calibrated(EfficientNet(variant), side)
        assert_parity(model, random_images(8, side, seed=4), dtype)

    @pytest.mark.slow
    @dtypes
    @pytest.mark.parametrize("squeezed", [1024, 1025, 20000])
    def test_wide_excitation(self, squeezed: int, dtype: torch.dtype) -> None:
        """Of the first block's 16 padded channels: the most that a thread computes alone."""
        model = EfficientNet(TINY)
        excite = model.features[1][0].block[1]
        excite.fc1 = nn.Conv2d(8, squeezed, 1)
        excite.fc2 = nn.Conv2d(squeezed, 8, 1)
        assert_parity(calibrated(model), X, dtype)

    @pytest.mark.parametrize("isa", ISAS)
    @dtypes
    def test_infinities(self, dtype: torch.dtype, isa: str) -> None:
        """NaN and inf stand where stock has them: silu(-inf) is NaN."""
        model = EfficientNet(TINY, num_classes=0)
        model.load_state_dict(networks.calibrated_state(TINY), strict=False)
        with torch.no_grad():
            values = torch.tensor([-torch.inf, torch.inf, torch.nan, -3e38])
            model.features[-1][1].bias[:4] = values
        stock = stock_in(model.eval(), X, dtype)
        y = effnet_fast.deploy(model, dtype, backend=f"cpu:{isa}")(X)
        assert y[:, [0, 2]].isnan().all()
        assert (y[:, 1] == torch.inf).all()
        assert not y[:, 3].any()
        assert torch.equal(y.isnan(), stock.isnan())
        assert torch.equal(y.isinf(), stock.isinf())

    def test_low_precision_model(self) -> None:
        model = network().bfloat16()
        deployed = effnet_fast.deploy(model)
        assert deployed.dtype is torch.bfloat16
        y, stock = deployed(X.bfloat16()), stock_in(model, X.bfloat16(), torch.float32)
        exact = stock_in(copy.deepcopy(model).double(), X.bfloat16().double(), torch.float32)
        assert_no_worse_than(y, stock, exact)

    def test_planted_fault_is_noticed(self) -> None:
        """Two channels swapped in one weight: what the tests above would have to see."""
        models = trio()
        weight = models.actual.features[5][1].block[0][0].weight
        with torch.no_grad():
            weight[[0, 1]] = weight[[1, 0]]
            exact = models.exact(X.double())
        for dtype in DTYPES:
            y = effnet_fast.deploy(models.actual, dtype)(X)
            with pytest.raises(AssertionError):
                assert_no_worse_than(y.to(dtype), stock_in(models.stock, X, dtype), exact)


def calibrated(model: EfficientNet, side: int = 48) -> EfficientNet:
    """With statistics of random images of its own."""
    for module in model.modules():
        if isinstance(module, effnet_fast.modules.layers.MBConv):
            module.block[-1][1].weight.data.mul_(0.25)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    for module in model.train().modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    with torch.no_grad():
        model(random_images(8, side, model.in_chans, seed=1))
    return model.eval()


class TestInputs:
    LAYOUTS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "cropped": lambda x: nn.functional.pad(x, (3, 2, 1, 5))[:, :, 1:-5, 3:-2],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every_second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    }

    @pytest.mark.parametrize("layout", LAYOUTS)
    @dtypes
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        deployed, x = effnet_fast.deploy(network()), X.to(dtype)
        strided = self.LAYOUTS[layout](x)
        assert torch.equal(strided, x)
        assert torch.equal(deployed(strided), deployed(x))

    @pytest.mark.parametrize("side", [48, 8])  # with blocks that threads take apart, and without
    @dtypes
    def test_many_images(self, side: int, dtype: torch.dtype) -> None:
        """More than the kernels take through the late layers at once."""
        x = random_images(35, side, seed=9)
        encoder = EfficientNetFeatures(TINY, out_indices=(0, 2, 4))
        encoder.load_state_dict(networks.calibrated_state(TINY))
        for model in (network(), encoder.eval()):
            deployed = effnet_fast.deploy(model, dtype)
            parts = [deployed(part) for part in x.split(8)]
            whole = deployed(x)
            if not isinstance(whole, list):
                whole, parts = [whole], [[part] for part in parts]
            for y, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(y, torch.cat(of_parts))
                assert len(y.flatten(1).unique(dim=0)) == len(x)

    def test_expanded(self) -> None:
        deployed = effnet_fast.deploy(network())
        y = deployed(X[:1].expand(3, -1, -1, -1))
        assert torch.equal(y, deployed(X[:1]).expand(3, -1))

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [(0, 3, 48, 48), (2, 3, 1, 1), (1, 3, 2, 65)], ids=str)
    def test_odd_sizes(self, shape: tuple[int, ...]) -> None:
        model = network()
        x = torch.randn(shape)
        y = effnet_fast.deploy(model)(x)
        stock = stock_in(model, x, torch.float32)
        assert (y.shape, y.dtype) == (stock.shape, stock.dtype)
        torch.testing.assert_close(y, stock, rtol=1e-3, atol=1e-3)
        maps = effnet_fast.deploy(EfficientNetFeatures(TINY).eval())(x)
        expected = EfficientNetFeatures(TINY).eval()(x)
        assert [m.shape for m in maps] == [m.shape for m in expected]

    @pytest.mark.parametrize(
        ("x", "error", "words"),
        [
            (torch.zeros(3, 48, 48), ValueError, "expected 4D input"),
            (torch.zeros(1, 4, 48, 48), RuntimeError, "to have 3 channels, but got 4"),
            (torch.zeros(1, 3, 0, 48), RuntimeError, "Calculated padded input size|too small"),
            (torch.zeros(1, 3, 48, 48, dtype=torch.float64), TypeError, "float64"),
            (torch.zeros(1, 3, 48, 48, dtype=torch.uint8), TypeError, "uint8"),
            (torch.zeros(1, 3, 48, 48, device="meta"), RuntimeError, "x is on meta"),
            (torch.zeros(1, 3, 48, 48, requires_grad=True), RuntimeError, "records no gradient"),
            ("image", TypeError, "got str"),
        ],
        ids=["3d", "channels", "no_rows", "fp64", "uint8", "meta", "gradient", "str"],
    )
    def test_errors(self, x: Tensor, error: type[Exception], words: str) -> None:
        deployed = effnet_fast.deploy(network())
        with pytest.raises(error, match=words):
            deployed(x)

    def test_gradients_are_never_recorded(self) -> None:
        deployed = effnet_fast.deploy(calibrated(EfficientNet(TINY, global_pool="max")))
        assert not deployed(X).requires_grad
        with torch.no_grad():
            assert torch.equal(deployed(X.clone().requires_grad_()), deployed(X))


class TestRefusals:
    def test_other_models(self) -> None:
        with pytest.raises(TypeError, match=r"got Linear; load other packages' weights"):
            effnet_fast.deploy(nn.Linear(2, 2))

    def test_overridden_forward(self) -> None:
        class Doubled(EfficientNet):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        with pytest.raises(RuntimeError, match="Doubled cannot be deployed: it overrides forward"):
            effnet_fast.deploy(Doubled(TINY).eval())

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16"):
            effnet_fast.deploy(network(), dtype)
        if dtype.is_floating_point:
            with pytest.raises(ValueError, match="dtype must be"):
                effnet_fast.deploy(network().to(dtype))
            assert effnet_fast.deploy(network().to(dtype), torch.float32)(X).isfinite().all()

    @pytest.mark.parametrize("backend", ["reference", "cuda", "triton", "cpu:sse9", "gpu"])
    def test_backends(self, backend: str) -> None:
        with pytest.raises((ValueError, RuntimeError), match=backend):
            effnet_fast.deploy(network(), backend=backend)

    def test_missing_extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "unavailable_reason", lambda: "no extension here")
        with pytest.raises(RuntimeError, match="no extension here"):
            effnet_fast.deploy(network())


class TestTracing:
    """What records operators would see memory that C++ fills, and record uninitialised tensors."""

    TRACERS: ClassVar[dict[str, Callable[[nn.Module], object]]] = {
        "jit": lambda m: torch.jit.trace(m, X, check_trace=False),
        "make_fx": lambda m: make_fx(m)(X),
        "make_fx_pre_dispatch": lambda m: make_fx(m, pre_dispatch=True)(X),
        "make_fx_fake": lambda m: make_fx(m, tracing_mode="fake")(X),
        "export": lambda m: torch.export.export(m, (X,), strict=False),
        "vmap": lambda m: torch.func.vmap(m)(X[None]),
        "forward_ad": lambda m: torch.func.jvp(m, (X,), (X,)),
    }

    @pytest.mark.parametrize("name", TRACERS)
    def test_refused(self, name: str) -> None:
        deployed = effnet_fast.deploy(network())
        y = deployed(X)
        with pytest.raises(RuntimeError, match="trace or export the model it was made of"):
            self.TRACERS[name](deployed)
        assert torch.equal(deployed(X), y)

    @pytest.mark.slow
    def test_compiled_code_calls_it(self) -> None:
        deployed = effnet_fast.deploy(network())
        called: list[str] = []

        def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            called.extend(n.name for n in graph.graph.nodes if n.op.startswith("call"))
            return graph.forward

        compiled = torch.compile(lambda x: deployed(2 * x) + 1, backend=backend)
        for _ in range(2):
            assert torch.equal(compiled(X), deployed(2 * X) + 1)
        assert len(called) == 2, f"the product and the sum are compiled, nothing else: {called}"
