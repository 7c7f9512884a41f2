"""The numbers that settings may be: a table {field: Range} for each dataclass, checked when it is made."""

import dataclasses
import inspect
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from hf_embed.errors import InputError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two limits. `str()` says it in words: "at least 1 and whole"."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        most = 2**63 - 1 if self.whole else sys.float_info.max  # a Python integer may be larger than both
        return number and -most <= value <= most and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {limit:.12g}" for word, limit in limits.items() if math.isfinite(limit)]
        if self.whole or len(words) < 2:
            words.append("whole" if self.whole else "finite")
        return " and ".join(words)


COUNT = Range(least=1, whole=True)
POSITIVE = Range(above=0)
FINITE = Range()
SEED = Range(least=0, most=2**32 - 1, whole=True)  # numpy takes no others


def is_one_of(value: Any, names: Iterable[str]) -> bool:
    """Return whether a value is one of some names; an array or a list is none, which `in` could not say."""
    return isinstance(value, str) and value in names


def check_ranges(settings: Any, ranges: dict[str, Range]) -> None:
    """Check a dataclass's numbers, the choices that its fields name, and that a switch is True or False.

    A field may be None where its type or its default says so. Of a list, every element has to be in range, and there
    is at least one.

    Raises:
        InputError: the first setting that is wrong, with the numbers that it may be.
    """
    types: dict[str, Any] = {}  # as they were written: transformers' parser overwrites `field.type`
    for kind in reversed(type(settings).__mro__):
        types |= inspect.get_annotations(kind)
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if value is None and (field.default is None or type(None) in get_args(types[field.name])):
            continue
        choices = field.metadata.get("choices")
        if choices and not is_one_of(value, choices):
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        if types[field.name] is bool and isinstance(value, str):
            raise InputError(f"{name} is {value!r}; it must be True or False")
        if name in ranges:
            numbers = value if isinstance(value, list | tuple) else [value]
            if wrong := [number for number in numbers or [value] if number not in ranges[name]]:
                raise InputError(f"{name} is {wrong[0]!r}; it must be {ranges[name]}")
