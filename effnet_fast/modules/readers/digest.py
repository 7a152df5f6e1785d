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
from types import FunctionType

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


def digest(function: object) -> str | None:
    """Of a function or of the functions of a class; None where there is no source to read.

    Decorators are not part of it: a decorated function has the digest of its own source.
    """
    if not isinstance(function, FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))  # no `__wrapped__`
    except (OSError, TypeError, SyntaxError):
        return None
    return hashlib.sha256(_words(tree.body).encode()).hexdigest()[:LENGTH]
