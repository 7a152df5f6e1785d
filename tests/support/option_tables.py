"""The tables of options in docs/training_runs.md, from the tables of the code.

`python tests/support/option_tables.py --update` writes them anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from effnet_fast.training.runs.options import options_of
from effnet_fast.training.runs.recipe import RECIPES, Recipe, read_recipe
from effnet_fast.training.runs.settings import Settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "training_runs.md"
BEGIN, END = "<!-- options: python tests/support/option_tables.py --update -->\n", "<!-- end -->\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return " to ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else f"{value}"


def _table(columns: dict[str, Any], table: Any) -> str:
    head = ["option", *columns, "what it is"]
    lines = _row(head) + _row(["---"] * len(head))
    for name, entry in options_of(table).items():
        text = entry.text
        if choices := entry.rule.choices:
            text = f"{', '.join(choices)}; {text}"
        values = [_shown(getattr(of, name)) for of in columns.values()]
        lines += _row([f"`--{name.replace('_', '-')}`", *values, text])
    return lines


def tables() -> str:
    """Both tables, of a run's options and of its recipe's."""
    recipes = _table({name: read_recipe(name) for name in RECIPES}, Recipe)
    return f"{_table({'default': Settings}, Settings)}\n{recipes}"


def main() -> int:
    """Prints the tables, or writes them into the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {DOCUMENT.name}")
    if not parser.parse_args().update:
        print(tables(), end="")
        return 0
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}{tables()}{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
