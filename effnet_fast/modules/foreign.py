"""Modules of other packages whose forward fuses: the class of an instance changes, nothing else.

The class that an instance gets is a subclass of its own, with a forward by `fused_forward`. Names,
children, parameters, hooks and the state dict stay, `isinstance` and the optimizer see no
difference, copies are of that class too, and a pickle holds the package's own class.

What the fused forward stands in for is code of another package, which may be of any version. It is
known by its source (see `readers.digest`): every function that it runs must be one whose text this
package has seen, and stay the one that it was.
"""

from __future__ import annotations

import copy
import copyreg
import dis
import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.modules import fused_forward, in_turn, stock, structure
from effnet_fast.modules.readers.digest import digest
from effnet_fast.modules.readers.known_code import KNOWN
from effnet_fast.modules.stock import Stock
from effnet_fast.modules.structure import RefusedError

# Modules that known code reads, by the names that it has for them.
_MODULES: dict[str, ModuleType] = {"F": F, "math": math, "torch": torch}
_reconstructor: Any = vars(copyreg)["_reconstructor"]  # as pickles of protocol 1 call it


class Fused:
    """In front of the class of another package's block: a forward that fuses.

    Attributes:
        own: the package's own class.
        backend, memory: as in `accelerate`.
        forward_stock: its forward as it was when this class was made.
        forward_scripted: the same under a name of its own: TorchScript compiles one method a name.
    """

    own: type[nn.Module]
    backend: str
    memory: str
    forward_stock: Callable[..., Any]
    forward_scripted: Callable[..., Any]
    __setstate__: Callable[..., None]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.forward_scripted(x)
        return _run(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not is_fused(type(self)):  # another's class below this one, as parametrizations make
            return super().__reduce_ex__(protocol)
        # `copyreg.__newobj__` would be for instances of that class alone.
        return _reconstructor, (self.own, object, None), self._state()

    def __copy__(self) -> Any:
        if (own := getattr(self.own, "__copy__", None)) is not None:
            return self._of_this_class(own(self))
        made = type(self).__new__(type(self))
        made.__setstate__(copy.copy(self._state()))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if (own := getattr(self.own, "__deepcopy__", None)) is not None:
            return self._of_this_class(own(self, memo))
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        return copied

    def _state(self) -> Any:
        """What the package's own class would be pickled by."""
        own = getattr(self.own, "__getstate__", None)  # Python 3.10 has none in `object`
        return self.__dict__ if own is None else own(self)

    def _of_this_class(self, made: Any) -> Any:
        if type(made) is self.own:
            made.__class__ = type(self)  # type: ignore[assignment]
        return made


class FusedWithDropRate(Fused):
    """The same where forward takes the rate of drop-path."""

    def forward(self, inputs: Tensor, drop_connect_rate: Any = None) -> Tensor:
        if torch.jit.is_scripting():
            return self.forward_scripted(inputs, drop_connect_rate)
        return _run(self, inputs, drop_connect_rate)


def _run(module: Any, x: Tensor, *arguments: Any) -> Any:
    kind = type(module)  # an instance may have attributes of these names
    forward = kind.own.forward
    if forward is not kind.forward_stock:  # another has come since
        return forward(module, x, *arguments)
    if kind.backend == "auto":
        return fused_forward.run(module, x, *arguments)
    with backends.use_backend(kind.backend):
        return fused_forward.run(module, x, *arguments)


class Finder(NamedTuple):
    """Finds classes in packages that are imported; backend and memory are those of `accelerate`."""

    backend: str
    memory: str

    def __call__(self, path: str) -> Any:
        """What has this path, as `find`."""
        return find(path)

    def fused(self, path: str) -> type:
        """The class of this path, as `accelerate` makes it."""
        return fused_class(find(path), self.backend, self.memory)


class Recipe(NamedTuple):
    """How instances of another package's class are read.

    Args:
        code: paths of the methods that its forward runs, itself first.
        reader: makes the reader of its instances, which takes what their forward takes but images.
        front: `Fused`, or a class of it.
        below: tables of PyTorch's own code that forward runs.
        members: as in `Stock`, by the paths of classes.
    """

    code: tuple[str, ...]
    reader: Callable[[Finder], Callable[..., Any]]
    front: type = Fused
    below: tuple[Stock, ...] = (stock.BLOCK,)
    members: tuple[tuple[str, str], ...] = ()


RECIPES: dict[str, Recipe] = {}  # by the paths of classes


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


def _require_known(path: str, function: Any) -> None:
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
    if isinstance(value, ModuleType):
        return value is _MODULES.get(name)
    if isinstance(value, FunctionType):  # `functools.wraps` copies names, but not the globals
        home = vars(sys.modules[value.__module__])
        is_own = value.__globals__ is home and home.get(name) is value
        return is_own and value.__qualname__ == name
    return value is getattr(types, name, None)


def _below(functions: list[FunctionType]) -> Iterator[tuple[ModuleType, str, Any]]:
    """Module, name and value of what known functions read.

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
            if not isinstance(value, FunctionType) or value in functions:
                continue
            if value.__module__.partition(".")[0] != "torch":
                _require_known(f"{value.__module__}:{value.__qualname__}", value)
                functions.append(value)


def _torch_rows(names: Iterable[str]) -> Iterator[tuple[type | ModuleType, str]]:
    """Operators of PyTorch that code with these names may call."""
    for name in names:
        for owner in (torch, torch.Tensor, F):
            value = getattr(owner, name, None)
            if isinstance(value, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
                yield owner, name


def _table(kind: type, recipe: Recipe) -> Stock:
    """The code of a class and below it, all of it known.

    Raises:
        RefusedError: some of it is not.
    """
    functions = []
    steps = "__call__ _call_impl forward" + " __iter__" * issubclass(kind, nn.Sequential)
    rows: list[tuple[Any, str]] = [(kind, steps)]
    for path in recipe.code:
        functions.append(find(path))
        _require_known(path, functions[-1])
        owner, _, name = path.rpartition(".")
        rows.append((find(owner), f"__call__ _call_impl {name}"))
    pinned = list(_below(functions))
    names = {name for function in functions for name in function.__code__.co_names}
    members = [(find(path), names) for path, names in recipe.members]
    return Stock(
        *rows, *dict.fromkeys(_torch_rows(sorted(names))),
        members=members, below=recipe.below, pinned=pinned,
    )  # fmt: skip


def _renamed(function: Any, name: str) -> FunctionType:
    code, scope = function.__code__, function.__globals__
    made = FunctionType(code, scope, name, function.__defaults__, function.__closure__)
    made.__annotations__, made.__module__ = function.__annotations__, function.__module__
    return made


_fused_classes: set[type] = set()


def is_fused(kind: type) -> bool:
    """Whether a class is one of `fused_class`."""
    return kind in _fused_classes


def own_class(kind: Any) -> type:
    """The package's own class of one of `fused_class`, and any other itself."""
    return kind.own if is_fused(kind) else kind


def is_known(kind: type) -> bool:
    """Whether there is a recipe for a class, or it is one of `fused_class`."""
    return path_of(own_class(kind)) in RECIPES


@functools.cache
def fused_class(kind: Any, backend: str, memory: str) -> type:
    """A subclass of another package's class whose forward fuses.

    Raises:
        RefusedError: the package's code is none that is known, with the reason.
    """
    path = path_of(kind)
    if find(path) is not kind:  # its module has been loaded again since
        raise RefusedError(f"{kind.__qualname__} is not what its module has now")
    recipe = RECIPES[path]
    table = _table(kind, recipe)
    table.require()
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "own": kind,
        "backend": backend,
        "memory": memory,
        "forward_stock": kind.forward,
        "forward_scripted": _renamed(kind.forward, "forward_scripted"),
    }
    fused = type(kind.__name__, (recipe.front, kind), names)
    structure.reads(fused, recipe.reader(Finder(backend, memory)), table.require)
    in_turn.looks_away(fused)
    _fused_classes.add(fused)
    return fused
