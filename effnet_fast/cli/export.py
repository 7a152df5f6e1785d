"""`effnet-fast export NETWORK --to onnx|torch --out FILE`: a network for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from effnet_fast.cli import common, networks, process
from effnet_fast.integrations import export as exporting
from effnet_fast.models.variants import VARIANTS

EXAMPLE = """example:
  effnet-fast export lite0 --to onnx --out lite0.onnx
  effnet-fast export RUN --to torch --out network.pt2 --batch 8
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write a network as ONNX or torch.export file",
        description="Writes a network as an ONNX file or a program of torch.export, with the names "
        "of its classes and how images are prepared, and compares what it computes with the "
        "network. A wrong file is not kept.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "network",
        metavar="MODEL|RUN|FILE",
        help=f"a size ({', '.join(VARIANTS)}: weights as for `classify --model`), the folder that "
        "`effnet-fast train` left, a checkpoint (.safetensors or .pth), or the name of published "
        "weights (EfficientNet_B0_Weights.DEFAULT)",
    )
    parser.add_argument(
        "--model",
        choices=tuple(VARIANTS),
        help="which EfficientNet the file is of (default: found from it)",
    )
    parser.add_argument("--to", choices=tuple(exporting.KINDS), required=True)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"the file to write, {' or '.join(exporting.KINDS.values())}",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    parser.add_argument(
        "--resolution",
        type=common.positive_int,
        help="side of the images in pixels (default: the network's)",
    )
    parser.add_argument(
        "--batch", type=common.positive_int, help="images per call (default: any number)"
    )
    networks.add_options(parser)
    parser.set_defaults(backend="auto")
    parser.add_argument("--threads", type=common.thread_count, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Writes the file and prints what was compared, or JSON."""
    common.set_threads(arguments)
    common.check_writable("--out", arguments.out)
    if arguments.out.exists() and not arguments.force:
        raise common.CommandError(f"--out {arguments.out}: exists; --force replaces it")
    with common.bad_input(
        OSError, ValueError, NotImplementedError, ImportError, exporting.ExportError
    ):
        network = _find(arguments)
        names = networks.find_labels(network, arguments.labels)
        done = exporting.export(
            network.model,
            arguments.out,
            to=arguments.to,
            preset=network.preset,
            class_names=names,
            resolution=arguments.resolution,
            batch=arguments.batch,
        )
    if network.weights is None:
        process.note("the weights are random, and the classes mean nothing")
    if done.checked_by is None:
        process.note("not compared with the network, only read: onnxruntime is not installed")
    report = {
        **vars(done),
        "model": network.size,
        "weights": network.weights,
        "classes": len(names or ()),
    }
    common.print_report(arguments, report, _print_report)


def _find(arguments: argparse.Namespace) -> networks.Network:
    """A size is one, unless a file or folder of that name is there."""
    text = arguments.network
    if text not in VARIANTS or Path(text).exists():
        return networks.find(text, arguments)
    if arguments.model not in (None, text):
        raise ValueError(f"two sizes were given: {text} and --model {arguments.model}")
    arguments.model = text
    return networks.find(None, arguments)


def _print_report(report: dict[str, Any]) -> None:
    batch = report["batch"] or "any number of"
    print(
        f"{report['path']}: {report['model']}, {report['bytes'] / 1e6:.1f} MB, {batch} images of "
        f"{report['resolution']} pixels, {report['classes']} names of classes"
    )
    if report["checked_by"]:
        print(
            f"Compared by {report['checked_by']}: rms error {report['error']:.1e}, "
            f"{report['allowed']:.1e} allowed"
        )
