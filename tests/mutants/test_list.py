"""The list of small faults fits the code: every piece of text is found once, so it cannot rot."""

from __future__ import annotations

from collections import Counter

import pytest

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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_applied(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert mutant.applied(text) != text
    assert mutant.file.startswith(AREAS[mutant.area])
    assert len(mutant.breaks.split()) > 5  # a sentence: why the program is not equivalent
    assert mutant.paths
    assert [path for path in mutant.paths if not (ROOT / path).exists()] == []
