"""predict: rows equal the network's own answers, whatever interrupts it and whoever computes."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import answered
from answered import CLASSES, rows_of
from effnet_fast.pretrained import images
from effnet_fast.training.answers import inference, prediction
from effnet_fast.training.answers.prediction import PredictionOptions, Resources, predict
from effnet_fast.training.answers.shares import Share
from tolerances import assert_no_worse_than

HERE = Resources(workers=0, batch=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return answered.checkpoint(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven pictures, one of them truncated."""
    folder = tmp_path_factory.mktemp("photos")
    answered.pictures(folder, 11, broken=(4,))
    return folder


@pytest.fixture
def model(weights):
    return answered.network(weights)


def expected(model, paths):
    """Stock's probabilities [N,C] in fp32 and in float64."""
    preset = images.preset(model.variant)
    x = torch.stack([preset(images.load(path)) for path in paths])
    stock = inference.stock_of(model)
    with torch.inference_mode():
        return stock(x).softmax(1), copy.deepcopy(stock).double()(x.double()).softmax(1)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_are_the_networks_answers(tmp_path, model, photos, suffix):
    out = tmp_path / f"out{suffix}"
    options = PredictionOptions(top=len(CLASSES))
    report = predict(model, photos, out, options=options, resources=HERE)
    assert (report["images"], report["unreadable"], report["present"]) == (11, 1, 0)
    rows = rows_of(out)
    assert [row["path"] for row in rows] == sorted(str(path) for path in photos.rglob("*.jpg"))
    (bad,) = [row for row in rows if row["reason"] is not None]
    assert bad["path"].endswith("004.jpg")
    assert "truncated" in bad["reason"]
    good = [row for row in rows if row["reason"] is None]
    stock, exact = expected(model, [row["path"] for row in good])
    actual = torch.empty_like(stock)
    for i, row in enumerate(good):
        classes = [entry[0] for entry in row["top"]]
        assert [entry[1] for entry in row["top"]] == [CLASSES[c] for c in classes]
        actual[i, classes] = torch.tensor([entry[2] for entry in row["top"]])
        assert row["top"] == sorted(row["top"], key=lambda entry: -entry[2])
    assert_no_worse_than(actual, stock, exact)
    assert len({row["top"][0][0] for row in good}) > 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_embeddings_are_pooled_features(tmp_path, model, photos, suffix):
    out = tmp_path / f"out{suffix}"
    predict(model, photos, out, options=PredictionOptions(embeddings=True), resources=HERE)
    rows = [row for row in rows_of(out) if row["reason"] is None]
    encoder = inference.without_classifier(model)
    preset = images.preset(model.variant)
    x = torch.stack([preset(images.load(row["path"])) for row in rows])
    with torch.inference_mode():
        stock = inference.stock_of(encoder)(x)
        exact = copy.deepcopy(inference.stock_of(encoder)).double()(x.double())
    assert stock.shape == (10, model.head_hidden_size)
    actual = torch.tensor(np.array([row["features"] for row in rows], np.float32))
    assert_no_worse_than(actual, stock, exact)
    assert model.num_classes == len(CLASSES)  # the caller's network stays


def test_workers_write_the_same_file(tmp_path, model, photos):
    files = []
    for name, workers in (("a", 0), ("b", 2)):
        out = tmp_path / f"{name}.csv"
        predict(model, photos, out, resources=Resources(batch=2, workers=workers))
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_decoding_ahead_gives_the_same_answers(model, photos):
    """As on a GPU: workers decode, this process computes."""
    network = inference.inference_form(model, None)
    listed = prediction.open_images(photos, labelled=False)
    answering = inference.Answering(network, listed, images.preset(model.variant), top=2)
    batches = list(inference.batched(range(11), 2))
    with inference.Workers(answering.decoding, 2) as decoders:
        found = list(inference.computed(answering, torch.device("cpu"), decoders.map(batches)))
    for batch, answer in zip(batches, found, strict=True):
        alone = answering(batch)
        assert (answer.indices, answer.reasons) == (batch, alone.reasons)
        np.testing.assert_array_equal(answer.values, alone.values)


def test_whatever_a_decoder_raises_is_a_reason(tmp_path, model, photos, monkeypatch):
    crop = inference.EvaluationCrop.__call__

    def stumbling(self, source, *args, **options):
        if source.endswith("002.jpg"):
            raise struct.error("unpack requires 4 bytes")
        warnings.warn("odd EXIF data", stacklevel=1)
        return crop(self, source, *args, **options)

    monkeypatch.setattr(inference.EvaluationCrop, "__call__", stumbling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, photos, tmp_path / "out.csv", resources=HERE)
    reasons = {row["path"][-7:]: row["reason"] for row in rows_of(tmp_path / "out.csv")}
    assert reasons["002.jpg"] == "cannot be decoded: error: unpack requires 4 bytes"
    assert [name for name, reason in reasons.items() if reason] == ["002.jpg", "004.jpg"]


def test_adds_nothing_to_a_finished_file_and_new_images_alone(tmp_path, model):
    folder, out = tmp_path / "photos", tmp_path / "out.csv"
    answered.pictures(folder, 3)
    predict(model, folder, out, resources=HERE)
    before = out.read_bytes()
    report = predict(model, folder, out, resources=HERE)
    assert (report["images"], report["present"], out.read_bytes()) == (0, 3, before)
    answered.pictures(folder, 5)
    assert predict(model, folder, out, resources=HERE)["images"] == 2
    assert out.read_bytes().startswith(before)
    assert len(rows_of(out)) == 5


def test_a_path_that_is_listed_twice_has_one_row(tmp_path, model):
    paths = answered.pictures(tmp_path / "photos", 2)
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join([*paths, paths[0]]))
    out = tmp_path / "out.csv"
    assert predict(model, listing, out, resources=HERE)["images"] == 2
    assert len(rows_of(out)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_name_that_is_the_escape_of_another_has_its_row(tmp_path, model, suffix):
    """Also where the first one was written by an earlier call."""
    folder, out = tmp_path / "photos", tmp_path / f"out{suffix}"
    folder.mkdir()
    answered.picture(0).save(folder / "one.png")
    shutil.copy(folder / "one.png", os.fsencode(folder) + b"/\xff.png")
    assert predict(model, folder, out, resources=HERE)["images"] == 2
    shutil.copy(folder / "one.png", folder / "\\xff.png")
    assert predict(model, folder, out, resources=HERE)["images"] == 1
    assert predict(model, folder, out, resources=HERE)["images"] == 0
    names = [row["path"].rpartition("/")[2] for row in rows_of(out)]
    assert names == ["one.png", "\\xff.png", "\\x5cxff.png"]
    assert [row["reason"] for row in rows_of(out)] == [None] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top": 3}, 'was begun with answer "top 5", and now it is "top 3"'),
        ({"embeddings": True}, 'was begun with answer "top 5", and now it is "embeddings"'),
        ({"draft": True}, "was begun with preparation"),
        ({"dtype": "bfloat16"}, 'was begun with dtype "float32", and now it is "bfloat16"'),
        ({"labels": [str(i) for i in range(7)]}, "was begun with labels"),
    ],
)
def test_refuses_other_options(tmp_path, model, photos, changed, message):
    out = tmp_path / "out.jsonl"
    predict(model, photos, out, resources=HERE)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=message):
        predict(model, photos, out, options=PredictionOptions(**changed), resources=HERE)
    assert out.read_bytes() == before


def test_refuses_another_network_and_other_images(tmp_path, model, photos):
    out = tmp_path / "out.csv"
    predict(model, photos, out, resources=HERE)
    with pytest.raises(ValueError, match="was begun with images"):
        predict(model, photos / "left", out, resources=HERE)
    model.classifier[1].bias.data[0] += 1
    with pytest.raises(ValueError, match="was begun with network"):
        predict(model, photos, out, resources=HERE)


def test_refuses_the_same_name_in_another_folder(tmp_path, model, monkeypatch):
    out = tmp_path / "out.csv"
    for name in ("one", "other"):
        answered.pictures(tmp_path / name / "photos", 2)
    monkeypatch.chdir(tmp_path / "one")
    predict(model, "photos", out, resources=HERE)
    assert predict(model, "photos", out, resources=HERE)["images"] == 0
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ValueError, match="was begun with folder"):
        predict(model, "photos", out, resources=HERE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"labels": ["a"]}, "1 labels for a network of 7 classes"),
        ({"dtype": "bfloat16", "backend": "reference"}, "backend 'reference' computes in"),
    ],
)
def test_refuses_bad_options(tmp_path, model, photos, options, message):
    with pytest.raises(ValueError, match=message):
        predict(model, photos, tmp_path / "out.csv", options=PredictionOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_shares_hold_each_path_once():
    paths = [f"photo {i}.jpg" for i in range(400)]
    shares = [[path for path in paths if Share(rank, 4).has(path)] for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == sorted(paths)
    assert min(map(len, shares)) > 60


def command(*words):
    return [sys.executable, "-m", "effnet_fast.cli", "predict", *map(str, words), "--no-progress"]


def has_grown(path, size):
    return path.exists() and path.stat().st_size > size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "times"),
    [
        (".csv", 1),
        *(pytest.param(s, 3, marks=pytest.mark.exhaustive) for s in (".csv", ".parquet")),
    ],
)
def test_continues_after_kills(tmp_path, weights, suffix, times):
    """SIGKILL as soon as rows are there, and again: each image has one row in the end."""
    folder, out = tmp_path / "photos", tmp_path / f"out{suffix}"
    paths = answered.pictures(folder, 60)
    argv = command(weights, folder, "--out", out, "--workers", 2, "--batch", 1)
    grown = out if suffix == ".csv" else tmp_path / f"{out.name}.predict.json"
    size, kills = 0, 0
    for _ in range(times):
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not has_grown(grown, size + 100):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        size = grown.stat().st_size if suffix == ".csv" else 0
    assert kills
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    assert [row["path"] for row in rows_of(out)] == paths


@pytest.mark.exhaustive
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_torchrun_shares_the_images(tmp_path, weights, photos, suffix):
    out = tmp_path / f"out{suffix}"
    words = (weights, photos, "--out", out, "--workers", 1, "--batch", 2, "--json")
    argv = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "effnet_fast.cli"]
    argv = [sys.executable, *argv, "predict", *map(str, words)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=environment)
    assert '"images": 11' in done.stdout
    assert done.stdout.count('"images"') == 1  # the first process alone reports
    rows = rows_of(out)
    assert sorted(row["path"] for row in rows) == sorted(map(str, photos.rglob("*.jpg")))
    again = subprocess.run(argv, check=True, capture_output=True, text=True, env=environment)
    assert '"images": 0' in again.stdout
    assert rows_of(out) == rows


@pytest.mark.exhaustive
@pytest.mark.parametrize("embeddings", [False, True])
def test_ray_gives_the_same_rows(tmp_path, model, photos, embeddings):
    options = PredictionOptions(top=2, embeddings=embeddings)
    files = []
    for name, ray in (("here", None), ("cluster", "local")):
        out = tmp_path / f"{name}.csv"
        resources = Resources(batch=2, workers=2, ray=ray)
        assert predict(model, photos, out, options=options, resources=resources)["images"] == 11
        files.append(out.read_bytes())
    assert files[0] == files[1]
