"""The command line, one file or package per subcommand: `effnet-fast classify | bench | ...`.

`main` imports the subcommands: importing this package costs nothing.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from effnet_fast.cli import process
from effnet_fast.cli.process import BROKEN_PIPE, INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD_INPUT = 2  # exit status, argparse's own for wrong usage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: its arguments. None means those of the process, whose streams and Ctrl-C are then
            made fit for it too.

    Returns:
        the exit status: 0; 2 for wrong usage, bad input, lack of memory or output that cannot be
        written (one line on stderr); 130 for Ctrl-C; 141 where nobody reads the output any more.
    """
    own = argv is None
    try:
        if own:
            process.prepare_streams()
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        process.discard_output()
        return BROKEN_PIPE
    except OSError as error:
        process.discard_output()
        process.note(f"{error.filename or 'standard output'}: {error.strerror or error}")
        return BAD_INPUT
    finally:
        if own:
            process.leave_at_interrupts()


def _run(argv: Sequence[str] | None) -> int:
    with process.leaving_at_interrupts() if argv is None else contextlib.nullcontext():
        from effnet_fast import files
        from effnet_fast.cli.common import CommandError
        from effnet_fast.cli.subcommands import build_parser

        parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CommandError as error:
        process.note(error)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not files.is_out_of_memory(error):
            raise
        process.note("not enough memory: a smaller batch, resolution or network needs less")
        return BAD_INPUT
    return 0
