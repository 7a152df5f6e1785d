"""From named tensors to a file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from effnet_fast.checkpoints.reading import remembered

SAFETENSORS = ".safetensors"
PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of a file to be written.

    Raises:
        ValueError: it is none of SUFFIXES.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{os.fspath(path)}: the suffix must be one of {', '.join(SUFFIXES)}")
    return suffix


def save(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a state dict; a reader of `path` sees the old file or the whole new one.

    Args:
        state: named tensors of any device.
        path: `.safetensors`, or `.pth`, `.pt`, `.bin` for torch.save. An existing file is
            replaced, even one that the tensors are mapped from.
        metadata: text entries of a safetensors file; other files have no place for them. Both kinds
            of file keep the family that a network from a checkpoint put into its state dict.

    Raises:
        ValueError: another suffix.
        OSError: the folder cannot be written to.
    """
    suffix = check_suffix(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    tensors = OrderedDict((key, _own(value)) for key, value in state.items())
    if hasattr(state, "_metadata"):  # versions of modules, and whose the network is
        # The attribute that nn.Module.state_dict sets on its dict; no type declares it.
        tensors._metadata = state._metadata  # type: ignore[attr-defined]
    metadata = {"format": "pt", **remembered(state), **(metadata or {})}
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))
    try:
        with open(temporary, "xb") as file:  # raises OSError, which safetensors would wrap
            permissions = os.fstat(file.fileno()).st_mode
            if suffix != SAFETENSORS:
                torch.save(tensors, file)
        if suffix == SAFETENSORS:
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, permissions)  # safetensors makes files for their owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _own(tensor: Tensor) -> Tensor:
    """The tensor without gaps and without a larger storage behind it, which would be saved too."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
