"""Measures the Triton kernels' configurations on this GPU: `python -m benchmarks.tune`.

Every candidate of a kernel runs in training steps and inferences of whole networks; launches are
timed one by one with events. What beats the present row by `MARGIN` is written as a row of
`triton_kernels/tuning.json`, for this device and these sizes, in front of the others. `--dry-run`
only prints them. Without this nothing is ever tuned.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import effnet_fast
from benchmarks import records

Config = dict[str, int]
Sizes = tuple[tuple[str, int], ...]
Times = dict[tuple[str, Sizes], float]  # ms of a launch
MARGIN = 0.03  # of the time: less is noise
REPEATS = 5
BATCHES = {"b0": 256, "b4": 64, "b7": 16}
COMMIT = re.compile("[0-9a-f]{7,40}")
ROW = ("kernel", "device", "where", "config", "source")


def _grid(**values: Sequence[int]) -> list[Config]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def _products(tiles: Sequence[tuple[int, int, int, int]]) -> list[Config]:
    names = ("BM", "BN", "BK", "num_warps")
    return [
        dict(zip(names, tile, strict=True)) | {"num_stages": stages}
        for tile in tiles
        for stages in (2, 3)
    ]


_TILES = ((64, 32, 64, 4), (64, 64, 32, 4), (64, 64, 64, 4), (64, 128, 64, 8), (128, 64, 64, 8))
_ROWS = _grid(BP=(16, 32, 64), BC=(32, 64, 128), num_warps=(4, 8), num_stages=(1,))
_RUNS = [row | {"RUN": run} for row in _ROWS for run in (128, 512)]
CANDIDATES: dict[str, list[Config]] = {
    "pointwise_fwd": _products((*_TILES, (128, 128, 32, 8), (128, 128, 64, 8))),
    "pointwise_bwd_data": _products(_TILES),
    "pointwise_bwd_weight": _products(((32, 64, 64, 4), (32, 64, 128, 8), (32, 128, 64, 8))),
    "dwconv_fwd": _grid(
        R=(2, 4), BW=(8, 16), BC=(32, 64), num_warps=(4, 8), num_stages=(1,)
    ),
    "expand_dwconv_fwd": _grid(P=(16, 32), BC=(32, 64), num_warps=(2, 4), num_stages=(1, 2)),
    "pointwise_pool_fwd": _products(_TILES),
    "stem_fwd": _products(((64, 32, 32, 4), (128, 32, 32, 4), (64, 64, 32, 4), (128, 64, 32, 8))),
    "stem_bwd_weight": _products(((64, 32, 32, 4), (64, 64, 32, 4), (128, 32, 32, 8))),
    "dwconv_bwd_data": _RUNS,
    "dwconv_bwd_weight": _grid(BP=(8, 16, 32), BC=(32, 64), num_warps=(4, 8), num_stages=(1,)),
    "bn_act": _ROWS,
    "bn_sums": _RUNS,
    "squeeze": _RUNS,
}  # fmt: skip


@contextlib.contextmanager
def watched(override: Mapping[str, Config], clock: Callable[[], Any]) -> Iterator[list[Any]]:
    """Launches inside the block take `override`'s configurations, by kernel.

    Yields:
        Filled as they run: (kernel, sizes), clock() before and clock() after each launch.
    """
    from effnet_fast.triton_kernels import launching, tuning

    find, start = tuning._find, launching.start
    asked: list[tuple[str, Sizes]] = []
    seen: list[Any] = []

    def found(kernel: str, device: str | None, sizes: Sizes) -> Config:
        asked[:] = [(kernel, sizes)]
        return override.get(kernel) or find(kernel, device, sizes)

    def started(*args: Any) -> None:
        begin = clock()
        start(*args)
        if asked:  # folds and the like have no row of their own
            seen.append((asked.pop(), begin, clock()))

    tuning._find, launching.start = found, started
    try:
        yield seen
    finally:
        tuning._find, launching.start = find, start


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_launches(step: Callable[[], None], override: Mapping[str, Config]) -> Times | None:
    """Median time of each launch in `step`, ms; None where a configuration does not fit."""
    from triton.errors import TritonError

    samples = defaultdict(list)
    try:
        with watched(override, _event) as seen:
            step()  # compiles
            del seen[:]
            for _ in range(REPEATS):
                step()
        torch.cuda.synchronize()
    except (TritonError, RuntimeError, ValueError) as error:  # no memory or registers for it
        print(f"  {dict(override)}: {[*str(error).splitlines(), type(error).__name__][0]}")
        return None
    for key, begin, end in seen:
        samples[key].append(begin.elapsed_time(end))
    return {key: statistics.median(values) for key, values in samples.items()}


def best(default: Times, candidates: Sequence[tuple[str, Config, Times]]) -> dict[Any, Config]:
    """The configuration of each (kernel, sizes) that beats the present one by `MARGIN`."""
    times, chosen = dict(default), {}
    for kernel, config, measured in candidates:
        for key, time in measured.items():
            if key[0] == kernel and time < times[key] * (1 - MARGIN * (key not in chosen)):
                times[key], chosen[key] = time, config
    return chosen


def rows_of(chosen: Mapping[Any, Config], device: str, commit: str) -> list[dict[str, Any]]:
    """Rows of the table; m holds within a factor of two, the other sizes exactly."""
    rows = []
    for (kernel, sizes), config in sorted(chosen.items(), key=lambda item: item[0]):
        where = {k: [v // 2, 2 * v] if k == "m" else [v, v] for k, v in sizes}
        source = f"measured({device}, {commit})"
        rows.append(dict(zip(ROW, (kernel, device, where, config, source), strict=True)))
    return rows


def write(path: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Puts rows in front of the table, in place of those of the same kernel, device and sizes."""
    key = [(row["kernel"], row["device"], row["where"]) for row in new]
    from effnet_fast.triton_kernels import tuning

    old = [
        row
        for row in json.loads((path if path.exists() else tuning.FILE).read_text())
        if (row["kernel"], row["device"], row["where"]) not in key
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in (*new, *old))
    path.write_text(f"[\n{lines}\n]\n")


def tune(step: Callable[[], None]) -> Iterator[dict[Any, Config]]:
    """What is best of `CANDIDATES` for the launches of `step`, kernel by kernel, as `best` says."""
    default = time_launches(step, {})
    assert default is not None, "the table's own rows must run"
    for kernel, configs in CANDIDATES.items():
        timed = [(kernel, config, time_launches(step, {kernel: config})) for config in configs]
        yield best(default, [(*row, times) for *row, times in timed if times is not None])


def _commit(text: str) -> str:
    if COMMIT.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(
        f"rows name the commit that they were measured at, 7 to 40 hexadecimal digits: got {text!r}"
    )


def _own_commit() -> str:
    """Of the checkout; rows of a changed one would name a commit that they are not of."""
    try:
        return _commit(records.git_commit())
    except argparse.ArgumentTypeError as error:
        raise SystemExit(
            f"{error}; commit the changes (a + marks them), or give --commit"
        ) from None


def _step(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16), effnet_fast.use_backend("triton"):
        model.train()
        model(x).float().sum().backward()
        model.eval()
        with torch.inference_mode():
            model(x)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and writes the table unless told not to.

    Returns:
        0, or 1 where there is no GPU.

    Raises:
        SystemExit: --commit, or the checkout's without it, is no commit's hash.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=["b0"])
    parser.add_argument("--table", type=Path, help="the file to write (default: the package's own)")
    parser.add_argument("--commit", type=_commit, help="for the rows (default: git's)")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, write nothing")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was tuned")
        return 1
    from effnet_fast.triton_kernels import tuning

    device, commit = torch.cuda.get_device_name(), arguments.commit or _own_commit()
    for name in arguments.models:
        model = getattr(effnet_fast, f"efficientnet_{name}")().cuda()
        model = model.to(memory_format=torch.channels_last)
        size = model.variant.resolution
        x = torch.randn(BATCHES[name], 3, size, size, device="cuda")
        step = functools.partial(_step, model, x.contiguous(memory_format=torch.channels_last))
        for chosen in tune(step):  # written kernel by kernel: the time may end at any
            new = rows_of(chosen, device, commit)
            for row in new:
                print(json.dumps(row), flush=True)
            if not arguments.dry_run:
                write(arguments.table or tuning.FILE, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
