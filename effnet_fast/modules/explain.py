"""Why a module runs unfused."""

from __future__ import annotations

from torch import nn

from effnet_fast import backends
from effnet_fast.modules import dense_block, observed, structure
from effnet_fast.modules.dense_block import DenseBlock, Found
from effnet_fast.ops.registration import autocast


def explain(module: nn.Module, op: str | None = None) -> str | None:
    """Why the module would run unfused under the current backend; None where it is fused.

    Asked for an input of its first weight's dtype and device; in eval mode, for a call that wants
    no gradient. `op` is the op that does it, where that is not the module's own.
    """
    backend = backends.current_backend()
    if backend == "reference":
        return 'the backend is "reference"'
    if reason := observed.recorder():
        return reason
    try:
        found: Found = structure.structure_of(module)
    except structure.RefusedError as refused:
        return str(refused)
    conv = found.first.conv
    x, _ = autocast(conv.weight.new_empty((1, conv.in_channels, 1, 1)))
    args = found.op_args(x, inference=not found.first.by_batch)
    assert args is not None
    reason = backends.explain(backend, op or found.op, args)
    if reason is None and isinstance(found, DenseBlock):
        return dense_block.obstacle(backends.choose(backend, found.op, args))
    return reason
