"""The fields of dataclasses with settings, and ranges of numbers.

A dataclass has a table {field: Range}, and checks its fields with it when it is made.
"""

import dataclasses
import inspect
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

import numpy as np

from hf_embed.errors import InputError

REQUIRED = dataclasses.MISSING  # the default of a setting that the user must give


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Return a field of a dataclass, with its default and what `--help` says of it. Each object gets a copy of a list.

    `metadata` holds further facts: the `choices`, or what `hf_embed.kit.cli.flag_class` reads.
    """
    if isinstance(default, list):
        return dataclasses.field(default_factory=partial(list, default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Range:
    """A range of finite numbers. `str()` describes it in words: "at least 1 and whole"."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        most = 2**63 - 1 if self.whole else sys.float_info.max  # Python integers have no limit of their own
        return number and -most <= value <= most and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {limit:.12g}" for word, limit in limits.items() if math.isfinite(limit)]
        if self.whole or len(words) < 2:
            words.append("whole" if self.whole else "finite")
        return " and ".join(words)


COUNT = Range(least=1, whole=True)
ABOVE_ZERO = Range(above=0)
FINITE = Range()
SEED = Range(least=0, most=2**32 - 1, whole=True)  # the seeds that NumPy accepts


def is_one_of(value: Any, names: Iterable[str]) -> bool:
    """Return whether a value is one of some names. Lists and arrays give False, whereas a plain `in` could fail on them."""
    return isinstance(value, str) and value in names


def check_one_of(what: str, value: Any, names: Iterable[str]) -> None:
    """Raise InputError, with all names, if a value is not one of some names. `what` says in the message what they name."""
    if not is_one_of(value, names):
        raise InputError(f"unknown {what} {value!r}; use one of {', '.join(names)}")


def check_ranges(settings: Any, ranges: dict[str, Range]) -> None:
    """Check the fields of a dataclass: numbers against `ranges`, names against the choices, and switches.

    The choices of a name are those of its type, such as `Literal["dot", "cosine"]`, or the `choices` of its `setting`.

    A number of NumPy becomes a number of Python, because JSON files and other libraries accept no other.

    A field may be None if its type or its default allows None. In a list, every element must be in range, and there must be at
    least one element. A switch must be True or False, not a text.

    Raises:
        InputError: for the first setting that is wrong. The message says which values are allowed.
    """
    types: dict[str, Any] = {}  # read from the classes, because transformers' parser overwrites `field.type`
    for kind in reversed(type(settings).__mro__):
        types |= inspect.get_annotations(kind)
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if isinstance(value, np.generic):
            value = value.item()
            setattr(settings, name, value)
        if value is None and (field.default is None or type(None) in get_args(types[field.name])):
            continue
        choices = field.metadata.get("choices") or (get_args(types[name]) if get_origin(types[name]) is Literal else ())
        if choices and not is_one_of(value, choices):
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        if types[field.name] is bool and isinstance(value, str):
            raise InputError(f"{name} is {value!r}; it must be True or False")
        if name in ranges:
            numbers = value if isinstance(value, list | tuple) else [value]
            if wrong := [number for number in numbers or [value] if number not in ranges[name]]:
                raise out_of_range(name, wrong[0], ranges[name])


def out_of_range(name: str, value: object, allowed: object) -> InputError:
    """Return the error for a number that is not `allowed`. For a text, such as "1e-4", the error says that it is no number."""
    number = "a number, without quotes, " if isinstance(value, str) else ""
    return InputError(f"{name} is {value!r}; it must be {number}{allowed}")
