"""Amounts with units: what is read, what is refused, and what is written."""

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.cli.scale import units

READ = [
    (units.parse_count, "2G", 2e9),
    (units.parse_count, "386M", 386e6),
    (units.parse_count, "1.5g", 1.5e9),
    (units.parse_count, "5000000", 5e6),
    (units.parse_count, "1e9", 1e9),
    (units.parse_count, " 5.3 k ", 5300.0),
    (units.parse_bytes, "8GiB", 8 * 2.0**30),
    (units.parse_bytes, "8GB", 8e9),
    (units.parse_bytes, "500 mb", 5e8),
    (units.parse_bytes, "1048576", 2.0**20),
    (units.parse_bytes, "64KiB", 2.0**16),
    (units.parse_bytes, "12B", 12.0),
    (units.parse_seconds, "15ms", 0.015),
    (units.parse_seconds, "0.5s", 0.5),
    (units.parse_seconds, "800us", 8e-4),
    (units.parse_seconds, ".5s", 0.5),
]
REFUSED = [
    (units.parse_count, "2GiB", "unknown unit 'GiB': give a count such as"),
    (units.parse_count, "", "'' is not a count"),
    (units.parse_count, "two", "'two' is not a count"),
    (units.parse_count, "1G2", "is not a count"),
    (units.parse_count, "-1G", "'-1G' is not a count"),
    (units.parse_count, "0", "not positive and finite"),
    (units.parse_count, "1e400", "not positive and finite"),
    (units.parse_count, "nan", "'nan' is not a count"),
    (units.parse_bytes, "8G", "unknown unit 'G': give an amount of memory such as 8GiB"),
    (units.parse_bytes, "15ms", "unknown unit 'ms'"),
    (units.parse_seconds, "15", "has no unit: give a time such as 15ms"),
    (units.parse_seconds, "15m", "unknown unit 'm'"),
]


@pytest.mark.parametrize(("parse", "text", "amount"), READ)
def test_read(parse, text, amount):
    assert parse(text) == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(("parse", "text", "message"), REFUSED)
def test_refused(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)


@settings(deadline=None)
@given(st.floats(1e-3, 1e17))
def test_written_counts_are_read_again(amount):
    assert units.parse_count(units.format_count(amount)) == pytest.approx(amount, rel=6e-3)
    assert units.parse_bytes(units.format_bytes(amount)) == pytest.approx(amount, rel=6e-3)
    assert units.parse_seconds(units.format_seconds(amount)) == pytest.approx(amount, rel=6e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_count(385_814_752), "386M"),
        (units.format_count(1.826e9), "1.83G"),
        (units.format_count(0), "0"),
        (units.format_count(999_499_999), "999M"),
        (units.format_count(999_500_000), "1.00G"),
        (units.format_bytes(241_000), "241 kB"),
        (units.format_bytes(1.5e40), "1.5e+25 PB"),
        (units.format_seconds(999.4), "999000 ms"),
        (units.format_bytes(88_278_084), "88.3 MB"),
        (units.format_bytes(999), "999 B"),
        (units.format_seconds(0.00827), "8.27 ms"),
    ],
)
def test_written(text, expected):
    assert text == expected
