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
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.modules import foreign_code, fused_forward, in_turn, stock, structure
from effnet_fast.modules.foreign_code import find, path_of
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

    if TYPE_CHECKING:  # TorchScript would take them for those of the package's class
        own: type[nn.Module]
        backend: str
        memory: str
        forward_stock: Callable[..., Any]
        __setstate__: Callable[..., None]

    def forward(self, x: Tensor) -> Any:
        return run(self, x)

    def __prepare_scriptable__(self) -> Any:
        """The module itself; torch.jit.script, which calls this, reads `forward_stock`."""
        if self.own.forward is not type(self).forward_stock:
            raise RuntimeError(
                f"{self.own.__name__}.forward was replaced after effnet_fast.accelerate: call "
                "effnet_fast.restore(model) before torch.jit.script"
            )
        return self

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
        kind: Any = type(self)
        if type(made) is self.own:
            made.__class__ = kind
        return made


class FusedWithDropRate(Fused):
    """The same where forward takes the rate of drop-path."""

    def forward(self, inputs: Tensor, drop_connect_rate: Any = None) -> Any:
        return run(self, inputs, drop_connect_rate)


def _in_front_of(own: FunctionType, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` for those who call it, `own` for those who read its source or signature.

    torch.jit.script reads that, with the names around it, and so compiles the package's forward.
    """
    signature = inspect.signature(own)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:  # by the package's own names
            bound = signature.bind(self, *args, **kwargs)
            args, kwargs = bound.args[1:], bound.kwargs
        return forward(self, *args, **kwargs)

    names = own.__globals__
    found = FunctionType(method.__code__, names, own.__name__, None, method.__closure__)
    return functools.wraps(own)(found)


def run(module: Any, x: Tensor, *arguments: Any) -> Any:
    """The forward of a `Fused`: fused, or as stock where another has replaced its package's."""
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
        reader: makes the reader of its instances, which takes what their forward takes but images;
            None for networks.
        front: `Fused`, or a class of it.
        below: tables of PyTorch's own code that forward runs.
        members: as in `Stock`, by the paths of classes.
        settings: attributes on which the result depends beside children, parameters and buffers.
        parts: paths of classes of blocks and layers below, whose code forward runs, too.
        is_block: whether they are blocks.
        inner: children that are plain nn.Sequential and get a front of their own, `FusedSequence`.
        finish: called with the class and its fused class when the latter is made.
        inherited: paths of classes, the class of PyTorch below each, and names of its methods that
            forward runs and the class leaves as they are.
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
    inner: tuple[tuple[str, type], ...] = ()
    inherited: tuple[tuple[str, type, str], ...] = ()


RECIPES: dict[str, Recipe] = {}  # by the paths of classes


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
        foreign_code.require_known(path, functions[-1])
        owner, _, name = path.rpartition(".")
        rows.append((find(owner), f"__call__ _call_impl {name}"))
    for path, base, methods in recipe.inherited:
        heir = foreign_code.heir(path, base, methods)
        rows.append((heir, f"__call__ _call_impl {methods}"))
    pinned = list(foreign_code.below(functions))
    names = {name for function in functions for name in function.__code__.co_names}
    members = [(find(path), names) for path, names in recipe.members]
    return Stock(
        *rows, *dict.fromkeys(foreign_code.torch_rows(sorted(names))),
        members=members, pinned=pinned,
        below=(*recipe.below, *(code_of(find(path)) for path in recipe.parts)),
    )  # fmt: skip


class FusedSequence(Fused):
    """In front of nn.Sequential where it is a network's child.

    Attributes:
        code: what the network and its modules run.
    """

    if TYPE_CHECKING:
        code: Stock


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


def inner_classes(module: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """Children of an accelerated network that get another class, too, and that class."""
    kind: Any = type(module)
    for name, front in RECIPES[path_of(own_class(kind))].inner:
        child = module._modules.get(name)
        if child is not None and own_class(type(child)) is nn.Sequential:
            yield child, _fused_sequence(kind.own, front, kind.backend, kind.memory)


@functools.cache
def _fused_sequence(network: Any, front: Any, backend: str, memory: str) -> type:
    fused = _made(nn.Sequential, front, backend, memory, code=code_of(network))
    structure.SEQUENCES.add(fused)
    front.enter(fused)
    return fused


def _made(kind: Any, front: type[Fused], backend: str, memory: str, **more: Any) -> type:
    """A subclass of another package's class with this front."""
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "own": kind,
        "backend": backend,
        "memory": memory,
        "forward_stock": kind.forward,
        "forward": _in_front_of(kind.forward, front.forward),
        # TorchScript reads those of the first class that has any, which would be a front's.
        "__annotations__": next(filter(None, map(inspect.get_annotations, kind.__mro__)), {}),
    }
    fused = type(kind.__name__, (front, kind), names | more)
    in_turn.looks_away(fused)
    _fused_classes.add(fused)
    return fused


@functools.cache
def fused_class(kind: Any, backend: str, memory: str) -> type:
    """A subclass of another package's class whose forward fuses.

    Raises:
        RefusedError: the package's code is none that is known, with the reason.
    """
    path = path_of(kind)
    if find(path) is not kind:  # its module has been loaded again since
        raise RefusedError(f"{kind.__qualname__} is not what its module has now")
    recipe, table = RECIPES[path], code_of(kind)
    table.require()
    fused = _made(kind, recipe.front, backend, memory)
    if recipe.reader is not None:
        reader = recipe.reader(Finder(backend, memory))
        for either in (kind, fused):  # the former in a network that is deployed
            structure.reads(either, reader, table.require, is_block=recipe.is_block)
    for path, settings in recipe.settings:
        structure.SETTINGS[find(path)] = tuple(settings.split())
    structure.SETTINGS[fused] = structure.SETTINGS.get(kind, ())
    for path in recipe.code:
        in_turn.looks_away(find(path.rpartition(".")[0]))
    if recipe.finish is not None:
        recipe.finish(kind, fused)
    return fused
