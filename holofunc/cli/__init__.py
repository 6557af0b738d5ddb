"""The command line: ``holofunc train``, ``evaluate``, ``find-lr``, ``explain``, ``export``, ``predict``, ``models``."""

from holofunc.cli.program import main

__all__ = ["main"]
