"""Fetches files whose URLs promise their SHA-256: whole, checked, or not at all.

What has arrived lies in NAME.part beside the file, locked while a process writes it; it gets the
file's name when it is complete and its hash is right. A part that was left by a lost connection or
a killed process is continued by the next call (HTTP Range, RFC 9110 section 14).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from effnet_fast import __version__
from effnet_fast.files import check_regular, is_at, lock

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # torch.hub's convention: NAME-<sha256>.pth
HASH_IN_FRAGMENT = re.compile(r"sha256=([0-9a-f]{8,64})")  # pip's: URL#sha256=<sha256>
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
TIMEOUT = 30.0  # seconds of silence that end an attempt
ATTEMPTS = 4  # in a row that bring nothing new
PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt
CHUNK = 1 << 20  # bytes
LEAST = 1 << 16  # bytes that have to arrive within STALL, over all attempts
STALL = 120.0  # seconds
WAITING = 8  # chunks that have arrived and are not written yet


class _InterruptedError(Exception):
    """An attempt ended early for a reason that may pass."""


class _StalledError(Exception):
    """The download as a whole does not get on."""


class _Pace:
    """How long a download may still take to bring LEAST more bytes."""

    def __init__(self, size: int) -> None:
        self._size, self._since = size, time.monotonic()

    def seconds_left(self) -> float:
        return STALL - (time.monotonic() - self._since)

    def reached(self, size: int) -> None:
        """Notes the size of the part."""
        if size - self._size >= LEAST:
            self._since = time.monotonic()
        elif size > self._size:  # not enough to begin anew
            return
        self._size = size


def fetch(url: str, folder: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """The file of `url` in `folder`, downloaded unless it lies there, its SHA-256 checked.

    Processes that fetch the same file into the same folder at once take turns, and one downloads.

    Args:
        url: holds the first 8 or more digits of the hash, in the file's name as in
            .../NAME-<sha256>.SUFFIX, or behind it as in .../NAME.SUFFIX#sha256=<sha256>; the file
            is then kept under a name with 8 of them, since many have such names.
        folder: made where it does not exist; None means torch.hub.get_dir()/checkpoints.
        progress: shows a progress bar on stderr.

    Raises:
        ValueError: the hash differs, or the URL has none. A file that was found is left
            as it is; what was downloaded is removed.
        ConnectionError: the server cannot be reached or refuses, or sends less than LEAST bytes in
            STALL seconds; what has arrived is kept for the next call where the server can continue
            it.
        OSError: the folder cannot be written, or is full.
    """
    name, prefix = name_and_hash(url)
    path = (_hub_folder() if folder is None else Path(folder)) / name
    if path.exists():
        check_regular(path)
    else:
        with _explained(path), _part(path) as file:
            if file is not None:
                _Download(url, path, file, progress).run(prefix)
                return path
    digest = sha256(path)
    if not digest.startswith(prefix):
        raise ValueError(
            f"{path}: the file's SHA-256 is {digest}, but begins with {prefix} for the file "
            f"published at {url}: it is truncated, damaged or another file. It was there before "
            "and is left as it is; move or delete it to have it downloaded again"
        )
    return path


def copy(url: str, path: Path, *, progress: bool = True) -> Path:
    """The same for a file whose hash nothing promises: downloaded to `path` unless it is there."""
    with _explained(path), _part(path) as file:
        if file is not None:
            file.truncate(0)  # a killed process's part may be of another version
            _Download(url, path, file, progress).run("")
    return path


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def name_and_hash(url: str) -> tuple[str, str]:
    """The name under which the file of an address is kept, and what its SHA-256 begins with.

    Raises:
        ValueError: nothing tells the hash.
    """
    parts = urllib.parse.urlparse(url)
    name = os.path.basename(parts.path)
    if match := HASH_IN_FRAGMENT.fullmatch(parts.fragment):
        stem, suffix = os.path.splitext(name)
        in_name = HASH_IN_NAME.search(name)
        if in_name is None:
            name = f"{stem}-{match.group(1)[:8]}{suffix}"
        return name, match.group(1)
    if match := HASH_IN_NAME.search(name):
        return name, match.group(1)
    raise ValueError(
        f"{url}: a download could not be checked: allowed are URLs with the file's SHA-256, "
        "as .../NAME-<sha256>.SUFFIX or .../NAME.SUFFIX#sha256=<sha256>"
    )


def _hub_folder() -> Path:
    import torch  # nothing else here needs it

    return Path(torch.hub.get_dir()) / "checkpoints"


class _Download:
    """One download into an open part."""

    def __init__(self, url: str, path: Path, file: IO[bytes], progress: bool) -> None:
        self.url = url
        self.path = path
        self.file = file
        self.progress = progress
        self.validator: str | None = None  # tells one version of the remote file from another
        self.continues = True  # whether the server answers Range, so far as is known
        self.joined = False  # whether the part is of several responses

    def run(self, prefix: str) -> None:
        """Fills the part, checks it and gives it the file's name."""
        with tqdm(
            desc=self.path.name,
            disable=not self.progress,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            initial=self._size(),
        ) as self.bar:
            self._fill()
            digest = sha256(self.file.name)
            if self.joined and not digest.startswith(prefix):  # of two versions, it may be
                self._start_over()
                self._fill()
                digest = sha256(self.file.name)
        if not digest.startswith(prefix):
            os.remove(self.file.name)
            raise ValueError(
                f"{self.path}: the SHA-256 of the file from {self.url} is {digest}, but must begin "
                f"with {prefix}: the file is truncated, damaged or another one. It was removed"
            )
        os.fsync(self.file.fileno())
        os.replace(self.file.name, self.path)

    def _fill(self) -> None:
        """Attempts until the part is complete."""
        failures, most = 0, self._size()
        self.pace = _Pace(most)
        while True:
            try:
                return self._attempt()
            except _StalledError:
                self._give_up(f"less than {LEAST} bytes arrived in {STALL:g} seconds")
            except _InterruptedError as error:
                size = self._size()
                failures = 1 if size > most else failures + 1
                most = max(most, size)
                if failures >= ATTEMPTS:
                    self._give_up(f"{failures} attempts in a row failed, the last with: {error}")
                time.sleep(PAUSE * 2 ** (failures - 1))

    def _attempt(self) -> None:
        """One request, for what the part lacks."""
        size = offset = self._size()
        with contextlib.closing(_received(self._request(offset), self.pace)) as received:
            try:
                response = next(received)
            except urllib.error.HTTPError as error:
                with error:
                    return self._refused(error, offset)
            total = self._accept(response, offset)
            size = self._size()
            for chunk in received:
                self.file.write(chunk)
                self.bar.update(len(chunk))
                size += len(chunk)
                self.pace.reached(size)
        size = self._size()
        if total is not None and size != total:
            raise _InterruptedError(f"the connection was closed after {size} of {total} bytes")

    def _request(self, offset: int) -> urllib.request.Request:
        headers = {"User-Agent": f"effnet-fast/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.validator is not None:
                headers["If-Range"] = self.validator
        return urllib.request.Request(self.url, headers=headers)

    def _refused(self, error: urllib.error.HTTPError, offset: int) -> None:
        """Returns where the refusal means that the part lacks nothing; raises otherwise."""
        if error.code == 416 and offset:  # no bytes from there on: the hash tells what the part is
            self.joined = True
            return
        if error.code in PASSING:
            raise _InterruptedError(f"HTTP status {error.code} {error.reason}") from error
        self._give_up(f"HTTP status {error.code} {error.reason}")

    def _accept(self, response: Any, offset: int) -> int | None:
        """Makes the part end where the response begins; the size of the whole file, if known."""
        if response.status == 206:
            start, total = _content_range(response)
            if start != offset:
                self._start_over()
                raise _InterruptedError(
                    f"the server sent bytes from {start} on instead of {offset}"
                )
            self.joined = self.joined or offset > 0
        else:
            if offset:
                self._start_over()
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and length.isdigit() else None
        self.continues = response.status == 206 or response.headers.get("Accept-Ranges") == "bytes"
        self.validator = _validator(response)
        self.bar.total = total
        self.bar.refresh()
        missing = 0 if total is None else total - self._size()
        free = shutil.disk_usage(self.path.parent).free
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing} bytes are missing and {free} are free")
        return total

    def _start_over(self) -> None:
        self.file.truncate(0)
        self.bar.reset()

    def _give_up(self, reason: str) -> None:
        if not self.continues:
            os.remove(self.file.name)
        raise ConnectionError(
            f"{self.url}: not downloaded: {reason}. Where there is no network, put the file at "
            f"{self.path}"
        )

    def _size(self) -> int:
        self.file.flush()
        return os.fstat(self.file.fileno()).st_size


def _received(request: urllib.request.Request, pace: _Pace) -> Generator[Any, None, None]:
    """The response, then its chunks, until there is no more or the pace is too slow.

    Another thread receives: a server that sends header lines or chunk sizes byte by byte would
    hold this one in a single call for hours.
    """
    items: queue.Queue[Any] = queue.Queue(WAITING)
    left = threading.Event()

    def put(item: Any) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=1)

    def receive() -> None:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                put(response)
                while not left.is_set() and (chunk := response.read1(CHUNK)):
                    put(chunk)
            put(None)
        except BaseException as error:  # the reader's to judge
            put(error)

    threading.Thread(target=receive, daemon=True).start()
    try:
        while True:
            seconds = pace.seconds_left()
            if seconds <= 0:
                raise _StalledError
            try:
                item = items.get(timeout=seconds)
            except queue.Empty:
                raise _StalledError from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_words(error)) from error
    finally:
        left.set()


def _content_range(response: Any) -> tuple[int | None, int | None]:
    """First byte and total size, as far as the header tells them."""
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, total = match.groups() if match else (None, None)
    return int(start) if start else None, int(total) if total and total != "*" else None


def _validator(response: Any) -> str | None:
    """What If-Range may hold: a strong ETag, or else a date."""
    etag = response.headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return str(etag)
    return response.headers.get("Last-Modified")


def _words(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error) or type(error).__name__


@contextlib.contextmanager
def _part(path: Path) -> Iterator[IO[bytes] | None]:
    """The locked part of `path`, open at its end; None where `path` came to be meanwhile.

    A part that is empty in the end is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    while True:
        with open(part, "ab") as file:
            locks = lock(file)
            try:
                if path.exists():
                    yield None
                    return
                if locks and is_at(file, part):  # else whoever held the lock moved or removed it
                    yield file
                    return
            finally:
                if is_at(file, part) and os.fstat(file.fileno()).st_size == 0:
                    os.remove(part)
        if not locks:
            break
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "ab") as file:
            yield file
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Names the file in errors of the file system; a full disk gets its space back."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        message = f"cannot be downloaded to: {error.strerror}"
        raise OSError(error.errno, message, str(path)) from error
