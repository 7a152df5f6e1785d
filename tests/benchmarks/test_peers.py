"""Peers: each computes what stock does, or says why it does not take part."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch._inductor import config

from benchmarks import network_contests as networks
from benchmarks import op_contests, peers
from benchmarks.contest import OURS, UnavailableError
from benchmarks.network_contests import Case
from benchmarks.peers import PEERS, Peer
from benchmarks.setups import Runner, network_step
from cases import dwconv_of, head_of, mbconv_of, pointwise_of, squeeze_excite_of, stem_of
from effnet_fast.modules import recognition, structure

SMALL = Case("b0", 2, 64)
ON_CPU = [p for p in PEERS if "cpu" in p.devices and not p.compiles]


def _installed(peer: Peer) -> bool:
    return all(importlib.util.find_spec(module) for module in peer.requires)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("peer", ON_CPU, ids=lambda peer: peer.name)
def test_takes_part(peer: Peer, mode: str) -> None:
    if mode not in peer.modes or not _installed(peer):
        pytest.skip(f"not for {mode}, or not installed")
    contest = networks.contest(SMALL, mode, peer.dtypes[0], "cpu", names=[peer.name])
    result = contest.build[peer.name]()()
    assert isinstance(result, torch.Tensor)
    assert result.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch_contiguous", "torch_channels_last", "torch_amp"])
def test_stock_never_takes_a_fused_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers made of this package's modules run PyTorch's operators and look for nothing else."""
    dtype = "bf16" if name == "torch_amp" else "fp32"
    contest = networks.contest(SMALL, "inference", dtype, "cpu", names=[name])

    def fail(module: object, *_: object) -> None:
        raise AssertionError("looked for something to fuse")

    monkeypatch.setattr(recognition, "recognise", fail)
    monkeypatch.setattr(structure, "structure_of", fail)
    contest.build[name]()()


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_jax_computes_what_stock_does() -> None:
    networks.contest(SMALL, "inference", "fp32", "cpu", names=["jax"]).build["jax"]()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_check_passes_and_finds_a_fault(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = networks._setup(SMALL, mode, "fp32", "cpu")
    networks.check(setup)
    _break_ours(monkeypatch)
    with pytest.raises(AssertionError):
        networks.check(setup)


@pytest.mark.slow
def test_check_finds_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = networks._setup(SMALL, "training", "fp32", "cpu")
    step = networks.network_step

    def wrong(model: torch.nn.Module, x: torch.Tensor, mode: str) -> Runner:
        if getattr(model, "backend", None) == "auto":
            model.features[3][0].block[1][0].weight.register_hook(lambda grad: grad.flip(0))
        return step(model, x, mode)

    monkeypatch.setattr(networks, "network_step", wrong)
    with pytest.raises(AssertionError):
        networks.check(setup)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_who_computes_something_else_does_not_take_part(mode: str) -> None:
    setup = networks._setup(SMALL, mode, "fp32", "cpu")
    expected = networks.expect(setup)
    wrong = copy.deepcopy(setup.model)
    _swap_channels(wrong)
    step = network_step(wrong, setup.x, mode)
    for name, error in (("wrong", UnavailableError), (f"{OURS}_graph", AssertionError)):
        with pytest.raises(error, match="computes something else: relative error"):
            networks.build(Peer(name, lambda setup: step), setup, expected)


def _swap_channels(model: torch.nn.Module) -> None:
    weight = model.features[3][0].block[1][0].weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]


def _break_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels of a weight change places in what runs on this package's kernels."""
    step = networks.network_step

    def wrong(model: torch.nn.Module, x: torch.Tensor, mode: str) -> Runner:
        if getattr(model, "backend", None) == "auto":
            _swap_channels(model)
        return step(model, x, mode)

    monkeypatch.setattr(networks, "network_step", wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "timm", "lukemelas"])
def test_networks_of_others_drop_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drops are work that the other contestants are spared, and make training steps differ."""
    setup = networks._setup(SMALL, "training", "fp32", "cpu")
    [peer] = [p for p in PEERS if p.name == name]
    if not _installed(peer):
        pytest.skip("not installed")
    built = []
    monkeypatch.setattr(peers, "_foreign", lambda setup, model, naming: built.append(model))
    peer.runner(setup)
    for module in built[0].modules():
        rates = [getattr(module, n, 0.0) for n in ("p", "drop_prob", "drop_rate")]
        assert not any(rates), module
    if name == "lukemelas":
        assert built[0]._global_params.drop_connect_rate == 0.0


@pytest.mark.slow
def test_compiled_peers_are_different_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal options would share one entry in the compiler's cache: the first's code for all."""
    asked, frozen = [], []

    def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
        asked.append(options)
        frozen.append(config.freezing)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    setup = networks._setup(SMALL, "inference", "fp32", "cpu")
    for peer in PEERS:
        if peer.name.startswith("torch_compile"):
            peer.runner(setup)
    assert asked == [
        {},
        {"options": {"freezing": True}},
        {"mode": "max-autotune"},
        {"mode": "reduce-overhead"},
    ]
    assert frozen == [False, True, False, False]


def test_a_peer_that_fails_or_is_missing_says_why() -> None:
    setup = networks._setup(SMALL, "inference", "fp32", "cpu")

    def broken(setup: object) -> None:
        raise RuntimeError("no such\nlibrary")

    with pytest.raises(UnavailableError, match="RuntimeError: no such"):
        Peer("broken", broken).runner(setup)
    with pytest.raises(UnavailableError, match="no_such_module is not installed"):
        Peer("missing", broken, requires=("no_such_module",)).runner(setup)


OPS = [
    (op_contests.dwconv, next(dwconv_of("b0", 1))),
    (op_contests.squeeze_excite, next(squeeze_excite_of("b0", 1))),
    (op_contests.pointwise, list(pointwise_of("b0", 1))[5]),
    (op_contests.head, next(head_of("b0", 2))),
    (op_contests.mbconv, list(mbconv_of("b0", 1))[2]),
    (op_contests.stem, stem_of("b0")),
]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("build", "case"), OPS, ids=[build.__name__ for build, _ in OPS])
def test_op_contestants_agree(build, case, mode: str) -> None:
    """This package's result and stock's are the same but for rounding, gradients included."""
    if mode == "training" and build is op_contests.pointwise:
        pytest.skip("there is no training kernel")
    contest = build(case, mode, "fp32", "cpu")
    contest.check()
    actual = contest.build[OURS]()()
    stock = contest.build[op_contests.STOCK]()()
    pairs = [(actual, stock)] if mode == "inference" else zip(actual[:1], stock[:1], strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_every_entry_is_held_by_a_peer() -> None:
    for mode in ("inference", "training"):
        for entry in networks.entries(mode):
            case, dtype, device, contestant = entry.values
            [peer] = [p for p in PEERS if p.name == contestant]
            assert mode in peer.modes
            assert dtype in peer.dtypes
            assert device in peer.devices
            assert case in networks.CASES[mode, device]
