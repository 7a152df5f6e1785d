"""A classifier's forward with its last convolution and the pooling as one op.

Only where nothing can see the map between the two: no hook, no other pooling, no method of one's
own, and nothing that records the operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from effnet_fast.inference.parts import (
    Course,
    InferenceParts,
    Step,
    averages_pixels,
    changed_step,
    parts_of,
)
from effnet_fast.models.execution import on_backend
from effnet_fast.modules import fused_forward, in_turn, observed, structure


def pooled_module(model: Any) -> nn.Module | None:
    """The last convolution's module where the network's forward pools it at once."""
    course = course_of(model)
    if course is None or course.last is None or _pooled_layer(model, course.last) is None:
        return None
    return course.last.modules[0]


def course_of(model: Any) -> Course | None:
    """What forward calls in turn, where calling that is all it does; None where it may do more."""
    if changed_step(model):
        return None
    given: InferenceParts = parts_of(model)
    try:
        given.calling_code.require()
        structure.refuse_global_hooks()
        return given.course()
    except structure.RefusedError:
        return None


def _pooled_layer(model: Any, step: Step) -> structure.Layer | None:
    """The last convolution, where the plain mean over all pixels follows."""
    head = parts_of(model).head
    if head is None or not averages_pixels(head):
        return None
    try:
        found = step.read()
    except structure.RefusedError:
        return None
    pools = isinstance(found, structure.Layer) and found.kind == structure.POINTWISE
    return found if pools and found.activates else None


def call_step(walk: in_turn.Walk, step: Step) -> None:
    """Calls the modules of a step, as one op where they are several."""
    if len(step.modules) == 1:
        walk.call(step.modules[0])
    else:
        walk.call_as_one(step.modules, partial(fused_forward.run_layer, step.read))


def run_pooled_head(model: Any, x: Tensor, backend: str) -> Tensor | None:
    """A classifier's forward by that op on a backend; None where features must run as a whole."""
    if backend == "reference" or not isinstance(x, Tensor) or observed.wants_operators(x):
        return None
    course, head = course_of(model), parts_of(model).head
    if course is None or head is None:
        return None
    with on_backend(model):
        walk = in_turn.Walk(x)
        call_step(walk, course.stem)
        for stage in course.stages:
            walk.call(stage.module, **stage.arguments)
        last = course.last and _pooled_layer(model, course.last)
        head = parts_of(model).head  # a layer's hook may have changed it
        assert head is not None
        if last and head.window is not None and max(walk.last.shape[2:]) > head.window:
            last = None
        pooled = fused_forward.run_pooled(last, walk.last) if last else None
    return head.run(walk.result()) if pooled is None else head.finish(pooled)
