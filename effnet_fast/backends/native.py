"""Access to the compiled extension, without failing the import where it is missing.

It is loaded along with this module, because torch.compile can read a global but follow no import.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first: the extension shares the OpenMP runtime that torch has loaded)

import effnet_fast


def _load_own(name: str) -> ModuleType:
    """A module of this package's own folder; an editable install offers that of another tree."""
    spec = importlib.util.find_spec(name)
    folders = [Path(folder).resolve() for folder in effnet_fast.__path__]
    if spec and spec.origin and Path(spec.origin).parent.resolve() not in folders:
        raise ImportError(f"{spec.origin} belongs to another copy of effnet_fast", name=name)
    return importlib.import_module(name)


def foreign_reason(module: ModuleType) -> str | None:
    """Why a module of triton_kernels is not of this copy of the package; None where it is."""
    package, folder = (Path(str(m.__file__)).resolve().parent for m in (effnet_fast, module))
    if folder.parent in (package, package.parent):  # installed, or a source tree
        return None
    return f"{folder} belongs to another copy of effnet_fast than {package}: pip install that one"


def _try_load() -> tuple[ModuleType | None, str]:
    try:
        return _load_own("effnet_fast._C"), ""
    except ImportError as error:
        root = Path(__file__).resolve().parents[2]
        if (root / "csrc").is_dir() and (root / "setup.py").is_file():
            return None, (
                f"effnet_fast was imported from the source tree {root}, which holds no compiled "
                f"effnet_fast._C: run 'pip install -e .' or 'pip install .' there ({error})"
            )
        return None, (
            f"the compiled extension effnet_fast._C cannot be loaded ({error}); "
            f"reinstall with 'pip install --force-reinstall --no-deps effnet-fast' and g++ present"
        )


def _try_load_simt() -> ModuleType | None:
    try:
        return _load_own("effnet_fast._C_simt")
    except ImportError:
        return None


_MODULE, _REASON = _try_load()
_SIMT = _try_load_simt()
_warned = False


def warn_if_missing() -> None:
    """Says once in a process that "auto" has to do without the extension."""
    global _warned
    if _REASON and not _warned:
        _warned = True
        warnings.warn(f"effnet_fast runs without its kernels, slowly: {_REASON}", stacklevel=2)


warn_if_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while tracing


def unavailable_reason() -> str | None:
    """Why the extension cannot be used, or None where it can."""
    return _REASON or None


@functools.cache
def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is missing or cannot be loaded; the text says what to do.
    """
    if _MODULE is None:
        raise RuntimeError(_REASON)
    return _MODULE


def simt_unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot be run on the CPU, or None where they can."""
    return None if _SIMT else "this build has no host run of the CUDA kernels: EFFNET_FAST_SIMT=1"


def load_simt() -> ModuleType:
    """The host run of the CUDA kernels, which tests alone have.

    Raises:
        RuntimeError: it was not built.
    """
    if _SIMT is None:
        raise RuntimeError(simt_unavailable_reason())
    return _SIMT
