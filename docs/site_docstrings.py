"""An extension of griffe, which reads the docstrings for the API pages.

Docstrings of this package describe parameters that belong together in one entry, such as `queries, corpus: ...`. griffe
expects an entry for each parameter, so the extension gives each parameter its own copy of the text.
"""

import re
from typing import Any

from griffe import Extension, Object

JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.MULTILINE)


class JointParameters(Extension):
    """Split the entries of a docstring that describe several parameters."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a class or function before it is parsed."""
        if obj.docstring and (obj.is_class or obj.is_function):
            obj.docstring.value = JOINT.sub(split, obj.docstring.value)


def split(entry: re.Match[str]) -> str:
    """Return an entry once for each of its names."""
    return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", "))
