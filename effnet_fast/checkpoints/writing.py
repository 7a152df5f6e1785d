"""From named tensors to a file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from effnet_fast import files
from effnet_fast.checkpoints.plain import first_problems, memory_of
from effnet_fast.checkpoints.reading import HUB_FILES, remembered

SAFETENSORS = ".safetensors"
PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in what safetensors says


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
            of file keep the family that a network from a checkpoint put into its state dict. Equal
            tensors and entries make equal bytes of a safetensors file.

    Raises:
        ValueError: another suffix; an entry that is no tensor, or one without plain memory (sparse,
            quantized, on the meta device); or a pipe or device is at `path`.
        OSError: the folder cannot be written to, the disk is full, or memory is lacking.
    """
    suffix = check_suffix(path)
    name = os.fspath(path)
    with files.naming_file(name):
        if problems := first_problems(state):
            raise ValueError(f"cannot be written: {problems}")
        tensors = _own(state)
        # nn.Module.state_dict sets this attribute: versions of modules, and whose the network is.
        if (versions := getattr(state, "_metadata", None)) is not None:
            vars(tensors)["_metadata"] = versions
    metadata = {"format": "pt", **remembered(state), **(metadata or {})}
    with files.replacing(path) as temporary, files.naming_file(name):
        if suffix == SAFETENSORS:
            permissions = temporary.stat().st_mode
            with _told_plainly():
                save_file(tensors, temporary, metadata=metadata)
                _sort_metadata(temporary)
            os.chmod(temporary, permissions)  # safetensors makes files for their owner alone
        else:
            with open(temporary, "wb") as file:
                save_pickle(tensors, file)


def save_folder(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    texts: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder in the layout of the Hugging Face Hub: it is there whole or not at all.

    Args:
        state: named tensors, for model.safetensors.
        path: of the folder, which must not exist.
        texts: the content of its JSON files by their names.
        metadata: as for `save`.

    Raises:
        ValueError, OSError: as `save`; something is at `path`.
    """
    target = Path(path)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".effnet-fast-", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(target.parent)) from error
    try:
        with files.naming_file(target):
            save(state, temporary / HUB_FILES[0], metadata)
        for name, content in texts.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            with files.replacing(temporary / name) as file:
                file.write_text(text, encoding="utf-8")
        temporary.chmod(stat.S_IMODE(target.parent.stat().st_mode) & 0o777)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Puts the text entries of a safetensors file in order of their names.

    safetensors writes them in an order that differs from call to call. The header keeps its length:
    https://github.com/huggingface/safetensors#format.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise ValueError(f"a header of {length} bytes is written anew with {len(text)}")
        file.seek(8)
        file.write(text.ljust(length))


def _own(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The tensors without gaps, each in memory of its own and no more of it, as it is saved whole.

    safetensors refuses tensors that share memory, and torch.save keeps them tied.
    """
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    taken: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().resolve_conj().resolve_neg().contiguous()
        memory = memory_of(tensor)
        if memory in taken or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(memory)
        tensors[key] = tensor
    return tensors


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """The system's error within one of safetensors, which tells it in words alone.

    It has no place for some dtypes, and tells that as a KeyError.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"a {SAFETENSORS} file cannot hold {error}") from error
    except SafetensorError as error:
        if match := OS_ERROR.search(str(error)):
            number = int(match[1])
            raise OSError(number, os.strerror(number)) from error
        raise


def save_pickle(content: Any, file: IO[bytes]) -> None:
    """torch.save, with the error of a write that fails instead of what torch makes of it."""
    failures: list[OSError] = []

    class Recorder:
        """Writes to the file, and keeps the error."""

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(content, cast(IO[bytes], Recorder()))  # of a file it calls these two alone
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        raise
