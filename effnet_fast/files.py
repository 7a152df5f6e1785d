"""What reading and writing files have in common: errors that name the file, whole files, locks."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Windows has none: `lock` then says that there is no lock.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems over a network
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuses what is no file on a disk: opening a pipe waits for a writer that may never come.

    Raises:
        OSError: nothing is there, or a folder.
        ValueError: a pipe, a socket or a device.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind in KINDS:
        raise ValueError(f"{os.fspath(path)}: {KINDS[kind]}, not a file")


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a file, without the mark that some editors on Windows begin it with.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no file on a disk, or its text is not UTF-8.
    """
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: not UTF-8 text: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or safetensors says that memory is lacking."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("allocate memory", "out of memory"))
    )


def out_of_memory(path: object) -> OSError:
    """The error of a file for which the memory does not suffice."""
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))


@contextlib.contextmanager
def naming_file(path: object) -> Iterator[None]:
    """Puts a file's name before what is wrong with its content.

    Raises:
        ValueError: with the name in front; for content that is nested too deeply, too.
        OSError: ENOMEM, where memory is lacking.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(path) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside `path`, which takes its place when the block ends without an error.

    A reader of `path` sees the old file or the whole new one, whoever else writes it at the same
    time: every call has a file of its own, and the last one to end remains.

    Raises:
        ValueError: a pipe, a socket or a device is there.
        OSError: the file cannot be written, or the disk is full; it has the name of `path`.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))
    if target.exists():
        check_regular(target)
    # Without the target's name, with which the new one could become too long.
    temporary = target.with_name(f".effnet-fast-{uuid.uuid4().hex}.tmp")
    try:
        temporary.open("xb").close()
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def lock(file: IO[bytes], *, wait: bool = True) -> bool | None:
    """Takes the lock of an open file, which ends with `unlock`, or when the process does.

    Args:
        file: open; another open file of the same name excludes it, in this process too.
        wait: whether to wait for who has the lock.

    Returns:
        True; False where another has it; None where there are no locks: on Windows, and on some
        file systems over a network.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def unlock(file: IO[bytes]) -> None:
    """Gives the lock back, also where a forked child has the file open still."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
