"""Pages whose commands are run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = {"effnet-fast": [sys.executable, "-m", "effnet_fast.cli"], "python": [sys.executable]}


def commands(page: str) -> list[str]:
    """The lines behind "$ " of a page's console blocks, continued ones joined."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    found = []
    for block in BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return found


def run(command: str, folder: Path) -> str:
    """What a command prints; fails with its errors."""
    program, *arguments = shlex.split(command)
    arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments]
    done = subprocess.run(
        [*PROGRAMS[program], *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.exhaustive
def test_from_a_budget_to_a_network(tmp_path: Path) -> None:
    printed = {command: run(command, tmp_path) for command in commands("budget_to_network.md")}
    by_start = {" ".join(c.split()[:3]): text for c, text in printed.items()}
    assert re.search(
        r"macs .* 12.0M +(9[5-9]|100)\.\d%|latency .* binds", by_start["effnet-fast scale fit"]
    )
    assert "scored by train digits batch=32 epochs=1 seed=0" in by_start["effnet-fast scale grid"]
    measured = by_start["python examples/measure_deployed.py run"]
    assert re.search(r"latency +predicted \S+ ms, measured \S+ ms", measured)
    assert re.search(r"memory +predicted \S+ MB, measured \S+ MB", measured)
    assert (tmp_path / "run" / "model.safetensors").exists()


# What is smaller in the test than on the page: another network and images of few pixels.
STAND_IN = {
    "--model b5 --weights DEFAULT": "--model lite0 --weights DEFAULT --resolution 64",
    "--epochs 10": "--epochs 2",
    "--epochs 4": "--epochs 2",
    "--batch 16": "--batch 8",
}


@pytest.mark.exhaustive
def test_fine_tuning_of_b5(tmp_path: Path, two_classes: Path) -> None:
    """On photographs of two kinds in the archive's layout; one of them is no image."""
    two_classes.rename(tmp_path / "cats_and_dogs_filtered")
    page = commands("fine_tuning_b5.md")
    assert len(page) >= 5
    printed = {}
    for command in page:
        for old, new in STAND_IN.items():
            command = command.replace(old, new)
        assert "b5" not in command
        printed[command] = run(command, tmp_path)
    for folder in ("frozen", "tuned"):
        assert (tmp_path / folder / "model.safetensors").exists()
    assert (tmp_path / "answers.csv").read_text().count("\n") > 8


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """train/ and validation/ with cats/ and dogs/: blue and yellow noise, one file unreadable."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path / "made"
    for split, count in (("train", 16), ("validation", 8)):
        for name, colour in (("cats", (40, 60, 200)), ("dogs", (220, 190, 30))):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.normal(0, 30, (48, 64, 3)) + colour
                image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
                number = index + (2000 if split == "validation" else 0)
                image.save(folder / split / name / f"{name[:-1]}.{number}.jpg")
    (folder / "train" / "cats" / "cat.99.jpg").write_bytes(b"no image")
    return folder
