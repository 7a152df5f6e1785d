"""Options and metrics in files: read as plain numbers, and no builder of numpy's is reached."""

from __future__ import annotations

import argparse
import pickle
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from effnet_fast import checkpoints
from effnet_fast.checkpoints import plain_data
from effnet_fast.checkpoints.reading import read

STATE = {"features.0.0.weight": torch.ones(2)}
NUMBERS = [
    *(np.float64(0.5), np.float32(2), np.float16(3), np.int8(-4), np.uint64(2**63), np.bool_(True)),
    *(np.complex64(1j), np.longdouble(5), np.dtype(">f8").type(6)),
]


def archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", "little")
    return path


def loaded(path: Path) -> object:
    with plain_data.allowed():
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: v.dtype.str)
def test_numbers_keep_their_value(tmp_path: Path, value: np.generic) -> None:
    torch.save({"best": value, "kind": value.dtype}, tmp_path / "a.pth")
    assert loaded(tmp_path / "a.pth")["best"] == value.item()


def test_the_byte_order_counts(tmp_path: Path) -> None:
    big = pickle.dumps(np.dtype(">i2"), 2)[2:-1]  # without PROTO and STOP
    data = b"c_codecs\nencode\n(X\x02\x00\x00\x00\x01\x02X\x06\x00\x00\x00latin1tR"
    scalar = b"cnumpy.core.multiarray\nscalar\n("
    path = archive(tmp_path / "a.pth", b"\x80\x02" + scalar + big + data + b"tR.")
    assert loaded(path) == 258


CRASHES = {
    "objects": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x03\x00\x00\x00O,OtRtR.",
    "object": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x01\x00\x00\x00OtRtR.",
    "text": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x09\x00\x00\x00U99999999tRtR.",
    "without_value": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8tRtR.",
    "short_value": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tRtR.",
    "no_type": b"cnumpy.core.multiarray\nscalar\n(K\x01K\x02tR.",
    "fields": b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8tR(K\x03X\x01\x00\x00\x00|NNNK\x08K\x01K\x00tb.",
    "unbuilt": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n)\x81NtR.",
    "array": b"cnumpy.core.multiarray\n_reconstruct\n(K\x01tR.",
}


@pytest.mark.parametrize("kind", CRASHES)
def test_no_file_makes_numpy_build_an_object(tmp_path: Path, kind: str) -> None:
    path = archive(tmp_path / "a.pth", b"\x80\x02" + CRASHES[kind])
    with pytest.raises(ValueError, match=r"a\.pth: (not a file of plain tensors|truncated or)"):
        checkpoints.load(path)


def test_only_classes_that_keep_what_they_are_given_are_allowed() -> None:
    entries = {entry[0] if isinstance(entry, tuple) else entry for entry in plain_data.PLAIN_DATA}
    own = {entry for entry in entries if entry.__module__ == plain_data.__name__}
    assert own == {plain_data.number, plain_data.NumberType}
    assert {entry.__module__.partition(".")[0] for entry in entries - own} == {
        *("argparse", "pathlib")
    }


def test_the_callers_own_list_comes_back_and_does_not_count_for_numpy(tmp_path: Path) -> None:
    scalar = np.float64(0).__reduce__()[0]
    own = [argparse.Namespace, np.dtype, scalar, type(np.dtype("f8"))]
    path = archive(tmp_path / "a.pth", b"\x80\x02" + CRASHES["objects"])
    good = tmp_path / "b.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(best=np.float64(1))}, good)
    with torch.serialization.safe_globals(own):
        before = set(map(repr, torch.serialization.get_safe_globals()))
        assert read(good).state.keys() == STATE.keys()
        with pytest.raises(ValueError, match=r"it needs numpy\.dtype"):
            checkpoints.load(path)
        assert set(map(repr, torch.serialization.get_safe_globals())) == before


def test_threads_that_read_do_not_take_each_others_list_away(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(best=np.float64(1))}, path)
    before = set(torch.serialization.get_safe_globals())
    inside, leave, failures = threading.Event(), threading.Event(), []

    def first() -> None:
        with plain_data.allowed():
            inside.set()
            leave.wait(30)

    def second() -> None:
        with plain_data.allowed():
            leave.set()
            thread.join(30)
            try:
                torch.load(path, weights_only=True)
            except pickle.UnpicklingError as error:
                failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    second()
    assert not failures
    assert set(torch.serialization.get_safe_globals()) == before


def test_what_others_add_meanwhile_stays() -> None:
    """As an import of torch.distributed.tensor does."""
    with plain_data.allowed():
        torch.serialization.add_safe_globals([Path])
    found = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([entry for entry in found if entry is not Path])
    assert Path in found
    assert not set(plain_data.PLAIN_DATA) & set(found)
