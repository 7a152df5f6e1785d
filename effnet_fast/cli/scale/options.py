"""Options, errors and words that the subcommands of `scale` share."""

from __future__ import annotations

import argparse
from typing import Any

from effnet_fast.cli import common
from effnet_fast.models.variants import Variant
from effnet_fast.scaling import CompoundScaling, Conditions, Counts, LatencyModel
from effnet_fast.scaling.compound import BASE_RESOLUTION
from effnet_fast.scaling.conditions import DTYPES
from effnet_fast.scaling.counts import unrounded_macs
from effnet_fast.scaling.memory import OPTIMIZER_TENSORS
from effnet_fast.scaling.memory_plans import MODES, plans

WORDS = (
    "MAC: multiply-adds of one image, which the literature on EfficientNet calls FLOPs; here "
    "FLOPs are twice as many."
)
PLANS = tuple(dict.fromkeys(plan for mode in MODES for plan in plans(mode)))


def add_rule(parser: argparse.ArgumentParser) -> None:
    """Adds the constants of the scaling rule and --multiple."""
    rule = CompoundScaling()
    for name in ("alpha", "beta", "gamma"):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=getattr(rule, name),
            help=f"constant of the rule (default: {getattr(rule, name)}, the paper's)",
        )
    parser.add_argument(
        "--multiple",
        type=common.positive_int,
        default=8,
        help="resolutions are rounded to this (default: 8)",
    )


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Adds what memory and latency depend on beside the network."""
    parser.add_argument("--batch", type=common.positive_int, default=1, help="images per call")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument(
        "--training", action="store_true", help="count a training step instead of a forward pass"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--plan",
        choices=PLANS,
        help="how blocks are computed: fused (this version's kernels, the default where they "
        "run), stock (PyTorch), in training also fast and lean (the design's memory)",
    )
    parser.add_argument(
        "--optimizer-tensors",
        type=int,
        default=OPTIMIZER_TENSORS,
        metavar="N",
        help="tensors that the optimizer keeps for each parameter (default: 2, Adam's)",
    )
    parser.add_argument("--threads", type=common.thread_count, help="CPU threads")


def rule_of(arguments: argparse.Namespace) -> CompoundScaling:
    """The scaling rule that the options give."""
    with common.bad_input(ValueError):
        return CompoundScaling(arguments.alpha, arguments.beta, arguments.gamma)


def conditions_of(arguments: argparse.Namespace) -> Conditions:
    """The conditions that the options give."""
    common.set_threads(arguments)
    with common.bad_input(ValueError):
        return Conditions(
            arguments.batch,
            DTYPES[arguments.dtype],
            arguments.training,
            arguments.device,
            arguments.plan,
            arguments.optimizer_tensors,
        )


def network_json(
    variant: Variant, counts: Counts, exact_resolution: float | None = None
) -> dict[str, Any]:
    """A network's multipliers and counts for `--json`.

    exact_resolution is that before rounding; None means that there was no rounding.
    """
    exact = exact_resolution or float(variant.resolution)
    unrounded = unrounded_macs(
        depth=variant.depth,
        width=variant.width,
        resolution=exact,
        stages=variant.baseline,
        squeeze=variant.squeeze,
        fixed_ends=variant.fixed_ends,
        head=variant.head,
    )
    return {
        "width": variant.width,
        "depth": variant.depth,
        "resolution": variant.resolution,
        "exact_resolution": exact,
        "resolution_multiplier": exact / BASE_RESOLUTION,
        "stage_channels": [stage.out_channels for stage in variant.stages],
        "repeats": [stage.repeats for stage in variant.stages],
        "stem_channels": variant.stem_channels,
        "head_channels": variant.head_channels,
        "params": counts.parameters,
        "macs": counts.macs,
        "flops": counts.flops,
        "unrounded_macs": unrounded,
        "activations": counts.activations,
    }


def latency_json(model: LatencyModel) -> dict[str, Any]:
    """Where a latency model comes from and how far it errs, for `--json`."""
    return {
        "machine": model.machine,
        "versions": model.versions,
        "threads": model.threads,
        "networks": len(model.samples),
        "median_error": {plan: p.median_error for plan, p in model.prices.items()},
        "largest_error": {plan: p.largest_error for plan, p in model.prices.items()},
    }
