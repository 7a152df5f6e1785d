"""Which class of a network a folder means."""

from __future__ import annotations

import importlib.util

import pytest

from effnet_fast.pretrained.weights import CATEGORIES
from effnet_fast.training.answers import class_names
from effnet_fast.training.answers.class_names import NONE, matched

NAMES = ["tabby cat", "dog", "7", "Red fox"]
SYNSETS = {"n01440764": 0, "n01443537": 1, "n15075141": 999}


@pytest.mark.parametrize(
    ("found", "names", "count", "expected"),
    [
        (["dog", "tabby cat"], NAMES, 4, [1, 0]),
        (["7", "dog"], NAMES, 4, [2, 1]),  # a name that is a number stays a name
        (["0", "3"], NAMES, 4, [0, 3]),
        (["0000", "0012"], None, 20, [0, 12]),
        (["red_fox", "Tabby-Cat"], NAMES, 4, [3, 0]),
        (["a", "b", "c"], None, 3, [0, 1, 2]),
        (["1", "2"], ["1", "2", "3"], 3, [0, 1]),  # names, where all of them are numbers
        (["0", "1", "02"], ["1", "2", "3"], 3, [NONE, 0, 1]),
        (["0", "2", "10"], ["0", "10", "2"], 3, [0, 2, 1]),
        (["golden_retriever", "tench"], CATEGORIES, 1000, [207, 0]),
        (["Cardigan", "cardigan", "red_fox"], CATEGORIES, 1000, [264, 474, 277]),
    ],
)
def test_finds_classes(found, names, count, expected):
    assert matched(found, names, count) == expected


@pytest.mark.parametrize(
    ("found", "names", "count", "message"),
    [
        (["dog", "horse"], NAMES, 4, "1 of the data's 2 classes are not among the network's 4: 'h"),
        (["0", "4"], NAMES, 4, "classes '4' are out of range: the network's are 0 to 3"),
        (["1", "01"], NAMES, 4, "two folders stand for the same number"),
        (["02"], ["1", "3", "002", "2"], 4, "several classes .* the number '02'"),
        (["a", "b"], None, 3, "the data has 2 classes .*: give them by --labels"),
        (["a", "b"], ["a", "b", "a"], 3, "several classes of the network have the name 'a'"),
        (["n01440764"], ["n1", "n2"], 2, "not among the network's 2"),
    ],
)
def test_refuses_others(found, names, count, message):
    with pytest.raises(ValueError, match=message):
        matched(found, names, count)


def test_all_wordnet_ids_need_no_table(monkeypatch):
    monkeypatch.setattr(class_names, "_table_of_timm", lambda: None)
    ids = [f"n{i:08d}" for i in range(1000)]
    assert matched(ids[::-1], CATEGORIES, 1000) == list(range(1000))[::-1]
    assert matched(ids, None, 1000) == list(range(1000))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm's table")
def test_some_wordnet_ids_by_the_table_of_timm():
    assert matched(list(SYNSETS), CATEGORIES, 1000) == list(SYNSETS.values())
    with pytest.raises(ValueError, match="'n00000000' are no WordNet ids of ImageNet's"):
        matched(["n00000000"], CATEGORIES, 1000)


def test_some_wordnet_ids_without_table(monkeypatch):
    monkeypatch.setattr(class_names, "_table_of_timm", lambda: None)
    with pytest.raises(ValueError, match=r"2 WordNet ids .*or with timm installed"):
        matched(list(SYNSETS)[:2], CATEGORIES, 1000)
