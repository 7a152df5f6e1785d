"""eval: counts by hand on pictures whose answers are known, labels of every kind, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import answered
from answered import CLASSES
from effnet_fast.training.answers import evaluation
from effnet_fast.training.answers.evaluation import Truth, evaluate
from effnet_fast.training.answers.prediction import PredictionOptions, Resources
from effnet_fast.training.data.loading import UnreadableLimitError
from effnet_fast.training.data.sources import open_images

HERE = Resources(workers=0, batch=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return answered.checkpoint(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture(scope="module")
def model(weights):
    return answered.network(weights)


@pytest.fixture
def sorted_pictures(tmp_path, model):
    """Twenty pictures in the folders of the classes that the network gives them."""
    folder = tmp_path / "data"
    found = answered.by_class(folder, model, 20)
    assert sum(map(bool, found.values())) > 2
    return folder, found


def test_all_right(sorted_pictures, model):
    folder, found = sorted_pictures
    result = evaluate(model, folder, resources=HERE).as_dict()
    assert (result["images"], result["unreadable"]) == (20, 0)
    assert (result["top1"], result["top5"], result["mean_recall"]) == (1.0, 1.0, 1.0)
    assert [entry["images"] for entry in result["classes"]] == [len(found[n]) for n in CLASSES]
    assert result["images_per_second"] > 0
    agreement = result["agreement"]
    assert (agreement["images"], agreement["same"]) == (20, 1.0)
    assert 0 <= agreement["largest_difference"] < 1e-4


def test_errors_and_unreadable_images_are_counted(sorted_pictures, model, tmp_path):
    folder, found = sorted_pictures
    source = max(found, key=lambda name: len(found[name]))
    target = next(name for name in CLASSES if name != source)
    content = Path(found[source][0]).read_bytes()
    (folder / target / "moved.png").write_bytes(content)
    (folder / target / "cut.png").write_bytes(content[:100])
    result = evaluate(model, folder, resources=HERE, compared=0)
    report = result.as_dict()
    assert (report["images"], report["unreadable"], report["agreement"]) == (21, 1, None)
    assert report["top1"] == pytest.approx(20 / 21)
    at = CLASSES.index(target), CLASSES.index(source)
    assert result.tally.confusion[at] == 1
    assert result.tally.confusion.sum() == 21
    assert report["first_unreadable"][0]["path"] == str(folder / target / "cut.png")
    with pytest.raises(UnreadableLimitError, match=r"1 images .* and 0 are allowed: .*cut"):
        evaluate(model, folder, resources=HERE, unreadable_limit=0)
    assert evaluate(model, folder, resources=HERE, unreadable_limit=1).unreadable == 1


def test_workers_count_the_same(sorted_pictures, model):
    folder, _ = sorted_pictures
    alone = evaluate(model, folder, resources=HERE, compared=0)
    shared = evaluate(model, folder, resources=Resources(workers=2, batch=4), compared=0)
    np.testing.assert_array_equal(alone.tally.confusion, shared.tally.confusion)
    assert alone.tally.ece == shared.tally.ece


def test_takes_val_tables_and_numbers(sorted_pictures, model, tmp_path):
    folder, found = sorted_pictures
    (tmp_path / "split").mkdir()
    folder.rename(tmp_path / "split" / "val")
    assert evaluate(model, tmp_path / "split", resources=HERE, compared=0).tally.top1 == 1.0
    rows = [("path", "label")]
    for label, name in enumerate(CLASSES):
        rows += [(path.replace("/data/", "/split/val/"), label) for path in found[name]]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert evaluate(model, tmp_path / "table.csv", resources=HERE, compared=0).tally.top1 == 1.0
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    for label, name in enumerate(CLASSES):
        (tmp_path / "split" / "val" / name).rename(numbered / str(label))
    assert evaluate(model, numbered, resources=HERE, compared=0).tally.top1 == 1.0


class Pictures(torch.utils.data.Dataset):
    """A dataset that tells labels with the images alone."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path, label = self.paths[index]
        return Image.open(path).convert("RGB"), label


def test_takes_datasets_without_targets(sorted_pictures, model):
    _, found = sorted_pictures
    pairs = [(path, label) for label, name in enumerate(CLASSES) for path in found[name]]
    result = evaluate(model, Pictures(pairs), resources=HERE, compared=0)
    assert (result.tally.images, result.tally.top1) == (20, 1.0)
    with pytest.raises(ValueError, match=r"label 7 is out of range: the network's classes are 0 t"):
        evaluate(model, Pictures([(pairs[0][0], 7)]), resources=HERE)


def test_refuses_classes_that_the_network_lacks(sorted_pictures, model):
    folder, _ = sorted_pictures
    (folder / "ash").rename(folder / "oak")
    answered.picture(0).save(folder / "oak" / "one.png")
    message = "1 of the data's 7 classes are not among the network's 7: 'oak'; the network's are '"
    with pytest.raises(ValueError, match=message):
        evaluate(model, folder, resources=HERE)


def test_numbers_that_are_names(tmp_path):
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate((2, 1, 2)))
    (tmp_path / "a.csv").write_text(f"path,label\n{rows}")
    with pytest.warns(UserWarning, match="no images in class '0'"):
        images = open_images(tmp_path / "a.csv")
    truth = Truth(images, ["1", "2", "3"], 3)
    assert [truth.of(i, label) for i, label in enumerate(images.labels)] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"1\.png: class '1' is not among the network's 3: '0', "):
        Truth(images, ["0", "10", "2"], 3)


def test_refuses_images_without_labels(tmp_path, model):
    answered.picture(0).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="have no labels: evaluation needs a folder per class"):
        evaluate(model, tmp_path, resources=HERE)


def test_refuses_labels_out_of_range(tmp_path, model):
    answered.picture(0).save(tmp_path / "one.png")
    table = tmp_path / "table.csv"
    table.write_text("path,label\none.png,7\n")
    with pytest.raises(ValueError, match="classes '7' are out of range: the network's are 0 to 6"):
        evaluate(model, table, resources=HERE)


def test_agreement_tells_other_answers(sorted_pictures, model, monkeypatch):
    folder, _ = sorted_pictures
    stock = evaluation.inference.stock_of(model)
    stock.classifier[1].bias.data += torch.arange(7.0)
    monkeypatch.setattr(evaluation.inference, "stock_of", lambda _: stock)
    agreement = evaluate(model, folder, resources=HERE, compared=8).agreement
    assert agreement["images"] == 8
    assert agreement["same"] < 1
    assert agreement["largest_difference"] > 0.05


def test_writes_tables_and_a_figure(sorted_pictures, model, tmp_path):
    folder, found = sorted_pictures
    result = evaluate(model, folder, resources=HERE, compared=0)
    paths = evaluation.write_tables(result, tmp_path)
    assert [path.name for path in paths] == ["classes.csv", "calibration.csv", "confusion.csv"]
    with (tmp_path / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == list(CLASSES)
    assert [row[0] for row in rows] == list(CLASSES)
    diagonal = [int(row[i + 1]) for i, row in enumerate(rows)]
    assert diagonal == [len(found[name]) for name in CLASSES]
    evaluation.draw_confusion(result, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 300


def test_backend_reference_evaluates_stock(sorted_pictures, model):
    folder, _ = sorted_pictures
    result = evaluate(model, folder, options=PredictionOptions(backend="reference"), resources=HERE)
    assert (result.tally.top1, result.agreement) == (1.0, None)


@pytest.mark.exhaustive
def test_torchrun_shares_the_images(sorted_pictures, weights, tmp_path):
    """Three processes, of which one has fewer batches than the others."""
    folder, found = sorted_pictures
    source = max(found, key=lambda name: len(found[name]))
    content = Path(found[source][0]).read_bytes()
    target = next(name for name in CLASSES if name != source)
    (folder / target / "moved.png").write_bytes(content)
    (folder / target / "cut.png").write_bytes(content[:100])
    words = ("eval", weights, folder, "--batch", 3, "--workers", 1, "--compare", 12, "--json")
    command = ["-m", "effnet_fast.cli", *map(str, words)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    reports = []
    for launcher in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *launcher, *command], check=True, capture_output=True, text=True
        )
        report = json.loads(done.stdout)  # of the first process alone
        assert report.pop("seconds") > 0
        assert report.pop("images_per_second") > 0
        reports.append(report)
    assert reports[0] == reports[1]
    assert (reports[0]["images"], reports[0]["unreadable"]) == (21, 1)
    assert reports[0]["loss"] > 0
    limited = [sys.executable, *torchrun, *command, "--unreadable-limit", "0"]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.count("1 images cannot be read, and 0 are allowed") == 3
