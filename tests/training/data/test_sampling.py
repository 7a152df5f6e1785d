"""Every image exactly once per epoch, whoever reads it, and the same order again."""

import itertools

import pytest

from effnet_fast.training.data.sampling import EpochSampler, dealt

# length, batch, world: whole steps; a rest for all; a rest that joins; fewer than a step; one each
CASES = [
    (64, 4, 4),
    (75, 4, 4),
    (67, 4, 4),
    (70, 4, 4),
    (5, 8, 4),
    (4, 2, 4),
    (10, 3, 1),
    (1, 8, 1),
]
BLOCKS = {
    64: [64],
    75: [10, 5, 60],
    67: [7] * 9 + [4],
    70: [35, 35],
    5: [2, 0, 3],
    4: [1, 3],
    10: [4, 6],
    1: [1],
}


def epoch(length, batch, world, number=0, **options):
    """Batches of all processes, step by step."""
    samplers = [
        EpochSampler(length, batch=batch, rank=rank, world=world, **options)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(number)
    return list(zip(*samplers, strict=True)), samplers[0]


@pytest.mark.parametrize("blocks", [False, True], ids=["images", "shards"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["dealt", "shuffled"])
@pytest.mark.parametrize(("length", "batch", "world"), CASES)
def test_every_image_once_and_even_batches(length, batch, world, shuffle, blocks):
    options = {"shuffle": shuffle, "blocks": BLOCKS[length] if blocks else None}
    for number in range(3):
        steps, sampler = epoch(length, batch, world, number, **options)
        images = [i for step in steps for own in step for i in own]
        assert sorted(images) == list(range(length))
        assert len(steps) == len(sampler)
        for position, step in enumerate(steps):
            sizes = [len(own) for own in step]
            assert sampler.total(position) == sum(sizes)
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= min(2, batch, length // world)
            assert max(sizes) <= batch + 2


@pytest.mark.parametrize("blocks", [None, [20, 10, 3, 37]])
def test_order_depends_on_seed_and_epoch_alone(blocks):
    first, _ = epoch(70, 4, 2, 3, seed=5, blocks=blocks)
    assert epoch(70, 4, 2, 3, seed=5, blocks=blocks)[0] == first
    assert epoch(70, 4, 2, 4, seed=5, blocks=blocks)[0] != first
    assert epoch(70, 4, 2, 3, seed=6, blocks=blocks)[0] != first
    assert [i for step in first for own in step for i in own] != list(range(70))


def test_a_steps_images_do_not_depend_on_the_processes():
    alone = [sorted(own) for (own,) in epoch(50, 8, 1)[0]]
    shared = [sorted(itertools.chain(*step)) for step in epoch(50, 2, 4)[0]]
    assert shared[:-1] == alone[: len(shared) - 1]
    assert sorted(itertools.chain(*shared[-1:])) == sorted(
        itertools.chain(*alone[len(shared) - 1 :])
    )


def test_shards_stay_with_a_process():
    sizes = [10] * 40
    steps, _ = epoch(400, 5, 4, blocks=sizes)
    shards = [{i // 10 for step in steps for i in step[rank]} for rank in range(4)]
    assert all(len(own) == 10 for own in shards)
    assert all(not a & b for a, b in itertools.combinations(shards, 2))
    # Neighbouring images are of different shards: they are mixed.
    order = [i // 10 for step in steps for i in step[0]]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 60


def test_resumes_after_what_was_handed_out():
    sampler = EpochSampler(40, batch=4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.position = 3
    other = EpochSampler(40, batch=4, seed=1)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == whole[3:]
    other.set_epoch(2)
    assert other.position == 3
    other.set_epoch(3)
    assert other.position == 0


@pytest.mark.parametrize("change", [{"batch": 5}, {"seed": 2}, {"shuffle": False}, {"world": 2}])
def test_refuses_to_resume_another_run(change):
    state = EpochSampler(40, batch=4, seed=1).state_dict()
    with pytest.raises(ValueError, match=f"begun with {next(iter(change))}"):
        EpochSampler(**{"length": 40, "batch": 4, "seed": 1, **change}).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 3, "batch": 1, "world": 4}, "3 images for 4 processes"),
        ({"length": 3, "batch": 0}, "batch must be at least 1"),
        ({"length": 3, "batch": 1, "rank": 2, "world": 2}, "rank must be in 0 to 1"),
        ({"length": 3, "batch": 1, "blocks": [1, 1]}, "blocks hold 2 images, but there are 3"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**arguments)


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 4), (3, 4), (12, 2), (0, 2)])
def test_dealt_batches_are_those_of_one_process(length, world):
    found = [list(dealt(length, 3, rank=rank, world=world)) for rank in range(world)]
    assert len(set(map(len, found))) == 1  # as many in each, so that none waits
    rounds = [list(part) for step in zip(*found, strict=True) for part in step]
    alone = [list(part) for part in dealt(length, 3)]
    assert [part for part in rounds if part] == alone
    assert [i for part in alone for i in part] == list(range(length))
