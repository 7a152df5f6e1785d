"""Packages beyond the core's, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a package that an extra of this one installs.

    Args:
        module: the name to import, "kornia.augmentation".
        extra: the extra that brings it, "train".

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is installed, and lacks something itself
        raise ImportError(
            f"this needs {package}: pip install 'effnet-fast[{extra}]'", name=package
        ) from error
