"""SyncBatchNorm in several processes: what one process computes on the joined batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import effnet_fast
import synced
from effnet_fast.modules import stock, structure, sync_batch_norm
from effnet_fast.modules.explain import explain
from effnet_fast.modules.layers import Conv2dNormActivation, MBConv, MBConvConfig
from effnet_fast.ops.call import Norm
from effnet_fast.ops.exchange import Exchange
from effnet_fast.ops.statistics import Moves
from networks import TINY, TINY_V2, pair, random_images, trio
from synced import Job, Results, calm
from tolerances import assert_parity

X = random_images(8, 48)
COUNTS = 3, 5
SHARES = synced.shares(X, *COUNTS)


def odd_norms(model: nn.Module) -> nn.Module:
    """Norms in other modes, and weights that are frozen."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[1].momentum = None
    norms[2].eval()
    for parameter in norms[4].parameters():
        parameter.requires_grad_(False)
    for place, options in {5: {"affine": False}, 7: {"track_running_stats": False}}.items():
        norm = norms[place]
        parent = next(m for m in model.modules() if norm in m.children())
        name = next(name for name, child in parent.named_children() if child is norm)
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, **options)
        setattr(parent, name, plain.to(norm.weight))
    return model


def layers() -> nn.Module:
    """A dense, a depthwise and a pointwise layer that no block has."""
    conv = Conv2dNormActivation
    torch.manual_seed(3)
    return nn.Sequential(
        conv(3, 8, 3, 2, activation_layer=nn.SiLU),
        conv(8, 8, 5, groups=8, activation_layer=nn.SiLU),
        conv(8, 8, 1, activation_layer=nn.SiLU),
    )


def lean(model: nn.Module) -> None:
    model.memory = "lean"


def checkpointed(model: Any) -> None:
    model.set_grad_checkpointing()


def hook_of_one(model: Any) -> None:
    """A hook in the first process alone: there the block runs its modules one by one."""
    if dist.get_rank() == 0:
        model.features[2][0].block[1][1].register_forward_hook(lambda *_: None)


def groups_of_one(model: nn.Module) -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = groups[dist.get_rank()]


@contextlib.contextmanager
def own_count() -> Iterator[None]:
    """A fault: dz divides by the number of this process's values."""
    sums = Exchange.sums

    def faulty(self: Exchange, *arguments: Tensor) -> Tensor:
        self._share = torch.ones_like(self._share)
        return sums(self, *arguments)

    Exchange.sums = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exchange.sums = sums  # type: ignore[method-assign]


def all_jobs() -> dict[str, Job]:
    tiny, v2 = calm(pair(TINY).actual), calm(pair(TINY_V2).actual)
    return {
        "v2": Job(v2, SHARES),
        "lean": Job(tiny, SHARES, lean),
        "lean_v2": Job(v2, SHARES, lean),
        "torchvision": Job(calm(pair(TINY).stock), SHARES, effnet_fast.accelerate),
        "empty": Job(v2, synced.shares(X, 0, 8)),
        "odd_norms": Job(odd_norms(copy.deepcopy(tiny)), SHARES),
        "layers": Job(layers(), SHARES),
        "hook": Job(tiny, SHARES, hook_of_one),
        "checkpointed": Job(tiny, SHARES, checkpointed),
        "fault": Job(v2, SHARES, around=own_count),
        "groups_of_one": Job(tiny, SHARES, groups_of_one),
        "reference": Job(
            copy.deepcopy(v2).double(), synced.shares(X.double(), *COUNTS), around=synced.reference
        ),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Results, Any]]]:
    """Of each job what two processes gave."""
    jobs = {name: copy.deepcopy(job) for name, job in all_jobs().items()}
    ranks = synced.run(2, tmp_path_factory.mktemp("two"), jobs)
    return {name: [rank[name] for rank in ranks] for name in jobs}


def results(found: list[tuple[Results, Any]]) -> Results:
    return synced.joined([result for result, _ in found])


def require_parity(actual: Results, variant: Any, change: Any = lambda model: model) -> None:
    """Holds it to the rule of parity with one process that has the joined batch."""
    three = trio(variant)
    one, exact = (synced.alone(change(calm(m)), X) for m in (three.stock, three.exact))
    assert_parity(actual, one, exact)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("v2", TINY_V2),
        ("lean", TINY),
        ("lean_v2", TINY_V2),
        ("torchvision", TINY),
        ("empty", TINY_V2),
        ("hook", TINY),
    ],
)
def test_two_processes_are_one_on_the_joined_batch(two: Any, name: str, variant: Any) -> None:
    require_parity(results(two[name]), variant)


def test_norms_in_other_modes(two: Any) -> None:
    require_parity(results(two["odd_norms"]), TINY, odd_norms)


def test_layers_that_no_block_has(two: Any) -> None:
    models = layers(), layers().double()
    assert_parity(results(two["layers"]), *(synced.alone(model, X) for model in models))


def test_everything_is_fused(two: Any) -> None:
    """A hook leaves the three norms of its block to the reference, in that process alone."""
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in pair(TINY).actual.modules())
    for name in ("lean", "torchvision"):
        assert [calls for _, calls in two[name]] == [{"fused": norms, "reference": 0}] * 2
    assert [calls for _, calls in two["hook"]] == [
        {"fused": norms - 3, "reference": 3},
        {"fused": norms, "reference": 0},
    ]


def test_the_reference_is_exact(two: Any) -> None:
    """Gradients and statistics in float64, with unequal batches."""
    actual, expected = results(two["reference"]), synced.alone(calm(trio(TINY_V2).exact), X)
    assert all(calls["fused"] == 0 for _, calls in two["reference"])
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, n=name: f"{n}: {text}")


def test_a_count_of_one_process_would_be_noticed(two: Any) -> None:
    with pytest.raises(AssertionError, match="grad"):
        require_parity(results(two["fault"]), TINY_V2)


def test_gradient_checkpointing_changes_no_bit(two: Any) -> None:
    for (actual, calls), (expected, _) in zip(two["checkpointed"], two["lean"], strict=True):
        assert calls["reference"] == 0
        for name, tensor in actual.items():
            assert tensor.equal(expected[name]), name


def test_a_group_of_one_is_a_batch_norm(two: Any) -> None:
    for share, (actual, calls) in zip(SHARES, two["groups_of_one"], strict=True):
        first = 0 if share is SHARES[0] else COUNTS[0]
        expected = synced.step(calm(pair(TINY).actual), share, first)
        assert calls == {"fused": 0, "reference": 0}
        for name, tensor in actual.items():
            assert tensor.equal(expected[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_process_runs_fused_as_batch_norm(training: bool) -> None:
    plain = calm(pair(TINY).actual)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    for module in converted.modules():
        if structure.is_block(type(module)):
            assert explain(module) is None
    if not training:
        plain.eval(), converted.eval()
    actual, expected = (synced.step(model, X) for model in (converted, plain))
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert tensor.equal(expected[name]), name


class OwnNorm(nn.SyncBatchNorm):
    """May compute anything."""


def of_a_subclass(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "__class__", OwnNorm)


def with_a_hook(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    norm.register_forward_hook(lambda *_: None)


def with_a_check_of_its_own(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    norm._check_non_zero_input_channels = lambda x: None


def with_another_function(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.modules.batchnorm, "sync_batch_norm", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_a_subclass, "is OwnNorm, not BatchNorm2d"),
        (with_a_hook, "has a hook"),
        (with_a_check_of_its_own, "patched _check_non_zero_input_channels"),
        (with_another_function, "sync_batch_norm is replaced"),
    ],
)
def test_what_is_not_known_is_refused(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.SyncBatchNorm)
    assert explain(block) is None
    change(block.block[1][1], monkeypatch)
    assert reason in str(explain(block))


def test_a_replaced_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.SyncBatchNorm)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: x)
    assert "SyncBatchNorm.forward is replaced" in str(explain(block))


def test_plain_networks_ask_nothing_of_the_new_code() -> None:
    """The code below SyncBatchNorm is looked at where there is one."""
    replaced = {owner for owner, _ in stock.NETWORK.originals}
    assert nn.SyncBatchNorm not in replaced


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What this process sends to a second one, which is a copy of it."""
    found: list[Tensor] = []

    def gather(rows: list[Tensor], own: Tensor, group: object) -> None:
        found.append(own.clone())
        for row in rows:
            row.copy_(own)

    def reduce(sums: Tensor, op: object, group: object) -> None:
        found.append(sums.clone())
        sums.mul_(2)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", gather)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    return found


def converted(module: nn.Module) -> nn.Module:
    """A copy in training with SyncBatchNorm, in a group of its own."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module).train(), object())


def test_what_is_sent_is_what_the_layer_sends(sent: list[Tensor]) -> None:
    """In forward mean, rstd and count, in backward the sums of du and of du * (z - mean).

    As torch/nn/modules/_functions.py has them.
    """
    plain, x = layers()[1].train(), random_images(3, 6, channels=8)
    synced.step(converted(plain), x)

    z = plain[0](x).detach().requires_grad_()
    u = plain[1](z)
    y = plain[2](u.clone())
    (du,) = torch.autograd.grad(y, u, synced.grad_of(y, 0))
    mean = z.mean((0, 2, 3))
    rstd = (z.var((0, 2, 3), correction=0) + plain[1].eps).rsqrt()
    count = torch.tensor([z.numel() / z.shape[1]])
    products = du * (z - mean.view(1, -1, 1, 1))
    sums = du.sum((0, 2, 3)), products.sum((0, 2, 3))
    assert len(sent) == 2
    torch.testing.assert_close(sent[0], torch.cat((mean, rstd, count)))
    torch.testing.assert_close(sent[1], torch.cat(sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1, None], ids=["dense", "depthwise", "block"])
def test_a_second_derivative_is_refused(sent: list[Tensor], place: int | None) -> None:
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.BatchNorm2d)
    module = converted(block if place is None else layers()[place])
    x = random_images(2, 8, channels=3 if place == 0 else 8).requires_grad_()
    y = module(x).sum()
    with pytest.raises(RuntimeError, match="SyncBatchNorm has no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def test_nothing_is_sent_that_nothing_depends_on(sent: list[Tensor]) -> None:
    """In backward: for a frozen convolution of images that want no gradient."""
    layer = converted(layers()[0])
    layer[0].weight.requires_grad_(False)
    layer(random_images(2, 8)).sum().backward()
    assert [row.numel() for row in sent] == [2 * 8 + 1]
    assert layer[1].weight.grad is not None


def test_statistics_move_by_a_factor_that_stays_on_the_device() -> None:
    """As on a GPU, where the number of all values is a tensor."""
    moved = [[torch.full((3,), 2.0), torch.full((3,), 4.0)] for _ in range(2)]
    pair_of_moments = torch.randn(3), torch.rand(3)
    for running, correction in zip(moved, (1.25, torch.tensor(1.25).double()), strict=True):
        exchange = Exchange(None)
        exchange.correction = correction
        norm, layer = Norm(True, 0.3, 1e-5, True, exchange), (None, None, None, *running)
        Moves((norm, layer, (1, 3, 1, 1)))(pair_of_moments)
    for actual, expected in zip(*moved, strict=True):
        torch.testing.assert_close(actual, expected)
        assert not actual.eq(actual[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_copy_of_a_batch_changes_nothing(sent: list[Tensor], dtype: torch.dtype) -> None:
    """Of the reference's result and gradients, beside BatchNorm's."""
    norm = nn.BatchNorm2d(8).to(torch.promote_types(dtype, torch.float32))
    norm.weight.data.uniform_(0.5, 2.0)
    found = []
    for module, forward in ((converted(norm), sync_batch_norm.forward), (norm, nn.Module.__call__)):
        x = random_images(3, 6, channels=8).to(dtype).requires_grad_()
        y = forward(module, x)
        grads = torch.autograd.grad(y, (x, *module.parameters()), synced.grad_of(y, 0))
        found.append((y, *grads))
    torch.testing.assert_close(*found)
    assert sent[0].dtype is norm.weight.dtype
