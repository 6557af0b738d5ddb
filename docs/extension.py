"""Griffe knows the section ``Examples``; the docstrings here, with one example each, call it ``Example``."""

import re

import griffe


class Singular(griffe.Extension):
    """Let a section ``Example:`` be rendered like ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
