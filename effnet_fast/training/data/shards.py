"""Shards in WebDataset's format: tar files whose members share a key per sample.

A shard is listed once, from its headers; images are then read where they lie, in any order. So an
epoch counts every sample exactly once, for any number of processes and workers. Shards of a server
are copied to a folder first.

Format: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from effnet_fast.pretrained import downloads
from effnet_fast.training.data.decoding import Draw, UnreadableImageError
from effnet_fast.training.data.folders import SUFFIXES

REMOTE = ("http://", "https://")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
CLASS, JSON = ".cls", ".json"  # members with a sample's label
LABEL_KEYS = ("label", "cls")  # of the JSON
CLASS_FILE = "classes.txt"  # beside local shards: a class name per line
OPEN_SHARDS = 16  # per process


class Member(NamedTuple):
    """Where an image lies: a part of a file."""

    shard: str
    offset: int  # bytes
    size: int


class Entry(NamedTuple):
    """A sample of a shard."""

    name: str  # "SHARD/KEY.jpg"
    member: Member
    label: Any  # as the shard has it; None without one


def is_pattern(data: str) -> bool:
    """Whether a text names shards: .tar files, one or, with braces or *, several."""
    return data.endswith(".tar")


def expand(pattern: str) -> list[str]:
    """The shards that a pattern names: "x-{000..007}.tar", "{a,b}.tar", "x-*.tar".

    Raises:
        ValueError: a range that runs backwards.
        FileNotFoundError: a pattern with * that fits nothing.
    """
    pieces: list[list[str]] = []
    for number, piece in enumerate(BRACES.split(pattern)):
        if number % 2 == 0:
            pieces.append([piece])
        elif bounds := RANGE.fullmatch(piece):
            first, last = bounds.groups()
            if int(last) < int(first):
                raise ValueError(f"{pattern}: the range {piece} runs backwards")
            width = len(first)
            pieces.append([f"{n:0{width}d}" for n in range(int(first), int(last) + 1)])
        else:
            pieces.append(piece.split(","))
    shards = ["".join(parts) for parts in itertools.product(*pieces)]
    if pattern.startswith(REMOTE) or not set(pattern) & set("*?["):
        return shards
    found = [path for shard in shards for path in sorted(glob.glob(shard))]
    if not found:
        raise FileNotFoundError(f"no shards fit {pattern}")
    return found


def local(shard: str, cache: str | os.PathLike[str] | None) -> Path:
    """A shard as a file: its own, or a copy of a server's.

    Args:
        cache: where copies lie; None means torch.hub.get_dir()/shards.

    Raises:
        ConnectionError, OSError: it cannot be fetched.
    """
    if not shard.startswith(REMOTE):
        return Path(shard)
    folder = Path(torch.hub.get_dir()) / "shards" if cache is None else Path(cache)
    # Shards of one name lie under many addresses.
    digest = hashlib.sha256(shard.encode()).hexdigest()[:12]
    return downloads.copy(shard, folder / f"{digest}-{os.path.basename(shard)}", progress=False)


def entries(shard: Path) -> Iterator[Entry]:
    """Lists a shard's samples from its headers, in the order of the file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no tar file, or is truncated; a label that cannot be read; a sample of
            two images.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            size = os.path.getsize(shard)
            for key, members in itertools.groupby(_members(archive), lambda m: _split(m.name)[0]):
                entry = _entry(shard, archive, key, list(members), size)
                if entry is not None:
                    yield entry
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: no tar file, or a truncated one: {error}") from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        cast(Any, archive).members = []  # millions would stay
        if member.isfile():
            yield member


def _split(name: str) -> tuple[str, str]:
    """A member's key and suffix: the suffix begins at the first dot of the base name."""
    folder, base = os.path.split(name)
    stem, dot, suffix = base.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()


def _entry(
    shard: Path, archive: tarfile.TarFile, key: str, members: Sequence[tarfile.TarInfo], size: int
) -> Entry | None:
    by_suffix = {_split(member.name)[1]: member for member in members}
    found = [suffix for suffix in by_suffix if suffix in SUFFIXES]
    if not found:
        return None
    if len(found) > 1 or len(by_suffix) < len(members):
        raise ValueError(
            f"{shard}: sample {key!r} has {len(members)} members, one image is allowed"
        )
    image = by_suffix[found[0]]
    if image.offset_data + image.size > size:
        raise ValueError(f"{shard}: truncated in {image.name!r}")
    member = Member(str(shard), image.offset_data, image.size)
    label: Any = None
    if CLASS in by_suffix:
        label = _text(archive, by_suffix[CLASS]).strip()
    elif JSON in by_suffix:
        try:
            content = json.loads(_text(archive, by_suffix[JSON]))
        except ValueError as error:
            raise ValueError(f"{shard}: {by_suffix[JSON].name}: {error}") from error
        names = [name for name in LABEL_KEYS if isinstance(content, dict) and name in content]
        label = content[names[0]] if names else None
    return Entry(f"{shard}/{image.name}", member, label)


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return "" if file is None else file.read().decode("utf-8", "replace")


def read_member(source: Member, draw: Draw) -> tuple[bytes, None]:
    """The bytes of an image in a shard.

    Raises:
        UnreadableImageError: the shard is shorter than when it was listed, or gone.
    """
    try:
        content = os.pread(_descriptor(os.getpid(), source.shard), source.size, source.offset)
    except FileNotFoundError as error:
        raise UnreadableImageError(source.shard, "the shard is gone") from error
    if len(content) < source.size:
        raise UnreadableImageError(source.shard, "the shard is truncated")
    return content, None


class _OpenFile:
    """A descriptor that is closed when nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(OPEN_SHARDS)
def _opened(process: int, path: str) -> _OpenFile:
    return _OpenFile(path)


def _descriptor(process: int, path: str) -> int:
    return _opened(process, path).number


def class_file(shards: Sequence[str]) -> list[str] | None:
    """The class names that lie beside local shards, or None."""
    path = Path(shards[0]).parent / CLASS_FILE
    if shards[0].startswith(REMOTE) or not path.is_file():
        return None
    return [line for line in path.read_text("utf-8").splitlines() if line]


def open_shards(
    pattern: str, cache: str | os.PathLike[str] | None = None
) -> tuple[list[Entry], list[int], list[str] | None]:
    """Lists all samples that a pattern names.

    Returns:
        The samples; how many each shard has; class names where a file beside them has them.

    Raises:
        OSError, ValueError: as `entries`.
    """
    names = expand(pattern)
    samples: list[Entry] = []
    sizes = []
    for name in names:
        found = list(entries(local(name, cache)))
        samples += found
        sizes.append(len(found))
    return samples, sizes, class_file(names)
