"""A deployed network beside what was predicted of it: `python examples/measure_deployed.py RUN`.

Prints the predicted and the measured time of a call and memory, as a table or as JSON. The time is
predicted by a calibration of this machine, which `effnet-fast scale fit --calibration` writes. The
memory is measured in a process of its own: what the resident set grows by from before the network
is loaded to its peak over the first calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import effnet_fast
from effnet_fast import timing
from effnet_fast.scaling import Conditions, LatencyModel

RUNS = 3  # calls of which the peak is taken
# glibc then gives large blocks back at once; by default its heap keeps holes, up to a fifth more.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def load(run: str) -> effnet_fast.EfficientNet:
    """The network of a run's folder, or of a file of weights."""
    folder = Path(run)
    path = folder / "model.safetensors" if folder.is_dir() else folder
    return effnet_fast.EfficientNet.from_checkpoint(path).eval()


def images(model: effnet_fast.EfficientNet, batch: int) -> torch.Tensor:
    """Random images of the network's size."""
    side = model.variant.resolution
    return torch.randn(
        batch, model.in_chans, side, side, generator=torch.Generator().manual_seed(0)
    )


def status(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_memory(run: str, batch: int) -> None:
    """Prints the bytes; runs in a process of its own."""
    other = effnet_fast.efficientnet(depth=0.1, width=0.1, resolution=32).eval()
    effnet_fast.deploy(other)(images(other, 1))  # what is imported and started on first use
    del other
    before = status("VmRSS")
    model = load(run)
    fast, x = effnet_fast.deploy(model), images(model, batch)
    for _ in range(RUNS):
        fast(x)
    print(status("VmHWM") - before)


def report(run: str, batch: int, calibration: str | None) -> dict[str, object]:
    """Predictions and measurements, seconds and bytes; None where there is none."""
    model = load(run)
    fast, x = effnet_fast.deploy(model), images(model, batch)
    counted = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    conditions = Conditions(batch=batch)
    predicted = None
    if calibration is not None:
        latency = LatencyModel.load(calibration)
        latency.check(conditions)
        predicted = latency.predict(model.variant, conditions.plan, **counted)
    measured = timing.measure({"deployed": lambda: fast(x)}, rounds=3)["deployed"].median / 1e3
    argv = [sys.executable, __file__, run, "--batch", str(batch), "--memory"]
    done = subprocess.run(argv, env=os.environ | HEAP, capture_output=True, text=True, check=True)
    return {
        "network": run,
        "resolution": model.variant.resolution,
        "batch": batch,
        "latency_s": {"predicted": predicted, "measured": measured},
        "memory": {
            "predicted": conditions.memory(model.variant, **counted).peak,
            "measured": int(done.stdout),
        },
    }


def main() -> None:
    """Parses the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a training run, or a file of weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibration", help="file of `effnet-fast scale fit --calibration`")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.run, arguments.batch)
        return
    found = report(arguments.run, arguments.batch, arguments.calibration)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['network']}, {found['resolution']} pixels, batch {found['batch']}")
    for name, unit, factor in (("latency_s", "ms", 1e3), ("memory", "MB", 1e-6)):
        values = found[name]
        shown = [
            f"{kind} {'-' if value is None else format(value * factor, '.3g')} {unit}"
            for kind, value in values.items()
        ]
        print(f"  {name.partition('_')[0]:8} {', '.join(shown)}")


if __name__ == "__main__":
    main()
