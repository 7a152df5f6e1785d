"""The code of other packages that a fused forward stands in for, and whether it is known.

It is known by its source (see `readers.digest`), function by function: the methods that a forward
runs, and all that these call in their packages.
"""

from __future__ import annotations

import dis
import math
import sys
import types
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from effnet_fast.modules.readers.digest import digest
from effnet_fast.modules.readers.known_code import KNOWN
from effnet_fast.modules.structure import RefusedError

# Modules that known code reads, by the names that it has for them.
_MODULES: dict[str, ModuleType] = {"F": F, "math": math, "nn": torch.nn, "torch": torch}


def path_of(kind: type) -> str:
    """The path of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find(path: str) -> Any:
    """What has this path, "module:name" or "module:Class.method", in a package that is imported.

    Raises:
        RefusedError: there is nothing of this path.
    """
    home, names = path.split(":")
    found: Any = sys.modules.get(home)
    for name in names.split("."):
        found = getattr(found, name, None)
    if found is None:
        raise RefusedError(f"this version of {home.partition('.')[0]} has no {names}")
    return found


def heir(path: str, base: type, methods: str) -> type:
    """The class of this path.

    Raises:
        RefusedError: one of these methods is not the one that its base has.
    """
    kind: type = find(path)
    for name in methods.split():
        if getattr(kind, name) is not getattr(base, name):
            raise RefusedError(f"{kind.__name__} has a {name} of its own")
    return kind


def require_known(path: str, function: Any) -> None:
    """Raises RefusedError for a function whose source is not one that this package knows."""
    if digest(function) not in KNOWN.get(path, ()):
        package = path.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "of unknown version")
        name = path.partition(":")[2]
        raise RefusedError(f"{name} of {package} {version} is none that is known")


def _read_globals(function: FunctionType) -> dict[str, Any]:
    """The global names that a function reads, of those that its module has, and their values."""
    names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    return {name: function.__globals__[name] for name in names & function.__globals__.keys()}


def _is_as_named(name: str, value: Any) -> bool:
    """Whether a global is what code that reads it by this name means.

    The digest of that code tells the name alone: `F` might be a module of another package.
    """
    if value is None or isinstance(value, (bool, int, float, str)):  # a setting
        return True
    if isinstance(value, ModuleType):
        return value is _MODULES.get(name)
    if isinstance(value, FunctionType):  # `functools.wraps` copies names, but not the globals
        home = vars(sys.modules[value.__module__])
        is_own = value.__globals__ is home and home.get(name) is value
        return is_own and value.__qualname__ == name
    own = sys.modules.get(value.__module__) if isinstance(value, type) else None
    return value in (getattr(types, name, None), getattr(own, name, None))


_AUTOGRAD = torch.autograd.Function
_STEPS = ("forward", "backward", "vjp", "setup_context")  # what a call of one of its classes runs


def _is_autograd(value: Any) -> bool:
    """Whether it is another package's class of an autograd Function."""
    return isinstance(value, type) and issubclass(value, _AUTOGRAD) and _is_foreign(value)


def _is_foreign(value: Any) -> bool:
    return value.__module__.partition(".")[0] != "torch"


def _rows_of_autograd(kind: Any) -> Iterator[tuple[type, str, Any]]:
    """Owner, name and value of what a call of an autograd Function runs.

    Raises:
        RefusedError: its `apply` is not PyTorch's.
    """
    # Each look at a class method makes another object around the one function.
    apply = getattr(kind.apply, "__func__", None)
    if apply is not vars(_AUTOGRAD)["apply"].__func__:
        raise RefusedError(f"{kind.__qualname__}.apply is replaced")
    yield kind, "apply.__func__", apply
    for name in _STEPS:
        yield kind, name, getattr(kind, name)


def _foreign_code(value: Any) -> Iterator[tuple[str, Any]]:
    """Path and function of what other packages run where their code calls a global of theirs."""
    if isinstance(value, FunctionType) and _is_foreign(value):
        yield value.__qualname__, value
    elif _is_autograd(value):
        for name in _STEPS:
            if (function := getattr(value, name)) is not getattr(_AUTOGRAD, name):
                yield f"{value.__qualname__}.{name}", function


def below(functions: list[Any]) -> Iterator[tuple[type | ModuleType, str, Any]]:
    """Owner, name and value of what known functions read.

    Args:
        functions: those of other packages among it are appended.

    Raises:
        RefusedError: one is a function whose source is not known, or not what its package has.
    """
    for function in functions:
        home = sys.modules[function.__module__]
        for name, value in _read_globals(function).items():
            yield home, name, value
            if not _is_as_named(name, value):
                raise RefusedError(f"{home.__name__}.{name} is replaced")
            if _is_autograd(value):
                yield from _rows_of_autograd(value)
            for path, code in _foreign_code(value):
                if code not in functions:
                    require_known(f"{value.__module__}:{path}", code)
                    functions.append(code)


def torch_rows(names: Iterable[str]) -> Iterator[tuple[type | ModuleType, str]]:
    """Operators of PyTorch that code with these names may call."""
    for name in names:
        for owner in (torch, torch.Tensor, F):
            value = getattr(owner, name, None)
            if isinstance(value, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
                yield owner, name
