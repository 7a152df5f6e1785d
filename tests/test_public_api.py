"""Public names and their parameters change on purpose, and users read of it in CHANGELOG.md."""

from __future__ import annotations

import argparse
import difflib

import public_api

ADVICE = """\
public names or parameters differ from tests/public_api.txt:
{difference}
Where that is meant, follow "Public names" in CONTRIBUTING.md, describe the change in a line of
CHANGELOG.md, and write the file anew: python tests/support/public_api.py --update"""


def test_names_and_parameters_are_those_written_down():
    expected = public_api.SNAPSHOT.read_text("utf-8").splitlines()
    difference = list(difflib.unified_diff(expected, public_api.api(), "written", "now", n=0))
    assert not difference, ADVICE.format(difference="\n".join(difference))


def test_a_default_an_option_and_a_member_are_seen():
    def before(x, *, eps=1e-5):
        pass

    def after(x, *, eps=1e-3):
        pass

    assert public_api._parameters(before) == "(x, *, eps=1e-05)"
    assert public_api._parameters(before) != public_api._parameters(after)
    parser = argparse.ArgumentParser("tool")
    parser.add_argument("--batch", type=int, default=1)
    assert list(public_api._commands(parser)) == ["tool --batch default=1"]

    class Network:
        depth = property(lambda self: 1)

        def freeze(self, stages=0):
            pass

    Network.__module__ = "effnet_fast"
    assert list(public_api._described("N", Network)) == [
        "N()",
        "N.depth: property",
        "N.freeze(self, stages=0)",
    ]
