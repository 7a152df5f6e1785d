"""The folder of a run: refused unless it is empty, locked, described."""

from __future__ import annotations

import os

import pytest

from effnet_fast.training.runs import run_folder
from effnet_fast.training.runs.run_folder import LOCK, RunFolder, read_description


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)


def test_a_new_folder_is_made_and_removed_where_nothing_was_written(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.open(resume=False) == {}
    assert os.listdir(folder.path) == [LOCK]
    folder.close()
    assert not folder.path.exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        RunFolder(tmp_path).open(resume=False)
    with pytest.raises(ValueError, match=r"not the folder of a run: it holds notes.txt"):
        RunFolder(tmp_path).open(resume=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(NotADirectoryError):
        RunFolder(tmp_path / "notes.txt").open(resume=False)
    with pytest.raises(NotADirectoryError):
        RunFolder(tmp_path / "notes.txt").open(resume=True)


def test_a_run_is_refused_without_resume_and_described_with_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(resume=False)
    folder.write_description({"model": "b0"})
    folder.close()
    with pytest.raises(FileExistsError, match="holds a run: --resume continues it"):
        RunFolder(tmp_path).open(resume=False)
    again = RunFolder(tmp_path)
    assert again.open(resume=True)["model"] == "b0"
    again.close()


@pytest.mark.skipif(run_folder.files.fcntl is None, reason="there are no locks here")
def test_a_second_run_is_refused_while_the_first_has_the_lock(tmp_path):
    first = RunFolder(tmp_path)
    first.open(resume=False)
    for resume in (False, True):
        with pytest.raises(BlockingIOError, match="another process trains in this folder"):
            RunFolder(tmp_path).open(resume=resume)
    first.close()
    second = RunFolder(tmp_path)
    second.open(resume=True)
    second.close()


@pytest.mark.skipif(run_folder.files.fcntl is None, reason="there are no locks here")
def test_a_forked_worker_does_not_keep_the_lock_of_a_dead_process(tmp_path):
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:  # takes the lock, forks a worker that lives on, and dies
        held = RunFolder(tmp_path)  # the lock goes with the object
        held.open(resume=False)
        worker = os.fork()
        if worker == 0:
            os.close(write)
            os.read(read, 1)  # until the test closes its end
            os._exit(0)
        os._exit(0)
    os.close(read)
    os.waitpid(holder, 0)
    folder = RunFolder(tmp_path)
    folder.open(resume=True)
    folder.close()
    os.close(write)


def test_a_description_of_another_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"run.json: not of a run, or of another version"):
        read_description(tmp_path)


def test_an_unfinished_run_has_no_network_yet(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(resume=False)
    folder.write_description({})
    folder.close()
    with pytest.raises(ValueError, match="the run has not ended"):
        run_folder.load_run(tmp_path)
