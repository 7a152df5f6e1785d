"""Calls of the registered ops with drawn arguments, good and broken, in this process.

`python tests/support/drawn_calls.py --count N --seed S` says what was taken and refused, and exits
with 1 where a call was taken that must be refused, a good one was refused, or a result is not that
of the same values in plain tensors. `--sanitize FOLDER` builds the extension under
AddressSanitizer there and runs in a process of its own, which a memory error ends.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from broken_arguments import REFUSED, break_one
from drawn_arguments import Draw
from effnet_fast.backends import can_run, native
from effnet_fast.ops.registration import RULES

for module in ("launchers", "statistics"):  # which register the ops
    importlib.import_module(f"effnet_fast.ops.{module}")

# How a caller's mistake is told; anything else is one of ours.
ERRORS = (TypeError, ValueError, RuntimeError, MemoryError)
GOOD = "good"  # the verdict over unbroken arguments: they must be taken
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


def backends() -> tuple[str, ...]:
    """The CPU's backends here."""
    names = [f"cpu:{isa}" for isa in native.load().isas()]
    return ("cpu", *(name for name in names if can_run(name, "dwconv_bn_silu") is None))


@dataclass
class Tally:
    """What became of the calls."""

    calls: int = 0
    taken: int = 0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


def _results(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    out = getattr(torch.ops.effnet_fast, op)(*arguments.values())
    if out is None:  # it writes to its arguments
        return [arguments["running_mean"], arguments["running_var"]]
    return list(out) if isinstance(out, tuple) else [out]


def _cleaned(value: Any) -> Any:
    """The same values in plain tensors."""
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    plain = value.detach().resolve_neg()
    if plain.dim() == 4:  # every rule takes the layout
        return plain.clone(memory_format=torch.contiguous_format).contiguous(
            memory_format=torch.channels_last
        )
    return plain.clone(memory_format=torch.contiguous_format)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _cleaned(value) for name, value in arguments.items()}


def _is_real(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_real, value))
    plain = type(value) in (Tensor, torch.nn.Parameter)
    if not plain:
        return not isinstance(value, Tensor)
    return value.device.type == "cpu" and not torch._is_functional_tensor(value)


def _difference(one: list[Tensor], two: list[Tensor]) -> str | None:
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        tolerance = TOLERANCE[b.dtype]
        try:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=False
            )
        except AssertionError as error:
            return f"result {index}: {str(error).splitlines()[0]} {list(a.shape)}"
    return None


def _one(op: str, seed: int, names: tuple[str, ...], tally: Tally) -> None:
    rng = random.Random(f"{op} {seed}")
    draw = Draw(RULES[op], rng, names)
    what, verdict = "nothing", GOOD
    if rng.random() < 0.75:
        what, verdict = break_one(draw, rng) or (what, verdict)
    arguments, place = draw.arguments, f"{op}, seed {seed}, {what}"
    # What is refused may not be read here either.
    compares = verdict != REFUSED and all(map(_is_real, arguments.values()))
    # Only what is taken is copied, since sizes may be huge; this op writes to its arguments.
    clean = _plain(arguments) if compares and op == "move_statistics" else None
    tally.calls += 1
    try:
        given = _results(op, arguments)
    except ERRORS as error:
        tally.refused[type(error).__name__] += 1
        if verdict == GOOD:
            tally.failures.append(f"{place}: refused: {error}")
        return
    except Exception as error:  # broad, as a class not in ERRORS is a finding to list
        if isinstance(error, AssertionError) and "FakeTensor" in str(error):
            tally.refused["AssertionError of torch"] += 1  # for fake tensors beside others
            return
        tally.failures.append(f"{place}: {type(error).__name__}: {error}")
        return
    tally.taken += 1
    if verdict == REFUSED:
        tally.failures.append(f"{place}: taken")
    elif compares:
        try:
            difference = _difference(given, _results(op, clean or _plain(arguments)))
        except ERRORS as error:
            difference = f"plain tensors are refused: {error}"
        if difference:
            tally.failures.append(f"{place}: {difference}")


def run(count: int, first: int = 0, ops: tuple[str, ...] = ()) -> Tally:
    """Calls each op in turn.

    Args:
        count: calls in all.
        first: the seed of the first; each call has one of its own.
        ops: some of the registered ops, or all.
    """
    chosen, names, tally = ops or tuple(sorted(RULES)), backends(), Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested, masked and quantized tensors
        for index in range(count):
            _one(chosen[index % len(chosen)], first + index // len(chosen), names, tally)
    return tally


def sanitized(folder: Path, arguments: list[str]) -> int:
    """Runs this file with an extension that is built under AddressSanitizer in a folder."""
    import compiling

    compiling.build_sanitized(folder)
    # Python links no C++, whose exceptions AddressSanitizer looks for as it starts.
    libraries = map(compiling.library, ("libasan.so", "libstdc++.so.6"))
    # Memory that cannot be had is MemoryError or RuntimeError, as without it.
    options = "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1"
    paths = [str(folder), str(Path(__file__).parent)]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode


def main() -> int:
    """Says what became of the calls; 1 where one failed."""
    parser = argparse.ArgumentParser(description="calls the registered ops with drawn arguments")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", type=Path)
    args = parser.parse_args()
    if args.sanitize:
        own = ["--count", str(args.count), "--seed", str(args.seed)]
        return sanitized(args.sanitize.resolve(), own)
    tally = run(args.count, args.seed)
    print(f"extension: {native.load().__file__}")
    refused = ", ".join(f"{count} {name}" for name, count in tally.refused.most_common())
    print(f"{tally.calls} calls of {len(RULES)} ops: {tally.taken} taken, {refused}")
    print(f"{len(tally.failures)} failures", *tally.failures[:50], sep="\n")
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
