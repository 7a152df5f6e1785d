"""Files of answers: what they hold, and what every kind of interruption leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from answered import rows_of
from effnet_fast.training.answers import outputs, rows, table_files
from effnet_fast.training.answers.outputs import Output
from effnet_fast.training.answers.rows import Answers, Columns

SUFFIXES = (".csv", ".jsonl", ".parquet")
LABELS = ["plain", 'say "so"', "comma, comma"]
COLUMNS = Columns(top=2, features=0, labels=LABELS)
DESCRIPTION = {"answer": "top 2", "network": "one"}
PATHS = ["a.jpg", 'b, "c".jpg', "line\nend.jpg", "Straße ü.jpg", "e.jpg", "f.jpg", "g.jpg"]
NAN = float("nan")


def answers(indices: list[int]) -> Answers:
    """Of images of which every fourth cannot be read."""
    reasons = ["truncated" if i % 4 == 3 else None for i in indices]
    readable = [i for i, reason in zip(indices, reasons, strict=True) if reason is None]
    classes = np.array([[i % 3, (i + 1) % 3] for i in readable], np.int64).reshape(-1, 2)
    values = np.array([[0.75, 1 / (i + 3)] for i in readable], np.float32).reshape(-1, 2)
    return Answers(indices, [-1] * len(indices), reasons, classes, values)


def fill(path, paths=PATHS, *, batch=2, stop=None, columns=COLUMNS, **options):
    """Writes what is missing, and gives up before the batch number `stop`."""
    with Output(path, columns, DESCRIPTION, **options) as output:
        left = [i for i, name in enumerate(paths) if rows.shown(name) not in output.done]
        for number, start in enumerate(range(0, len(left), batch)):
            if number == stop:
                raise KeyboardInterrupt
            indices = left[start : start + batch]
            output.add([paths[i] for i in indices], answers(indices))
    return len(left)


def check(path, paths=PATHS):
    found = rows_of(path)
    assert sorted(row["path"] for row in found) == sorted(paths)
    for row in found:
        i = paths.index(row["path"])
        if i % 4 == 3:
            assert (row["reason"], row["top"]) == ("truncated", [])
        else:
            expected = [(i % 3, LABELS[i % 3]), ((i + 1) % 3, LABELS[(i + 1) % 3])]
            assert [entry[:2] for entry in row["top"]] == expected
            values = [np.float32(entry[2]) for entry in row["top"]]
            assert values == [np.float32(0.75), np.float32(1 / (i + 3))]
    assert not path.with_name(f"{path.name}.parts").exists()
    assert not path.with_name(f".{path.name}.lock").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_holds_a_row_per_image(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    assert fill(path) == len(PATHS)
    check(path)
    assert [row["path"] for row in rows_of(path)] == PATHS
    before, content = path.stat().st_mtime_ns, path.read_bytes()
    assert fill(path) == 0
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (before, content)
    assert fill(path, [*PATHS, "new.jpg"]) == 1
    check(path, [*PATHS, "new.jpg"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_continues_after_an_error(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    with pytest.raises(KeyboardInterrupt):
        fill(path, stop=2)
    assert fill(path) == len(PATHS) - 4
    check(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_continues_from_every_byte(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(outputs.os, "fsync", lambda file: None)  # hundreds of files, no power cut
    path, paths = tmp_path / f"out{suffix}", PATHS[:4]
    fill(path, paths)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        fill(path, paths)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_that_were_joined_count_once(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"out{suffix}"
    options = {"rank": 0, "world": 2}
    # Killed after the join has taken its place, and before the parts are removed.
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)
    fill(path, **options)
    monkeypatch.undo()
    assert list(path.with_name(f"{path.name}.parts").glob(f"*{suffix}"))
    assert fill(path) == 0
    check(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_that_were_not_joined_are(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"out{suffix}"
    fill(path, PATHS[:2])
    replace, calls = os.replace, []

    def killed_in_join(source, target):
        if os.fspath(target) == os.fspath(path):
            calls.append(source)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", killed_in_join)
    with pytest.raises(KeyboardInterrupt):
        fill(path, rank=0, world=2)
    monkeypatch.undo()
    assert calls
    assert len(rows_of(path)) == 2
    (tmp_path / f"{path.name}.parts" / "begun.tmp").write_bytes(b"x")
    assert fill(path) == 0
    check(path)


def test_processes_share_a_file(tmp_path):
    """Four processes in turn, whose parts the first one joins."""
    path = tmp_path / "out.csv"
    first = Output(path, COLUMNS, DESCRIPTION, rank=0, world=4)
    with first:
        for rank in range(1, 4):
            other = Output(path, COLUMNS, DESCRIPTION, rank=rank, world=4)
            with other:
                indices = list(range(rank - 1, len(PATHS), 3))
                other.add([PATHS[i] for i in indices], answers(indices))
        assert not path.exists()
    check(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_embeddings(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    columns = Columns(top=0, features=3, labels=None)
    values = np.array([[0.1, -2.5, 3e-9], [1, 2, 3]], np.float32)
    none = np.empty((2, 0), np.int64)
    with Output(path, columns, DESCRIPTION) as output:
        reasons = [None, "gone", None]
        output.add(["a", "b", "c"], Answers([0, 1, 2], [-1] * 3, reasons, none, values))
    first, second, third = rows_of(path)
    assert second["features"] is None
    assert second["reason"] == "gone"
    for row, expected in ((first, values[0]), (third, values[1])):
        np.testing.assert_array_equal(np.array(row["features"], np.float32), expected)


def test_what_is_no_number_is_null_in_json(tmp_path):
    path = tmp_path / "out.jsonl"
    values = np.array([[NAN, 0.5]], np.float32)
    with Output(path, COLUMNS, DESCRIPTION) as output:
        output.add(["a"], Answers([0], [-1], [None], np.zeros((1, 2), np.int64), values))
    assert [entry[2] for entry in rows_of(path)[0]["top"]] == [None, 0.5]


def test_parts_of_parquet_are_written_as_rows_come(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "PART_ROWS", 2)
    path = tmp_path / "out.parquet"
    with Output(path, COLUMNS, DESCRIPTION) as output:
        for i in range(5):
            output.add([PATHS[i]], answers([i]))
        assert len(list((tmp_path / "out.parquet.parts").glob("*.parquet"))) == 2
    check(path, PATHS[:5])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_refuses_what_was_made_with_something_else(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    fill(path)
    other = {**DESCRIPTION, "network": "two"}
    message = 'was begun with network "one", and now it is "two"; give another file'
    with pytest.raises(ValueError, match=message), Output(path, COLUMNS, other):
        pass
    check(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_refuses_files_of_others(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"my own notes\n")
    with pytest.raises(ValueError, match=r"exists, and out\.\w+\.predict\.json, which says how"):
        fill(path)
    path.with_name(f"{path.name}.predict.json").write_text('{"answer": "top 2", "network": "one"}')
    with pytest.raises(ValueError, match=f"out{suffix}"):
        fill(path)
    assert path.read_bytes() == b"my own notes\n"


def test_refuses_a_second_writer(tmp_path):
    path = tmp_path / "out.csv"
    other = pytest.raises(ValueError, match="another process is writing it")
    with Output(path, COLUMNS, DESCRIPTION), other:
        fill(path)
    assert fill(path) == len(PATHS)


def test_refuses_other_suffixes_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.csv, \.parquet, \.jsonl"):
        Output(tmp_path / "out.txt", COLUMNS, DESCRIPTION)
    with pytest.raises(FileNotFoundError):
        fill(tmp_path / "absent" / "out.csv")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_told_by_the_file(tmp_path):
    path = tmp_path / "out.csv"
    output = Output(path, COLUMNS, DESCRIPTION)
    with Path("/dev/full").open("ab", buffering=0) as full, output:
        output._open = lambda: full
        with pytest.raises(OSError, match="No space left") as caught:
            output.add(PATHS, answers(list(range(len(PATHS)))))
        output._file = None
    assert caught.value.filename == str(path)


def test_no_two_paths_have_the_same_text():
    raw = os.fsdecode(b"\xff.jpg")
    escaped = ["\\xff.jpg", "\\x5cxff.jpg", "\\x5cx5cxff.jpg", "\\udcff.jpg", "\\x5cudcff.jpg"]
    plain = ["C:\\photos\\xmas.jpg", "a\\\\b.jpg", "ü.jpg", "\\xFF.jpg"]
    mixed = [os.fsdecode(b"\\\xff.jpg"), "\\" + os.fsdecode(b"xff\xfe.jpg"), "\ud800.jpg"]
    paths = [raw, *escaped, *plain, *mixed]
    texts = [rows.shown(path) for path in paths]
    assert len(set(texts)) == len(set(paths))
    assert texts[0] == "\\xff.jpg"
    assert [rows.shown(path) for path in plain] == plain
    for text in texts:
        text.encode("utf-8")
