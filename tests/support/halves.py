"""Parity of whole networks in 16 bits, where one tensor alone is a matter of luck."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import networks
from networks import Trio, run_network
from tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_no_worse_than


def without_random_layers(model: nn.Module) -> None:
    """bf16 and fp32 draws differ."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0


def assert_errors(run: Callable[[nn.Module], dict[str, Tensor]], models: Trio, x: Tensor) -> None:
    """Holds all tensors of a kind together to the rule of parity, with the floor of float32.

    One bias of a squeeze-and-excitation alone is a matter of luck. Each counts in units of its
    size, or of a hundredth of the largest of its kind: some vanish but for rounding.
    """
    actual, stock = run(models.actual), run(models.stock)
    backward = any(name.startswith("grad ") for name in stock)
    exact = run_network(models.exact, x.double(), backward)
    assert list(actual) == list(stock)
    kinds: dict[str, list[str]] = {}
    for name, tensor in actual.items():
        assert tensor.dtype is stock[name].dtype, name
        if tensor.is_floating_point():
            kinds.setdefault(name.split(" ")[0], []).append(name)
        else:
            assert torch.equal(tensor, stock[name]), name
    for kind, names in kinds.items():
        sizes = {name: networks.rms(exact[name]) for name in names}
        units = {name: size + 0.01 * max(sizes.values()) for name, size in sizes.items()}
        factor = GRADIENT_FACTOR if kind == "grad" else OUTPUT_FACTOR
        together = (
            torch.cat([results[name].double().flatten() / units[name] for name in names])
            for results in (actual, stock, exact)
        )
        try:
            assert_no_worse_than(*together, factor, dtype=torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error
