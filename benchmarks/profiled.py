"""One step of each contest of bench_cuda.py over B0, on backend "cuda": for hardware counters."""

from __future__ import annotations

import sys

import torch

from benchmarks.records import ROOT

sys.path.insert(0, str(ROOT / "tests/support"))  # as pytest does for the suites
from cases import dwconv_of, squeeze_excite_of
from parity import BF16, dwconv_call, run, squeeze_excite_call

BATCH = 64


def main(batch: int = BATCH, backend: str = "cuda") -> int:
    """Inference and a training step of every distinct shape; returns how many calls it made."""
    calls = 0
    for case in dict.fromkeys(dwconv_of("b0", batch=batch)):
        run(dwconv_call(case, BF16), backend, wanted=())
        run(dwconv_call(case, BF16, training=True), backend)
        calls += 2
    for excite in dict.fromkeys(squeeze_excite_of("b0", batch=batch)):
        run(squeeze_excite_call(excite, BF16), backend)
        calls += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    main()
