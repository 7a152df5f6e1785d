"""`effnet-fast eval RUN FOLDER`: how good a network is on labelled images, and how fast."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from effnet_fast.cli import common, networks, predict, process
from effnet_fast.training.answers import evaluation, shares
from effnet_fast.training.answers.prediction import Resources

SHOWN = 20  # classes in the table that is printed; --json and --out have all
EXAMPLES = """examples:
  effnet-fast eval runs/pets pets
  effnet-fast eval EfficientNet_Lite0_Weights.DEFAULT imagenet/val --out report
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="accuracy, calibration and speed on labelled images",
        description="Answers labelled images and prints top-1 and top-5 accuracy, each class, the "
        "expected calibration error, images per second, and how far the fused kernels agree with "
        "stock PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks.add_run(parser)
    parser.add_argument(
        "data",
        metavar="FOLDER",
        help="a folder with a folder per class, or with val/ or test/ of such; a table .csv or "
        '.parquet with the columns path and label; shards "x-{000..007}.tar"',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write classes.csv, calibration.csv, confusion.csv and confusion.png there",
    )
    parser.add_argument(
        "--compare",
        type=_count,
        default=evaluation.COMPARED,
        metavar="N",
        help=f"images on which stock PyTorch answers too (default: {evaluation.COMPARED})",
    )
    parser.add_argument(
        "--unreadable-limit",
        type=_count,
        metavar="N",
        help="stop with an error when more images cannot be read (default: no limit)",
    )
    predict.add_resources(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return 0 if text == "0" else common.positive_int(text)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates; prints tables or JSON."""
    common.check_backend(arguments.backend)
    if arguments.out is not None:
        with common.bad_input(OSError):
            arguments.out.mkdir(parents=True, exist_ok=True)
    network, options = predict.load(arguments)
    given = common.bad_input(*predict.BAD_INPUT)
    with given, predict.noted_warnings(), predict.Progress(arguments) as bar:
        result = evaluation.evaluate(
            network.model,
            arguments.data,
            preset=network.preset,
            options=options,
            resources=Resources(arguments.batch, arguments.workers),
            compared=arguments.compare,
            unreadable_limit=arguments.unreadable_limit,
            on_rows=bar.begin,
        )
    if not shares.is_first():
        return
    for path, reason in result.first_unreadable:
        process.note(f"{path}: {reason}")
    report = {"model": network.size, "weights": network.weights, **result.as_dict()}
    report["files"] = [] if arguments.out is None else _write(result, arguments.out)
    common.print_report(arguments, report, _print)


def _write(result: evaluation.Evaluation, folder: Path) -> list[str]:
    with common.bad_input(OSError):
        paths = evaluation.write_tables(result, folder)
        figure = folder / "confusion.png"
        if result.tally.confusion is None:
            process.note(f"{result.tally.classes} classes are too many for a confusion matrix")
        elif importlib.util.find_spec("matplotlib") is None:
            process.note(f"no {figure}: it needs matplotlib: pip install 'effnet-fast[train]'")
        else:
            evaluation.draw_confusion(result, figure)
            paths.append(figure)
    return [str(path) for path in paths]


def _print(report: dict[str, Any]) -> None:
    rows = [
        ["images", f"{report['images']:,}"],
        ["unreadable", f"{report['unreadable']:,}"],
        ["top-1", _share(report["top1"])],
        ["top-5", _share(report["top5"])],
        ["mean recall of the classes", _share(report["mean_recall"])],
        ["calibration error (ECE)", _share(report["ece"])],
        ["loss (cross entropy)", "-" if report["loss"] is None else f"{report['loss']:.4f}"],
        ["images per second", f"{report['images_per_second'] or 0:,.1f}"],
    ]
    agreement = report["agreement"]
    if agreement is not None:
        same = f"{_share(agreement['same'])} of {agreement['images']}"
        rows.append(["same class as stock PyTorch", same])
        rows.append(["largest difference to it", f"{agreement['largest_difference']:.1e}"])
    print(common.format_table(rows))
    occurring = [entry for entry in report["classes"] if entry["images"]]
    lowest = sorted(occurring, key=lambda entry: entry["recall"])[:SHOWN]
    table = [["class", "images", "recall", "precision", "F1"]]
    for entry in lowest:
        shares = [_share(entry[name]) for name in ("recall", "precision", "f1")]
        table.append([entry["name"], f"{entry['images']:,}", *shares])
    print(f"\n{common.format_table(table)}")
    if len(occurring) > len(lowest):
        print(f"The {len(lowest)} of {len(occurring)} classes with the lowest recall.")
    for path in report["files"]:
        print(path)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
