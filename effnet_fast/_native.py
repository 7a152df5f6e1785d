"""Access to the compiled extension, without failing the import where it is missing."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first: the extension shares the OpenMP runtime that torch has loaded)


@functools.cache
def _try_load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("effnet_fast._C"), ""
    except ImportError as error:
        root = Path(__file__).resolve().parent.parent
        if (root / "csrc").is_dir() and (root / "setup.py").is_file():
            return None, (
                f"effnet_fast was imported from the source tree {root}, which holds no compiled "
                f"effnet_fast._C and shadows an installed package: run 'pip install -e .' there, "
                f"or start Python elsewhere ({error})"
            )
        return None, (
            f"the compiled extension effnet_fast._C cannot be loaded ({error}); "
            f"reinstall with 'pip install --force-reinstall --no-deps effnet-fast' and g++ present"
        )


def unavailable_reason() -> str | None:
    """Why the extension cannot be used, or None where it can."""
    return _try_load()[1] or None


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is missing or cannot be loaded; the text says what to do.
    """
    module, reason = _try_load()
    if module is None:
        raise RuntimeError(reason)
    return module
