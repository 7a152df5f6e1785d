"""What a block was read as, remembered: whatever changes, the next call sees it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast.modules import recognition
from effnet_fast.modules.layers import MBConv, MBConvConfig
from effnet_fast.modules.stochastic_depth import StochasticDepth
from parity import assert_same, channels_last


def block(seed: int = 0) -> MBConv:
    torch.manual_seed(seed)
    return MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.25, nn.BatchNorm2d).train()


def step(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step, or the error that it ends in."""
    torch.manual_seed(seed)
    x = channels_last(torch.randn(4, 8, 6, 6)).requires_grad_()
    module.zero_grad()
    try:
        y = module(x.to(next(module.parameters()).dtype))
        y.square().sum().backward()
    except Exception as error:  # whatever it is, it must be the same
        return {f"{type(error).__name__}: {error}": torch.zeros(1)}
    results = {"y": y.detach(), "x": x.grad}
    results |= {f"grad {n}": p.grad for n, p in module.named_parameters()}
    results |= {n: b.clone() for n, b in module.named_buffers()}
    return {name: value for name, value in results.items() if value is not None}


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """Every call reads the module."""
    patch.setattr(recognition._Known, "current", lambda *_: None)


def held(patch: pytest.MonkeyPatch) -> list[bool]:
    """Appends what each question for a reading was answered."""
    answers: list[bool] = []
    original = recognition._Known.current

    def current(known: Any, module: Any) -> Any:
        found = original(known, module)
        answers.append(found is not None)
        return found

    patch.setattr(recognition._Known, "current", current)
    return answers


def set_to(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda m: setattr(m.get_submodule(path), name, value)


class Doubled(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Other(nn.Parameter):
    pass


CONV, NORM, ACT, SE = "block.1.0", "block.1.1", "block.1.2", "block.2"
EDITS: dict[str, Callable[[Any], Any]] = {
    "momentum": set_to(NORM, "momentum", 0.5),
    "no momentum": set_to(NORM, "momentum", None),
    "eps": set_to(NORM, "eps", 0.25),
    "eps of no norm": set_to(NORM, "eps", -1.0),
    "eval of a norm": lambda m: m.block[1][1].eval(),
    "no tracking": set_to(NORM, "track_running_stats", False),
    "no statistics": lambda m: (
        m.block[1][1].__dict__["_buffers"].update(running_mean=None, running_var=None)
    ),
    "no counter": set_to(NORM, "num_batches_tracked", None),
    "eval of all": lambda m: m.eval(),
    "hook": lambda m: m.block[1].register_forward_hook(lambda *a: 2 * a[2]),
    "pre-hook": lambda m: m.block[1][1].register_forward_pre_hook(lambda *a: (2 * a[1][0],)),
    "backward hook": lambda m: m.block[1][0].register_full_backward_hook(lambda *a: None),
    "hook of the block": lambda m: m.register_forward_hook(lambda *a: 2 * a[2]),
    "parameter": lambda m: setattr(
        m.block[1][0], "weight", nn.Parameter(m.block[1][0].weight.detach() * 2)
    ),
    "parameter in its table": lambda m: m.block[1][1]._parameters.update(
        weight=nn.Parameter(m.block[1][1].weight.detach() * 2)
    ),
    "buffer": lambda m: m.block[1][1].register_buffer("running_mean", torch.ones(48)),
    "no gamma": set_to(NORM, "weight", None),
    "frozen": lambda m: m.block[1][0].weight.requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "statistic that requires a gradient": lambda m: m.block[1][1].running_mean.requires_grad_(),
    "data": lambda m: m.block[1][0].weight.data.mul_(2),
    "other data": lambda m: setattr(m.block[1][0].weight, "data", m.block[1][0].weight.data * 2),
    "data of another shape": lambda m: setattr(
        m.block[1][0].weight, "data", torch.ones(48, 1, 5, 5)
    ),
    "data of another dtype": lambda m: setattr(
        m.block[1][1].weight, "data", m.block[1][1].weight.data.double()
    ),
    "negative data": lambda m: setattr(
        m.block[1][1].weight, "data", torch._neg_view(m.block[1][1].weight.data)
    ),
    "class of a parameter": lambda m: setattr(m.block[1][0].weight, "__class__", Other),
    "state": lambda m: m.load_state_dict(block(1).state_dict()),
    "assigned state": lambda m: m.load_state_dict(block(1).state_dict(), assign=True),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "forward of an instance": lambda m: setattr(m.block[1][2], "forward", torch.relu),
    "class of a child": lambda m: setattr(m.block[1][2], "__class__", Doubled),
    "another activation": lambda m: m.block[1].register_module("2", nn.ReLU()),
    "another norm": lambda m: m.block[1].register_module("1", nn.BatchNorm2d(48, eps=0.5)),
    "one more child": lambda m: m.block[1].append(nn.ReLU()),
    "one child less": lambda m: m.block[1].pop(2),
    "stride": set_to(CONV, "stride", (2, 2)),
    "padding": set_to(CONV, "padding", (2, 2)),
    "dilation": set_to(CONV, "dilation", (2, 2)),
    "padding mode": set_to(CONV, "padding_mode", "circular"),
    "pool": set_to(f"{SE}.avgpool", "output_size", 2),
    "no residual": lambda m: setattr(m, "use_res_connect", False),
    "lean": lambda m: setattr(m, "memory", "lean"),
    "drop-path": set_to("stochastic_depth", "p", 0.75),
    "drop-path of batches": set_to("stochastic_depth", "mode", "batch"),
    "eval of drop-path": lambda m: m.stochastic_depth.eval(),
    "another drop-path": lambda m: setattr(m, "stochastic_depth", StochasticDepth(0.0, "row")),
    "hiding": lambda m: m.block[1][0].__dict__.update(weight=m.block[1][0].weight.detach() * 2),
    "checkpointing": lambda m: setattr(m, "grad_checkpointing", True),
}


def steps_around(edit: Callable[[Any], Any], remembers: bool) -> dict[str, Tensor]:
    """Results of four steps, of which a block that remembers reads itself twice, and of two more.

    The edit comes between them.
    """
    module = block()
    with pytest.MonkeyPatch.context() as patch:
        answers = held(patch)
        if not remembers:
            forgetful(patch)
        steps = [step(module) for _ in range(4)]
        assert not remembers or answers == [False, True, True]
        edit(module)
        steps += [step(module, seed) for seed in (1, 2)]
    return {f"{i} {k}": v for i, s in enumerate(steps) for k, v in s.items()}


def test_every_edit_between_steps() -> None:
    # One test of all: of parametrized cases `make test` runs a few.
    wrong = []
    for name, edit in EDITS.items():
        remembered, read = steps_around(edit, True), steps_around(edit, False)
        same = remembered.keys() == read.keys()
        if not same or not all(torch.equal(remembered[k], read[k]) for k in read):
            wrong.append(name)
    assert wrong == []


def test_what_is_set_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = block()
    for _ in range(3):
        step(module)
    answers = held(monkeypatch)
    step(module)
    monkeypatch.setattr(MBConv, "memory", "lean")
    step(module)
    assert answers == [True, False]
    step(module)
    assert recognition.recognise(module).found.memory == "lean"


def test_code_of_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is in no table of blocks."""
    module = block()
    for layer in (module.block[0], module.block[1]):
        layer.register_module("2", nn.ReLU())
    for _ in range(3):
        step(module)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: torch.relu(x) * 3)
    with monkeypatch.context() as patch:
        forgetful(patch)
        expected = step(copy.deepcopy(module))
    assert_same(step(module), expected)


def test_a_module_that_changes_all_the_time_is_seldom_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, watched = block(), []
    original = recognition._watch
    monkeypatch.setattr(recognition, "_watch", lambda m: watched.append(m) or original(m))
    for _ in range(30):
        module.block[1][1].weight = nn.Parameter(module.block[1][1].weight.detach())
        step(module)
    assert 1 < len(watched) < 8


def test_what_cannot_be_compared_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list among the settings may be edited and stay the same list."""
    module: Any = block()
    module.block[1][0].notes = [1]
    answers = held(monkeypatch)
    for _ in range(4):
        step(module)
    assert not any(answers)


def test_nothing_keeps_a_module() -> None:
    module = block()
    for _ in range(3):
        step(module)
    assert module in recognition._known
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_copies_and_states_have_nothing_of_it() -> None:
    module = block()
    before = set(vars(module))
    for _ in range(3):
        step(module)
    assert set(vars(module)) == before
    copied = copy.deepcopy(module)
    assert copied not in recognition._known
    assert_same(step(copied), step(module))
