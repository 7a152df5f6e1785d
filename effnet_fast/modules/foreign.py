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
import inspect
import sys
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

_reconstructor: Any = vars(copyreg)["_reconstructor"]  # as pickles of protocol 1 call it


class Fused:
    """In front of the class of another package's block: a forward that fuses.

    Attributes:
        own: the package's own class.
        backend, memory: as in `accelerate`.
        forward_stock: its forward as it was when this class was made.
    """

    own: type[nn.Module]
    backend: str
    memory: str
    forward_stock: Callable[..., Any]
    __setstate__: Callable[..., None]

    def forward(self, x: Tensor) -> Any:
        return _run(self, x)

    def __prepare_scriptable__(self) -> Any:
        """The module itself; torch.jit.script, which calls this, reads `forward_stock`."""
        if self.own.forward is not type(self).forward_stock:
            raise RuntimeError(
                f"{self.own.__name__}.forward was replaced after effnet_fast.accelerate: call "
                "effnet_fast.restore(model) before torch.jit.script"
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `copyreg.__newobj__` would be for instances of that class alone.
        return _reconstructor, (self.own, object, None), self._state()

    def __copy__(self) -> Any:
        return self._made_of(copy.copy(self._state()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        return copied

    def _state(self) -> Any:
        return super().__reduce_ex__(2)[2]

    def _made_of(self, state: Any) -> Any:
        made = type(self).__new__(type(self))
        made.__setstate__(state)
        return made


class FusedWithDropRate(Fused):
    """The same where forward takes the rate of drop-path."""

    def forward(self, inputs: Tensor, drop_connect_rate: Any = None) -> Any:
        return _run(self, inputs, drop_connect_rate)


def _in_front_of(stock: FunctionType, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` for those who call it, `stock` for those who read its source.

    torch.jit.script reads that, with the names around it, and so compiles the stock forward.
    """
    signature = inspect.signature(stock)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:  # by the package's own names
            args = signature.bind(self, *args, **kwargs).args[1:]
        return forward(self, *args)

    names = stock.__globals__
    found = FunctionType(method.__code__, names, stock.__name__, None, method.__closure__)
    return functools.wraps(stock)(found)


def _run(module: Any, x: Tensor, *arguments: Any) -> Any:
    forward = module.own.forward
    if forward is not type(module).forward_stock:  # another has come since
        return forward(module, x, *arguments)
    if module.backend == "auto":
        return fused_forward.run(module, x, *arguments)
    with backends.use_backend(module.backend):
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
        reader: makes the reader of its instances, which takes what their forward takes but images;
            None for networks.
        front: `Fused`, or a class of it.
        below: tables of PyTorch's own code that forward runs.
        members: as in `Stock`, by the paths of classes.
        settings: attributes on which the result depends beside children, parameters and buffers.
        parts: paths of classes of blocks and layers below, whose code forward runs, too.
        is_block: whether they are blocks.
        finish: called with the class and its fused class when the latter is made.
    """

    code: tuple[str, ...]
    reader: Callable[[Finder], Callable[..., Any]] | None
    front: type[Fused] = Fused
    below: tuple[Stock, ...] = (stock.BLOCK,)
    members: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    parts: tuple[str, ...] = ()
    is_block: bool = True
    finish: Callable[[type, type], None] | None = None


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
            if isinstance(value, ModuleType):
                given = sys.modules.get(value.__name__)
            elif isinstance(value, FunctionType):
                given = getattr(sys.modules.get(value.__module__), value.__qualname__, None)
            else:
                continue
            if given is not value:
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


@functools.cache
def code_of(kind: type) -> Stock:
    """The code of a class and below it, all of it known.

    Raises:
        RefusedError: some of it is not.
    """
    recipe = RECIPES[path_of(kind)]
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
        members=members, pinned=pinned,
        below=(*recipe.below, *(code_of(find(path)) for path in recipe.parts)),
    )  # fmt: skip


_fused_classes: set[type] = set()


def is_fused(kind: type) -> bool:
    """Whether a class is one of `fused_class`."""
    return kind in _fused_classes


def own_class(kind: Any) -> type:
    """The package's own class of one of `fused_class`, and any other itself."""
    return kind.own if is_fused(kind) else kind


def learn(model: nn.Module) -> None:
    """Enters the readers of all classes in a model for which there is a recipe.

    Raises:
        RefusedError: the code of one is none that is known, with the reason.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in kinds:
        if is_known(kind) and not is_fused(kind):
            fused_class(kind, "auto", "fast")


def is_known(kind: type) -> bool:
    """Whether there is a recipe for a class, or it is one of `fused_class`."""
    return path_of(own_class(kind)) in RECIPES


def is_network(kind: type) -> bool:
    """Whether a class is another package's network, in front of which is no reader."""
    recipe = RECIPES.get(path_of(own_class(kind)))
    return recipe is not None and recipe.reader is None


@functools.cache
def fused_class(kind: Any, backend: str, memory: str) -> type:
    """A subclass of another package's class whose forward fuses.

    Raises:
        RefusedError: the package's code is none that is known, with the reason.
    """
    recipe, table = RECIPES[path_of(kind)], code_of(kind)
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "own": kind,
        "backend": backend,
        "memory": memory,
        "forward_stock": kind.forward,
        "forward": _in_front_of(kind.forward, recipe.front.forward),
        # TorchScript reads those of the first class that has any, which would be a front's.
        "__annotations__": next(filter(None, map(inspect.get_annotations, kind.__mro__)), {}),
    }
    fused = type(kind.__name__, (recipe.front, kind), names)
    if recipe.reader is not None:
        reader = recipe.reader(Finder(backend, memory))
        for either in (kind, fused):  # the former in a network that is deployed
            structure.reads(either, reader, table.require, is_block=recipe.is_block)
    for path, settings in recipe.settings:
        structure.SETTINGS[find(path)] = tuple(settings.split())
    structure.SETTINGS[fused] = structure.SETTINGS.get(kind, ())
    for path in recipe.code:
        in_turn.looks_away(find(path.rpartition(".")[0]))
    in_turn.looks_away(fused)
    _fused_classes.add(fused)
    if recipe.finish is not None:
        recipe.finish(kind, fused)
    return fused
