"""`effnet-fast eval`: its table, its JSON, its files, and one line for every bad input."""

from __future__ import annotations

import json
import re

import pytest

import answered
from answered import CLASSES
from effnet_fast import cli


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return answered.checkpoint(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture
def data(tmp_path, weights):
    """Twelve pictures in the folders of their classes, and one that cannot be read."""
    folder = tmp_path / "data"
    answered.by_class(folder, answered.network(weights), 12)
    (folder / CLASSES[0] / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def run(words, capsys):
    assert cli.main(["eval", *map(str, words)]) == 0
    return capsys.readouterr()


def refused(words, capsys):
    assert cli.main(["eval", *map(str, words)]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1].removeprefix("effnet-fast: ")


def test_json(weights, data, capsys):
    printed = run((weights, data, "--json", "--compare", 4), capsys)
    report = json.loads(printed.out)
    assert (report["top1"], report["top5"]) == (1.0, 1.0)
    assert (report["images"], report["unreadable"]) == (12, 1)
    assert report["images_per_second"] > 0
    assert (report["model"], report["weights"]) == ("lite0", str(weights))
    assert (report["agreement"]["images"], report["agreement"]["same"]) == (4, 1.0)
    assert [entry["name"] for entry in report["classes"]] == list(CLASSES)
    (note,) = [line for line in printed.err.splitlines() if "cut.jpg" in line]
    assert note.startswith(f"effnet-fast: {data / CLASSES[0] / 'cut.jpg'}: ")


def test_table_and_files(weights, data, tmp_path, capsys):
    folder = tmp_path / "report"
    out = run((weights, data, "--out", folder, "--compare", 0), capsys).out
    assert re.search("^top-1 +100.00%$", out, re.MULTILINE)
    assert "class" in out
    assert re.search(r"^loss \(cross entropy\) +\d\.\d{4}$", out, re.MULTILINE)
    assert "stock" not in out
    names = ["calibration.csv", "classes.csv", "confusion.csv", "confusion.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(str(folder / name) in out for name in names)


def test_does_without_matplotlib(weights, data, tmp_path, capsys, monkeypatch):
    from effnet_fast.cli import evaluate

    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    printed = run((weights, data, "--out", tmp_path / "report", "--compare", 0), capsys)
    assert "it needs matplotlib: pip install 'effnet-fast[train]'" in printed.err
    assert (tmp_path / "report" / "confusion.csv").is_file()


def test_refuses_bad_input(weights, data, tmp_path, capsys):
    assert "and 0 are allowed" in refused((weights, data, "--unreadable-limit", 0), capsys)
    (data / CLASSES[1]).rename(data / "oak")
    answered.picture(0).save(data / "oak" / "one.png")
    message = refused((weights, data), capsys)
    assert message.startswith("1 of the data's 7 classes are not among the network's 7: 'oak'")
    absent = tmp_path / "absent"
    assert refused((weights, absent), capsys) == f"{absent}: No such file or directory"


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "effnet-fast eval runs/pets pets" in capsys.readouterr().out
