"""The command line: ``holofunc train``, ``holofunc evaluate``, ``holofunc models``."""

from holofunc.cli.program import main

__all__ = ["main"]
