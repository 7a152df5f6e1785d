"""The backend that a network runs on, and memory that its blocks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from effnet_fast import backends
from effnet_fast.modules import foreign
from effnet_fast.ops import scratch


def backend_of(model: Any) -> str:
    """The backend that runs a network: its own, or the caller's where that is "auto"."""
    kind = type(model)  # an instance of another package's may have an attribute of this name
    own: str = kind.backend if foreign.is_fused(kind) else model.backend
    return backends.current_backend() if own == "auto" else own


@contextlib.contextmanager
def on_backend(model: Any) -> Iterator[None]:
    """Runs what is inside on the network's backend, with memory that its blocks share."""
    backend = backend_of(model)
    with scratch.scope():
        if backend == backends.current_backend():
            yield
        else:
            with backends.use_backend(backend):
                yield
