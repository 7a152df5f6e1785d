"""Edits drawn at random between calls of a model: it must give what stock gives, each time.

`python tests/support/drawn_edits.py --edits 2000` counts, in processes of their own so that a crash
is one count more; `make reliability` calls it. A sequence is a small network, calls that pack it,
and up to three edits with a call after each and one when they are undone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import torchvision_cpu  # noqa: F401  (before any import of torchvision)

# isort: split
import effnet_fast
import networks
from edit_kinds import KINDS
from edit_session import Session
from effnet_fast import use_backend
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.inference.snapshot import Snapshot, run_network
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import MINI, TINY

LONGEST = 3  # edits of a sequence
WAYS = ("infer", "infer", "infer", "gradient", "train")
# Relative rms errors that stock's own rounding explains: in fp32; where bf16 or fp16 takes part.
ROUNDING = 1e-3, 6e-2
NOISE = 50  # times what a perturbation of the images by half a rounding changes
REFUSALS = (RuntimeError, ValueError, TypeError)
FORWARDS = {kind: kind.forward for kind in (EfficientNet, EfficientNetFeatures)}
SAME = replace(MINI, name="mini_same", padding="same")

Results = dict[str, Tensor]


@dataclass
class Counts:
    """What a run has seen."""

    edits: int = 0
    calls: int = 0
    planned: int = 0  # calls of a plain model that ran as one call into C++
    deployed: int = 0  # calls of a deployed model that gave a result
    refused: int = 0  # calls of a deployed model that gave the reason why not
    missed: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        for name, value in other.items():
            mine = getattr(self, name)
            if isinstance(mine, int):
                setattr(self, name, mine + value)
            else:
                mine += value if isinstance(mine, list) else collections.Counter(value)


def build(draw: random.Random) -> Any:
    """A small network in eval mode whose outputs depend on the images."""
    variant = draw.choice((MINI, MINI, MINI, SAME, TINY))
    state = networks.calibrated_state(TINY if variant is TINY else MINI)
    if draw.random() < 0.25:
        model: Any = EfficientNetFeatures(variant, out_indices=draw.choice(((0, 1), (1,))))
        model.load_state_dict(state, strict=False)
        return model.eval()
    model = EfficientNet(variant, num_classes=1000)
    model.load_state_dict(state)
    return model.eval()


def images(model: Any, seed: int) -> Tensor:
    x = networks.random_images(2, model.variant.resolution, seed=seed)
    weight = next(model.parameters())
    dtypes = {p.dtype for p in model.parameters()}
    return x.to(weight.dtype) if len(dtypes) == 1 else x


def outcome(function: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:  # broad, as edits raise any class and stock must, too
        return error


def run(model: Any, x: Tensor, way: str, autocast: bool) -> Results:
    """Results of a call under seed 0, with gradients where they are wanted, and all buffers."""
    torch.manual_seed(0)
    wanted = way != "infer"
    x = x.detach().clone().requires_grad_(wanted)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(wanted), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    maps = y if isinstance(y, list) else [y]
    results = {f"y {index}": m.detach().clone() for index, m in enumerate(maps)}
    if wanted and any(m.requires_grad for m in maps):
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(m.shape, generator=generator).to(m.dtype) for m in maps]
        kept = [(m, g) for m, g in zip(maps, grads, strict=True) if m.requires_grad]
        torch.autograd.backward(*zip(*kept, strict=True))
        found = {"x": x.grad} | {n: p.grad for n, p in model.named_parameters()}
        results |= {f"grad {n}": g.detach().clone() for n, g in found.items() if g is not None}
    return results | {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}


def by_reference(model: Any, x: Tensor, way: str, autocast: bool) -> Results:
    with use_backend("reference"):
        return run(model, x, way, autocast)


def restore(model: Any, buffers: Results) -> None:
    """Puts statistics back that a call in training mode has moved; others are not touched."""
    for name, buffer in model.named_buffers():
        kept = buffers.get(name)
        moved = kept is not None and kept.shape == buffer.shape and not buffer.is_meta
        if moved and not torch.equal(buffer, kept):
            buffer.data.copy_(kept)


def difference(actual: Any, stock: Any, noisy: Callable[[], Any]) -> str | None:
    """What differs by more than rounding, None for nothing.

    Args:
        actual, stock: outcomes.
        noisy: stock's outcome on images that are perturbed by a rounding.
    """
    if isinstance(actual, Exception) or isinstance(stock, Exception):
        same = type(actual) is type(stock)
        return None if same else f"{_shown(actual)} where stock gives {_shown(stock)}"
    if actual.keys() != stock.keys():
        return f"results {sorted(actual.keys() ^ stock.keys())[:3]} on one side alone"
    beyond = _beyond(actual, stock, None)
    if beyond is None:
        return None
    other = outcome(noisy)
    return beyond if isinstance(other, Exception) else _beyond(actual, stock, other)


def _shown(value: Any) -> str:
    if isinstance(value, Exception):
        return f"{type(value).__name__} ({str(value)[:90]})"
    return "results"


def _beyond(actual: Results, stock: Results, noisy: Results | None) -> str | None:
    low = any(t.dtype in (torch.bfloat16, torch.float16) for t in stock.values())
    largest: dict[str, float] = collections.defaultdict(float)
    for name, tensor in stock.items():
        largest[name.split(" ")[0]] = max(largest[name.split(" ")[0]], networks.rms(tensor))
    for name, tensor in actual.items():
        expected = stock[name]
        if (tensor.shape, tensor.dtype, tensor.device) != (
            *(expected.shape, expected.dtype, expected.device),
        ):
            return f"{name} is {tensor.dtype} {list(tensor.shape)}"
        if tensor.is_meta or not tensor.numel():
            continue
        if not tensor.is_floating_point():
            if not torch.equal(tensor, expected):
                return f"{name} differs"
            continue
        if not expected.isfinite().all():
            if tensor.isfinite().all():
                return f"{name} is finite"
            continue
        allowed = ROUNDING[low] * (networks.rms(expected) + 0.01 * largest[name.split(" ")[0]])
        if noisy is not None and name in noisy:
            allowed = max(allowed, NOISE * networks.rms(noisy[name] - expected))
        error = networks.rms(tensor - expected)
        if not error <= allowed:
            return f"{name}: rms error {error:.2e} of {networks.rms(expected):.2e}"
    return None


def _is_part_on_meta(model: Any) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def _perturbed(x: Tensor, low: bool) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=generator).to(x.dtype)
    return torch.addcmul(x, x, noise, value=2.0**-9 if low else 2.0**-22)  # no patched `*`


class Run:
    """Draws sequences and keeps count."""

    def __init__(self, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.kinds = kinds
        self.counts = Counts()
        self._planned = 0
        original = CpuEngine.__call__

        def call(engine: CpuEngine, *args: Any) -> Any:
            self._planned += 1
            return original(engine, *args)

        self._watched = original, call

    def sequence(self, seed: int) -> None:
        """One model, its edits, and calls between them."""
        draw = random.Random(seed)
        model = build(draw)
        deployed = effnet_fast.deploy(model) if draw.random() < 0.5 else None
        names: list[str] = []
        original, watched = self._watched
        with warnings.catch_warnings(), contextlib.ExitStack() as patch:
            warnings.simplefilter("ignore")
            patch.callback(setattr, CpuEngine, "__call__", original)
            CpuEngine.__call__ = watched  # type: ignore[method-assign]
            with contextlib.ExitStack() as stack:
                session = Session(model, draw, stack)
                self._check(session, deployed, seed, names)
                for _ in range(draw.randint(1, LONGEST)):
                    name = draw.choice(self.kinds)
                    names.append(name)
                    torch.manual_seed(seed)
                    with contextlib.suppress(Exception):  # no place for it, or torch refuses it
                        KINDS[name](session)
                        self.counts.kinds[name] += 1
                    self.counts.edits += 1
                    self._check(session, deployed, seed, names)
            self._check(session, deployed, seed, [*names, "undone"])

    def _check(self, session: Session, deployed: Any, seed: int, names: list[str]) -> None:
        way = session.draw.choice(WAYS) if names else "infer"
        model, autocast = session.model, session.autocast
        if way == "train":
            model.train()
        x = images(model, session.draw.randrange(4))
        if deployed is not None:
            self._check_deployed(deployed, seed, names)
        before = self._planned
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        actual = outcome(lambda: run(model, x, way, autocast))
        self.counts.calls += 1
        if self._planned > before:
            self.counts.planned += 1
            self._check_plan(model, x, autocast, seed, names)
        restore(model, buffers)
        stock = outcome(lambda: by_reference(model, x, way, autocast))

        def noisy() -> Results:
            restore(model, buffers)
            low = autocast or x.dtype in (torch.bfloat16, torch.float16)
            return by_reference(model, _perturbed(x, low), way, autocast)

        if _is_part_on_meta(model):  # what stock computes there is whatever memory holds
            actual, stock = (o if isinstance(o, Exception) else {} for o in (actual, stock))
        self._note(difference(actual, stock, noisy), seed, names, way)
        if way == "train":
            model.eval()

    def _check_plan(
        self, model: Any, x: Tensor, autocast: bool, seed: int, names: list[str]
    ) -> None:
        """What came from packed weights equals to the bit what weights packed now give."""
        dtype = torch.bfloat16 if autocast else x.dtype

        def fresh() -> Any:
            return run_network(model, Snapshot(model).engine_for(dtype, "cpu"), x, dtype)

        found = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for function in (lambda: FORWARDS[type(model)](model, x), fresh):
                torch.manual_seed(0)
                y = outcome(function)
                found.append(y if isinstance(y, list) else [y])
        if isinstance(found[1][0], Exception):  # such as for a hook of backward's
            return
        if not all(torch.equal(a, b) or a.isnan().any() for a, b in zip(*found, strict=True)):
            self._note("packed weights are stale", seed, names, "infer")

    def _check_deployed(self, deployed: Any, seed: int, names: list[str]) -> None:
        x = networks.random_images(2, deployed.source.variant.resolution)

        def call() -> Results:
            y = deployed(x)
            return {f"y {i}": m for i, m in enumerate(y if isinstance(y, list) else [y])}

        def stock(x: Tensor = x) -> Results:
            found = by_reference(deployed.source, x, "infer", False)
            return {name: tensor for name, tensor in found.items() if name.startswith("y")}

        def refused(error: Exception) -> bool:
            self.counts.refused += 1
            if not isinstance(error, REFUSALS):
                self._note(f"deploy raises {_shown(error)}", seed, names, "deploy")
            return True

        actual = outcome(call)
        if isinstance(actual, Exception):
            refused(actual)
            return
        self.counts.deployed += 1
        expected = outcome(stock)
        if isinstance(expected, Exception):  # such as other weights' dtype than the images'
            return
        noisy = lambda: stock(_perturbed(x, False))  # noqa: E731
        if difference(actual, expected, noisy) is None:
            return
        self.counts.missed[names[-1]] += 1
        error = outcome(lambda: deployed.refresh() or {})
        again = error if isinstance(error, Exception) else outcome(call)
        if isinstance(again, Exception):
            refused(again)
        else:
            found = difference(again, expected, noisy)
            self._note(found and f"after refresh(): {found}", seed, names, "deploy")

    def _note(self, found: str | None, seed: int, names: list[str], way: str) -> None:
        if found:
            self.counts.failures.append(f"seed {seed} {way} {' > '.join(names)}: {found}")


def work(first: int, count: int, kinds: Sequence[str] = tuple(KINDS)) -> Counts:
    """`count` edits or a few more, from this seed on, in this process."""
    torch.set_num_threads(1)
    drawn = Run(kinds)
    seed = first
    while drawn.counts.edits < count:
        print(f"seed {seed}", file=sys.stderr, flush=True)  # read where the process dies
        drawn.sequence(seed)
        seed += 1
    return drawn.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence")
    parser.add_argument("--chunk", type=int, default=200, help="edits in one process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(vars(work(options.seed, options.edits))))
        return 0
    total, seed = Counts(), options.seed
    while total.edits < options.edits:
        count = min(options.chunk, options.edits - total.edits)
        command = [sys.executable, __file__, "--worker", f"--seed={seed}", f"--edits={count}"]
        done = subprocess.run(command, capture_output=True, text=True)
        last = [line for line in done.stderr.splitlines() if line.startswith("seed ")][-1:]
        if done.returncode:
            total.failures.append(f"process ended with {done.returncode} at {last}:")
            total.failures += [line[:200] for line in done.stderr.splitlines()[-3:]]
            total.edits += count
        else:
            total.add(json.loads(done.stdout))
        seed += 1000
        print(f"{total.edits} edits, {len(total.failures)} failures", flush=True)
    report(total)
    return bool(total.failures)


def report(counts: Counts) -> None:
    print(
        f"{counts.edits} edits of {len(counts.kinds)} kinds, {counts.calls} calls of plain models"
    )
    print(f"of which {counts.planned} ran in one call from packed weights")
    print(f"deployed: {counts.deployed} results, {counts.refused} refusals")
    print(f"deployed, missed until refresh(): {dict(counts.missed.most_common())}")
    print(f"{len(counts.failures)} failures")
    for failure in counts.failures:
        print(f"  {failure}")


if __name__ == "__main__":
    sys.exit(main())
