"""The CPU's passes of a staged MBConv, as `mbconv_passes` registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..reference import mbconv_passes as reference
from .registration import nhwc


def _by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        results = function(*args[:-1])
        if isinstance(results, Tensor):
            return _laid_out(results)
        return tuple(_laid_out(result) for result in results)

    return run


def _laid_out(tensor: Tensor) -> Tensor:
    return nhwc(tensor) if tensor.dim() == 4 else tensor


expand = _by_reference(reference.expand)
depthwise = _by_reference(reference.depthwise)
squeeze = _by_reference(reference.squeeze)
project = _by_reference(reference.project)
finish = _by_reference(reference.finish)
finish_backward = _by_reference(reference.finish_backward)
project_backward = _by_reference(reference.project_backward)
excite_backward = _by_reference(reference.excite_backward)
depthwise_backward = _by_reference(reference.depthwise_backward)
expand_backward = _by_reference(reference.expand_backward)
