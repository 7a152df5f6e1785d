"""Downloads against a host on this machine: whole, checked, or not at all."""

import contextlib
import functools
import hashlib
import os
import socket
import threading

import pytest

from effnet_fast.pretrained import downloads
from host import CONTENT, OTHER, SIZE, Answer, fetch, holds, part


def test_downloads_once(host, tmp_path):
    path = fetch(host, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / os.path.basename(host.url())
    assert holds(path)
    assert fetch(host, path.parent) == path
    assert host.asked == [None]


def test_shows_progress_only_when_asked(host, tmp_path, capsys):
    fetch(host, tmp_path / "silent")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    downloads.fetch(host.url(), tmp_path / "shown", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "weights-" in captured.err
    assert "100%" in captured.err


def test_without_a_length(host, tmp_path):
    host.length = False
    assert holds(fetch(host, tmp_path))


@pytest.mark.parametrize("status", downloads.PASSING)
def test_tries_again_after_a_passing_error(host, tmp_path, status):
    host.answers = [Answer(status=status)]
    assert holds(fetch(host, tmp_path))
    assert len(host.asked) == 2


def test_continues_a_broken_connection(host, tmp_path):
    host.answers = [Answer(cut=100_000), Answer(cut=50_000)]
    assert holds(fetch(host, tmp_path))
    assert host.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_goes_on_as_long_as_something_arrives(host, tmp_path):
    host.answers = [Answer(cut=20_000)] * 10
    assert holds(fetch(host, tmp_path))
    assert len(host.asked) == 11 > 2 * downloads.ATTEMPTS


@pytest.mark.slow
def test_continues_after_silence(host, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 1.0)
    host.answers = [Answer(cut=100_000, stall=300.0)]
    assert holds(fetch(host, tmp_path))
    assert host.asked == [None, "bytes=100000-"]
    assert host.outlasted == 0


def test_continues_what_an_earlier_process_left(host, tmp_path):
    part(host, tmp_path, CONTENT[:123_457])
    assert holds(fetch(host, tmp_path))
    assert host.asked == ["bytes=123457-"]


def test_takes_a_part_that_is_complete(host, tmp_path):
    part(host, tmp_path, CONTENT)
    assert holds(fetch(host, tmp_path))
    assert host.asked == [f"bytes={SIZE}-"]


@pytest.mark.parametrize(
    "content",
    [OTHER[:1000], OTHER, CONTENT + b"more"],
    ids=["of_another_file", "whole_of_another_file", "too_long"],
)
def test_starts_over_when_the_part_is_of_something_else(host, tmp_path, content):
    part(host, tmp_path, content)
    assert holds(fetch(host, tmp_path))
    assert host.asked[-1] is None


def test_starts_over_when_the_host_ignores_ranges(host, tmp_path):
    host.ranges = False
    part(host, tmp_path, OTHER[:1000])
    host.answers = [Answer(cut=100_000)]
    assert holds(fetch(host, tmp_path))


def test_starts_over_when_the_host_sends_another_range(host, tmp_path):
    part(host, tmp_path, CONTENT[:1000])
    host.answers = [Answer(shift=10)]
    assert holds(fetch(host, tmp_path))
    assert host.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("etag", ['"2"', None], ids=["noticed_by_the_host", "noticed_by_the_hash"])
def test_starts_over_when_the_file_changes_on_the_way(host, tmp_path, etag):
    url = host.url()
    host.content = OTHER
    host.etag = etag and '"1"'
    change = functools.partial(vars(host).update, content=CONTENT, etag=etag)
    host.answers = [Answer(cut=100_000, then=change)]
    assert holds(downloads.fetch(url, tmp_path, progress=False))
    assert len(host.asked) == (2 if etag else 3)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
@pytest.mark.parametrize(
    "served",
    [OTHER, CONTENT[:-1], CONTENT[: SIZE // 2], CONTENT + b"\0", b"", b"<html>log in</html>"],
    ids=["other", "one_byte_short", "half", "one_byte_long", "empty", "page"],
)
def test_refuses_what_has_another_hash(host, tmp_path, served, ranges):
    url, promised = host.url(), hashlib.sha256(CONTENT).hexdigest()[:8]
    host.content, host.ranges = served, ranges
    with pytest.raises(ValueError, match="weights-") as caught:
        downloads.fetch(url, tmp_path, progress=False)
    message = str(caught.value)
    assert str(tmp_path / os.path.basename(url)) in message
    assert promised in message
    assert hashlib.sha256(served).hexdigest() in message
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_file_that_was_tampered_with(host, tmp_path):
    path = fetch(host, tmp_path)
    for position in (0, SIZE // 2, SIZE - 1):
        tampered = bytearray(CONTENT)
        tampered[position] ^= 1
        path.write_bytes(tampered)
        with pytest.raises(ValueError, match="is left as it is; move or delete it") as caught:
            fetch(host, tmp_path)
        assert str(path) in str(caught.value)
        assert hashlib.sha256(tampered).hexdigest() in str(caught.value)
        assert holds(path, bytes(tampered))
    path.unlink()
    assert holds(fetch(host, tmp_path))


def test_refuses_a_file_that_was_truncated(host, tmp_path):
    path = fetch(host, tmp_path)
    path.write_bytes(CONTENT[:1000])
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(host, tmp_path)
    assert host.asked == [None]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_gives_up_at_once_when_the_host_refuses(host, tmp_path, status):
    host.answers = [Answer(status=status)] * 9
    with pytest.raises(
        ConnectionError, match=f"{host.url()}: not downloaded: HTTP status {status}"
    ):
        fetch(host, tmp_path)
    assert len(host.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_gives_up_when_the_host_stays_broken(host, tmp_path):
    host.answers = [Answer(status=500)] * 99
    with pytest.raises(ConnectionError, match=r"4 attempts in a row failed.* HTTP status 500"):
        fetch(host, tmp_path)
    assert len(host.asked) == downloads.ATTEMPTS
    assert list(tmp_path.iterdir()) == []


def test_gives_up_without_a_host(host, tmp_path):
    url = "http://127.0.0.1:1/weights-0123abcd.pth"
    with pytest.raises(ConnectionError, match=r"refused.*put the file at .*/weights-0123abcd\.pth"):
        downloads.fetch(url, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
def test_a_host_that_always_breaks_off(host, tmp_path, ranges):
    host.ranges = ranges
    host.answers = [Answer(cut=1000)] + [Answer(cut=0 if ranges else 1000)] * 99
    with pytest.raises(ConnectionError, match=rf"closed after 1000 of {SIZE} bytes"):
        fetch(host, tmp_path)
    left = [path.read_bytes() for path in tmp_path.iterdir()]
    assert left == ([CONTENT[:1000]] if ranges else [])  # what can be continued is kept
    host.answers = []
    assert holds(fetch(host, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
def test_gives_up_when_the_host_trickles(host, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(downloads, "STALL", 0.5)
    monkeypatch.setattr(downloads, "LEAST", 1 << 20)
    host.ranges = ranges
    host.answers = [Answer(delay=0.2)]
    with pytest.raises(ConnectionError, match=r"less than 1048576 bytes arrived in 0\.5 seconds"):
        fetch(host, tmp_path)
    assert len(host.asked) == 1
    assert len(list(tmp_path.iterdir())) == ranges  # what can be continued is kept
    monkeypatch.setattr(downloads, "STALL", 30.0)
    assert holds(fetch(host, tmp_path))


@pytest.mark.slow
def test_gives_up_when_every_attempt_brings_a_little(host, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "STALL", 0.5)
    host.answers = [Answer(cut=1)] * 10_000
    with pytest.raises(ConnectionError, match="less than 65536 bytes arrived"):
        fetch(host, tmp_path)


def test_gives_up_when_the_headers_trickle(quick_retries, tmp_path, monkeypatch):
    """Each byte comes within TIMEOUT, and none ends a line."""
    monkeypatch.setattr(downloads, "STALL", 0.4)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not over.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights-0123abcd.pth"
        with pytest.raises(ConnectionError, match=r"arrived in 0\.4 seconds"):
            downloads.fetch(url, tmp_path, progress=False)
        over.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_the_cache_is_refused(host, tmp_path):
    os.mkfifo(tmp_path / os.path.basename(host.url()))
    with pytest.raises(ValueError, match="a pipe, not a file"):
        fetch(host, tmp_path)


@pytest.mark.parametrize("sha256", [8, 64])
def test_takes_a_hash_behind_the_name(host, tmp_path, sha256):
    digest = hashlib.sha256(CONTENT).hexdigest()
    url = f"{host.address}/folder/model.bin#sha256={digest[:sha256]}"
    for _ in range(2):
        path = downloads.fetch(url, tmp_path, progress=False)
        assert path.name == f"model-{digest[:8]}.bin"
        assert holds(path)
    assert host.asked == [None]
    host.content = OTHER
    with pytest.raises(ValueError, match="It was removed"):
        downloads.fetch(url, tmp_path / "other", progress=False)


def test_the_hash_behind_the_name_goes_before_that_in_it(host, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert holds(downloads.fetch(f"{host.url()}#sha256={digest}", tmp_path, progress=False))
    with pytest.raises(ValueError, match="is left as it is"):
        downloads.fetch(f"{host.url()}#sha256={'0' * 64}", tmp_path, progress=False)


@pytest.mark.parametrize(
    "name",
    [
        *("weights.pth", "weights-0123abc.pth", "weights-DEFAULT0.pth", ""),
        *("weights.pth#sha256=", "weights.pth#sha256=0123abc", "weights.pth#md5=0123abcd"),
    ],
)
def test_refuses_urls_without_a_hash(tmp_path, name):
    with pytest.raises(ValueError, match=r"allowed are URLs with the file's SHA-256"):
        downloads.fetch(f"http://127.0.0.1:1/{name}", tmp_path)


def test_takes_longer_hashes(host, tmp_path):
    url = host.url(sha256=hashlib.sha256(CONTENT).hexdigest())
    assert holds(downloads.fetch(url, tmp_path, progress=False))
