"""The list of small faults fits the code: every piece of text is found once, so it cannot rot."""

from __future__ import annotations

import dataclasses
from collections import Counter

from compiling import ROOT
from mutant_list import AREAS, Mutant, read_mutants

MUTANTS = read_mutants()
LEAST, LEAST_OF_AN_AREA = 60, 8


def test_there_are_enough_in_every_area() -> None:
    areas = Counter(mutant.area for mutant in MUTANTS)
    assert set(areas) == set(AREAS)
    assert min(areas.values()) >= LEAST_OF_AN_AREA
    assert len(MUTANTS) >= LEAST


def test_names_differ() -> None:
    assert [name for name, times in Counter(m.name for m in MUTANTS).items() if times > 1] == []


def test_all_can_be_applied() -> None:
    # One test of all: of parametrized cases `make test` runs a few.
    faults = [f"{mutant.name}: {fault}" for mutant in MUTANTS for fault in _faults(mutant)]
    assert faults == []


def test_what_cannot_be_applied_is_told() -> None:
    mutant = dataclasses.replace(MUTANTS[0], find="no such text", tests=("tests/nowhere.py",))
    assert len(_faults(mutant)) == 2


def _faults(mutant: Mutant) -> list[str]:
    """What keeps a mutant from being tried."""
    found = []
    text = (ROOT / mutant.file).read_text()
    try:
        if mutant.applied(text) == text:
            found.append("changes nothing")
    except ValueError as error:
        found.append(str(error))
    if not mutant.file.startswith(AREAS[mutant.area]):
        found.append(f"{mutant.file} is of another area")
    if len(mutant.breaks.split()) <= 5:
        found.append("no sentence says why the program is not equivalent")
    if not mutant.paths:
        found.append("no tests")
    found += (f"no {path}" for path in mutant.paths if not (ROOT / path).exists())
    return found
