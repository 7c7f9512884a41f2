"""Readers of labeled evaluation sets from a file or the Hub, and checks of the cells of their rows."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from hf_embed.data.columns import plain
from hf_embed.data.files import kind_of, shortened
from hf_embed.data.labeled import MATCHES
from hf_embed.data.sources import KINDS, cell_text, is_list, read_file, read_hub
from hf_embed.errors import InputError

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


def first_match(names: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the names that match the first pattern with any matches, sorted by the numbers in the names.

    A pattern may match the name itself, or the form that `plain` returns.
    """
    found = ([name for name in names if pattern.fullmatch(name) or pattern.fullmatch(plain(name))] for pattern in patterns)
    return sorted(next(filter(None, found), []), key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])


def cell_texts(cell: object, where: str) -> list[str]:
    """Return the texts of a cell that holds one text, a list of texts, or null (no texts). Otherwise raise InputError."""
    if isinstance(cell, str) and is_list(cell):
        raise InputError(
            f"{where}: the text looks like a list, {shortened(cell)}; write the rows as jsonl or parquet, or put each text "
            "into its own column, negative_1, negative_2 ..."
        )
    cells = [] if cell is None else cell if isinstance(cell, list | tuple) else [cell]
    return [cell_text(text, where) for text in cells]


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


def check_label_names(rows: Dataset, column: str, name: str) -> None:
    """Raise InputError if a `ClassLabel` names label 0 as one of texts that belong together, as entailment in GLUE's RTE."""
    kind = rows.features[column]
    if isinstance(kind, ClassLabel) and plain(kind.names[0]) in (*MATCHES, "relevant"):
        raise InputError(
            f"{name}: the label 0 of column '{column}' is named {kind.names[0]}, but 1 must mean that two texts belong "
            "together, and 0 that they do not; exchange the two labels"
        )


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
