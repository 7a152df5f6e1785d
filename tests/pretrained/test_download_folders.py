"""Downloads into folders that others use, that are full, or that cannot be written."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest

from effnet_fast.pretrained import downloads
from host import CONTENT, OTHER, SIZE, Answer, fetch, holds, part

FETCH = """
import sys
from effnet_fast.pretrained import downloads
print(downloads.fetch(sys.argv[1], sys.argv[2], progress=False))
"""


class TestProcesses:
    @staticmethod
    def start(host, folder):
        command = [sys.executable, "-c", FETCH, host.url(), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @pytest.mark.slow
    def test_several_at_once_share_one_download(self, host, tmp_path):
        host.answers = [Answer(delay=0.3)]
        processes = [self.start(host, tmp_path) for _ in range(3)]
        outputs = [process.communicate(timeout=60) for process in processes]
        path = tmp_path / os.path.basename(host.url())
        assert outputs == [(f"{path}\n", "")] * 3
        assert holds(path)
        assert len(host.asked) == 1

    @pytest.mark.slow
    def test_the_next_takes_over_from_one_that_fails(self, host, tmp_path):
        host.answers = [Answer(cut=200_000, stall=300.0)]
        first = self.start(host, tmp_path)
        file = tmp_path / (os.path.basename(host.url()) + ".part")
        while not (file.exists() and file.stat().st_size > 100_000):
            assert first.poll() is None
            time.sleep(0.02)
        second = self.start(host, tmp_path)
        time.sleep(0.5)  # long enough to wait for the lock, which is not a condition
        first.kill()
        first.communicate()
        assert second.communicate(timeout=60)[1] == ""
        assert holds(tmp_path / os.path.basename(host.url()))
        assert host.asked[0] is None
        assert len(host.asked) == 2
        assert int(host.asked[1].removeprefix("bytes=").rstrip("-")) > 100_000


@pytest.mark.slow
def test_threads_at_once_share_one_download(host, tmp_path):
    host.answers = [Answer(delay=0.1)]
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(host, tmp_path))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert holds(paths[0])
    assert len(host.asked) == 1


def test_waits_for_a_part_that_is_then_removed(host, tmp_path):
    file = part(host, tmp_path, b"")
    paths = []
    thread = threading.Thread(target=lambda: paths.append(fetch(host, tmp_path)))
    with open(file, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread.start()
        time.sleep(0.3)  # long enough to wait for the lock, which is not a condition
        assert host.asked == []
        file.unlink()
    thread.join()
    assert holds(paths[0])


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(host, tmp_path, monkeypatch, error):
    def flock(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert holds(fetch(host, tmp_path))
    host.content = OTHER
    with pytest.raises(ValueError, match="SHA-256"):
        downloads.fetch(host.url(sha256="01234567"), tmp_path / "b", progress=False)
    assert list((tmp_path / "b").iterdir()) == []


class TestFileSystem:
    @pytest.mark.parametrize("found", [0, 100_000])
    def test_too_little_space(self, host, tmp_path, monkeypatch, found):
        part(host, tmp_path, CONTENT[:found])
        missing = SIZE - found
        usage = types.SimpleNamespace(free=missing - 1)
        monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            OSError, match=f"{missing} bytes are missing and {missing - 1}"
        ) as caught:
            fetch(host, tmp_path)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / os.path.basename(host.url()))
        assert list(tmp_path.iterdir()) == []

    def test_full_disk(self, host, tmp_path):
        file = tmp_path / (os.path.basename(host.url()) + ".part")
        file.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            fetch(host, tmp_path)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / os.path.basename(host.url()))
        assert list(tmp_path.iterdir()) == []

    def test_folder_without_permission(self, host):
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            os.chmod(name, 0o555)
            root = os.geteuid() == 0
            try:
                if root:
                    os.seteuid(65534)  # permissions do not bind root
                with pytest.raises(PermissionError, match="cannot be downloaded to") as caught:
                    fetch(host, name)
            finally:
                if root:
                    os.seteuid(0)
                os.chmod(name, 0o755)
            assert caught.value.filename.startswith(name)
            assert list(Path(name).iterdir()) == []

    def test_folder_that_is_a_file(self, host, tmp_path):
        (tmp_path / "file").write_text("hello")
        with pytest.raises(FileExistsError, match="cannot be downloaded to"):
            fetch(host, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "hello"

    def test_reading_needs_no_permission_to_write(self, host, tmp_path, monkeypatch):
        path = fetch(host, tmp_path)

        def refuse(*args, **options):
            raise AssertionError("the folder was to be left alone")

        monkeypatch.setattr(Path, "mkdir", refuse)
        monkeypatch.setattr(downloads, "_part", refuse)
        assert fetch(host, tmp_path) == path

    def test_file_mode_follows_the_umask(self, host, tmp_path):
        mask = os.umask(0o027)
        try:
            assert fetch(host, tmp_path).stat().st_mode & 0o777 == 0o640
        finally:
            os.umask(mask)
