"""Which class of a network a folder means: by name, WordNet id or number."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from effnet_fast.pretrained.weights import CATEGORIES

SYNSET = re.compile(r"n\d{8}")  # a WordNet id, as ImageNet's folders have them
SHOWN = 5  # names in an error
NONE = -1  # the place of a number that names no class


def matched(found: Sequence[str], names: Sequence[str] | None, count: int) -> list[int]:
    """The network's class of each class of a data set.

    Args:
        found: the names of the data set's classes.
        names: those of the network, in the order of the logits; None where they are not known.
        count: number of the network's classes.

    Returns:
        per entry of `found` its place in the logits. Tried are, in this order: the same names;
        WordNet ids of ImageNet's 1000 classes; numbers from 0; the same names but for case, spaces
        and underscores. Where the network has no names and as many classes, the sorted order.
        Where all its names are numbers, "7" means the class of that name, and never the eighth:
        NONE stands for numbers without one, which a table's classes may have and no image.

    Raises:
        ValueError: nothing of this fits; the message names the first classes that do not.
    """
    if names is not None and set(found) <= set(names):
        return _placed(found, list(names))
    if all(SYNSET.fullmatch(name) for name in found) and _is_imagenet(names, count):
        return _synsets(found)
    if all(name.isdecimal() for name in found):
        if names is not None and all(name.isdecimal() for name in names):
            return _named_by_number(found, names)
        return _numbers(found, count)
    if names is None:
        if len(found) == count:
            return list(range(count))
        raise ValueError(
            f"the data has {len(found)} classes ({_listed(found)}), the network {count} without "
            "names: give them by --labels"
        )
    plain = [_plain(name) for name in names]
    unknown = [name for name in found if _plain(name) not in plain]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the data's {len(found)} classes are not among the network's "
            f"{count}: {_listed(unknown)}; the network's are {_listed(names)}"
        )
    others = [_plain(name) for name in found if name not in names]  # "Cardigan" and "cardigan" are
    places = dict(zip(others, _placed(others, plain), strict=True))  # two classes of ImageNet
    return [names.index(name) if name in names else places[_plain(name)] for name in found]


def _is_imagenet(names: Sequence[str] | None, count: int) -> bool:
    return count == len(CATEGORIES) and (names is None or list(names) == CATEGORIES)


def _placed(found: Sequence[str], names: list[str]) -> list[int]:
    """The places of names, each of which must be there once."""
    often = Counter(names)
    twice = [name for name in found if often[name] > 1]
    if twice:
        raise ValueError(
            f"several classes of the network have the name {_listed(twice)}: name the folders by "
            "number, from 0"
        )
    places = {name: place for place, name in enumerate(names)}
    return [places[name] for name in found]


def _numbers(found: Sequence[str], count: int) -> list[int]:
    numbers = [int(name) for name in found]
    beyond = [name for name, number in zip(found, numbers, strict=True) if number >= count]
    if beyond:
        raise ValueError(
            f"classes {_listed(beyond)} are out of range: the network's are 0 to {count - 1}"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"two folders stand for the same number: {_listed(found)}")
    return numbers


def _named_by_number(found: Sequence[str], names: Sequence[str]) -> list[int]:
    """The places of numbers among names that are numbers: "01" is "1"."""
    often = Counter(map(int, names))
    twice = [name for name in found if often[int(name)] > 1]
    if twice:
        raise ValueError(f"several classes of the network have the number {_listed(twice)}")
    places = {int(name): place for place, name in enumerate(names)}
    return [places.get(int(name), NONE) for name in found]


def _synsets(found: Sequence[str]) -> list[int]:
    """ImageNet's classes are in the order of their WordNet ids."""
    if len(found) == len(CATEGORIES):
        order = {name: place for place, name in enumerate(sorted(found))}
        return [order[name] for name in found]
    table = _table_of_timm()
    if table is None:
        raise ValueError(
            f"{len(found)} WordNet ids ({_listed(found)}): which of ImageNet's 1000 classes they "
            "are is known with all 1000 folders, empty ones too, or with timm installed, whose "
            "table is read; else name the folders by class or number, from 0"
        )
    unknown = [name for name in found if name not in table]
    if unknown:
        raise ValueError(f"{_listed(unknown)} are no WordNet ids of ImageNet's 1000 classes")
    return _placed(found, table)


def _table_of_timm() -> list[str] | None:
    """The WordNet ids of ImageNet's classes in order, from timm's file; timm is not imported."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    ids = path.read_text("utf-8").split() if path.is_file() else []
    return ids if len(ids) == len(CATEGORIES) else None


def _plain(name: str) -> str:
    """A name without what file systems and spellings change."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
