"""Imports go one way, from the command line down to the extension, and in no circle.

Imports inside functions count, so do those for type checkers and modules named by text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a module may import: its own row and those before it. The longest name that fits counts.
ROWS = (
    (
        "effnet_fast._C",
        "effnet_fast._C_simt",
        "effnet_fast.files",
        "effnet_fast.locks",
        "effnet_fast.timing",
    ),
    ("effnet_fast.backends.native",),
    ("effnet_fast.reference",),
    ("effnet_fast.backends", "effnet_fast.triton_kernels"),
    ("effnet_fast.checkpoints", "effnet_fast.pretrained"),  # they know no network
    ("effnet_fast.ops",),
    ("effnet_fast.modules",),
    ("effnet_fast.inference",),
    # The networks have the methods of the hub, which builds them anew from their settings.
    ("effnet_fast.models", "effnet_fast.integrations.hub", "effnet_fast.integrations.hub_config"),
    (
        "effnet_fast.acceleration",
        "effnet_fast.deployment",
        "effnet_fast.diagnostics",
        "effnet_fast.integrations",
        "effnet_fast.scaling",
    ),
    ("effnet_fast.training",),
    ("effnet_fast.cli",),
)
RANKS = {name: rank for rank, names in enumerate(ROWS) for name in names}
# (importer, imported): why it may look up.
ALLOWED: dict[tuple[str, str], str] = {}


def sources() -> dict[str, tuple[Path, bool]]:
    """Every module of the package: its file, and whether it is a package."""
    found = {}
    for folder, prefix in ((ROOT / "effnet_fast", "effnet_fast"),
                           (ROOT / "triton_kernels", "effnet_fast.triton_kernels")):  # fmt: skip
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join((prefix, *(parts[:-1] if is_package else parts)))
            found.setdefault(name, (path, is_package))
    return found


SOURCES = sources()


def imports(name: str, text: str, is_package: bool) -> Iterator[str]:
    """The package's modules that a source imports, wherever in it."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value] if node.value.startswith("effnet_fast.") else []
        for target in found:
            while target and target not in SOURCES and target not in RANKS:
                target = target.rpartition(".")[0]
            if target.startswith("effnet_fast.") and target != name:
                yield target


def rank(name: str) -> int:
    """The row of a module."""
    known = name
    while known not in RANKS:
        known = known.rpartition(".")[0]
        assert known, f"{name} stands in no row"
    return RANKS[known]


def upward(name: str, targets: set[str]) -> list[str]:
    """What a module imports from rows after its own."""
    return [t for t in sorted(targets) if rank(t) > rank(name) and (name, t) not in ALLOWED]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += graph.get(name, ())
        return seen

    return [name for name in graph if name in reachable(name)]


GRAPH = {
    name: set(imports(name, path.read_text("utf-8"), is_package))
    for name, (path, is_package) in SOURCES.items()
    if name != "effnet_fast"  # makes every public name on first use
}


def test_imports_go_down():
    """Of all modules in one test: as cases, those beyond the first few would be exhaustive."""
    found = {name: upward(name, targets) for name, targets in GRAPH.items()}
    assert {name: targets for name, targets in found.items() if targets} == {}


def test_no_circle():
    graph = {name: {t for t in GRAPH[name] if (name, t) not in ALLOWED} for name in GRAPH}
    assert circles(graph) == []


def test_every_exception_is_needed():
    assert all(imported in GRAPH[importer] for importer, imported in ALLOWED)


def test_an_upward_import_and_a_circle_are_found():
    lazy = "def f():\n    from effnet_fast.models import variants\n"
    assert upward(
        "effnet_fast.ops.mbconv", set(imports("effnet_fast.ops.mbconv", lazy, False))
    ) == ["effnet_fast.models.variants"]
    assert set(imports("effnet_fast.ops.x", "from . import mbconv", False)) == {
        "effnet_fast.ops.mbconv"
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
