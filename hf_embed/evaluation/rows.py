"""Rows of labelled evaluation sets, from a file or the Hub: their columns found by name, their texts checked.

Sets of a query and of documents that do and do not answer it have these columns, first match wins (case does not matter):

    the query      anchor | query | sent0 | question
    positives      positive | sent1 | answer         also pos, positives, answers; positive_1, positive_2 ...
    negatives      negative | hard_neg | documents   also neg, negatives; negative_1, negative_2 ...

Positives and negatives are a text, a list of texts, or null. `documents` are all candidates; those that are no positives are
the negatives.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from hf_embed.data.files import NEGATIVE, kind_of, shortened
from hf_embed.data.sources import KINDS, is_list, numbers_in, read_file, read_hub
from hf_embed.errors import InputError

logger = logging.getLogger(__name__)

QUERIES = [re.compile(name, re.IGNORECASE) for name in ("anchor", "query", "sent0", "question")]
POSITIVES = [re.compile(name, re.IGNORECASE) for name in (r"pos(itive)?s?(_\d+)?", "sent1", r"answers?(_\d+)?")]
NEGATIVES = [NEGATIVE, re.compile("documents", re.IGNORECASE)]
ACCEPTED = "query, positive, negative; anchor, positive, negative; sent0, sent1, hard_neg; question, answer, negative"
FILL_IN = "fill it in or delete the row"


class Judged(NamedTuple):
    """A query, the documents that answer it, and some that do not."""

    query: str
    positives: list[str]
    negatives: list[str]


def hub_rows(path: str) -> Dataset | None:
    """Return the rows of OWNER/DATASET:SPLIT or OWNER/DATASET:CONFIG:SPLIT on the Hub; None where `path` is that of a file.

    Raises:
        InputError: they cannot be loaded, or the split is not named.
    """
    name = re.fullmatch(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))??(:(?P<split>\w+))?", path)
    if not name or Path(path).exists() or (not name["split"] and kind_of(path) in KINDS):
        return None
    if not name["split"]:
        raise InputError(f"{path}: no such file; of a dataset on the Hub name the split too, for example {path}:test")
    return read_hub(name["name"], name["config"], name["split"])


def read_rows(path: str) -> Dataset:
    """Read a file that names its columns, or OWNER/DATASET:SPLIT on the Hub."""
    rows = hub_rows(path)
    return read_file(path) if rows is None else rows


def judged_rows(rows: Dataset | Iterable[Mapping[str, Any]], name: str) -> list[Judged]:
    """Find the query, the positives and the negatives of each row.

    Args:
        rows: with the columns above.
        name: what messages call the rows.

    Raises:
        InputError: a missing column, or a cell that is empty or no text.
    """
    if not isinstance(rows, Dataset):
        rows = list(rows)
        if wrong_kind := next((row for row in rows if not isinstance(row, Mapping)), None):
            raise InputError(f"{name}: a row is a {type(wrong_kind).__name__}; give a dict of query, positive, negative each")
    columns = rows.column_names if isinstance(rows, Dataset) else list(dict.fromkeys(column for row in rows for column in row))
    queries, positives, negatives = judged_columns(columns, name)
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        query = cell_text(row.get(queries[0]), f"{where}, column '{queries[0]}'")
        right, wrong = (
            [text for column in names for text in cell_texts(row.get(column), f"{where}, column '{column}'")]
            for names in (positives, negatives)
        )
        if negatives[0].lower() == "documents":
            wrong = [text for text in wrong if text not in set(right)]
        found.append(Judged(query, right, wrong))
    return found


def judged_columns(names: list[str], name: str) -> tuple[list[str], list[str], list[str]]:
    """Return the columns of the query, the positives and the negatives; warn of those that are not used.

    Raises:
        InputError: one of the three is missing.
    """
    queries, positives, negatives = (first_match(names, patterns) for patterns in (QUERIES, POSITIVES, NEGATIVES))
    for found, what in ((queries, "query"), (positives, "positive"), (negatives, "negative")):
        if not found:
            raise InputError(f"{name}: no column {what}; found {', '.join(names)}; accepted are {ACCEPTED}; rename them")
    if unused := [column for column in names if column not in [queries[0], *positives, *negatives]]:
        logger.warning(f"{name}: columns {', '.join(unused)} are not used")
    return queries, positives, negatives


def first_match(names: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the names, ordered by the numbers in them, that the first pattern matches which matches any."""
    found = ([name for name in names if pattern.fullmatch(name)] for pattern in patterns)
    return sorted(next(filter(None, found), []), key=numbers_in)


def cell_text(cell: object, where: str) -> str:
    """Return a cell that is a text. Raises InputError, which begins with `where`, for another."""
    if not isinstance(cell, str) or not cell.strip():
        kind = "missing" if cell is None else "empty" if isinstance(cell, str) else f"not a text ({shortened(repr(cell))})"
        raise InputError(f"{where}: the text is {kind}; {FILL_IN}")
    return cell


def cell_texts(cell: object, where: str) -> list[str]:
    """Return the texts of a cell: a text alone, a list of them, or null, which has none. Raises InputError for another."""
    if isinstance(cell, str) and is_list(cell):
        raise InputError(
            f"{where}: the text is a list, {shortened(cell)}; write the rows as jsonl or parquet, or the texts into columns of "
            "their own, negative_1, negative_2 ..."
        )
    cells = [] if cell is None else cell if isinstance(cell, list | tuple) else [cell]
    return [cell_text(text, where) for text in cells]


def text_lists(lists: Mapping[str, Sequence[str]], name: str) -> list[list[str]]:
    """Return the lists. Raises InputError where they differ in length or are empty, or a text is empty or none."""
    lengths = {key: len(texts) for key, texts in lists.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        found = ", ".join(f"{length:,} {key}" for key, length in lengths.items())
        raise InputError(f"{name}: got {found}; give as many of each, and at least one")
    for key, texts in lists.items():
        for number, text in enumerate(texts, 1):
            cell_text(text, f"{name}, row {number}, {key}")
    return list(map(list, lists.values()))
