"""The staged MBConv against autograd of the plain one, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_passes
from cases import MBCONV_CASES, MBConvCase, find
from effnet_fast import ops, reference
from effnet_fast.ops import mbconv_training
from effnet_fast.ops.call import Norm, call_of
from effnet_fast.reference.activations import ACTIVATIONS
from effnet_fast.reference.mbconv import MBConvConfig, MBConvParams, three_modes
from mbconv_blocks import EPS, BlockCall, block_call, params_of, run
from parity import FP32, Results, random_like

CLOSE = 1e-12  # relative to the largest value of a tensor
SAMPLES = ("c_odd_stride_2", "no_expansion_residual", "c_eq_vector", "no_expansion")
ASYMMETRIC = (1, 2, 0, 3)


def staged(
    call: BlockCall, passes: Any = reference_passes, needs: Any = mbconv_training.ALL
) -> Results:
    """y and the gradients, by the names that `run` gives them."""
    tensors = {k: None if t is None else t.double() for k, t in call.tensors.items()}
    params, config = params_of(tensors), call.config
    padding = reference.arguments.resolve_padding(config.padding, params.depthwise.weight.shape[-1])
    layers = mbconv_training.Layers(params.expand, params.depthwise, params.squeeze, params.project)
    norms = tuple(
        Norm(mode, 0.0, eps) for mode, eps in zip(three_modes(call.training), EPS, strict=True)
    )
    how = call_of(
        norms, (), "", (config.stride,) * 2, padding, config.residual, call.memory,
        config.activation, config.se_activation, config.gate,
    )  # fmt: skip
    x, row_scale = tensors["x"], tensors["row_scale"]
    y, saved = mbconv_training.forward(passes, x, row_scale, layers, how)
    if call.memory == "lean":
        saved = saved._replace(z1=None)
    grads = mbconv_training.backward(passes, random_like(y), saved, layers, how, needs)
    results = {"y": y, "grad x": grads.x}
    for name in ("expand", "depthwise", "squeeze", "project"):
        part = getattr(params, name)
        fields = () if part is None else part._fields
        found = getattr(grads, "excite" if name == "squeeze" else name)
        assert fields or found == (None,) * len(found)
        for field, grad in zip(fields, found, strict=False):
            results[f"grad {name}.{field}"] = grad
    return results


def assert_equal(actual: Results, exact: Results) -> None:
    for name, tensor in exact.items():
        if name == "y" or name.startswith("grad "):
            error = (actual[name].reshape(tensor.shape) - tensor).abs().max()
            assert error <= CLOSE * max(1.0, float(tensor.abs().max())), f"{name}: {error:.1e}"


def without_affine(call: BlockCall) -> BlockCall:
    names = [n for n in call.tensors if n.endswith(("bn_weight", "bn_bias"))]
    return replace(call, tensors=call.tensors | dict.fromkeys(names))


def without_biases(call: BlockCall) -> BlockCall:
    return call.with_tensors(squeeze__reduce_bias=None, squeeze__expand_bias=None)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SAMPLES)
def test_gradients_are_those_of_autograd(name: str, training: bool) -> None:
    call = block_call(find(MBCONV_CASES, name), FP32, training)
    assert_equal(staged(call), run(call, double=True))


@pytest.mark.parametrize("index", range(1, 7))
def test_any_mixture_of_training_and_eval(index: int) -> None:
    modes = tuple(bool(index >> bit & 1) for bit in range(3))
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32, modes)
    assert_equal(staged(call), run(call, double=True))


@pytest.mark.parametrize(
    "change", [without_affine, without_biases, lambda c: replace(c, memory="lean")]
)
@pytest.mark.parametrize("name", SAMPLES[:3])
def test_absent_parameters_and_lean_memory(name: str, change: Any) -> None:
    call = change(block_call(find(MBCONV_CASES, name), FP32))
    assert_equal(staged(call), run(call, double=True))


@pytest.mark.parametrize("name", SAMPLES)
def test_drop_path(name: str) -> None:
    call = block_call(find(MBCONV_CASES, name), FP32, dropped=True)
    assert_equal(staged(call), run(call, double=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, training: bool) -> None:
    """With and without squeeze-excite and expansion; its own activation is another."""
    others = {
        "se_activation": ACTIVATIONS[ACTIVATIONS.index(activation) - 1],
        "gate": "hardsigmoid",
    }
    for name in ("c_odd_stride_2", "no_expansion_residual"):
        for kinds in ({}, others, {"squeeze": False}):
            case = find(MBCONV_CASES, name)
            call = block_call(case, FP32, training, activation=activation, **kinds)
            assert ("grad squeeze.reduce_weight" in run(call)) == ("squeeze" not in kinds)
            assert_equal(staged(call), run(call, double=True))


def test_a_block_without_squeeze_excite_has_no_pass_for_it() -> None:
    call, counting = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32, squeeze=False), Counting()
    staged(call, counting)
    assert {"squeeze", "excite", "excite_backward"}.isdisjoint(counting.ran)
    assert len(counting.ran) == 4 + 4


def test_asymmetric_padding() -> None:
    case = find(MBCONV_CASES, "c_odd_stride_2")
    call = block_call(case, FP32, padding=ASYMMETRIC)
    assert_equal(staged(call), run(call, double=True))


class Counting:
    """Passes that remember which of them ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(reference_passes, name)

        def counted(*args: Any) -> Any:
            self.ran.append(name)
            return function(*args)

        return counted


NONE = mbconv_training.Needs(False, (False,) * 3, (False,) * 3, (False,) * 4, (False,) * 3)


@pytest.mark.parametrize(
    ("needs", "passes"),
    [
        ({"project": (True, False, False)}, 2),
        ({"excite": (False, True, False, False)}, 3),
        ({"depthwise": (True, False, True)}, 4),
        ({"expand": (False, True, False)}, 5),
        ({"x": True}, 5),
    ],
    ids=lambda value: str(value),
)
def test_what_is_not_wanted_prunes_passes_and_changes_no_number(
    needs: dict[str, Any], passes: int
) -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    counting = Counting()
    actual = staged(call, counting, NONE._replace(**needs))
    assert len([name for name in counting.ran if name.endswith("_backward")]) == passes
    full = staged(call)
    wanted = {k: v for k, v in actual.items() if k.startswith("grad ") and v is not None}
    assert wanted
    for name, grad in wanted.items():
        assert torch.equal(grad, full[name]), name


@pytest.mark.parametrize("row", range(2))
def test_a_wrong_sum_is_noticed(row: int) -> None:
    class Wrong(Counting):
        def __getattr__(self, name: str) -> Any:
            function = super().__getattr__(name)
            if name != "squeeze":
                return function

            def wrong(*args: Any) -> tuple[Tensor, Tensor]:
                pooled, slopes = function(*args)
                slopes[row] *= 1 + 1e-6
                return pooled, slopes

            return wrong

    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    with pytest.raises(AssertionError, match="grad "):
        assert_equal(staged(call, Wrong()), run(call, double=True))


@pytest.mark.slow
def test_gradcheck() -> None:
    case = MBConvCase("tiny", 2, 3, 6, 3, 3, 3, 3, 1, 2, True)
    call = block_call(case, FP32, dropped=True)
    tensors = {k: None if t is None else t.double() for k, t in call.tensors.items()}
    names = call.differentiable

    def function(*inputs: Tensor) -> Tensor:
        own = tensors | dict(zip(names, inputs, strict=True))
        own |= {k: None if t is None else t.clone() for k, t in own.items() if "running" in k}
        return reference.mbconv(
            own["x"], params_of(own), call.config, training=True, row_scale=own["row_scale"]
        )

    inputs = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": "small"}, ValueError, "memory must be one of fast, lean, got 'small'"),
        ({"training": 1}, TypeError, "training must be a bool or three of them, got 1"),
        ({"row_scale": torch.ones(3)}, ValueError, r"row_scale must have shape \[2\], got \[3\]"),
        (
            {"config": MBConvConfig(stride=2, residual=True)},
            ValueError,
            "a residual needs an output",
        ),
        ({"x": torch.ones(2, 15, 7, 7)}, ValueError, "with Cin = 15 as in x"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    arguments: dict[str, Any] = {"x": call.x, "params": params_of(call.tensors)}
    arguments |= {"config": call.config, "training": True} | change
    with pytest.raises(error, match=message):
        reference.mbconv(**arguments)


NAMES = "silu, identity, relu, relu6, hardswish"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "tanh"}, f"activation must be one of {NAMES}, got 'tanh'"),
        ({"activation": None}, f"activation must be one of {NAMES}, got None"),
        ({"se_activation": "SiLU"}, f"se_activation must be one of {NAMES}, got 'SiLU'"),
        ({"gate": "silu"}, "gate must be one of sigmoid, hardsigmoid, got 'silu'"),
    ],
)
def test_unknown_names(config: dict[str, Any], message: str) -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    for function in (reference.mbconv, ops.mbconv):
        with pytest.raises(ValueError, match=message):
            function(call.x, params_of(call.tensors), replace(call.config, **config), training=True)


def test_wrong_squeeze_weight() -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    params: MBConvParams = params_of(call.tensors)
    squeeze = params.squeeze._replace(reduce_weight=torch.ones(4, 63))
    with pytest.raises(ValueError, match="reduce_weight must have shape"):
        reference.mbconv(call.x, replace(params, squeeze=squeeze), call.config, training=True)
