"""Readers of labeled evaluation sets from a file or the Hub, and checks of the cells of their rows."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from hf_embed.data.known_columns import by_plain_name, numbers_in, plain
from hf_embed.data.labeled import MATCHES, NO_MATCHES, text_of
from hf_embed.data.sources import KINDS, cell_text, first_cells, read_file, read_hub
from hf_embed.errors import InputError, shortened
from hf_embed.files.read_files import kind_of

# The words for labels are those of labeled training pairs, but without -1, which often stands for no label.
LABELS = {word: int(word in MATCHES) for word in (*MATCHES, *NO_MATCHES) if word != "-1"}


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


def read_layout(path: str, layouts: Sequence[Sequence[str]], further: bool = False) -> tuple[Dataset, bool]:
    """Return the columns of an evaluation set that have one of some layouts, in the order of the layout.

    Args:
        path: a file, or OWNER/DATASET:SPLIT on the Hub.
        layouts: the plain names of the columns that belong together. The first layout that the rows have is used. The columns
            of a csv or tsv file without a header, whose first row has none of these names, are in the order of the first one.
        further: whether a file without a header may have more columns, which are then returned too.

    Returns:
        The rows with the columns of the layout, and whether the columns have names.

    Raises:
        InputError: if the rows have none of the layouts.
    """
    rows, named = hub_rows(path), True
    if rows is None:
        cells = first_cells(path)
        named = cells is None or not {name for layout in layouts for name in layout}.isdisjoint(map(plain, cells))
        rows = read_file(path, header=named)
    more = len(rows.column_names) - len(layouts[0])
    if not named and (more == 0 or (further and more > 0)):
        return rows, False
    found = by_plain_name(rows.column_names)
    chosen = next((layout for layout in layouts if found.keys() >= set(layout)), None)
    if chosen is None:
        shown = ", ".join(map(str, rows.column_names if named else rows[0].values()))
        wanted = f"{', '.join(layouts[0][:-1])} and {layouts[0][-1]}"
        raise InputError(
            f"{path}: found the columns {shown}; expected {wanted}, by name or, in a csv or tsv file without a header, in this "
            "order; rename the columns"
        )
    return rows.select_columns([found[name] for name in chosen]), True


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
    number = LABELS.get(text_of(label, None))
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
