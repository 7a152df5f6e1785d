"""Public names with their parameters and defaults, one a line, as tests/public_api.txt holds them.

Annotations are left out: they may become more exact without a user noticing.
`python tests/support/public_api.py --update` writes the file anew.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

SNAPSHOT = Path(__file__).parents[1] / "public_api.txt"
PACKAGE = "effnet_fast"
LONG = 80  # characters; of a longer default only the length is shown
# Public names of a module: its `__all__`, or these.
MODULES: dict[str, tuple[str, ...] | None] = {
    PACKAGE: None,
    "effnet_fast.backends": ("BACKENDS", "OPS", "can_run", "current_backend", "use_backend"),
    "effnet_fast.checkpoints": None,
    "effnet_fast.deployment": ("DeployedEfficientNet", "deploy"),
    "effnet_fast.models": None,
    "effnet_fast.ops": None,
    "effnet_fast.reference": None,
    "effnet_fast.scaling": None,
    "effnet_fast.training": None,
}


def api() -> list[str]:
    """Every public name of the package and of the command line, sorted within each module."""
    found: list[str] = []
    first: dict[int, str] = {}  # under which name a class or function came first, by its id
    for name, names in MODULES.items():
        module = importlib.import_module(name)
        for public in sorted(names or module.__all__):
            value, full = getattr(module, public), f"{name}.{public}"
            known = first.setdefault(id(value), full) if callable(value) else full
            found += _described(full, value) if known == full else [f"{full}: {known}"]
    from effnet_fast.cli.subcommands import build_parser

    return found + list(_commands(build_parser()))


def _described(name: str, value: Any) -> Iterator[str]:
    """A line for a function or constant; for a class one more for each of its members."""
    if isinstance(value, ModuleType):
        yield f"{name}: module"
    elif isinstance(value, type):
        yield from _class(name, value)
    elif callable(value):
        yield name + _parameters(value)
    elif name == f"{PACKAGE}.__version__":
        yield f"{name}: str"
    elif isinstance(value, Mapping):
        yield f"{name}: {', '.join(map(str, value))}"
    else:
        yield f"{name} = {value!r}"


def _class(name: str, value: type) -> Iterator[str]:
    if issubclass(value, enum.Enum):
        yield f"{name}: {', '.join(value.__members__)}"
        return
    is_plain_error = issubclass(value, BaseException) and "__init__" not in vars(value)
    yield f"{name}: error" if is_plain_error else f"{name}{_parameters(value)}"
    members: dict[str, Any] = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith(PACKAGE):
            members |= {key: at for key, at in vars(base).items() if not key.startswith("_")}
    for key, member in sorted(members.items()):
        if isinstance(member, property):
            yield f"{name}.{key}: property" + (", settable" if member.fset else "")
        elif callable(getattr(value, key, None)):
            yield f"{name}.{key}{_parameters(getattr(value, key))}"


def _parameters(value: Any) -> str:
    """The signature without annotations; the same text on every version of Python."""
    signature = inspect.signature(value)
    parameters = [
        at.replace(annotation=at.empty, default=_Shown(at.default) if at.default is not at.empty
                   else at.empty)
        for at in signature.parameters.values()
    ]  # fmt: skip
    return str(inspect.Signature(parameters))


class _Shown:
    """A default, whose text has no address and no form of one version of Python."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, enum.Enum):
            return f"{type(self.value).__name__}.{self.value.name}"
        if inspect.isroutine(self.value) or isinstance(self.value, type):
            return self.value.__qualname__
        text = repr(self.value)
        is_long = len(text) > LONG and isinstance(self.value, tuple)
        return f"<tuple of {len(self.value)}>" if is_long else text


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A line for each option and argument of a parser, and those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in sorted(action.choices):
                yield from _commands(action.choices[name])
        elif not isinstance(action, argparse._HelpAction):
            yield f"{parser.prog} {_option(action)}"


def _option(action: argparse.Action) -> str:
    parts = ["/".join(action.option_strings) or action.dest]
    if action.choices is not None:
        parts.append("{" + ",".join(map(str, action.choices)) + "}")
    for field in ("nargs", "default"):
        value = getattr(action, field)
        if value is not None and value is not argparse.SUPPRESS:
            parts.append(f"{field}={value}")
    if action.option_strings and action.required:
        parts.append("required")
    return " ".join(parts)


def main() -> int:
    """Prints the names, or writes them to the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write tests/public_api.txt")
    text = "\n".join(api()) + "\n"
    if parser.parse_args().update:
        SNAPSHOT.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
