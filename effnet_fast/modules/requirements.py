"""What a reader requires of modules: their classes and children, and nothing that a user added.

Hooks, methods and attributes of an instance do not show in its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

from torch.nn.modules import module as nn_module


class RefusedError(Exception):
    """A module that is not what the fused path knows; the text is the reason.

    The checks run at every call, so they build no text unless they fail: a reason names the module
    from the inside out, each level putting its own name in front.
    """


def refuse_global_hooks() -> None:
    """Raises RefusedError where a hook sees every module."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        raise RefusedError("a global module hook is registered")


# Methods of modules that a call looks up on the instance, which may have one of its own.
METHODS = frozenset({
    "_call_impl", "_check_input_dim", "_compiled_call_impl", "_conv_forward", "_scale", "forward",
    "forward_stock", "gate",
})  # fmt: skip


def is_altered(state: dict[str, Any]) -> Any:
    """Whether an instance with this `__dict__` has a hook or one of METHODS, or may have.

    Written out, which takes half the time of an intersection: a block asks it of 19 children.
    """
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_call_impl" in state
        or "_compiled_call_impl" in state
        or "_conv_forward" in state
        or "_check_input_dim" in state
        or "forward_stock" in state
        or "gate" in state
        or "_scale" in state  # of torchvision's squeeze-and-excitation
    )


def is_observed(state: dict[str, Any]) -> bool:
    """Whether all that was added to an instance with this `__dict__` are plain forward hooks.

    They take the module, what it took and what it gave.
    """
    return (
        bool(state["_forward_hooks"])
        and not any(state.get(name) for name in _OTHER_HOOKS)
        and patched_method(state) is None
    )


_OTHER_HOOKS = (
    *("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_hooks = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


def hidden(state: dict[str, Any], names: Iterable[str]) -> RefusedError:
    """The refusal of an instance whose `__dict__` hides one of these entries of its tables.

    Python finds `__dict__["weight"]` before `_parameters["weight"]`.
    """
    name = next(name for name in names if name in state)
    return RefusedError(f".{name} hides an entry of the module's tables")


def require(module: Any, *kinds: type) -> None:
    """Raises RefusedError for a module of none of these classes, where there are any.

    So it does for one with hooks or with one of METHODS of its instance's own.
    """
    if kinds and type(module) not in kinds:
        raise RefusedError(f" is {type(module).__name__}, not {kinds[0].__name__}")
    state = module.__dict__
    if not is_altered(state):
        return
    if any(_hooks(state)):
        raise RefusedError(" has a hook")
    if name := patched_method(state):
        raise RefusedError(f" has a patched {name}")


def patched_method(state: dict[str, Any]) -> str | None:
    """Which of METHODS an instance has of its own, by its `__dict__`."""
    names = METHODS & state.keys()
    if state.get("_compiled_call_impl") is None:  # as `Module.compile` is undone
        names -= {"_compiled_call_impl"}
    return min(names, default=None)


class Part(NamedTuple):
    """What a child has to be."""

    name: str
    kinds: dict[type, Children | None]  # one of these classes, and its children; None for any


Kinds = dict[type, "Children | None"]
# By their names, what the children of a module are.
Children = dict[tuple[str, ...], tuple[Part, ...]]


def one_of(*kinds: type) -> Kinds:
    """Classes of a `Part` with any children."""
    return dict.fromkeys(kinds)


def children_of(*allowed: Iterable[Part]) -> Children:
    """Children that may be any of these rows."""
    return {tuple(part.name for part in row): tuple(row) for row in map(tuple, allowed)}


def require_children(children: dict[str, Any], allowed: Children) -> None:
    """Raises RefusedError for children by name that are not allowed or have hooks, and theirs."""
    parts = allowed.get(tuple(children))
    if parts is None:
        raise RefusedError(f" has children {list(children)}")
    for name, kinds in parts:
        child = children[name]
        try:
            # `require` alone would take twice the time.
            if type(child) not in kinds or is_altered(s := child.__dict__):
                require(child, *kinds)
            elif (below := kinds[type(child)]) is not None:
                require_children(s["_modules"], below)
        except RefusedError as refused:
            raise RefusedError(f".{name}{refused}") from None
