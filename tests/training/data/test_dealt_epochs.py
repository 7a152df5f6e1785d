"""Four processes share an epoch: counts add up, and gradients are those of the joined batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from image_folders import class_folders, encoded, photo, shard

WORLD, COUNT = 4, 39  # two steps of 16 images, and 7 that are too few for a third
PROGRAM = Path(__file__).parents[2] / "support" / "dealt_epochs.py"


def folder(root):
    return str(class_folders(root / "images", {"a": 12, "b": 13, "c": 14}, (12, 10)))


def shards(root):
    samples = [{".jpg": encoded(photo(12, 10, n)), ".cls": b"%d" % (n % 3)} for n in range(COUNT)]
    for number in range(5):
        shard(root / f"x-{number}.tar", samples[8 * number : 8 * number + 8], 8 * number)
    return str(root / "x-{0..4}.tar")


# test_sampling shows without processes how an epoch is dealt.
@pytest.mark.exhaustive
@pytest.mark.parametrize("data", [folder, shards])
def test_every_image_once_and_gradients_of_the_joined_batch(tmp_path, data):
    where, meeting = data(tmp_path), str(tmp_path / "meeting")
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, where, meeting, str(rank), str(WORLD)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD
    found = json.loads(outputs[0])
    steps = len(found["read"]) // 2
    for epoch in (found["read"][:steps], found["read"][steps:]):
        read = [i for step in epoch for own in step for i in own]
        assert sorted(read) == list(range(COUNT))
        assert [sum(map(len, step)) for step in epoch] == [16, 23]
    assert found["read"][:steps] != found["read"][steps:]
    assert found["worst"] < 1e-5
