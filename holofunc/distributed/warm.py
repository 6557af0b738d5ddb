"""Imported by the server that `launch` forks ranks from, and by nobody else: what takes seconds is done there, once."""

from holofunc.distributed.collectives import differentiable_in_graphs

__all__: list[str] = []

differentiable_in_graphs()
