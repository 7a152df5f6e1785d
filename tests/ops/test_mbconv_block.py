"""A block in one native call: to the bit what the registered passes give one by one."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cases import MBCONV_CASES, find
from effnet_fast import ops
from effnet_fast.ops.cpu import mbconv_block
from effnet_fast.reference.activations import ACTIVATIONS, GATES
from mbconv_blocks import BlockCall, block_call, run
from parity import DTYPES, FP32, RUNNING, assert_same

mbconv = importlib.import_module("effnet_fast.ops.mbconv")  # under that name is the op
NATIVE = (FP32, DTYPES[2])  # whose vectors are fp32, as kernels read them
SAMPLES = ("c_odd_stride_2", "no_expansion_residual", "c_eq_vector", "k7")
MODES = [*itertools.product((False, True), repeat=3)]


class Count:
    """How often each direction was asked, and how often it ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked, self.ran = 0, 0
        for direction in ("forward", "backward"):
            original = getattr(mbconv_block, f"mbconv_block_{direction}")
            patch.setattr(mbconv_block, f"mbconv_block_{direction}", self._counting(original))

    def _counting(self, original: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            result = original(*arguments)
            self.asked += 1
            self.ran += result is not None
            return result

        return counting


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    found = Count(monkeypatch)
    monkeypatch.setattr(mbconv, "launcher_of", lambda _, name: getattr(mbconv_block, name))
    return found


def by_passes(call: BlockCall, **options: Any) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mbconv, "_in_one_call", lambda *_: None)
        return run(call, ops.mbconv, backend="cpu", **options)


def at_once(call: BlockCall, **options: Any) -> dict[str, Tensor]:
    return run(call, ops.mbconv, backend="cpu", **options)


def check(count: Count, call: BlockCall, **options: Any) -> None:
    before, directions = count.ran, 1 + (options.get("wanted") != ())
    assert_same(at_once(call, **options), by_passes(call, **options))
    assert count.ran - before == directions


# One test of many cases: of parametrized ones `make test` runs a few.
def test_every_shape(count: Count) -> None:
    for param in MBCONV_CASES:
        if param.marks or "batch_0" in str(param.id):
            continue
        for dtypes in NATIVE:
            check(count, block_call(param.values[0], dtypes, dropped=True))


def test_norms_of_either_kind(count: Count) -> None:
    for training, name, memory in itertools.product(MODES, SAMPLES, ("fast", "lean")):
        for dtypes in NATIVE:
            check(count, block_call(find(MBCONV_CASES, name), dtypes, training, memory=memory))


@pytest.mark.parametrize("squeeze", [True, False])
def test_whatever_is_wanted(count: Count, squeeze: bool) -> None:
    """Each tensor's gradient alone, all but it, and none."""
    for name, memory in itertools.product(SAMPLES[:3], ("fast", "lean")):
        case = find(MBCONV_CASES, name)
        call = block_call(case, FP32, dropped=True, squeeze=squeeze, memory=memory)
        every = call.differentiable
        alone, others = [[one] for one in every], [[o for o in every if o != one] for one in every]
        for wanted in (*alone, *others, ()):
            check(count, call, wanted=wanted)


def test_absent_vectors(count: Count) -> None:
    kinds = ("bn_weight", "bn_bias"), ("reduce_bias", "expand_bias")
    for sample, names in itertools.product(SAMPLES, kinds):
        call = block_call(find(MBCONV_CASES, sample), FP32)
        gone = dict.fromkeys(n for n in call.tensors if n.endswith(names))
        check(count, replace(call, tensors=call.tensors | gone))


def test_activations(count: Count) -> None:
    case = find(MBCONV_CASES, "c_eq_vector")
    for activation, gate, squeeze in itertools.product(ACTIVATIONS, GATES, (True, False)):
        call = block_call(
            case, FP32, squeeze=squeeze, activation=activation, se_activation="relu", gate=gate
        )
        check(count, call)


def test_padding(count: Count) -> None:
    for padding in ((0, 1, 0, 1), (1, 2, 1, 2), (3, 0, 1, 4)):
        check(count, block_call(find(MBCONV_CASES, "c_odd_stride_2"), FP32, padding=padding))


def test_counters_of_versions_move(count: Count) -> None:
    """Once for each statistic and call, as by the passes; those of eval mode stay."""
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32, (True, False, True))
    versions = []
    for function in (at_once, by_passes):
        given = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "clone", lambda tensor: tensor)  # `run` copies what moves
            before = {k: t._version for k, t in given.items() if t is not None}
            function(replace(call, tensors=given), wanted=["x"])
        after = {k: t._version for k, t in given.items() if t is not None}
        versions.append({k: after[k] - n for k, n in before.items()})
    assert versions[0] == versions[1]
    assert versions[0]["expand.running_mean"] == 1
    assert versions[0]["depthwise.running_var"] == 0


UNFIT: dict[str, Any] = {
    "another_dtype": lambda t: t.bfloat16(),
    "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
    "negative": lambda t: torch._neg_view(t.neg()),
}


def test_what_kernels_do_not_read_goes_by_the_passes(count: Count) -> None:
    """Each tensor in turn; the passes convert it, or refuse it as ever."""
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), NATIVE[1], dropped=True)
    weights = ("expand.weight", "depthwise.weight", "project.weight")
    for kind, (name, tensor) in itertools.product(UNFIT, call.tensors.items()):
        assert tensor is not None
        if name in ("x", "row_scale") or name.endswith(RUNNING):  # made plain before the op
            continue
        if kind != "another_dtype" or name not in weights:
            changed = replace(call, tensors=call.tensors | {name: UNFIT[kind](tensor)})
            before = count.ran
            assert_same(at_once(changed), by_passes(changed))
            assert count.ran < before + 2, name


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_who_watches_operators_sees_the_passes(count: Count) -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32)
    with _Record() as record:
        at_once(call)
    assert "effnet_fast.mbconv_expand.default" in record.names
    assert "effnet_fast.mbconv_expand_backward.default" in record.names
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        at_once(call)
    seen = {event.name for event in profiled.events()}
    assert {"effnet_fast::mbconv_project", "effnet_fast::mbconv_project_backward"} <= seen
    assert count.asked == 0
