"""What runs a network from packed weights, and what its forward makes of the result."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from effnet_fast.inference.network_spec import LAST_MAP, LOGITS, TAPS, NetworkSpec


class Engine(Protocol):
    """Packed weights of a network, and the call that runs it.

    Attributes:
        spec: what is packed.
        device: of the weights, and of the images.
        nbytes: of the packed weights.
        captured: whether a CUDA graph that a caller captures reads the weights.
    """

    spec: NetworkSpec
    device: torch.device
    nbytes: int
    captured: bool

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """Logits or pooled features [N,C] where the network has them, and the maps [N,C,H,W].

        Args:
            x: images [N,C,H,W] on the engine's device, with any strides.
            dtype: of the results.

        Raises:
            ValueError: a convolution has no output.
        """

    def close(self) -> None:
        """Frees what only later calls would use; the engine can still be called."""


def run_network(model: Any, engine: Engine, x: Tensor, dtype: torch.dtype) -> Any:
    """The result of the network's forward: the engine's, and modules on it where those are left.

    Args:
        model: the network that the engine was packed from.
        engine: runs it.
        x: images [N,C,H,W].
        dtype: of the result.
    """
    spec = engine.spec
    if spec.result == LOGITS:
        y, _ = engine(x, dtype)
        assert y is not None
        return y
    if spec.result == TAPS:
        return engine(x, dtype)[1]
    y, maps = engine(x, spec.dtype)
    head = model.inference_parts().head
    y = head.run(maps[0]) if spec.result == LAST_MAP else head.classifier(y)
    return y.to(dtype)
