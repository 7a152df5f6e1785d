"""The check before native code: what every registered op refuses, and in which words."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import broken_arguments
import drawn_calls
from broken_arguments import BREAKS, REFUSED
from drawn_arguments import Draw, TensorRule
from effnet_fast import backends
from effnet_fast.ops.registration import RULES

OPS = sorted(RULES)
QUICK, MAKE_TEST = 108, 8_000  # calls: of plain pytest and of `make test`
# What is done to a tensor, the error and its text after the argument's name.
REFUSALS: dict[str, tuple[type[Exception], str]] = {
    "int": (TypeError, "is int32, allowed is "),
    "bool": (TypeError, "is bool8, allowed is "),
    "more_dims": (ValueError, r"is \[1, 1, 1, .*\], allowed is \["),
    "no_dims": (ValueError, r"is \[\], allowed is \["),
    "subclass": (TypeError, "is a Plain, allowed is a torch.Tensor and no subclass"),
    "freed_storage": (RuntimeError, "has no memory"),
}


def drawn(op: str, fits: Callable[[Draw], bool] = lambda draw: True) -> Draw:
    """Good arguments of an op, with images of more than one pixel and channel."""
    for seed in range(1000):
        draw = Draw(RULES[op], random.Random(seed), ("cpu",))
        sizes = draw.sizes
        large = sizes["N"] and all(sizes[s] > 1 for s in "CEORHWPQ")
        if large and fits(draw):
            return draw
    raise AssertionError(f"nothing fits {op}")


def call(draw: Draw, op: str) -> Any:
    return getattr(torch.ops.effnet_fast, op)(*draw.arguments.values())


def name_of(name: str, at: int | None) -> str:
    return name if at is None else rf"{name}\[{at}\]"


def test_every_argument_has_a_rule() -> None:
    for op in OPS:
        schema = getattr(torch.ops.effnet_fast, op).default._schema
        rules = RULES[op]
        assert [argument.name for argument in schema.arguments] == list(rules)
        for argument in schema.arguments:
            kind, rule = str(argument.type), rules[argument.name]
            if kind == "List[Optional[Tensor]]":
                assert isinstance(rule, list)
            elif "Tensor" in kind:
                assert isinstance(rule, str)
                parts = TensorRule.of(rule)
                assert parts is not None
                assert parts.optional == kind.startswith("Optional")


@pytest.mark.parametrize("op", OPS)
def test_a_broken_tensor_is_named(op: str) -> None:
    call(drawn(op), op)
    for kind, (error, text) in REFUSALS.items():
        for name, at, _ in drawn(op).places():
            draw = drawn(op)
            rule = next(r for n, a, r in draw.places() if (n, a) == (name, at))
            found = BREAKS[kind](draw, draw.get(name, at), rule, random.Random(0))
            assert found is not None
            draw.put(name, at, found[0])
            with pytest.raises(error, match=f"^{op}: {name_of(name, at)} {text}"):
                call(draw, op)


@pytest.mark.parametrize("op", OPS)
def test_another_size_is_named_with_what_is_known(op: str) -> None:
    tried = 0
    for name, at, rule in drawn(op).places():
        draw = drawn(op)
        letters = [s for s in rule.shape if s.isalpha() and draw.uses(s) > 1 and s not in "HWKLPQ"]
        if not letters:
            continue
        place, x = rule.shape.index(letters[0]), draw.get(name, at)
        longer = torch.cat([x, x.narrow(place, 0, 1)], place)
        if rule.layout in ("inner", "nhwc"):
            longer = longer.contiguous(memory_format=torch.channels_last)
        draw.put(name, at, longer)
        with pytest.raises(ValueError, match=rf"^{op}: .* is .*, allowed is \[.*\] with .* = "):
            call(draw, op)
        tried += 1
    assert tried


@pytest.mark.parametrize("op", OPS)
def test_dtypes_are_not_mixed(op: str) -> None:
    for name, at, rule in drawn(op).places():
        if rule.kind == "floats":
            continue
        draw = drawn(op)
        draw.put(name, at, draw.get(name, at).double())
        with pytest.raises(TypeError, match=f"^{op}: {name} is float64, allowed is "):
            call(draw, op)
    images = [place for place in drawn(op).places() if place[2].kind == "image"]
    if len(images) > 1:
        draw = drawn(op, lambda draw: draw.dtype is torch.float32)
        name, at, _ = [place for place in draw.places() if place[2].kind == "image"][-1]
        draw.put(name, at, draw.get(name, at).bfloat16())
        with pytest.raises(TypeError, match="is bfloat16, allowed is float32 like"):
            call(draw, op)


@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str) -> None:
    """What a kernel reads by its address alone has no gaps; other layouts are copied or refused."""
    for name, at, rule in drawn(op).places():
        draw = drawn(op)
        x = draw.get(name, at)
        wide = torch.stack([x, x], -1)[..., 0]
        draw.put(name, at, wide)
        if rule.layout == "any":
            call(draw, op)
            continue
        text = r"\.contiguous\(\)" if rule.layout == "dense" else "channels_last"
        with pytest.raises(ValueError, match=f"^{op}: {name} has shape .* and strides .*{text}"):
            call(draw, op)


@pytest.mark.parametrize("op", [op for op in OPS if "with mean" in str(RULES[op].get("var"))])
def test_mean_and_var_go_together(op: str) -> None:
    for absent in ("mean", "var"):
        draw = drawn(op, lambda draw: draw.arguments["mean"] is not None)
        draw.arguments[absent] = None
        with pytest.raises((ValueError, TypeError), match=r"mean and var are given together|None"):
            call(draw, op)


@pytest.mark.parametrize(
    ("op", "changed", "text"),
    [
        ("dwconv_statistics", {"stride": 3}, "stride is 3, allowed are 1 and 2"),
        ("dwconv_statistics", {"stride": 0}, "stride is 0, allowed are 1 and 2"),
        ("dwconv_statistics", {"padding": [-1, 0, 0, 0]}, r"padding is \[-1\], allowed are 0 to"),
        ("stem_conv", {"stride": [1, 0]}, r"stride is \[1, 0\], allowed are 1 to"),
        ("stem_conv", {"stride": [1]}, "stride must have 2 numbers"),
        ("mbconv_expand_backward", {"wanted": [True]}, "wanted must have 2 flags"),
        ("mbconv_excite_backward", {"pixels": -1}, "pixels must not be negative"),
        ("mbconv_eval", {"eps": [1e-5]}, "eps must have 3 flags"),
        ("mbconv_eval", {"depthwise": []}, "depthwise has 0 tensors, not 5"),
        ("bn_silu", {"backend": "auto"}, "'auto' has no kernels; allowed are cpu"),
        ("bn_silu", {"backend": "cpu:mips"}, "mips"),
    ],
    ids=str,
)
def test_other_arguments(op: str, changed: dict[str, Any], text: str) -> None:
    draw = drawn(op)
    draw.arguments |= changed
    with pytest.raises((ValueError, RuntimeError), match=text):
        call(draw, op)


def test_what_comes_out_of_a_convolution() -> None:
    op = "mbconv_depthwise_backward"
    draw = drawn(op)
    draw.arguments["padding"] = [side + 2 for side in draw.sides]
    with pytest.raises(ValueError, match="come out of this convolution, not"):
        call(draw, op)
    draw = drawn("dwconv_statistics", lambda draw: draw.sizes["K"] == 5 and draw.sizes["H"] < 5)
    draw.arguments["padding"] = [0] * 4
    with pytest.raises(ValueError, match="a kernel of 5x5 does not fit into padded images of"):
        call(draw, "dwconv_statistics")


def test_a_residual_fits() -> None:
    op = "mbconv_eval"
    call(drawn(op, lambda draw: draw.residual), op)
    others = [drawn(op, lambda draw: draw.sizes["O"] != draw.sizes["C"])]
    others[0].arguments["residual"] = True
    for side in (0, 2):  # a column more, a row more
        others.append(drawn(op, lambda draw: draw.residual and draw.arguments["stride"] == 1))
        others[-1].arguments["padding"] = list(others[-1].sides)
        others[-1].arguments["padding"][side] += 1
    for draw in others:
        with pytest.raises(ValueError, match="a residual needs an output of the input's shape"):
            call(draw, op)


@pytest.mark.parametrize("name", ["expand", "depthwise", "excite", "project"])
def test_negative_bits_inside_lists_are_signs(name: str) -> None:
    """PyTorch itself takes them from arguments that are single tensors."""
    draw = drawn("mbconv_eval", lambda draw: draw.arguments["expand"] and draw.arguments["excite"])
    arguments = draw.arguments
    for key in ("expand", "depthwise", "excite", "project"):
        arguments[key] = [t if t is None else t.float().contiguous() for t in arguments[key]]
    expected = call(draw, "mbconv_eval")
    arguments[name] = [t if t is None else torch._neg_view(-t) for t in arguments[name]]
    assert torch.equal(call(draw, "mbconv_eval"), expected)


def test_devices() -> None:
    draw = drawn("bn_silu")
    draw.arguments["backend"] = "cuda"
    with pytest.raises(RuntimeError, match="bn_silu: z is on another device than cuda"):
        call(draw, "bn_silu")


def test_a_sign_in_a_bit() -> None:
    """The dispatcher resolves it before the gate."""
    draw = drawn("bn_silu")
    expected = call(draw, "bn_silu")
    z = draw.arguments["z"]
    draw.arguments["z"] = torch._neg_view(-z)
    assert draw.arguments["z"].is_neg()
    assert torch.equal(call(draw, "bn_silu"), expected)


def test_tensors_of_a_subclass_take_the_reference() -> None:
    from effnet_fast.ops import squeeze_excite

    x, w1, w2 = torch.rand(1, 8, 4, 4), torch.rand(2, 8), torch.rand(8, 2)
    expected = squeeze_excite(x, w1, None, w2, None, backend="reference")
    y = squeeze_excite(x.as_subclass(broken_arguments.Plain), w1, None, w2, None)
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    with pytest.raises(RuntimeError, match="a tensor is a Plain, kernels take"):
        squeeze_excite(x, w1.as_subclass(broken_arguments.Plain), None, w2, None, backend="cpu")


def test_drawn_calls() -> None:
    tally = drawn_calls.run(QUICK)
    assert tally.failures == []
    assert tally.taken > QUICK // 4
    assert tally.refused.total() > QUICK // 4


@pytest.mark.slow
def test_more_drawn_calls() -> None:
    assert drawn_calls.run(MAKE_TEST, first=1000).failures == []


def test_drawn_calls_notice_a_missing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the gate a kernel takes NCHW memory for NHWC: other numbers come out."""
    op = "dwconv_bn_silu_eval"

    def past_the_gate(op: str, arguments: dict[str, Any]) -> list[Tensor]:
        return list(backends.launcher_of(arguments["backend"], op)(*arguments.values()))

    def other_layout(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
        return x.contiguous(), "same"

    monkeypatch.setattr(broken_arguments, "BREAKS", {"other_layout": other_layout})
    assert drawn_calls.run(50, ops=(op,)).failures == []
    monkeypatch.setattr(drawn_calls, "_results", past_the_gate)
    assert any("x other_layout: result 0" in f for f in drawn_calls.run(50, ops=(op,)).failures)


def test_drawn_calls_notice_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"same": lambda draw, x, rule, rng: (x, REFUSED)}
    monkeypatch.setattr(broken_arguments, "BREAKS", same)
    assert any(f.endswith("same: taken") for f in drawn_calls.run(50).failures)
