"""The front of another package's network: its forward by a plan, or by its layers in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast.inference import parts
from effnet_fast.inference.own_plan import forget_plan, plan_of
from effnet_fast.inference.parts import Head
from effnet_fast.models.execution import backend_of, on_backend
from effnet_fast.models.pooled_head import call_step, course_of, run_pooled_head
from effnet_fast.modules import foreign, in_turn, observed, stock
from effnet_fast.modules.foreign import RECIPES, Fused, Recipe


class Parts(NamedTuple):
    """`parts.InferenceParts` of another package's network.

    Attributes:
        make_course: as `InferenceParts.course`.
        present: as `InferenceParts.present`.
    """

    head: Head | None
    taps: tuple[int, ...]
    identity: tuple[object, ...]
    code: stock.Stock
    make_course: Callable[[], parts.Course]
    present: Callable[[Tensor, Any], Any] | None = None

    @property
    def calling_code(self) -> stock.Stock:
        """All of it: forward is another package's."""
        return self.code

    def course(self) -> parts.Course:
        """What forward calls in turn."""
        return self.make_course()


class FusedNetwork(Fused):
    """In front of a network's class: a forward from packed weights, or by its layers in turn.

    Attributes:
        plan: as in `EfficientNet`.
    """

    plan = True

    def forward(self, x: Tensor) -> Any:
        forward: Callable[..., Any] = type(self).own.forward
        if torch.compiler.is_compiling():
            return forward(self, x)
        if forward is type(self).forward_stock:
            y = run(self, x)
            if y is not None:
                return y
        with on_backend(self):
            return forward(self, x)


def run(model: Any, x: Tensor) -> Any:
    """The network's result; None where its own forward has to run."""
    backend = backend_of(model)
    if model.training:
        forget_plan(model)
        y = None
    else:
        y = plan_of(model).run(model, x, backend)
    if y is None:
        y = run_pooled_head(model, x, backend)
    if y is None:
        y = _maps(model, x, backend)
    return None if y is None else parts.presented(model, x, y)


def _maps(model: Any, x: Tensor, backend: str) -> list[Tensor] | None:
    """An encoder's maps by its layers in turn; None for a classifier or where that is not known."""
    if backend == "reference" or not isinstance(x, Tensor) or observed.wants_operators(x):
        return None
    course, taps = course_of(model), parts.parts_of(model).taps
    if course is None or not taps:
        return None
    with on_backend(model):
        walk = in_turn.Walk(x)
        call_step(walk, course.stem)
        maps = [walk.result()] if 0 in taps else []
        for index, stage in enumerate(course.stages, start=1):
            walk.call(stage.module, **stage.arguments)
            if index in taps:
                maps.append(walk.result())
    return maps


def enter(
    path: str,
    steps: tuple[str, ...],
    make_parts: Callable[[Any, stock.Stock], parts.InferenceParts],
    below: tuple[str, ...],
    code: tuple[str, ...] = (),
    inner: tuple[tuple[str, type], ...] = (),
    settings: tuple[tuple[str, str], ...] = (),
    front: type[Fused] = FusedNetwork,
    torch_code: tuple[stock.Stock, ...] = (),
) -> None:
    """Enters the recipe of a network.

    Args:
        path: of its class.
        steps: the methods that its forward calls.
        make_parts: of an instance and its code.
        below: paths of classes of blocks and layers in it.
        code, inner, settings, front: as in `Recipe`.
        torch_code: tables of PyTorch's own code that forward runs beside that of all networks.
    """
    methods = tuple(f"{path}.{name}" for name in ("forward", *steps))

    def finish(kind: type, fused: type) -> None:
        for either in (kind, fused):
            parts.enter(
                either, lambda model: make_parts(model, foreign.code_of(kind)), frozenset(steps)
            )

    RECIPES[path] = Recipe(
        (*methods, *code), None, front, (stock.NETWORK, stock.FLATTEN, *torch_code),
        settings=settings, parts=below, is_block=False, finish=finish, inner=inner,
    )  # fmt: skip
