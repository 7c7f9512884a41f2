"""An extension of griffe, which reads the docstrings for the API pages.

It makes up for two habits of this package. An entry of a docstring may describe several parameters, as in
`queries, corpus: texts by id`: each parameter gets its own copy of the text. And the fields of settings have no docstring but a
help text, which `--help` shows: that text becomes their docstring.
"""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprCall, Extension, Function, Object

JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrite docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Split the entries of a class or function that describe several parameters, and show defaults of settings."""
        if obj.docstring and (obj.is_class or obj.is_function):
            obj.docstring.value = JOINT.sub(split, obj.docstring.value)
        for parameter in obj.parameters if isinstance(obj, Function) else ():  # also of the __init__ of a dataclass
            if is_setting(parameter.default):
                parameter.default = parameter.default.arguments[0]

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Give a field of a dataclass its help text as docstring, and show its default in place of the call of `setting`."""
        if is_setting(attr.value) and attr.docstring is None:
            default, text = attr.value.arguments[:2]
            attr.docstring, attr.value = Docstring(help_text(str(text)), parent=attr), default
            attr.labels.clear()


def is_setting(value: object) -> bool:
    """Return whether an expression is a call of `setting`, whose first arguments are the default and the help text."""
    return isinstance(value, ExprCall) and str(value.function) == "setting"


def split(entry: re.Match[str]) -> str:
    """Return an entry once for each of its names."""
    return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", "))


def help_text(source: str) -> str:
    """Return a help text from its source: a text, or an f-string."""
    text = ast.parse(source, mode="eval").body
    return "".join(map(shown, text.values if isinstance(text, ast.JoinedStr) else [text]))


def shown(part: ast.expr) -> str:
    """Return a part of an f-string: a constant as it is, and "the names in `TABLE`" for the joined names of a table."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    called = part.value if isinstance(part, ast.FormattedValue) else part
    if isinstance(called, ast.Call) and ast.unparse(called.func).endswith(".join"):
        return f"the names in `{ast.unparse(called.args[0])}`"
    return f"`{ast.unparse(called)}`"
