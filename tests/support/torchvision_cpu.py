"""What torchvision needs to import beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def define_missing_ops() -> torch.library.Library | None:
    """Declares torchvision's two nms ops where its own extension cannot be loaded.

    torchvision's wheel on PyPI is linked to CUDA; beside a CPU torch its extension does not load
    and `import torchvision` then fails for want of these schemas. The networks need neither.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


# The declarations live as long as the object does.
OPS = define_missing_ops()
