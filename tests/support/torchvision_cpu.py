"""What torchvision needs to import beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
import sys

import torch


def define_missing_ops() -> torch.library.Library | None:
    """Declares torchvision's two nms ops where its own extension cannot be loaded.

    torchvision's wheel on PyPI is linked to CUDA; beside a CPU torch its extension does not load
    and `import torchvision` then fails for want of these schemas. The networks need neither.
    Only that import can tell: its releases load libraries of different names, and what is loaded
    twice ends the process.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


# The declarations live as long as the object does.
OPS = define_missing_ops()
