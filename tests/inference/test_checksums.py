"""Checksums of memory: what they notice, on every instruction set and any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiers
from effnet_fast.backends import native

CHUNK = 128 << 10  # csrc/bindings/checksums.h


@pytest.fixture(params=[name.removeprefix("cpu:") for name in tiers.AVAILABLE])
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def memory(count: int, begin: int = 1) -> Tensor:
    """Drawn bytes, at an odd address unless told otherwise."""
    return torch.randint(0, 256, (count + begin,), dtype=torch.uint8)[begin:]


def sums(isa: str, *parts: Tensor, threads: int = 1) -> list[int]:
    spans = [(part.data_ptr(), part.numel()) for part in parts]
    return native.load().checksums(isa, spans, threads)


def test_every_bit_counts(isa: str) -> None:
    for count in (1, 4, 63, 64, 65, 1000, 1333):
        data = memory(count)
        before = sums(isa, data)
        for place in {0, count - 1, *torch.randint(0, count, (40,)).tolist()}:
            for bit in (1, 16, 128):
                data[place] ^= bit
                assert sums(isa, data) != before, (count, place, bit)
                data[place] ^= bit
        assert sums(isa, data) == before


def test_signs_of_any_two_numbers(isa: str) -> None:
    """The highest bits of two words: a sum of multiples would not see both change."""
    data = torch.randn(1024)
    before = sums(isa, data.view(torch.uint8))
    for first in (0, 5, 700):
        for second in range(first + 1, 1024, 1 if first == 0 else 13):
            data[[first, second]] *= -1
            assert sums(isa, data.view(torch.uint8)) != before, (first, second)
            data[[first, second]] *= -1


def test_edits_of_all_numbers(isa: str) -> None:
    data = torch.randn(5000)
    before = sums(isa, data.view(torch.uint8))
    for edited in (-data, data.flip(0), data.roll(1), data.roll(64), 0 * data, data + 1):
        assert sums(isa, edited.view(torch.uint8)) != before


def test_chunks_do_not_depend_on_threads(isa: str) -> None:
    parts = [memory(n) for n in (5, CHUNK, 0, 3 * CHUNK + 7, 64)]
    first = sums(isa, *parts)
    assert len(first) == 5
    assert all(sums(isa, *parts, threads=threads) == first for threads in (2, 3, 8))
    parts[3][2 * CHUNK] ^= 1
    changed = [a != b for a, b in zip(first, sums(isa, *parts, threads=2), strict=True)]
    assert changed == [False, False, False, True, False]


def test_no_memory(isa: str) -> None:
    assert sums(isa) == sums(isa, memory(0)) == []
    with pytest.raises(ValueError, match="bytes"):
        native.load().checksums(isa, [(0, -1)], 1)
