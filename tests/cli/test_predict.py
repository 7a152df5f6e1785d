"""`effnet-fast predict`: what it prints and writes, and one line for every bad input."""

from __future__ import annotations

import json

import pytest

import answered
from answered import CLASSES, rows_of
from effnet_fast import cli


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return answered.checkpoint(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture
def photos(tmp_path):
    """Five pictures, one truncated, below a folder whose name has a space and an umlaut."""
    folder = tmp_path / "Fotos für alle"
    answered.pictures(folder, 5, broken=(2,))
    return folder


def run(words, capsys):
    assert cli.main(["predict", *map(str, words)]) == 0
    return capsys.readouterr()


def refused(words, capsys):
    assert cli.main(["predict", *map(str, words)]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("effnet-fast: ")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_writes_a_row_per_file(tmp_path, weights, photos, suffix, capsys):
    out = tmp_path / f"out{suffix}"
    words = (weights, photos, "--out", out, "--top", 2)
    printed = run(words, capsys)
    assert printed.err == ""
    assert printed.out.startswith(f"{out}: 5 rows added; 1 unreadable; ")
    rows = rows_of(out)
    assert [row["path"] for row in rows] == sorted(map(str, photos.rglob("*.jpg")))
    assert [len(row["top"]) for row in rows if row["reason"] is None] == [2] * 4
    report = json.loads(run((*words, "--json"), capsys).out)
    assert (report["images"], report["present"], report["out"]) == (0, 5, str(out))
    assert rows_of(out) == rows


def test_csv_begins_with_a_header(tmp_path, weights, photos, capsys):
    out = tmp_path / "out.csv"
    run((weights, photos, "--out", out, "--top", 1), capsys)
    lines = out.read_text("utf-8").splitlines()
    assert lines[0] == "path,reason,class_1,label_1,probability_1"
    assert len(lines) == 6
    assert any(",truncated or corrupt image" in line for line in lines)


def test_takes_a_runs_folder(tmp_path, weights, photos, capsys):
    folder = tmp_path / "RUN"  # which looks like the name of published weights
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    (folder / "run.json").write_text("{}")
    outs = []
    for number, network in enumerate((weights, folder)):
        outs.append(tmp_path / f"{number}.csv")
        run((network, photos, "--out", outs[-1]), capsys)
    assert rows_of(outs[0]) == rows_of(outs[1])


def test_takes_own_labels(tmp_path, weights, photos, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"own {name}\n" for name in CLASSES))
    out = tmp_path / "out.csv"
    run((weights, photos, "--out", out, "--labels", labels), capsys)
    assert all(row["top"][0][1].startswith("own ") for row in rows_of(out) if not row["reason"])


def test_refuses_another_network(tmp_path, weights, photos, capsys):
    out = tmp_path / "out.csv"
    run((weights, photos, "--out", out), capsys)
    other = answered.checkpoint(tmp_path / "other.safetensors", seed=1)
    message = refused((other, photos, "--out", out), capsys)
    assert message.startswith(f"{out}: was begun with network ")


def test_refuses_bad_input(tmp_path, weights, photos, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out.csv"
    cases = [
        ((weights, empty, "--out", out), f"{empty}: no images"),
        ((weights, tmp_path / "absent", "--out", out), f"{tmp_path / 'absent'}: No such file"),
        ((tmp_path / "absent", photos, "--out", out), f"{tmp_path / 'absent'}: No such file"),
        ((weights, photos, "--out", tmp_path / "out.txt"), f"{tmp_path / 'out.txt'}: the file mu"),
        ((weights, photos, "--out", empty / "a" / "o.csv"), f"--out {empty / 'a' / 'o.csv'}: "),
        ((weights, photos, "--out", out, "--device", "tpu"), "--device must be cpu or cuda, got"),
        ((weights, photos, "--out", out, "--device", "cuda:99"), "--device cuda:99: this machine"),
        (("IMAGENET1K_V9", photos, "--out", out), "EfficientNet_B0_Weights has no member"),
        ((weights, photos, "--out", out, "--dtype", "float16", "--device", "cpu"), "dtype must be"),
    ]
    for words, message in cases:
        assert refused(words, capsys).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == [photos.name, "empty"]


def test_names_the_extra_that_is_missing(tmp_path, weights, photos, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    message = refused((weights, photos, "--out", tmp_path / "out.parquet"), capsys)
    assert message == "this needs pyarrow: pip install 'effnet-fast[predict]'"


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert "effnet-fast predict runs/pets photos --out pets.csv" in capsys.readouterr().out
