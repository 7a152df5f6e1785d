"""The modules that a network hands over, so that its inference can run from packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from effnet_fast.modules import stock, structure
from effnet_fast.modules.structure import RefusedError

# Methods that forward calls, through which a class or an instance could change what it computes.
STEPS = frozenset({"forward_features", "forward_head", "_prepared", "_maps"})
METHODS = STEPS | {"forward"}
ENTRIES = frozenset({"forward", "__call__", "_call_impl"})  # on the way from a call to forward


def in_order(module: nn.Module) -> tuple[Any, ...]:
    """The children as nn.Sequential runs them.

    A child in two places comes twice, and None stands where one was set to None; `children()`
    leaves both out.
    """
    return tuple(module._modules.values())


@dataclass(frozen=True)
class Head:
    """What follows the last stage of a classifier.

    Where `finish` takes [N,C] and makes [N,C,1,1] of it again, it is as if forward flattened.
    """

    pool: nn.Module  # makes pooled features [N,C,1,1] of the last convolution's map
    flattens: bool  # whether forward makes [N,C] of what pool gives
    classifier: nn.Module  # makes the network's result of that in eval mode
    finish: Callable[[Tensor], Tensor]  # likewise, in either mode
    run: Callable[[Tensor], Tensor]  # from the last stage's map to the result
    hides: bool = False  # whether nobody sees the map that run takes: it may have any layout

    @property
    def window(self) -> int | None:
        """The largest side of maps of which pool is the mean; None where it is of all."""
        size: Any = getattr(self.pool, "kernel_size", None)
        return size if type(self.pool) is nn.AvgPool2d else None


class Step(NamedTuple):
    """A convolution with BatchNorm and activation: modules that forward calls in turn."""

    place: str  # for reasons
    modules: tuple[nn.Module, ...]
    read: Callable[[], structure.Layer]  # takes them apart, or raises RefusedError


class Stage(NamedTuple):
    """A block, or a sequence of blocks."""

    place: str  # for reasons
    module: nn.Module
    arguments: Mapping[str, Any] = MappingProxyType({})  # what forward gives it beside the map


class Course(NamedTuple):
    """What a network's forward calls in turn."""

    containers: tuple[nn.Module, ...]  # modules around these that only hand on
    stem: Step
    stages: tuple[Stage, ...]
    last: Step | None  # a classifier's last convolution


class InferenceParts(Protocol):
    """A network's modules, as its forward runs them.

    Attributes:
        head: what follows the last stage; None in an encoder.
        taps: the places whose maps an encoder gives: 0 for the stem, then the stages.
        identity: what differs where forward runs other modules; without a reference to the network.
        code: the code that forward and its modules run.
        calling_code: of that, what runs around the modules.
        present: makes what forward returns of the images and the logits or maps; None where it
            returns these.
    """

    @property
    def head(self) -> Head | None: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def identity(self) -> tuple[object, ...]: ...
    @property
    def code(self) -> stock.Stock: ...
    @property
    def calling_code(self) -> stock.Stock: ...
    @property
    def present(self) -> Callable[[Tensor, Any], Any] | None: ...

    def course(self) -> Course:
        """What forward calls in turn.

        Raises:
            RefusedError: it is not known, with the reason.
        """


@dataclass(frozen=True)
class FeaturesParts:
    """`InferenceParts` of a network whose stem, stages and last convolution are one sequence.

    Attributes:
        split: an encoder's stage whose blocks count one by one among taps, -1 for none.
    """

    features: nn.Module
    head: Head | None
    taps: tuple[int, ...]
    code: stock.Stock = stock.NETWORK
    calling_code: stock.Stock = stock.HEAD
    split: int = -1
    present: Callable[[Tensor, Any], Any] | None = None

    @property
    def layers(self) -> tuple[Any, ...]:
        """Stem, stages and last convolution."""
        return in_order(self.features)

    @property
    def identity(self) -> tuple[object, ...]:
        head = self.head
        rest = () if head is None else (head.pool, head.flattens, head.classifier)
        return (self.features, self.taps, *rest)

    def course(self) -> Course:
        try:
            require_sequence(self.features)
            children = self.layers
            if len(children) < (3 if self.head else 2):
                raise RefusedError(f" has {len(children)} layers")
            if None in children:
                raise RefusedError(" has a layer that is None")
        except RefusedError as refused:
            raise RefusedError(f"features{refused}") from None
        stages = children[1:-1] if self.head else children[1:]
        last = None
        if self.head:
            last = whole(f"features.{len(children) - 1}", children[-1])
        places = [Stage(f"features.{i}", stage) for i, stage in enumerate(stages, start=1)]
        containers = [self.features]
        if self.split > 0:
            place, stage, _ = places[self.split - 1]
            try:
                require_sequence(stage)
            except RefusedError as refused:
                raise RefusedError(f"{place}{refused}") from None
            containers.append(stage)
            blocks = [Stage(f"{place}.{i}", block) for i, block in enumerate(in_order(stage))]
            places[self.split - 1 : self.split] = blocks
        stem = whole("features.0", children[0])
        return Course(tuple(containers), stem, tuple(places), last)


def require_sequence(module: nn.Module) -> None:
    """Raises RefusedError for a module that does more than call its children in turn."""
    if type(module) not in structure.SEQUENCES:
        raise RefusedError(f" is {type(module).__name__}, not Sequential")
    structure.require(module)


def whole(place: str, module: nn.Module) -> Step:
    """The step of a module that has all three."""

    def read() -> structure.Layer:
        structure.require(module)
        found: structure.Layer = structure.structure_of(module)
        return found

    return Step(place, (module,), read)


def averages_pixels(head: Head) -> bool:
    """Whether pooling is the plain mean over all pixels of maps up to `head.window`, [N,C]."""
    pool: Any = head.pool
    try:
        structure.require(pool, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
    except structure.RefusedError:
        return False
    if type(pool) is nn.AvgPool2d:
        return head.flattens and _is_one_window(pool)
    return head.flattens and pool.output_size in (1, (1, 1))


def _is_one_window(pool: Any) -> bool:
    """Whether an nn.AvgPool2d takes the mean of maps that are no larger than its kernel."""
    size = pool.kernel_size
    is_plain = type(size) is int and size > 0 and pool.stride == size and pool.padding == 0
    return is_plain and pool.ceil_mode is True and pool.divisor_override is None


class Network(NamedTuple):
    """A class of networks.

    Attributes:
        parts: gives the parts of an instance.
        steps: names of the methods that forward calls.
        methods: these and `ENTRIES`, as they were when the class was entered.
    """

    parts: Callable[[Any], InferenceParts]
    steps: frozenset[str]
    methods: dict[str, Any]


_NETWORKS: dict[type, Network] = {}


def enter(
    kind: type, parts: Callable[[Any], InferenceParts], steps: frozenset[str] = STEPS
) -> None:
    """Enters a class of networks; its subclasses are networks, too, where they change no step."""
    methods = {name: getattr(kind, name) for name in steps | ENTRIES if hasattr(kind, name)}
    _NETWORKS[kind] = Network(parts, steps, methods)


def network_class(kind: type) -> type | None:
    """The class that was entered which a class is, or derives from; None for no network."""
    return next((base for base in kind.__mro__ if base in _NETWORKS), None)


def _network_of(kind: type) -> tuple[type, Network]:
    entered = network_class(kind)
    assert entered is not None, kind
    return entered, _NETWORKS[entered]


def parts_of(model: Any) -> InferenceParts:
    """The modules that a network's forward runs."""
    return _network_of(type(model))[1].parts(model)


def presented(model: Any, x: Tensor, y: Any) -> Any:
    """What forward returns of images x, given the logits or maps y."""
    present = parts_of(model).present
    return y if present is None else present(x, y)


def is_own(model: Any, name: str) -> bool:
    """Whether what the instance has under the name of a method is its class's, bound to it."""
    method = model.__dict__[name]
    is_bound = isinstance(method, MethodType) and method.__self__ is model
    return is_bound and method.__func__ is getattr(type(model), name)


def changed_method(model: Any) -> str | None:
    """Which of the methods is not that of the class of networks that was entered, in words.

    Neither a subclass nor an instance may have another, nor may that class itself by now. A
    `forward` in the instance may be its class's, to which Accelerate's `unwrap_model` sets it.
    """
    return _changed(model, ENTRIES)


def changed_step(model: Any) -> str | None:
    """As `changed_method` for what forward calls.

    A subclass's forward may call the class's own, and so may one that is set on the instance.
    """
    return _changed(model, frozenset())


def _changed(model: Any, entries: frozenset[str]) -> str | None:
    state, kind = model.__dict__, type(model)
    entered, network = _network_of(kind)
    names = network.steps | entries
    if not state.keys().isdisjoint(names):
        for name in sorted(names & state.keys()):
            if name != "forward" or not is_own(model, name):
                return f"its {name} is patched"
    methods = network.methods
    changed = [name for name in names if getattr(kind, name, None) is not methods.get(name)]
    if not changed:
        return None
    name = min(changed)
    is_replaced = getattr(entered, name, None) is not methods.get(name)
    return f"{entered.__name__}.{name} is replaced" if is_replaced else f"it overrides {name}"
