"""The sequence of trainings: what is repeated, when it stops, its table, and the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiers
from benchmarks import training_accuracy as accuracy
from effnet_fast import EfficientNet
from effnet_fast.training.runs.recipe import read_recipe

DATA = {"digits": "d", "fashion": "f"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replaces trainings by numbers; each call is noted."""
    noted: list[tuple[str, ...]] = []

    def runner(name: str) -> accuracy.Runner:
        def run(task: Any, data: str, seed: int, changes: Any) -> dict[str, float]:
            noted.append((name, task.data, data, seed))
            top1 = 0.9 + 0.01 * seed + (0.005 if name == "ours" else 0.0)
            return {"top1": top1, "top5": 1.0, "images_per_second": 100.0, "seconds": 9.0}

        return run

    monkeypatch.setattr(accuracy, "CONTESTANTS", {n: runner(n) for n in ("ours", "stock")})
    return noted


def test_runs_alternate_and_are_not_repeated(calls: list, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    accuracy.run_all(path, DATA, ["digits"], ["ours", "stock"], [0, 1])
    expected = [(name, "digits", "d", seed) for seed in (0, 1) for name in ("ours", "stock")]
    assert calls == expected
    accuracy.run_all(path, DATA, ["digits", "scratch"], ["ours"], [0, 1])
    assert calls[len(expected) :] == [("ours", "fashion", "f", 0), ("ours", "fashion", "f", 1)]
    rows = accuracy.rows_of(path)
    assert len(rows) == 6
    assert rows[0]["epochs"] == "3"
    assert rows[-1]["epochs"] == "4"
    assert all(row["torch"] == torch.__version__ for row in rows)


def test_begins_no_run_after_the_time(calls: list, tmp_path: Path, capsys) -> None:
    accuracy.run_all(tmp_path / "rows.csv", DATA, ["digits"], minutes=-1.0)
    assert calls == []
    assert "the same command continues" in capsys.readouterr().out


def test_leaves_out_tasks_without_data(calls: list, tmp_path: Path) -> None:
    accuracy.run_all(tmp_path / "rows.csv", {"digits": "d"}, seeds=[0])
    assert {data for _, data, *_ in calls} == {"digits"}


def test_summary(calls: list, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    accuracy.run_all(path, DATA, ["digits"])
    lines = accuracy.summary(path).splitlines()
    assert lines[2] == "| digits | ours | 3 | 90.50% to 92.50% | 100 | 9 |"
    assert lines[3] == "| digits | stock | 3 | 90.00% to 92.00% | 100 | 9 |"


def test_torchvision_has_the_same_weights_and_constants() -> None:
    recipe = read_recipe("quick", {"bn_momentum": 0.05})
    task = accuracy.TASKS["scratch"]
    own = EfficientNet("b0", num_classes=10)
    for norm in (m for m in own.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.05
    stock = accuracy.torchvision_network(own, task, recipe)
    assert type(stock).__module__.startswith("torchvision")
    assert {m.momentum for m in stock.modules() if isinstance(m, nn.BatchNorm2d)} == {0.05}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(stock.eval()(x), own.eval()(x), rtol=1e-3, atol=1e-4)
    groups = accuracy.Grouped(stock, own).param_groups(0.1, 0.01)
    found = {id(p) for group in groups for p in group["params"]}
    assert found == {id(p) for p in stock.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers.some(("digits", "scratch"), ("scratch",)))
def test_both_contestants_train(name: str, tmp_path: Path) -> None:
    """Two colours, which one epoch on 24 images tells apart better than chance or not at all."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in enumerate(((30, 40, 200), (210, 200, 20))):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (rng.normal(0, 20, (32, 32, 3)) + colour).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    task = accuracy.TASKS[name]
    small = accuracy.Task(
        task.data, task.model, None, task.recipe, resolution=32, torchvision=task.torchvision
    )
    changes = {"epochs": 1, "batch": 8}
    for contestant in accuracy.CONTESTANTS.values():
        found = contestant(small, str(tmp_path / "data"), 0, changes)
        assert 0 <= found["top1"] <= 1
        assert found["images_per_second"] > 0
