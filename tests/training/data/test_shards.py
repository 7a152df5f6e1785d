"""Shards: every sample found and read where it lies, and what is no shard refused."""

import json
import os

import pytest
import torch

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.training.data import shards
from effnet_fast.training.data.decoding import EvaluationCrop, TrainingCrop
from effnet_fast.training.data.loading import batches
from effnet_fast.training.data.sampling import EpochSampler
from effnet_fast.training.data.sources import open_images
from host import Answer, serve
from image_folders import encoded, photo, shard

CROP = EvaluationCrop(ImageClassification(crop_size=16, resize_size=16))


def sample(number, label=None):
    content = {".jpg": encoded(photo(24, 20, number))}
    return content if label is None else {**content, ".cls": str(label).encode()}


@pytest.fixture
def pattern(tmp_path):
    """Three shards of 4, 4 and 2 samples."""
    for number, count in enumerate((4, 4, 2)):
        first = 4 * number
        samples = [sample(n, n % 3) for n in range(first, first + count)]
        shard(tmp_path / f"x-{number:03d}.tar", samples, first)
    return str(tmp_path / "x-{000..002}.tar")


def test_samples_labels_and_pixels(pattern):
    images = open_images(pattern)
    assert len(images) == 10
    assert images.sizes == (4, 4, 2)
    assert images.labels == [n % 3 for n in range(10)]
    assert images.classes == ("0", "1", "2")
    assert images.paths[5].endswith("x-001.tar/000005.jpg")
    for workers in (0, 2):
        found = list(batches(images, None, CROP, batch=4, workers=workers))
        pixels = torch.cat([b.images for b in found])
        for number in range(10):
            assert torch.equal(pixels[number], CROP(encoded(photo(24, 20, number))))


def test_every_sample_once_per_epoch(pattern):
    images = open_images(pattern)
    for epoch in range(2):
        seen = []
        for rank in range(3):
            sampler = EpochSampler(10, batch=2, rank=rank, world=3, blocks=images.sizes)
            sampler.set_epoch(epoch)
            for batch in batches(images, sampler, TrainingCrop(8), workers=0):
                seen += batch.indices.tolist()
        assert sorted(seen) == list(range(10))


def test_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(3):
            writer.write(
                {"__key__": f"deep/{number}",
                 "jpg": encoded(photo(20, 20, number)), "cls": number, "json": {"label": 7}}
            )  # fmt: skip
    images = open_images(tmp_path / "w.tar")
    assert images.labels == [0, 1, 2]
    assert images.paths[2].endswith("w.tar/deep/2.jpg")
    (batch,) = batches(images, None, CROP)
    assert batch.problems == ()


def test_labels_by_name_from_json_and_class_file(tmp_path):
    names = ("dog", "cat", "dog")
    labels = [json.dumps({"label": name}).encode() for name in names]
    samples = [{**sample(n), ".json": label} for n, label in enumerate(labels)]
    shard(tmp_path / "x.tar", samples)
    assert open_images(tmp_path / "x.tar").classes == ("cat", "dog")
    assert open_images(tmp_path / "x.tar").labels == [1, 0, 1]
    (tmp_path / "classes.txt").write_text("dog\ncow\ncat\n")
    with pytest.warns(UserWarning, match="no images in class 'cow'"):
        assert open_images(tmp_path / "x.tar").labels == [0, 2, 0]
    assert open_images(tmp_path / "x.tar", classes=("cat", "dog")).labels == [1, 0, 1]
    with pytest.raises(ValueError, match=r"000001\.jpg has label 'cat'; allowed are 0 to 0"):
        open_images(tmp_path / "x.tar", classes=("dog",))


def test_without_labels(tmp_path):
    shard(tmp_path / "x.tar", [sample(0), {".txt": b"no image"}, sample(1)])
    images = open_images(tmp_path / "x.tar")
    assert (images.labels, images.classes, len(images)) == (None, None, 2)
    shard(tmp_path / "y.tar", [sample(0, 1), sample(1)])
    assert open_images(tmp_path / "y.tar", labelled=False).labels is None
    with pytest.raises(ValueError, match=r"1 images have no label: '.*000001\.jpg'"):
        open_images(tmp_path / "y.tar")


def test_http_shards_are_copied_once(tmp_path, pattern):
    content = (tmp_path / "x-000.tar").read_bytes()
    cache = tmp_path / "cache"
    with serve(content) as host:
        url = f"{host.address}/data/x-{{000..001}}.tar"
        images = open_images(url, cache=cache)
        assert len(host.asked) == 2
        assert len(open_images(url, cache=cache)) == 8
        assert len(host.asked) == 2
    assert len(images) == 8
    (batch,) = batches(images, None, CROP)
    assert torch.equal(batch.images[6], CROP(encoded(photo(24, 20, 2))))
    assert sorted(name.split("-", 1)[1] for name in os.listdir(cache)) == ["x-000.tar", "x-001.tar"]


def test_an_absent_http_shard(tmp_path):
    with (
        serve(b"", answers=[Answer(status=404)]) as host,
        pytest.raises(ConnectionError, match="404"),
    ):
        open_images(f"{host.address}/x.tar", cache=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("https://h/a?b={0..1}.tar", ["https://h/a?b=0.tar", "https://h/a?b=1.tar"]),
    ],
)
def test_patterns(pattern, names):
    assert shards.expand(pattern) == names


def test_globs(tmp_path, pattern):
    assert len(open_images(tmp_path / "x-*.tar")) == 10
    with pytest.raises(FileNotFoundError, match="no shards fit"):
        open_images(tmp_path / "y-*.tar")
    with pytest.raises(ValueError, match="runs backwards"):
        open_images(tmp_path / "x-{2..1}.tar")


@pytest.mark.parametrize("cut", [300, 700, 1024, 1500])
def test_a_truncated_shard_is_refused(tmp_path, cut):
    path = shard(tmp_path / "x.tar", [sample(0, 1), sample(1, 1)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 10240 + cut] if cut > 1024 else content[:cut])
    with pytest.raises(ValueError, match=r"x\.tar: "):
        open_images(path)


def test_what_is_no_shard(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"text" * 1000)
    with pytest.raises(ValueError, match=r"x\.tar: no tar file"):
        open_images(tmp_path / "x.tar")
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "gone.tar")
    shard(tmp_path / "y.tar", [{".txt": b""}])
    with pytest.raises(ValueError, match="no images"):
        open_images(tmp_path / "y.tar")
    shard(tmp_path / "z.tar", [{**sample(0), ".png": b""}])
    with pytest.raises(ValueError, match=r"sample '000000' has 2 members, one image is allowed"):
        open_images(tmp_path / "z.tar")
    shard(tmp_path / "j.tar", [{**sample(0), ".json": b"{"}])
    with pytest.raises(ValueError, match=r"000000\.json"):
        open_images(tmp_path / "j.tar")


def test_a_shard_that_shrinks_is_unreadable(tmp_path):
    path = shard(tmp_path / "x.tar", [sample(0), sample(1)])
    images = open_images(path)
    os.truncate(path, images.members[1].offset + 5)
    (batch,) = batches(images, None, CROP)
    assert batch.indices.tolist() == [0]
    assert batch.problems[0].reason == "the shard is truncated"
