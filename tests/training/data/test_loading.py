"""Worker processes: the same batches however many they are, and errors that name the file."""

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.training.data import groups, loading
from effnet_fast.training.data.decoding import Draw, EvaluationCrop, TrainingCrop
from effnet_fast.training.data.loading import Loader, UnreadableLimitError, batches
from effnet_fast.training.data.sampling import EpochSampler
from effnet_fast.training.data.sources import ImageList, open_images
from effnet_fast.training.data.workers import WorkerError
from image_folders import class_folders, photo

COUNT = 30


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_images(class_folders(tmp_path_factory.mktemp("images"), {"a": 14, "b": 16}))


@pytest.fixture(scope="module")
def loader(images):
    """Two workers for all tests of a kind: starting them takes longest."""
    with Loader(images, workers=2, seed=3) as loader:
        yield loader


@pytest.fixture
def small_groups(monkeypatch):
    """Several groups of several batches in an epoch of few images."""
    monkeypatch.setattr(loading, "GROUP_BYTES", 0)
    monkeypatch.setattr(loading, "LEAST_PER_WORKER", 5)


class Numbers:
    """A dataset whose items draw, and whose item 5 fails in a way of choice."""

    def __init__(self, failure=None):
        self.failure = failure

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5 and self.failure == "raise":
            raise KeyError("lost")
        if index == 5 and self.failure == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        noise = np.random.randint(0, 255, (6, 6, 3), np.uint8)
        return Image.fromarray(noise), index % 2


class Unloadable(Numbers):
    def __setstate__(self, state):
        raise RuntimeError("made here alone")


def read(loader, crop, **options):
    sampler = EpochSampler(len(loader.images), batch=4, seed=1)
    sampler.set_epoch(options.get("epoch", 0))
    return list(loader.batches(sampler, crop))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and a[3:] == b[3:]
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("in_turn", [True, False], ids=["in_turn", "ahead"])
def test_workers_read_what_this_process_reads(images, loader, small_groups, monkeypatch, in_turn):
    monkeypatch.setattr(loader, "in_turn", in_turn)
    with Loader(images, workers=0, seed=3) as alone:
        for epoch, crop in enumerate([TrainingCrop(16), TrainingCrop(16), TrainingCrop(24)]):
            found = read(loader, crop, epoch=epoch)
            assert same(found, read(alone, crop, epoch=epoch))
            assert len(found) == 8
    assert found[0].images.is_contiguous(memory_format=torch.channels_last)
    assert found[0].images.dtype == torch.uint8


def test_batches_hold_what_they_say(images, loader):
    crop = EvaluationCrop(ImageClassification(crop_size=16, resize_size=16))
    seen = []
    for batch in read(loader, crop):
        assert batch.total == len(batch.indices)
        for x, label, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True):
            assert torch.equal(x, crop(images.paths[index]))
            assert label == images.labels[index]
            seen.append(index)
    assert sorted(seen) == list(range(COUNT))


def test_batches_stay_when_the_memory_is_used_again(images, loader, small_groups):
    crop = TrainingCrop(16)
    sampler = EpochSampler(COUNT, batch=4)
    kept = [(b.images, b.images.clone()) for b in loader.batches(sampler, crop)]
    assert all(torch.equal(x, y) for x, y in kept)


@pytest.mark.parametrize("workers_", [0, 2])
def test_the_position_counts_what_was_handed_out(images, loader, workers_):
    with Loader(images, workers=0, seed=3) as alone:
        source = loader if workers_ else alone
        crop, sampler = TrainingCrop(16), EpochSampler(COUNT, batch=4, seed=1)
        whole = list(source.batches(sampler, crop))
        assert sampler.position == len(sampler) == 8
        sampler = EpochSampler(COUNT, batch=4, seed=1)
        for _ in source.batches(sampler, crop):
            if sampler.position == 3:
                break
        other = EpochSampler(COUNT, batch=4, seed=1)
        other.load_state_dict(sampler.state_dict())
        assert same(list(source.batches(other, crop)), whole[3:])


def test_an_iteration_that_was_left_early_disturbs_no_other(loader, small_groups):
    whole = read(loader, TrainingCrop(16))
    for _ in range(3):
        for _ in loader.batches(EpochSampler(COUNT, batch=4), TrainingCrop(20)):
            break
    assert same(read(loader, TrainingCrop(16)), whole)


@pytest.mark.parametrize("in_turn", [True, False], ids=["in_turn", "ahead"])
def test_workers_rest_while_the_caller_computes(loader, small_groups, monkeypatch, in_turn):
    monkeypatch.setattr(loader, "in_turn", in_turn)
    order = EpochSampler(COUNT, batch=4)
    flying = [len(loader._pool.flying) for _ in loader.batches(order, TrainingCrop(16))]
    assert flying == ([0] * 8 if in_turn else [1] * 6 + [0] * 2)


def test_workers_know_the_limit_of_pixels(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with Loader(images, workers=1) as loader:
        (batch,) = loader.batches([[0]], TrainingCrop(8))
    assert batch.problems[0].reason.startswith("refused as a decompression bomb")


def test_one_iteration_at_a_time(loader):
    first = loader.batches([[0]], TrainingCrop(8))
    next(first)
    with pytest.raises(RuntimeError, match="one epoch at a time"):
        next(loader.batches([[0]], TrainingCrop(8)))
    first.close()
    assert len(list(loader.batches([[0]], TrainingCrop(8)))) == 1


def test_any_order_of_indices_is_taken(images):
    order = [torch.tensor([3, 1]), range(2), [], (29,)]
    found = list(batches(images, order, TrainingCrop(8), workers=0))
    assert [b.indices.tolist() for b in found] == [[3, 1], [0, 1], [], [29]]
    assert [len(b.images) for b in batches(images, None, TrainingCrop(8), batch=16)] == [16, 14]


@pytest.fixture
def damaged(tmp_path):
    paths = []
    for number in range(12):
        paths.append(str(tmp_path / f"{number}.png"))
        if number in (2, 3, 7):
            (tmp_path / f"{number}.png").write_text("no image")
        else:
            photo(9, 9, number).save(paths[-1])
    return ImageList(paths, list(range(12)))


@pytest.mark.parametrize("count", [0, 2])
def test_unreadable_images_are_left_out_and_listed(damaged, count):
    crop = EvaluationCrop(ImageClassification(crop_size=8, resize_size=8))
    with Loader(damaged, workers=count) as loader:
        for _ in range(2):
            found = list(loader.batches([[0, 1], [2, 3], [4, 7, 8]], crop))
            for batch in found:
                for x, index in zip(batch.images, batch.indices.tolist(), strict=True):
                    assert torch.equal(x, crop(damaged.paths[index]))
            assert [b.labels.tolist() for b in found] == [[0, 1], [], [4, 8]]
            assert [b.images.shape for b in found] == [(2, 3, 8, 8), (0, 3, 8, 8), (2, 3, 8, 8)]
            assert [[p.index for p in b.problems] for b in found] == [[], [2, 3], [7]]
            assert [b.total for b in found] == [2, 2, 3]
    problem = found[2].problems[0]
    assert problem.path == damaged.paths[7]
    assert problem.reason == "not an image of type JPEG, PNG, WEBP"
    # Each image counts once, however often it is met.
    assert sorted(loader.unreadable) == [2, 3, 7]


@pytest.mark.parametrize("count", [0, 2])
def test_empty_batches_are_batches(images, count):
    crop = EvaluationCrop(ImageClassification(crop_size=8, resize_size=8))
    for order in ([[], [3]], [[4], [], [5]], [[]]):
        found = list(batches(images, order, crop, workers=count))
        assert [batch.indices.tolist() for batch in found] == order
        assert [batch.images.shape for batch in found] == [(len(b), 3, 8, 8) for b in order]


def test_the_limit_of_unreadable_images(damaged):
    for _ in batches(damaged, None, TrainingCrop(8), unreadable_limit=3):
        pass
    with pytest.raises(
        UnreadableLimitError, match=r"3 images .* 2 are allowed: .*2\.png: not an im"
    ):
        for _ in batches(damaged, None, TrainingCrop(8), unreadable_limit=2):
            pass


@pytest.mark.parametrize("count", [0, 2])
def test_an_exception_names_the_image(count):
    images = open_images(Numbers("raise"))
    with (
        Loader(images, workers=count) as loader,
        pytest.raises(WorkerError, match=r"^Numbers\[5\]: KeyError: 'lost'$") as caught,
    ):
        list(loader.batches([range(8)], TrainingCrop(8)))
    if count:
        assert "in __getitem__" in str(caught.value.__cause__)


def test_a_killed_worker_is_noticed_and_replaced():
    with Loader(open_images(Numbers("die")), workers=2) as loader:
        with pytest.raises(WorkerError, match=r"was ended by SIGKILL \(is the memory full\?\)"):
            list(loader.batches([range(8)], TrainingCrop(8)))
        assert len(list(loader.batches([range(5)], TrainingCrop(8)))) == 1


def test_datasets_that_workers_cannot_have():
    with (
        Loader(open_images(Unloadable()), workers=1) as loader,
        pytest.raises(WorkerError) as caught,
    ):
        list(loader.batches([range(2)], TrainingCrop(8)))
    assert "cannot be made anew in a worker: RuntimeError('made here alone')" in str(caught.value)
    local = Numbers(failure=lambda: None)
    with (
        Loader(open_images(local), workers=1) as loader,
        pytest.raises(TypeError, match=r"cannot be sent to worker processes .*workers=0"),
    ):
        list(loader.batches([range(2)], TrainingCrop(8)))


def test_a_datasets_own_random_numbers_depend_on_the_draw():
    images = open_images(Numbers())
    crop = EvaluationCrop(ImageClassification(crop_size=6, resize_size=6))
    found = []
    for count in (0, 2):
        np.random.seed(count)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state()
        found.append(list(batches(images, None, crop, batch=3, workers=count, seed=2, epoch=1)))
        assert np.random.get_state()[1].tolist() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert same(*found)
    assert not torch.equal(found[0][0].images[0], found[0][0].images[1])


def test_as_a_torch_dataset(images):
    data = images.with_crop(TrainingCrop(16), seed=3, epoch=2)
    (batch,) = batches(images, [[4]], TrainingCrop(16), workers=0, seed=3, epoch=2)
    assert torch.equal(data[4].image, batch.images[0])
    assert (data[4].index, data[4].label, data[4].reason) == (4, 0, None)
    assert torch.equal(pickle.loads(pickle.dumps(data))[4].image, data[4].image)
    assert data[-1].index == COUNT - 1
    with pytest.raises(IndexError):
        data[COUNT]
    with pytest.raises(TypeError, match="with_crop"):
        images[0]


def test_refuses_numbers_below_zero(images):
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        Loader(images, workers=-1)
    with pytest.raises(ValueError, match="unreadable_limit must be at least 0"):
        Loader(images, unreadable_limit=-1)


def test_local_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert loading.default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading.default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert loading.default_workers() == 1


def test_few_images_start_no_workers(images):
    assert Loader(images).workers == 0
    assert Loader(ImageList(["a.jpg"] * 200)).workers == loading.default_workers()


def test_memory_without_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    group = groups.Group(2, 4)
    group.pixels[:] = 7
    other = groups.Group(2, 4, os.dup(group.descriptor))
    assert (other.pixels == 7).all()
    assert other.labels.shape == other.states.shape == (2,)
    group.close()
    other.close()


def test_draws_name_the_image(images):
    reader = images.reader()
    item = groups.Item(4, images.paths[4], 0, "x")
    crop = TrainingCrop(16)
    assert torch.equal(
        groups.read(reader, item, crop, Draw(3, 2))[0], crop(images.paths[4], Draw(3, 2, 4))
    )
