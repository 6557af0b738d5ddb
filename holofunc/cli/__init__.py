"""The command line: ``holofunc train``, ``evaluate``, ``models``, ``export``."""

from holofunc.cli.program import main

__all__ = ["main"]
