"""Counts of predictions: against scikit-learn, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as peer

from effnet_fast.training.answers.metrics import BINS, MATRIX_LIMIT, Tally

CLASSES = 6


@pytest.fixture
def drawn():
    """Labels, the five likeliest classes and confidences of 300 images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES - 1, 300)  # the last class has no images
    top = np.stack([rng.permutation(CLASSES)[:5] for _ in labels])
    top[::2, 0] = labels[::2]
    return labels, top, rng.random(300)


def counted(labels, top, confidences, size=7):
    tally = Tally(CLASSES)
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        tally.add(labels[part], top[part], confidences[part])
    return tally


def test_agrees_with_scikit_learn(drawn):
    labels, top, confidences = drawn
    tally = counted(*drawn)
    best = top[:, 0]
    assert tally.images == 300
    assert tally.top1 == pytest.approx(peer.accuracy_score(labels, best))
    assert tally.top5 == pytest.approx(np.mean([y in t for y, t in zip(labels, top, strict=True)]))
    expected = peer.confusion_matrix(labels, best, labels=range(CLASSES))
    np.testing.assert_array_equal(tally.confusion, expected)
    precision, recall, f1, images = peer.precision_recall_fscore_support(
        labels, best, labels=range(CLASSES), zero_division=np.nan
    )
    for i, row in enumerate(tally.per_class(list("abcdef"))):
        assert (row.name, row.images) == ("abcdef"[i], images[i])
        for value, wanted in ((row.precision, precision), (row.recall, recall), (row.f1, f1)):
            if row.images:
                assert value == pytest.approx(wanted[i])
    assert tally.per_class()[-1].recall is None
    assert tally.balanced() == pytest.approx(np.mean(recall[:-1]))


def test_batches_do_not_matter(drawn):
    one, other = counted(*drawn, size=300), counted(*drawn, size=1)
    np.testing.assert_array_equal(one.confusion, other.confusion)
    assert one.ece == pytest.approx(other.ece)


def test_calibration_by_hand():
    tally = Tally(2)
    # Two images at 0.9, one right; one at 0.6, right: |1 - 1.8| and |1 - 0.6|, over three.
    tally.add([0, 0, 1], [[0, 1], [1, 0], [1, 0]], [0.9, 0.9, 0.6])
    assert tally.ece == pytest.approx((0.8 + 0.4) / 3)
    rows = [row for row in tally.calibration() if row["images"]]
    assert [row["accuracy"] for row in rows] == [1.0, 0.5]
    assert [row["confidence"] for row in rows] == pytest.approx([0.6, 0.9])


def test_bins_hold_their_upper_bound():
    tally = Tally(1)
    tally.add([0] * 3, [[0]] * 3, [0.0, 1 / BINS, 1.0])
    counts = [row["images"] for row in tally.calibration()]
    assert (counts[0], counts[-1], sum(counts)) == (2, 1, 3)


def test_nothing_counted():
    tally = Tally(3)
    tally.add([], np.empty((0, 3)), [])
    assert (tally.images, tally.top1, tally.top5, tally.ece, tally.balanced()) == (0, *[None] * 4)


@pytest.mark.parametrize("label", [-1, 3])
def test_refuses_labels_out_of_range(label):
    with pytest.raises(ValueError, match="labels must lie in 0 to 2"):
        Tally(3).add([label], [[0]], [0.5])


def test_no_matrix_of_very_many_classes():
    tally = Tally(MATRIX_LIMIT + 1)
    tally.add([MATRIX_LIMIT], [[MATRIX_LIMIT]], [0.5])
    assert tally.confusion is None
    assert tally.per_class()[-1].correct == 1


def test_shares_in_any_order_give_the_same_numbers():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    top = np.argsort(generator.random((300, 4)), axis=1)
    confidences = generator.random(300).astype(np.float32)
    losses = generator.gamma(1.0, 2.0, 300).astype(np.float32)
    order = generator.permutation(300)
    one, *parts = (Tally(4) for _ in range(4))
    one.add(labels, top, confidences, losses)
    for rank, part in enumerate(parts):
        for places in np.array_split(order[rank::3], 7):
            part.add(labels[places], top[places], confidences[places], losses[places])
    arrays = []
    for part in parts[1:]:  # what an all-reduce does, one process after the other
        part.share(lambda array: arrays.append(array.copy()) or array)
    count = len(arrays) // 2
    rest = iter(a + b for a, b in zip(arrays[:count], arrays[count:], strict=True))
    parts[0].share(lambda array: array + next(rest))
    assert parts[0].images == 300
    assert (parts[0].ece, parts[0].loss, parts[0].top1) == (one.ece, one.loss, one.top1)
    assert parts[0].calibration() == one.calibration()
    np.testing.assert_array_equal(parts[0].confusion, one.confusion)
    assert one.loss == pytest.approx(losses.mean(dtype=np.float64), abs=1e-9)


@pytest.mark.parametrize("large", [5e3, np.inf, np.nan])
def test_losses_that_no_integer_holds(large):
    tally = Tally(2, matrix=False)
    tally.add([0, 1], [[0], [1]], [0.5, 0.5], [0.25, large])
    np.testing.assert_equal(tally.loss, (0.25 + large) / 2)
    assert tally.confusion is None
