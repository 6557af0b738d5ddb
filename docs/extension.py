"""What the docstrings here have and griffe does not know: ``Example:``, ``Source:``, and names that are links."""

import re

import griffe


class House(griffe.Extension):
    """Renders sections ``Example:`` like ``Examples:``, ``Source:`` as a paragraph, and full names as links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(
                r"^Source: .*(?:\n[ ]+\S.*)+", lambda found: re.sub(r"\n +", "\n", found[0]), text, flags=re.M
            )
            obj.docstring.value = re.sub(r"(?<!`)`(holofunc(?:\.\w+)+)`(?!`)", self.link, text)

    @staticmethod
    def link(found: re.Match[str]) -> str:
        return f'<autoref identifier="{found[1]}" optional>`{found[1]}`</autoref>'
