"""All that a run continues from: one file, written whole or not at all.

Weights, their moving average, optimizer, schedule, scaler, the random states of every process, the
sampler's position and the metrics so far. Reading it executes nothing.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet_fast import files
from effnet_fast.checkpoints.writing import save_pickle

FORMAT = 2


def random_state() -> dict[str, Any]:
    """The states of all generators of this process, in types that need no code to be read."""
    version, numbers, gauss = random.getstate()
    found: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = found
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the generators of this process to a `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds all generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of CUDA devices, too


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a state; a reader of `path` sees the old one or the whole new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; the old file remains.
    """
    with (
        files.replacing(path) as temporary,
        files.naming_file(path),
        open(temporary, "wb") as file,
    ):
        save_pickle({"format": FORMAT, **state}, file)


def load(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The state of a file; None where there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is corrupt, or of another version.
    """
    if not Path(path).exists():
        return None
    files.check_regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on garbage, it raises whatever it trips over
        if files.is_out_of_memory(error):
            raise files.out_of_memory(path) from error
        raise ValueError(f"{os.fspath(path)}: truncated or corrupt state of a run") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)}: not the state of a run of this version")
    return state
