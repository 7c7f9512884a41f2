"""Readers of labeled evaluation sets from a file or the Hub, and checks of the cells of their rows."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from hf_embed.data.known_columns import numbers_in, plain
from hf_embed.data.sources import KINDS, cell_text, first_cells, read_file, read_hub
from hf_embed.errors import InputError, shortened
from hf_embed.files.read_files import kind_of

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def hub_rows(path: str) -> Dataset | None:
    """Return the rows of OWNER/DATASET:SPLIT or OWNER/DATASET:CONFIG:SPLIT on the Hub, or None if `path` names a file.

    Raises:
        InputError: if the rows cannot be loaded, or the split is missing from the name.
    """
    name = re.fullmatch(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))??(:(?P<split>\w+))?", path)
    if not name or os.path.exists(path) or (not name["split"] and kind_of(path) in KINDS):
        return None
    if not name["split"]:
        raise InputError(
            f"{path}: this file does not exist; for a dataset on the Hub, name the split too, for example {path}:test"
        )
    return read_hub(name["name"], name["config"], name["split"])


def read_rows(path: str) -> Dataset:
    """Read a file with named columns, or OWNER/DATASET:SPLIT on the Hub."""
    rows = hub_rows(path)
    return read_file(path) if rows is None else rows


def read_table(path: str, names: Collection[str]) -> tuple[Dataset, bool]:
    """Return the rows of a file, and whether its columns have names.

    The columns of a csv or tsv file without a header are named 0, 1, 2 ... Its first row is a header if it has one of `names`,
    which are in the form that `plain` returns.
    """
    cells = first_cells(path)
    named = cells is None or not set(names).isdisjoint(map(plain, cells))
    return read_file(path, header=named), named


def first_match(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names whose plain form matches the first pattern with any matches, sorted by the numbers in the names."""
    found = ([name for name in names if re.fullmatch(pattern, plain(name))] for pattern in patterns)
    return sorted(next(filter(None, found), []), key=numbers_in)


def is_number(cell: Any) -> bool:
    """Return whether a cell is, or holds as text, a number, which may be NaN or infinite."""
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def label_number(label: object, where: str) -> int:
    """Return a label as 0 or 1. Otherwise raise InputError, with a message that begins with `where`."""
    number = LABELS.get(str(label).strip().lower())
    if number is None:
        raise InputError(f"{where}: the label is {label!r}, not 0 or 1; correct it or delete the row")
    return number


def as_list(values: Iterable, name: str) -> list:
    """Return values as a list. A single text becomes a list of one. Raise InputError if the values cannot be listed."""
    try:
        return [values] if isinstance(values, str) else list(values)
    except TypeError as error:
        raise InputError(
            f"{name}: got {shortened(repr(values))}, which is not a list but a {type(values).__name__}; give a list"
        ) from error


def text_lists(lists: Mapping[str, Iterable[str]], name: str) -> list[list[str]]:
    """Return the lists of texts. Raise InputError if a list or a text is empty, a text is missing, or the lengths differ."""
    found = {key: as_list(texts, f"{name}: {key}") for key, texts in lists.items()}
    lengths = {key: len(texts) for key, texts in found.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        counts = ", ".join(f"{length:,} {key}" for key, length in lengths.items())
        raise InputError(f"{name}: got {counts}; give the same number of each, and at least one")
    for key, texts in found.items():
        for number, text in enumerate(texts, 1):
            cell_text(text, f"{name}, row {number}, {key}")
    return list(found.values())
