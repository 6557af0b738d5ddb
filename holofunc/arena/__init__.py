"""Arenas: flat dicts of tensors that are views of one vector per dtype.

What treats every element alike (most of an optimizer) can then run once on the vector instead of once per tensor,
which is what makes a compiled update quick to compile and as fast as memory. A leaf begins on a row of its own, so that
one number per leaf becomes a column that broadcasts over the leaf's rows.

Arenas appear inside functions compiled by `holofunc.jit`. Outside, the same dicts are plain ones, whose tensors happen
to lie in an arena (`lay_out`, `parts`).
"""

from holofunc.arena.arenas import Arena, InseparableError, gathered, moved, parts, together, views
from holofunc.arena.layouts import Layout, Slot, family, layout_of, layouts_of, wholes

__all__ = [
    "Arena",
    "InseparableError",
    "Layout",
    "Slot",
    "family",
    "gathered",
    "layout_of",
    "layouts_of",
    "moved",
    "parts",
    "together",
    "views",
    "wholes",
]
