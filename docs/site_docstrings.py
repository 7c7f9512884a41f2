"""An extension of griffe, which reads the docstrings for the API pages.

It makes up for two habits of this package. An entry of a docstring may describe several parameters, as in
`queries, corpus: texts by id`: each parameter gets its own copy of the text. And the fields of settings have no docstring but a
help text in their metadata, which `--help` shows: that text becomes their docstring.
"""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprKeyword, Extension, Object

JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrite docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Split the entries of a class or function that describe several parameters."""
        if obj.docstring and (obj.is_class or obj.is_function):
            obj.docstring.value = JOINT.sub(split, obj.docstring.value)

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Give a field of a dataclass its help text as docstring, and show its default in place of the call of `field`."""
        given = {key.name: key.value for key in getattr(attr.value, "arguments", []) if isinstance(key, ExprKeyword)}
        if attr.docstring is None and (text := help_text(str(given.get("metadata", "None")))):
            attr.docstring = Docstring(text, parent=attr)
            attr.labels.clear()
            if "default_factory" not in given:
                attr.value = given.get("default")


def split(entry: re.Match[str]) -> str:
    """Return an entry once for each of its names."""
    return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", "))


def help_text(metadata: str) -> str:
    """Return the help text in the source of a field's metadata, "" if there is none."""
    mapping = ast.parse(metadata, mode="eval").body
    for key, text in zip(mapping.keys, mapping.values) if isinstance(mapping, ast.Dict) else ():
        if isinstance(key, ast.Constant) and key.value == "help":
            return "".join(map(shown, text.values if isinstance(text, ast.JoinedStr) else [text]))
    return ""


def shown(part: ast.expr) -> str:
    """Return a part of an f-string: a constant as it is, and "the names in `TABLE`" for the joined names of a table."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    called = part.value if isinstance(part, ast.FormattedValue) else part
    if isinstance(called, ast.Call) and ast.unparse(called.func).endswith(".join"):
        return f"the names in `{ast.unparse(called.args[0])}`"
    return f"`{ast.unparse(called)}`"
