"""`effnet-fast convert IN OUT --to FAMILY`: a checkpoint under another family's names."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from effnet_fast import checkpoints
from effnet_fast.checkpoints import FAMILIES, FORMATS, Checkpoint, transformers_folder
from effnet_fast.cli import common, process
from effnet_fast.files import naming_file
from effnet_fast.models.loading import family_variant, find_variant, published_variant
from effnet_fast.models.variants import Variant

# Constants of a network, which no tensor holds.
CONSTANTS = ("padding", "bn_eps")
TARGETS = tuple(name for name in FAMILIES if FAMILIES[name].naming != "keras")  # only read
FOLDERS = ("transformers",)  # families whose checkpoints are folders
CLASSIFIER, STEM = "classifier.1.weight", "features.0.0.weight"


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="rename a checkpoint's parameters as another family names them",
        description="Renames a checkpoint's parameters as another family names them. Entries of "
        "training scripts beside the weights are left out. OUT is written whole or not at all.",
    )
    suffixes = " or ".join(checkpoints.SUFFIXES)
    parser.add_argument("input", metavar="IN", help="checkpoint of any family: a file or an URL")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help=f"file, {suffixes}; for transformers also a folder"
    )
    parser.add_argument(
        "--to", required=True, choices=TARGETS, help="the family whose names OUT gets"
    )
    parser.add_argument(
        "--from",
        dest="family",
        choices=FORMATS,
        default="auto",
        help="the family of IN's network (default: found from its metadata, names and file name)",
    )
    parser.add_argument(
        "--no-ema", action="store_true", help="take the weights, not their moving average"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Converts the file; prints a summary or JSON."""
    with common.bad_input(OSError, ValueError):
        report = convert(arguments)
    if arguments.json:
        common.print_json(report)
        return
    print(
        f"{report['output']}: {report['tensors']} tensors, {report['parameters']:,} parameters of "
        f"{report['family']}'s {report['variant'] or 'network'}, named as {report['to']} does"
    )
    for note in report["notes"]:
        process.note(note)


def convert(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the file.

    Returns:
        what `--json` prints: input, output, the input's family and naming, the output's (to), the
        published size or None (variant), numbers of tensors and parameters, bytes, and notes.

    Raises:
        OSError, ValueError: of the files; nothing has been written then.
    """
    to_folder = arguments.to in FOLDERS and not arguments.output.suffix
    if not to_folder:
        checkpoints.check_suffix(arguments.output)
    elif os.path.lexists(arguments.output):
        raise ValueError(f"{arguments.output}: exists; no folder is replaced")
    if arguments.output.exists() and not arguments.force:
        raise ValueError(f"{arguments.output}: exists; --force replaces it")
    checkpoint = checkpoints.open_checkpoint(
        arguments.input,
        arguments.family,
        ema=not arguments.no_ema,
        progress=sys.stderr.isatty(),
    )
    state = checkpoints.convert(checkpoint.state, arguments.to)
    variant = published_variant(checkpoint.state)
    if to_folder:
        _save_folder(checkpoint, state, arguments.output)
    else:
        checkpoints.save(state, arguments.output, checkpoint.metadata)
    written = [*arguments.output.iterdir()] if to_folder else [arguments.output]
    return {
        "input": os.fspath(arguments.input),
        "output": str(arguments.output),
        "family": checkpoint.family,
        "naming": checkpoint.naming,
        "to": arguments.to,
        "variant": variant and variant.name,
        "tensors": len(state),
        "parameters": sum(
            tensor.numel()
            for key, tensor in checkpoint.state.items()
            if key.endswith((".weight", ".bias"))
        ),
        "bytes": sum(file.stat().st_size for file in written),
        "notes": _notes(checkpoint, arguments, variant),
    }


def _save_folder(checkpoint: Checkpoint, state: dict[str, Tensor], path: Path) -> None:
    """Writes the folder of a network of transformers, its configuration included."""
    with naming_file(path):
        variant = find_variant(checkpoint)
        channels = checkpoint.state[STEM].shape[1]
        classes = len(checkpoint.state.get(CLASSIFIER, ()))
        names = checkpoint.facts.classes
        config = transformers_folder.config_of(
            variant, channels, classes, names if len(names) == classes else ()
        )
        processor = transformers_folder.processor_of(variant)
    texts = {"config.json": config, transformers_folder.PROCESSOR_FILE: processor}
    checkpoints.save_folder(state, path, texts, checkpoint.metadata)


def _notes(
    checkpoint: Checkpoint, arguments: argparse.Namespace, variant: Variant | None
) -> list[str]:
    """Facts that the names cannot hold, and that the user has to supply."""
    notes = [checkpoint.assumption] if checkpoint.assumption else []
    if variant is None:
        return notes
    own = family_variant(variant, checkpoint)
    stock = family_variant(variant, replace(checkpoint, family=arguments.to))
    differing = [name for name in CONSTANTS if getattr(own, name) != getattr(stock, name)]
    if differing:
        constants = ", ".join(f"{name}={getattr(own, name)}" for name in differing)
        where = "its metadata say so"
        if arguments.output.suffix not in (checkpoints.SAFETENSORS, ""):
            where = f'give family="{checkpoint.family}"'
        notes.append(
            f"these weights are for a network with {constants}, which is not what "
            f"{arguments.to}'s own {variant.name} has. EfficientNet.from_checkpoint builds it: "
            f"{where}"
        )
    return notes
