"""A digest of what a function's source says, the same in every version of Python.

Readers of other packages' modules know the code that they stand in for by it: a release that
changes a word of a comment, a docstring or an annotation keeps it, one that changes a statement
does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType

LENGTH = 16  # hexadecimal digits
# What changes nothing of what a function computes, or is new in some version of `ast`.
_UNREAD = frozenset(
    ("annotation", "returns", "type_comment", "type_params", "decorator_list", "ctx", "kind")
)


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _words(node: object) -> str:
    """The syntax tree in text, without what is empty."""
    if isinstance(node, list):
        return f"[{','.join(_words(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (
        f"{name}={_words(value)}"
        for name, value in ast.iter_fields(node)
        if name not in _UNREAD and value not in (None, [])
    )
    return f"{type(node).__name__}({','.join(fields)})"


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


@lru_cache(maxsize=8)
def _codes_of(text: str, filename: str) -> frozenset[CodeType]:
    return frozenset(_codes_in(compile(text, filename, "exec", dont_inherit=True)))


def _is_of_its_source(code: CodeType) -> bool:
    """Whether the file as it is now gives this code.

    It does not where the file has changed since it was imported, or the code since it was made.
    """
    lines, _ = inspect.findsource(code)
    return code in _codes_of("".join(lines), code.co_filename)


def digest(function: object) -> str | None:
    """Of a function's source; None where there is none to read, or its code is not of that source.

    Decorators are not part of it: what they return has the digest of its own source, so one that
    wraps the function gives another digest, and one that returns it changes nothing that is run.
    """
    if not isinstance(function, FunctionType):
        return None
    try:
        if not _is_of_its_source(function.__code__):
            return None
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))  # no `__wrapped__`
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return hashlib.sha256(_words(tree.body).encode()).hexdigest()[:LENGTH]
