"""Whether each block's expansion and depthwise convolution run as one kernel on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from effnet_fast.cli import common
from effnet_fast.models.variants import Variant
from effnet_fast.scaling.counts import groups
from effnet_fast.triton_kernels import expand_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = (
    "One kernel (fused) or two (separate) for a block's expansion and depthwise convolution in "
    "inference with Triton,\nwith the bytes and the time that the model of "
    "triton_kernels/expand_choice.py predicts on an H200. Predictions, not measurements."
)


def block_plans(
    variant: Variant, resolution: int | None = None, *, batch: int = 1, dtype: str = "fp32"
) -> list[dict[str, Any]]:
    """The alike blocks of each stage that expand, with what the Triton backend makes of them.

    Returns:
        each with "stage", "blocks" (how many), "in_channels", "channels", "side" of the input,
        "kernel", "stride"; "plan", "fused" or "separate", its "source" and, where the fused kernel
        is out of the question, the "reason"; "bytes" and "seconds", predicted for the batch, by
        plan.
    """
    x = torch.empty(0, dtype=DTYPES[dtype], device="meta")
    rows = []
    for group in groups(variant, resolution):
        if group.kind != "block" or not group.expands:
            continue
        expand, depthwise = group.convs["expand"], group.convs["depthwise"]
        shape = expand_choice.Shape(
            batch, expand.in_channels, expand.out_channels, expand.side, expand.side,
            depthwise.side, depthwise.side, depthwise.kernel, depthwise.stride, x.element_size(),
        )  # fmt: skip
        tile = expand_choice.tile_of(x, shape)[1]
        costs = {"separate": expand_choice.separate(shape)}
        if (cost := expand_choice.fused(shape, tile)) is not None:
            costs["fused"] = cost
        rows.append(
            {
                "stage": group.stage,
                "blocks": group.repeats,
                "in_channels": shape.in_channels,
                "channels": shape.channels,
                "side": shape.height,
                "kernel": shape.kernel,
                "stride": shape.stride,
                "plan": "fused" if expand_choice.is_joined_quicker(shape, tile) else "separate",
                "source": expand_choice.SOURCE,
                "reason": expand_choice.refusal(shape),
                "bytes": {plan: cost.bytes for plan, cost in costs.items()},
                "seconds": {plan: cost.seconds for plan, cost in costs.items()},
            }
        )
    return rows


def plan_table(rows: list[dict[str, Any]]) -> str:
    """What `effnet-fast info --plan` prints of `block_plans`."""
    head = ["stage", "blocks", "expansion", "kernel", "plan", "separate", "", "fused", ""]
    table = [head]
    for row in rows:
        side = row["side"]
        cells = [
            str(row["stage"]),
            str(row["blocks"]),
            f"{row['in_channels']}->{row['channels']} at {side}x{side}",
            f"{row['kernel']}x{row['kernel']}/{row['stride']}",
            row["plan"],
        ]
        for plan in ("separate", "fused"):
            known = plan in row["bytes"]
            cells.append(f"{row['bytes'][plan] / 1e6:,.1f} MB" if known else "-")
            cells.append(f"{row['seconds'][plan] * 1e6:,.0f} us" if known else "-")
        table.append(cells)
    reasons = sorted({row["reason"] for row in rows if row["reason"]})
    notes = [f"Not fused: {reason}." for reason in reasons]
    return "\n".join(["", common.format_table(table), WORDS, *notes])
