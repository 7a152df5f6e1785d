"""`effnet-fast info b7`: what a network consists of and costs, stage by stage."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from effnet_fast.cli import common
from effnet_fast.cli.block_plans import block_plans, plan_table
from effnet_fast.models.variants import VARIANTS, Variant
from effnet_fast.scaling import ConvShape, convolutions
from effnet_fast.scaling.passes import MODES, PLANS, Traffic, traffic

ELEMENT_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
ONE_PER_BLOCK = ("depthwise", "fused", "dense")  # kinds of convolutions
LAST_OF_A_STAGE = ("stem", "project", "dense", "head")
BEST = {"inference": "block_fused", "training": "fast"}  # shown without --traffic
WORDS = (
    "MAC: multiply-adds of one image, which the literature on EfficientNet calls FLOPs; "
    "here FLOPs are twice as many.\n"
    "Activations: the outputs of all convolutions. Traffic: the fewest bytes that a plan carries "
    "to and from memory."
)


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="parameters, multiply-adds, memory and traffic of a network",
        description="Prints a network's layers and costs, by stage. Nothing is run.",
    )
    parser.add_argument("model", choices=tuple(VARIANTS), help="which EfficientNet")
    parser.add_argument("--batch", type=common.positive_int, default=1, help="images per call")
    parser.add_argument("--dtype", choices=tuple(ELEMENT_SIZES), default="fp32")
    parser.add_argument(
        "--resolution", type=common.positive_int, help="side in pixels (default: the model's own)"
    )
    parser.add_argument(
        "--classes", type=common.positive_int, default=1000, help="size of the logits"
    )
    parser.add_argument(
        "--traffic", action="store_true", help="the ideal traffic of every plan, stock's included"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="whether inference on a GPU joins each block's expansion and depthwise convolution "
        "in one kernel, with the predictions behind the choice",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints a table by stage, or everything as JSON."""
    report = info(
        VARIANTS[arguments.model],
        arguments.resolution,
        batch=arguments.batch,
        dtype=arguments.dtype,
        num_classes=arguments.classes,
    )
    if arguments.json:
        common.print_json(report)
    else:
        _print_report(report, all_plans=arguments.traffic)
        if arguments.plan:
            print(plan_table(report["plan"]))


def info(
    variant: Variant,
    resolution: int | None = None,
    *,
    batch: int = 1,
    dtype: str = "fp32",
    num_classes: int = 1000,
) -> dict[str, Any]:
    """Everything that `--json` prints.

    Returns:
        the conditions; "stages", a list of the stem, the stages and the head, each with its output
        "channels" and "side", number of "blocks", "parameters", "macs", "activation_bytes" and
        "traffic_bytes" (by mode and plan); "total" of the same; and "plan", what `block_plans`
        gives.
        Parameters and macs are of one image, bytes of the whole batch.
    """
    resolution = resolution or variant.resolution
    size = ELEMENT_SIZES[dtype]
    shapes = list(convolutions(variant, resolution, num_classes=num_classes))
    moved = {
        (mode, plan): traffic(
            variant, mode, plan, resolution, batch=batch, element_size=size, num_classes=num_classes
        )
        for mode, plan in PLANS
    }
    last = len(variant.stages) + 1
    names = {0: "stem", last: "head"}
    stages = []
    for number in range(last + 1):
        own = [shape for shape in shapes if shape.stage == number]
        rows = {key: [row for row in rows if row.stage == number] for key, rows in moved.items()}
        stages.append(
            {
                "name": names.get(number, f"stage {number}"),
                "blocks": sum(s.repeats for s in own if s.kind in ONE_PER_BLOCK),
                "channels": _output(own).out_channels,
                "side": _output(own).side,
                **_sums(own, rows, batch * size),
            }
        )
    return {
        "model": variant.name,
        "resolution": resolution,
        "batch": batch,
        "dtype": dtype,
        "stages": stages,
        "total": {
            "blocks": variant.blocks,
            **_sums(shapes, moved, batch * size),
        },
        "plan": block_plans(variant, resolution, batch=batch, dtype=dtype),
    }


def _output(shapes: list[ConvShape]) -> ConvShape:
    """The convolution whose output is the stage's."""
    return [s for s in shapes if s.kind in LAST_OF_A_STAGE][-1]


def _sums(
    shapes: Iterable[ConvShape], moved: dict[tuple[str, str], list[Traffic]], size: int
) -> dict[str, Any]:
    shapes = list(shapes)
    flows: dict[str, dict[str, int]] = {mode: {} for mode in MODES}
    for (mode, plan), rows in moved.items():
        flows[mode][plan] = sum(row.bytes for row in rows)
    macs = sum(s.repeats * s.macs for s in shapes)
    return {
        "parameters": sum(s.repeats * s.parameters for s in shapes),
        "macs": macs,
        "flops": 2 * macs,
        "activation_bytes": size * sum(s.repeats * s.activations for s in shapes),
        "traffic_bytes": flows,
    }


def _print_report(report: dict[str, Any], all_plans: bool) -> None:
    print(
        f"efficientnet_{report['model']}  {report['resolution']}x{report['resolution']}  "
        f"batch {report['batch']}  {report['dtype']}"
    )
    shown = [key for key in PLANS if all_plans or BEST[key[0]] == key[1]]
    head = ["", "blocks", "output", "parameters", "MMAC", "activations"]
    if all_plans:
        head = head[:1]
    table = [head + [f"{mode} {plan}" for mode, plan in shown]]
    for stage in (*report["stages"], {"name": "total", **report["total"]}):
        output = f"{stage['channels']}x{stage['side']}x{stage['side']}" if "side" in stage else ""
        row = [
            stage["name"],
            str(stage["blocks"] or ""),
            output,
            f"{stage['parameters']:,}",
            f"{stage['macs'] / 1e6:,.1f}",
            _megabytes(stage["activation_bytes"]),
        ]
        if all_plans:
            row = row[:1]
        flows = stage["traffic_bytes"]
        table.append(row + [_megabytes(flows[mode][plan]) for mode, plan in shown])
    print(common.format_table(table))
    print(WORDS)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
