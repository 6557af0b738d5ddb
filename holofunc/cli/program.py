"""From arguments to an exit code: 0, 2 for what is refused at the start, 1 for what fails later, 130 for Ctrl-C."""

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from holofunc.cli.options import given, parse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. It is prepared first, which checks everything and computes nothing, and carried out then.

    Args:
        argv: the arguments; None is those of the process.

    Returns:
        The exit code. Errors are one line on standard error.

    Example:
        >>> from holofunc import cli
        >>> cli.main(["models", "smallnet"])
        name      parameters   GMACs  size  task            top-1               weights
        smallnet      94,762    1.20   224  classification
        0
    """
    try:
        arguments = parse(argv)
    except ValueError as error:
        return _complain(error, 2)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    from holofunc.checkpoint import CheckpointError  # from here on torch is there; `--help` does without
    from holofunc.cli.commands import COMMANDS
    from holofunc.cli.ranks import leave_word
    from holofunc.distributed import RankError, is_rank_zero
    from holofunc.models.exporting import ExportError

    code = 2
    try:
        with leave_word():
            carry_out = COMMANDS[arguments.command](arguments)
            code = 1
            return carry_out()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written when Python ends
        return 1
    except (CheckpointError, ExportError, ImportError, OSError, TypeError, ValueError) as error:
        if code == 1 and isinstance(error, (ImportError, TypeError)):
            raise
        if code == 2 and not is_rank_zero():  # what is refused is refused by all ranks
            return code
        return _complain(error, code, _origin(arguments, error))
    except RankError as error:  # the first rank says it; or another one, of the first
        return _complain(error, 1) if is_rank_zero() or 0 in error.causes else 1
    except KeyboardInterrupt:
        sys.stderr.write("holofunc: interrupted\n")
        return 130


def _origin(arguments: argparse.Namespace, error: Exception) -> str:
    """The configuration file, if the error begins with a key that only the file has."""
    file = vars(arguments).get("config")
    key = re.match(r"\w*", str(error))
    if file is None or key is None or key[0] in given(arguments):
        return ""
    try:
        return f"{file}: " if key[0] in tomllib.loads(Path(file).read_text(encoding="utf-8")) else ""
    except (OSError, ValueError):  # which is what the error is about
        return ""


def _complain(error: Exception, code: int, origin: str = "") -> int:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    sys.stderr.write(f"holofunc: error: {origin}{' '.join(str(error).split())}{notes}\n")
    return code
