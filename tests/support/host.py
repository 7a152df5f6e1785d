"""A server on this machine that plays the host of published weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from effnet_fast.pretrained import downloads

SIZE = 300_000  # bytes: several of the server's writes
CONTENT = random.Random(0).randbytes(SIZE)
OTHER = random.Random(1).randbytes(SIZE)


@dataclass
class Answer:
    """How one request is answered; the default is what a good host does."""

    status: int | None = None  # an error instead of the file
    cut: int | None = None  # bytes of the body after which the connection is closed
    stall: float = 0.0  # seconds of silence after `cut` bytes, unless another request comes
    shift: int = 0  # bytes by which a range starts later than was asked for
    delay: float = 0.0  # seconds before each 64 KiB
    then: Callable[[], object] | None = None  # called before the connection is closed


@dataclass
class Host:
    """What is served, how the next requests are answered, and what was asked for."""

    content: bytes
    ranges: bool = True
    etag: str | None = '"1"'
    length: bool = True
    answers: list[Answer] = field(default_factory=list)  # of the next requests, then the default
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request
    outlasted: int = 0  # silences during which nobody asked again
    address: str = ""
    arrival: threading.Condition = field(default_factory=threading.Condition)

    def url(self, name: str = "weights", sha256: str | None = None) -> str:
        """Where the content is, under a name that promises its hash."""
        digest = sha256 or hashlib.sha256(self.content).hexdigest()[:8]
        return f"{self.address}/models/{name}-{digest}.pth"


def fetch(host: Host, folder: Path) -> Path:
    """Fetches what the host serves."""
    return downloads.fetch(host.url(), folder, progress=False)


def part(host: Host, folder: Path, content: bytes) -> Path:
    """Leaves a part of the file, as a killed process does."""
    path = folder / (os.path.basename(host.url()) + ".part")
    path.write_bytes(content)
    return path


def holds(path: Path, content: bytes = CONTENT) -> bool:
    """Whether the file has this content, in a folder without other files."""
    assert sorted(path.parent.iterdir()) == [path]
    return path.read_bytes() == content


@contextlib.contextmanager
def serve(content: bytes, **options: Any) -> Iterator[Host]:
    """Serves `content` under every path until the block ends."""
    host = Host(content, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(host))
    server.daemon_threads = True
    host.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(host: Host) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            with host.arrival:
                host.asked.append(asked)
                host.arrival.notify_all()
            answer = host.answers.pop(0) if host.answers else Answer()
            if answer.status is not None:
                self.send_error(answer.status)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and host.ranges else 0
            if self.headers.get("If-Range") not in (None, host.etag):
                start = 0
            if start and start >= len(host.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(host.content)}")
                self.end_headers()
                return
            start += answer.shift
            body = host.content[start:]
            self.send_response(206 if start else 200)
            if start:
                last = len(host.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(host.content)}")
            if host.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if host.etag:
                self.send_header("ETag", host.etag)
            if host.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self._send(body[: answer.cut], answer)

        def _send(self, body: bytes, answer: Answer) -> None:
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(body), 1 << 16):
                    time.sleep(answer.delay)
                    self.wfile.write(body[at : at + (1 << 16)])
                self.wfile.flush()
                if answer.stall:
                    self._wait(answer.stall)
                if answer.then is not None:
                    answer.then()

        def _wait(self, seconds: float) -> None:
            """Is silent until the next request, at most for so long."""
            with host.arrival:
                before = len(host.asked)
                if not host.arrival.wait_for(lambda: len(host.asked) > before, seconds):
                    host.outlasted += 1

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
