"""torchvision's old calling forms, and where and in which dtype a network is built."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import effnet_fast
import effnet_fast.models
from effnet_fast.pretrained.weights import EfficientNet_B0_Weights, EfficientNet_B1_Weights

B0 = EfficientNet_B0_Weights.IMAGENET1K_V1
Form = tuple[tuple[Any, ...], dict[str, Any]]
# Old calls, the weights that they stand for, and how many warnings torchvision gives.
OLD: list[tuple[Form, Any, int]] = [
    (((), {"pretrained": False}), None, 2),
    (((), {"pretrained": True}), B0, 2),
    (((False,), {}), None, 2),
    (((True,), {}), B0, 2),
    (((None,), {}), None, 1),
    (((None, False), {}), None, 1),
    (((True, False), {}), B0, 2),
    (((), {"weights": True}), B0, 1),
    (((), {"weights": "legacy"}), B0, 1),
    ((("IMAGENET1K_V1",), {}), B0, 1),
    (((), {"pretrained": "imagenet"}), B0, 2),
]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What published weights are loaded, instead of loading them."""
    found: list[Any] = []

    def note(model: nn.Module, published: Any, in_chans: int, progress: bool) -> None:
        found.append((published, progress))

    monkeypatch.setattr(effnet_fast.models, "load_published", note)
    return found


@pytest.fixture
def torchvision_on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's function, which loads nothing either."""
    kind = torchvision.models.efficientnet.WeightsEnum
    monkeypatch.setattr(kind, "get_state_dict", lambda *args, **options: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **options: None)

    def build(*args: Any, **options: Any) -> nn.Module:
        with torch.device("meta"):
            return torchvision.models.efficientnet_b0(*args, **options)

    return build


@pytest.mark.parametrize(("form", "meant", "count"), OLD, ids=str)
def test_old_form(
    form: Form, meant: Any, count: int, loaded: list[Any], torchvision_on_meta: Any
) -> None:
    args, options = form
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        torchvision_on_meta(*args, **options)
    with pytest.warns(UserWarning, match="efficientnet_b0 takes") as ours:
        model = effnet_fast.efficientnet_b0(*args, **options)
    assert type(model) is effnet_fast.models.EfficientNet
    progress = args[1] if len(args) == 2 else True
    assert loaded == ([] if meant is None else [(meant, progress)])
    assert len(theirs) == count
    assert {w.category for w in ours} == {w.category for w in theirs} == {UserWarning}
    assert all(w.filename == __file__ for w in ours)
    assert any("weights" in str(w.message) for w in ours)


def test_pretrained_means_the_first_set(loaded: list[Any]) -> None:
    with pytest.warns(UserWarning, match="EfficientNet_B1_Weights.DEFAULT"):
        effnet_fast.efficientnet_b1(pretrained=True)
    assert loaded == [(EfficientNet_B1_Weights.IMAGENET1K_V1, True)]


def test_encoder(loaded: list[Any]) -> None:
    with pytest.warns(UserWarning, match="pretrained"):
        model = effnet_fast.efficientnet_b0(pretrained=True, features_only=True)
    assert type(model) is effnet_fast.models.EfficientNetFeatures
    assert [member for member, _ in loaded] == [B0]


def test_new_forms_warn_of_nothing(loaded: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights in (None, "DEFAULT", B0, torchvision.models.EfficientNet_B0_Weights.DEFAULT):
            effnet_fast.efficientnet_b0(weights=weights, progress=False)
    assert loaded == [(B0, False)] * 3


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((None, True, 5), {}, "at most 2 arguments by position"),
        ((None,), {"weights": None}, "multiple values for argument 'weights'"),
        ((None,), {"pretrained": False}, "weights alone"),
        ((), {"weights": None, "pretrained": False}, "weights alone"),
        ((), {"weights": 2.5}, "Invalid Weight class"),
        ((), {"pretraind": True}, "pretraind"),
    ],
)
@pytest.mark.filterwarnings("ignore:efficientnet_b0 takes")
def test_refused(args: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        effnet_fast.efficientnet_b0(*args, **options)


def test_nothing_is_published() -> None:
    with pytest.raises(ValueError, match="efficientnet_b8 has no pretrained weights"):
        effnet_fast.efficientnet_b8(pretrained=True)
    with pytest.warns(UserWarning, match="pretrained"):
        effnet_fast.efficientnet_b8(pretrained=False, device="meta")


def test_the_signature_is_that_of_today() -> None:
    signature = inspect.signature(effnet_fast.efficientnet_b0)
    assert "pretrained" not in signature.parameters
    assert {p.kind for p in signature.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


class TestPlacement:
    @pytest.mark.parametrize("features_only", [False, True])
    def test_meta(self, features_only: bool) -> None:
        model = effnet_fast.efficientnet_b0(device="meta", features_only=features_only)
        tensors = [*model.parameters(), *model.buffers()]
        assert {t.device.type for t in tensors} == {"meta"}
        assert all(p.requires_grad for p in model.parameters())

    def test_dtype_rounds_the_same_draws(self) -> None:
        states = []
        for dtype in (None, torch.bfloat16):
            torch.manual_seed(0)
            states.append(effnet_fast.efficientnet(width=0.3, dtype=dtype).state_dict())
        for name, tensor in states[0].items():
            rounded = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert torch.equal(states[1][name], rounded), name
            assert states[1][name].dtype is rounded.dtype

    def test_weights_are_loaded_before_they_are_rounded(self, monkeypatch) -> None:
        seen = []
        monkeypatch.setattr(
            effnet_fast.models,
            "load_published",
            lambda model, **_: seen.append(next(model.parameters()).dtype),
        )
        model = effnet_fast.efficientnet_b0(weights="DEFAULT", dtype=torch.float64, device="cpu")
        assert seen == [torch.float32]
        assert next(model.parameters()).dtype is torch.float64

    @pytest.mark.parametrize(
        ("options", "kind", "text"),
        [
            ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype or None, got 'float32'"),
            ({"dtype": torch.int8}, ValueError, "dtype must be one of .*, got torch.int8"),
            ({"dtype": torch.complex64}, ValueError, "dtype must be one of"),
            ({"device": "gpu0"}, ValueError, "device 'gpu0' is unknown"),
            ({"device": 2.5}, TypeError, "device must be a torch.device, its name or None"),
            ({"device": "xpu:7"}, RuntimeError, "device 'xpu:7' cannot be used here"),
            ({"device": "meta", "weights": "DEFAULT"}, ValueError, "no memory for weights"),
        ],
    )
    def test_refused(self, options: dict[str, Any], kind: type[Exception], text: str) -> None:
        with pytest.raises(kind, match=text):
            effnet_fast.efficientnet_b0(**options)
