"""Two processes of a run, some of whose shares are empty, give the numbers of one; with gloo."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import several_runs
from effnet_fast.models import EfficientNet
from effnet_fast.training.data.sampling import EpochSampler
from effnet_fast.training.data.sources import open_images
from effnet_fast.training.runs.loop import train
from several_runs import evaluated, stepped, trained
from training_runs import SMALL, make_data

pytestmark = pytest.mark.exhaustive

# Whole images without a draw, and the plainest step.
PLAIN: dict[str, Any] = {
    **SMALL,
    "epochs": 1,
    "batch": 3,
    "resolution": 64,
    "dropout": 0.0,
    "drop_path": 0.0,
    "flip": 0.0,
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "optimizer": "sgd",
    "rate": 0.1,
    "clip": 0.0,
    "warmup_epochs": 0.0,
}
SHARED = {"sync_bn": True}
SHARDED = {"strategy": "fsdp"}
# Everything that draws or remembers something.
RICH: dict[str, Any] = {
    **SMALL,
    "strategy": "fsdp",
    "ema": 0.9,
    "accumulate": 2,
    "batch": 2,
    "drop_path": 0.3,
    "flip": 0.5,
}


def spoil(data: Path, rank: int, count: int) -> None:
    """Makes so many images unreadable that a process has in the first step."""
    paths = open_images(data, split="train").paths
    sampler = EpochSampler(len(paths), batch=PLAIN["batch"], seed=SMALL["seed"], rank=rank, world=2)
    for index in next(iter(sampler))[:count]:
        Path(paths[index]).write_bytes(b"no image")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training images, of which the second process can read none, and one for validation."""
    data = make_data(tmp_path_factory.mktemp("half") / "data", train=2, val=1)
    for name in ("blue", "green"):
        (data / "val" / name / "0.png").unlink()
    spoil(data, 1, 3)
    return data


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many, three unreadable ones in two processes; 21 for validation, one unreadable."""
    data = make_data(tmp_path_factory.mktemp("odd") / "data", train=2, val=7)
    for rank in range(2):
        spoil(data, rank, 1 + rank)
    (data / "val" / "green" / "3.png").write_bytes(b"no image")
    return data


@pytest.fixture(scope="module")
def several(
    half: Path, odd: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what each process says of each job."""
    runs = tmp_path_factory.mktemp("runs")
    begin = str(runs / "begin")
    train(data, begin, **{**PLAIN, "batch": 9})
    plain = {**PLAIN, "data": str(half), "weights": begin}
    limited = {**PLAIN, "data": str(odd), "unreadable_limit": 2}
    rich = {**RICH, "data": str(data)}
    jobs = {
        "half": (trained, plain),
        "half shared": (trained, plain | SHARED),
        "half sharded": (trained, plain | SHARDED),
        "half frozen": (trained, plain | {"freeze": -1}),
        "none": (trained, plain | {"unreadable_limit": 2}),
        "limited": (trained, limited),
        "borne": (trained, limited | {"unreadable_limit": 3}),
        "unbroken": (trained, rich),
        "broken": (trained, rich | {"crash": 3, "save_minutes": 0.0}),
    }
    named = {name: (job, {**given, "out": str(runs / name)}) for name, (job, given) in jobs.items()}
    resumed = {**rich, "out": str(runs / "broken"), "resume": True}
    named["resumed"] = (trained, resumed)
    for (name, images), strategy in itertools.product(
        {"half": half, "odd": odd}.items(), ("ddp", "fsdp")
    ):
        job = evaluated, {"data": str(images), "strategy": strategy}
        named[f"evaluate {name} {strategy}"] = job
    for strategy, dtype in itertools.product(("ddp", "fsdp"), (torch.float32, torch.float64)):
        named[f"{strategy} {dtype}"] = stepped, {"strategy": strategy, "dtype": dtype}
    return runs, several_runs.run(2, runs, named)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return EfficientNet.from_checkpoint(run).state_dict()


@pytest.mark.parametrize("name", ["half", "half shared", "half sharded", "half frozen"])
def test_a_share_without_a_readable_image_adds_nothing(
    several: Any, half: Path, tmp_path: Path, name: str
) -> None:
    runs, found = several
    assert [result["metrics"]["steps"] for result in (part[name] for part in found)] == [1, 1]
    freeze = -1 if name.endswith("frozen") else 0
    begin = runs / "begin"
    train(half, tmp_path / "one", **{**PLAIN, "batch": 6, "weights": begin, "freeze": freeze})
    one, start, actual = (weights(run) for run in (tmp_path / "one", begin, runs / name))
    moved = sum(not torch.equal(start[key], one[key]) for key in one)
    assert moved == (2 if freeze else len(one))
    for key, expected in one.items():
        torch.testing.assert_close(actual[key], expected, rtol=1e-4, atol=1e-6, msg=key)


def test_the_limit_is_that_of_all_processes(several: Any) -> None:
    _, found = several
    errors = [part["limited"]["error"] for part in found]
    assert errors[0] == errors[1]
    assert errors[0].startswith("UnreadableLimitError: 3 images cannot be read, and 2 are allowed")
    assert errors[0].count(".png: ") == 3
    assert all(part["limited"]["losses"] == {} for part in found)
    assert [part["borne"]["metrics"]["unreadable"] for part in found] == [4, 4]
    assert "and 2 are allowed" in found[0]["none"]["error"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["half", "odd"])
def test_validation_gives_the_numbers_of_one_process(
    several: Any, request: pytest.FixtureRequest, name: str, strategy: str
) -> None:
    images = request.getfixturevalue(name)
    expected = evaluated(str(images))
    assert expected is not None
    assert expected["loss"] is not None
    for part in several[1]:
        assert part[f"evaluate {name} {strategy}"] == expected


def test_a_sharded_run_continues_bit_for_bit(several: Any) -> None:
    runs, found = several
    for part in found:
        before, after = part["broken"], part["resumed"]
        assert before["error"].startswith("CrashError")
        assert min(after["losses"]) == max(before["losses"])  # the last one was not saved
        assert {**before["losses"], **after["losses"]} == part["unbroken"]["losses"]
    files = [(runs / name / "model.safetensors").read_bytes() for name in ("unbroken", "broken")]
    assert files[0] == files[1]


def test_sharded_weights_differ_by_rounding_alone(several: Any) -> None:
    """Six steps on batches of three: what parts them in float32 is gone in float64."""
    apart = {}
    for dtype in (torch.float32, torch.float64):
        whole, sharded = (several[1][0][f"{strategy} {dtype}"] for strategy in ("ddp", "fsdp"))
        apart[dtype] = max(
            float((value - sharded[name]).abs().max())
            for name, value in whole.items()
            if value.is_floating_point()
        )
    assert apart[torch.float32] > 1e-4  # else float64 would show nothing
    assert apart[torch.float64] < 1e-5 * apart[torch.float32]
