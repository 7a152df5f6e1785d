"""On which device and in which dtype a network is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Placement(NamedTuple):
    """A device and a dtype, None for PyTorch's defaults."""

    device: torch.device | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, device: Any, dtype: Any) -> Placement:
        """The placement that arguments ask for.

        Raises:
            TypeError: another type of device or dtype.
            ValueError: a device of no such name, or a dtype that is none of DTYPES.
            RuntimeError: the device is not there.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if device is None:
            return cls(None, dtype)
        if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device, its name or None, got {device!r}")
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r} is unknown: {error}") from error
        try:
            torch.empty(0, device=found)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise RuntimeError(f"device {str(found)!r} cannot be used here: {error}") from error
        return cls(found, dtype)

    def build(self, make: Callable[[], Any], load: Callable[[Any], None] | None = None) -> Any:
        """make()'s network there, loaded before it is rounded to the dtype.

        Raises:
            ValueError: something is loaded into a network without memory.
        """
        if load is not None and self.device is not None and self.device.type == "meta":
            raise ValueError("device 'meta' has no memory for weights: use weights=None")
        if self.device is None:
            model = make()
        else:
            with self.device:
                model = make()
        if load is not None:
            load(model)
        return model if self.dtype is None else model.to(self.dtype)
