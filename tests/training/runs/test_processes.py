"""Several processes under torchrun, with gloo: gradients, elastic restarts, sharded weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from effnet_fast.models import EfficientNet
from effnet_fast.training.runs.loop import train
from effnet_fast.training.runs.processes import Processes
from training_runs import SMALL as NEW

# Sizes that a program takes by name.
SMALL = {**NEW, "model": "lite0"}

pytestmark = pytest.mark.exhaustive

# What makes an image's gradient depend on the image alone: statistics that do not move.
ALONE = {
    **SMALL,
    "epochs": 1,
    "dropout": 0.0,
    "drop_path": 0.0,
    "flip": 0.0,
    "optimizer": "sgd",
    "freeze": -1,
    "clip": 0.0,
    "warmup_epochs": 0.0,
}
PROGRAM = """
import json, os, sys
from effnet_fast.training.runs.loop import train
arguments = json.loads(sys.argv[1])
crash = arguments.pop("crash", None)
rank = int(os.environ["RANK"])
def on_step(step, loss):
    os.write(1, f"STEP {rank} {step} {loss}\\n".encode())  # at once: others write there, too
    if crash and [rank, step] == crash and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
train(on_step=on_step, **arguments)
"""


def torchrun(tmp_path, processes, arguments, *options):
    """Trains under torchrun; what it printed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *options, str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(arguments, default=str)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weight(run):
    """All parameters and statistics: some hardly move in a few steps of a network like this."""
    state = EfficientNet.from_checkpoint(run).state_dict()
    return torch.cat([value.float().flatten() for value in state.values()])


def test_four_processes_take_the_step_of_one(data, tmp_path):
    """18 images: 4 processes with batches of 1 to 2 have the gradients of one with 6."""
    train(data, tmp_path / "one", **{**ALONE, "batch": 18})
    arguments = {**ALONE, "data": data, "out": tmp_path / "four", "batch": 5}
    printed = torchrun(tmp_path, 4, arguments)
    assert printed.count("STEP") == 4  # one step each: 18 images are dealt to the four
    torch.testing.assert_close(weight(tmp_path / "four"), weight(tmp_path / "one"))
    assert json.loads((tmp_path / "four" / "run.json").read_text())["metrics"]["steps"] == 1


def test_shared_statistics_make_the_whole_network_step_as_in_one_process(data, tmp_path):
    train(data, tmp_path / "start", **{**ALONE, "freeze": 0, "rate": 1e-2})
    options = {**ALONE, "weights": tmp_path / "start", "freeze": 0, "rate": 1e-2}
    train(data, tmp_path / "one", **{**options, "batch": 18})
    arguments = {**options, "data": data, "out": tmp_path / "four", "batch": 5, "sync_bn": True}
    torchrun(tmp_path, 4, arguments)
    start, one, four = (
        EfficientNet.from_checkpoint(tmp_path / name).state_dict()
        for name in ("start", "one", "four")
    )
    floats = [name for name, tensor in one.items() if tensor.is_floating_point()]
    moved, apart = (
        torch.cat([(state[name] - one[name]).flatten() for name in floats]).norm()
        for state in (start, four)
    )
    assert moved > 0
    assert apart < 0.01 * moved


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_is_started_again_and_continues(data, tmp_path, killed):
    common = {**SMALL, "data": data, "batch": 3, "save_minutes": 0.0, "ema": 0.9}
    whole = torchrun(tmp_path, 2, {**common, "out": tmp_path / "whole"})
    arguments = {**common, "out": tmp_path / "run", "crash": [killed, 4]}
    printed = torchrun(tmp_path, 2, arguments, "--max-restarts=1")
    expected = sorted({line for line in whole.splitlines() if line.startswith("STEP")})
    assert sorted({line for line in printed.splitlines() if line.startswith("STEP")}) == expected
    torch.testing.assert_close(
        weight(tmp_path / "run"), weight(tmp_path / "whole"), rtol=0.0, atol=0.0
    )


@pytest.mark.parametrize("options", [{}, {"strategy": "fsdp"}], ids=["ddp", "fsdp"])
def test_sharded_weights_end_where_whole_ones_do(data, tmp_path, options):
    # Two steps of 18 images: statistics of three images make rounding grow from step to step,
    # and AdamW divides by gradients that are rounding alone.
    common = {**SMALL, "data": data, "batch": 9, "ema": 0.5, "drop_path": 0.0, "dropout": 0.0}
    common |= {"optimizer": "sgd", "warmup_epochs": 0.0}
    torchrun(tmp_path, 2, {**common, "out": tmp_path / "plain"})
    printed = torchrun(tmp_path, 2, {**common, **options, "out": tmp_path / "run"})
    assert "STEP 1" in printed
    torch.testing.assert_close(
        weight(tmp_path / "run"), weight(tmp_path / "plain"), rtol=1e-3, atol=1e-5
    )


def test_a_process_alone_sums_and_gathers():
    processes = Processes("cpu", "fp32", "ddp")
    try:
        assert (processes.rank, processes.world) == (0, 1)
        assert processes.gather("x") == ["x"]
        assert processes.from_main(lambda: 3) == 3
        assert processes.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    finally:
        processes.close()
