"""Learns the code of other packages that readers stand in for, into `readers/known_code.py`.

    python tests/support/known_code.py

adds what the installed versions have to what is known, and forgets nothing. To learn another
version, put it in front of the installed one:

    pip install --no-deps --target FOLDER timm==0.9.16
    PYTHONPATH=FOLDER python tests/support/known_code.py

Read the difference to what was known in the packages' own sources before you commit it: the table
says that the readers are right for it. Then write the version into the reader's first lines.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from effnet_fast.models import foreign as networks  # noqa: F401  (enters their recipes)
from effnet_fast.modules import foreign, foreign_code
from effnet_fast.modules.readers import known_code
from effnet_fast.modules.readers.digest import digest

HEAD = '''"""The sources that readers stand in for, by `digest`, of every version that was read.

Written by tests/support/known_code.py.
"""

KNOWN: dict[str, tuple[str, ...]] = {
'''


def _learn(path: str, function: object) -> None:
    found = digest(function)
    assert found, f"{path} has no source"
    known_code.KNOWN[path] = tuple(dict.fromkeys((*known_code.KNOWN.get(path, ()), found)))


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Takes every source for one that is known, and enters it."""
    before = foreign_code.require_known
    foreign_code.require_known = _learn
    try:
        yield
    finally:
        foreign_code.require_known = before


def main() -> None:
    with learning():
        for path in list(foreign.RECIPES):
            home, name = path.split(":")
            with contextlib.suppress(ImportError, AttributeError):
                foreign.fused_class(getattr(importlib.import_module(home), name), "auto", "fast")
    rows = []
    for path, digests in sorted(known_code.KNOWN.items()):
        row = f'    "{path}": ("{digests[0]}",),\n'
        if len(digests) > 1 or len(row) > 101:  # as the formatter has it
            values = "".join(f'        "{value}",\n' for value in digests)
            row = f'    "{path}": (\n{values}    ),\n'
        rows.append(row)
    Path(known_code.__file__).write_text(f"{HEAD}{''.join(rows)}}}\n")


if __name__ == "__main__":
    import torchvision_cpu  # noqa: F401  (before any import of torchvision)

    main()
