"""`effnet-fast scale fit`: the largest network within a budget, or the largest batch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from effnet_fast import scaling
from effnet_fast.cli import common, process
from effnet_fast.cli.scale import options, plot, units
from effnet_fast.cli.scale.options import WORDS
from effnet_fast.models.variants import VARIANTS, Variant
from effnet_fast.scaling.conditions import to_json
from effnet_fast.scaling.latency import bursts

# Option, its type, name of fit's argument, help.
LIMITS = (
    ("macs", units.parse_count, "multiply-adds of one image: 1G, 386M"),
    ("flops", units.parse_count, "operations of one image, two for each multiply-add: 2G"),
    ("params", units.parse_count, "trained parameters: 5M"),
    ("memory", units.parse_bytes, "peak memory for the batch: 8GiB, 500MB"),
    ("latency", units.parse_seconds, "time for the batch on this machine: 15ms"),
)
PLOTTED = 100  # networks for each unit of phi
NETWORK_LIMITS = tuple(name for name, *_ in LIMITS if name != "memory")


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "fit",
        help="the largest network within a budget",
        description="Finds the largest network of the scaling rule within every limit, or one near "
        "the rule where that uses less than 95% of each. " + WORDS,
    )
    for name, kind, text in LIMITS:
        parser.add_argument(f"--{name}", type=kind, metavar="AMOUNT", help=text)
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="find the largest batch that fits --memory, for the network of --model, --phi or "
        "the other limits",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--model", choices=tuple(VARIANTS), help="with --max-batch: this network")
    given.add_argument("--phi", type=float, help="with --max-batch: the network at this phi")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for --latency: read the measurements from this file, or measure and write them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the network with random weights, .safetensors: `effnet-fast train --weights` "
        "takes it",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=common.SEED,
        help=f"with --out: of the random weights (default: {common.SEED})",
    )
    parser.add_argument(
        "--on-rule",
        action="store_true",
        help="stay on the rule, also where its rounding leaves more than 5%% of every limit unused",
    )
    options.add_rule(parser)
    options.add_conditions(parser)
    plot.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the network, or the batch, as a short table or JSON."""
    _check(arguments)
    plot.check(arguments)
    conditions = options.conditions_of(arguments)
    report = batch_report(arguments, conditions) if arguments.max_batch else None
    report = report or fit_report(arguments, *_fit(arguments, conditions))
    common.print_report(arguments, report, _print_report)


def _check(arguments: argparse.Namespace) -> None:
    named = arguments.model is not None or arguments.phi is not None
    limits = [f"--{name}" for name in NETWORK_LIMITS if getattr(arguments, name) is not None]
    if arguments.max_batch:
        if arguments.memory is None:
            raise common.CommandError("--max-batch needs --memory, which the batch has to fit")
        if named == bool(limits):
            raise common.CommandError(
                "--max-batch needs one network: give --model or --phi, or limits other than "
                "--memory, but not both"
            )
    elif named:
        raise common.CommandError("--model and --phi belong to --max-batch")
    elif not limits and arguments.memory is None:
        names = [f"--{name}" for name, *_ in LIMITS]
        raise common.CommandError(f"give at least one limit: {', '.join(names)}")
    if arguments.out is not None:
        if named:
            raise common.CommandError(
                "--out writes the network of the limits: leave out --model and --phi"
            )
        common.check_writable("--out", arguments.out)
    if arguments.max_batch and arguments.plot is not None:
        raise common.CommandError("--plot shows networks near the limits, not --max-batch")
    if arguments.calibration is not None and arguments.latency is None:
        raise common.CommandError("--calibration belongs to --latency")


def latency_model(
    arguments: argparse.Namespace, conditions: scaling.Conditions
) -> scaling.LatencyModel:
    """From the file that --calibration names if it is there, else measured, and written there."""
    path = arguments.calibration
    with common.bad_input(OSError, ValueError):
        if path is not None and path.exists():
            model = scaling.LatencyModel.load(path)
            model.check(conditions)
            if foreign := model.foreign():
                process.note(f"{path} was measured under other conditions: {foreign}")
            return model
        if path is not None:
            common.check_writable("--calibration", path)
        with common.progress(arguments, bursts(conditions), "measuring") as bar:
            model = scaling.calibrate(conditions, on_burst=lambda name: bar.update())
        if path is not None:
            model.save(path)
        return model


def _fit(
    arguments: argparse.Namespace, conditions: scaling.Conditions
) -> tuple[scaling.Fit, dict[str, float]]:
    """The network, and the limits that were given."""
    rule = options.rule_of(arguments)
    limits = {name: getattr(arguments, name) for name, *_ in LIMITS}
    if arguments.max_batch:
        limits["memory"] = None  # limits the batch, not the network
    latency = latency_model(arguments, conditions) if arguments.latency is not None else None
    with common.bad_input(ValueError):
        result = scaling.fit(
            **{f"target_{name}": limit for name, limit in limits.items()},
            **vars(conditions),
            latency_model=latency,
            scaling=rule,
            multiple=arguments.multiple,
            refine=not arguments.on_rule,
        )
    return result, {name: limit for name, limit in limits.items() if limit is not None}


def fit_report(
    arguments: argparse.Namespace, result: scaling.Fit, limits: dict[str, float]
) -> dict[str, Any]:
    """Everything that `--json` prints of the largest network within the limits."""
    rule, latency = options.rule_of(arguments), result.latency_model
    report: dict[str, Any] = {
        "phi": result.point.phi,
        **options.network_json(result.point.variant, result.counts, result.point.exact_resolution),
        "binding": list(result.binding),
        "limits": limits,
        "shares": result.shares,
        "offset": {**vars(result.offset), "distance": result.offset.distance},
        "on_rule": {
            "phi": result.ray.phi,
            "macs": scaling.count(result.ray.variant).macs,
            "shares": result.ray_shares,
        },
        "memory": vars(result.memory),
        "conditions": to_json(result.conditions),
        "rule": vars(rule),
    }
    if latency is not None:
        variant = result.point.variant
        report["latency_s"] = {plan: latency.predict(variant, plan) for plan in latency.prices}
        report["latency_model"] = options.latency_json(latency)
    if arguments.out is not None:
        report["out"] = str(arguments.out)
        with common.bad_input(OSError, ValueError):
            network = scaling.random_network(result.point.variant, arguments.seed)
            scaling.save_network(network, arguments.out)
    if arguments.plot is not None:
        at = partial(rule.at, multiple=arguments.multiple)
        plot.shares(arguments.plot, result.ray.phi, _shares_near(result, limits, at))
    return report


# What a network uses of each limit.
USED: dict[str, Callable[[Variant, scaling.Fit], float]] = {
    "macs": lambda variant, result: scaling.count(variant).macs,
    "flops": lambda variant, result: scaling.count(variant).flops,
    "params": lambda variant, result: scaling.count(variant).parameters,
    "memory": lambda variant, result: result.conditions.memory(variant).peak,
    "latency": lambda variant, result: _latency(variant, result),
}


def _latency(variant: Variant, result: scaling.Fit) -> float:
    assert result.latency_model is not None
    return result.latency_model.predict(variant, result.conditions.plan)


def _shares_near(
    result: scaling.Fit, limits: dict[str, float], at: Callable[[float], scaling.Point]
) -> dict[str, list[tuple[float, float]]]:
    """By limit, phi and the share that the rule's networks use, from two below to one above."""
    phis = [result.ray.phi + step / PLOTTED for step in range(-2 * PLOTTED, PLOTTED + 1)]
    points = [at(phi) for phi in phis]
    return {
        name: [(p.phi, USED[name](p.variant, result) / limit) for p in points]
        for name, limit in limits.items()
    }


def batch_report(arguments: argparse.Namespace, conditions: scaling.Conditions) -> dict[str, Any]:
    """Everything that `--json` prints of the largest batch that fits the memory."""
    if arguments.model is not None:
        variant = VARIANTS[arguments.model]
        report = {"model": variant.name, **options.network_json(variant, scaling.count(variant))}
    elif arguments.phi is not None:
        with common.bad_input(ValueError, OverflowError):
            point = options.rule_of(arguments).at(arguments.phi, multiple=arguments.multiple)
        variant = point.variant
        report = {
            "phi": arguments.phi,
            **options.network_json(variant, scaling.count(variant), point.exact_resolution),
        }
    else:
        result, limits = _fit(arguments, conditions)
        variant, report = result.point.variant, fit_report(arguments, result, limits)
    with common.bad_input(ValueError):
        batch = scaling.max_batch(variant, arguments.memory, conditions)
    conditions = replace(conditions, batch=batch)
    report["max_batch"] = batch
    report["memory_limit"] = arguments.memory
    report["memory"] = vars(conditions.memory(variant))
    report["conditions"] = to_json(conditions)
    return report


def _print_report(report: dict[str, Any]) -> None:
    head = f"phi {report['phi']:.4f}" if "phi" in report else f"efficientnet_{report['model']}"
    if "max_batch" in report:
        head = f"batch {report['max_batch']} of {head}"
    print(head)
    rows = [
        ["depth", f"{report['depth']:.3f}", f"repeats {_list(report['repeats'])}"],
        ["width", f"{report['width']:.3f}", f"channels {_list(report['stage_channels'])}"],
        ["resolution", f"{report['resolution_multiplier']:.3f}", f"{report['resolution']} pixels"],
    ]
    print(common.format_table([["", "multiplier", "rounded"], *rows]))
    used = {
        "params": (report["params"], units.format_count),
        "macs": (report["macs"], units.format_count),
        "flops": (report["flops"], units.format_count),
        "memory": (report["memory"]["peak"], units.format_bytes),
    }
    plan = report["conditions"]["plan"]
    if "latency_s" in report:
        used["latency"] = (report["latency_s"][plan], units.format_seconds)
    limits = dict(report.get("limits", {}))
    if "memory_limit" in report:
        limits["memory"] = report["memory_limit"]
    table = [["", "needs", "limit", "used", ""]]
    for name, (amount, text) in used.items():
        limit = limits.get(name)
        share = ["", ""] if limit is None else [text(limit), f"{amount / limit:.1%}"]
        mark = "binds" if name in report.get("binding", ()) else ""
        table.append([name, text(amount), *share, mark])
    print(common.format_table(table))
    if "offset" in report:
        _print_offset(report)
    c = report["conditions"]
    print(
        f"Memory{' and latency' if 'latency_s' in report else ''}: "
        f"{'a training step' if c['training'] else 'inference'}, batch {c['batch']}, "
        f"{c['dtype']}, {c['device']}, {plan} blocks."
    )
    if "latency_s" in report:
        _print_latency(report)
    print(WORDS)


def _print_offset(report: dict[str, Any]) -> None:
    if report["offset"]["distance"] == 0:
        print("The network is on the rule.")
        return
    off = [f"{name} {report['offset'][name] - 1:+.1%}" for name in ("depth", "width", "resolution")]
    used = max(report["on_rule"]["shares"].values())
    print(
        f"Off the rule by {', '.join(off)}: the largest network on it (phi "
        f"{report['on_rule']['phi']:.4f}) uses {used:.1%} of the limit."
    )


def _print_latency(report: dict[str, Any]) -> None:
    model = report["latency_model"]
    for plan, seconds in report["latency_s"].items():
        print(
            f"Latency, {plan}: {units.format_seconds(seconds)}, predicted; networks that the fit "
            f"had not seen were off by {model['median_error'][plan]:.1%} (median) and "
            f"{model['largest_error'][plan]:.1%} (worst)."
        )
    print(
        f"Measured on {model['machine']}, threads: {model['threads']}, torch "
        f"{model['versions'].get('torch')}."
    )


def _list(values: list[int]) -> str:
    return ",".join(map(str, values))
