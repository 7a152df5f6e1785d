"""The state of a run: whole or not at all, and all generators with it."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import torch

from effnet_fast.training.runs import state


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()]


def test_random_states_are_continued_through_a_file(tmp_path):
    state.seed_everything(3)
    draws()
    state.save({"random": state.random_state()}, tmp_path / "state.pt")
    expected = draws()
    state.seed_everything(4)
    assert draws() != expected
    state.set_random_state(state.load(tmp_path / "state.pt")["random"])
    assert draws() == expected


def test_there_may_be_none(tmp_path):
    assert state.load(tmp_path / "state.pt") is None


class FullDisk:
    """A file that takes so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    state.save({"step": 1}, path)
    plain = state.save_pickle
    monkeypatch.setattr(state, "save_pickle", lambda c, f: plain(c, FullDisk(f, 1000)))
    with pytest.raises(OSError, match=r"No space left on device: .*state.pt") as caught:
        state.save({"step": 2, "weights": torch.rand(1000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert state.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["state.pt"]


def test_what_is_no_state_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"state.pt: truncated or corrupt"):
        state.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="not the state of a run of this version"):
        state.load(path)
