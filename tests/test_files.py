"""Whole files, locks, and errors that name the file."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from effnet_fast import files


def test_the_last_of_several_writers_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [f"{i}\n" * 1000 for i in range(4)]
    seen, errors = set(), []

    def write(text: str) -> None:
        try:
            for _ in range(30):
                with files.replacing(path) as temporary:
                    temporary.write_text(text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    path.write_text(texts[0])
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_text())
    assert errors == []
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    for name in (f".a.{os.getpid()}.tmp", ".effnet-fast-.tmp"):
        (tmp_path / name).write_text("stale")
    with files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_errors_have_the_name_of_the_target(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, files.replacing(tmp_path / "folder"):
        pass
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(OSError, match="left on device") as caught, files.replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "temporary")
    assert caught.value.filename == str(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe, not a file"), files.replacing(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert not (tmp_path / "a").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: a pipe, not a file"):
        files.check_regular(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"/dev/null: a device, not a file"):
        files.read_text("/dev/null")
    with pytest.raises(IsADirectoryError):
        files.check_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.check_regular(tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bytes: not UTF-8 text"):
        files.read_text(tmp_path / "bytes")


def test_text_is_read_without_the_mark_of_windows(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\n")
    assert files.read_text(tmp_path / "labels.txt") == "cat\ndog\n"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("bad"), ValueError, "a: bad"),
        (RecursionError("deep"), ValueError, "a: nested too deeply"),
        (MemoryError(), OSError, "[Errno 12] Cannot allocate memory: 'a'"),
        (RuntimeError("x: can't allocate memory: y"), OSError, "[Errno 12] Cannot allocate"),
        (RuntimeError("another"), RuntimeError, "another"),
    ],
)
def test_naming_file(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)) as caught, files.naming_file("a"):
        raise error
    assert type(caught.value) is kind


def test_a_lock_excludes_other_open_files_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("w") as first, path.open("w") as second:
        assert files.lock(first) is True
        assert files.lock(second, wait=False) is False
        files.unlock(first)
        assert files.lock(second, wait=False) is True
        assert files.is_at(first, path)
        path.unlink()
        assert not files.is_at(first, path)


def test_without_locks_there_is_none(tmp_path: Path) -> None:
    """As on Windows, where there is no fcntl."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from effnet_fast import files\n"
        f"file = open({str(tmp_path / 'a')!r}, 'w')\n"
        "print(files.lock(file), files.unlock(file))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None None\n"
