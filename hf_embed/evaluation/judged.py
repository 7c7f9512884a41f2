"""Queries with documents that answer them and documents that do not.

They are read from rows with these columns. In each line the first name that matches is used (case, spaces, hyphens and
underscores do not matter):

    the query      anchor | query | sent0 | question
    positives      positive | sent1 | answer         also pos, positives, answers; positive_1, positive_2 ...;
                                                     positive_passages (Tevatron), positive_ctxs (DPR)
    negatives      negative | hard_neg | documents   also neg, negatives; negative_1, negative_2 ...;
                                                     negative_passages, negative_ctxs, hard_negative_ctxs

Training pairs with negatives are accepted too, for example premise, entailment, contradiction (`hf_embed.data.known_columns`).
The cells of positives and negatives are a text, a passage {"title", "text"}, a list of these, or null. `documents` holds all
candidates of a query: its negatives are the documents that are not among the positives. In a second layout, each row has one
document and its label, and the rows of the same query belong together:

    the query, as above; document | passage | answer; label, 1 or 0         document and label may also be lists
"""

import logging
from contextlib import suppress
from typing import NamedTuple

from datasets import Dataset

from hf_embed.data.columns import negative_columns, pair_of
from hf_embed.data.known_columns import NEGATIVE_NAME, plain
from hf_embed.data.scores import check_label_names
from hf_embed.data.sources import cell_text, cell_texts, plain_rows
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.rows import first_match, label_number

logger = logging.getLogger(__name__)

# Patterns of column names in their plain form.
QUERIES = ("anchor", "query", "sent0", "question")
POSITIVES = (r"pos(itive)?s?(\d+|passages|ctxs)?", "sent1", r"answers?\d*")
NEGATIVES = (NEGATIVE_NAME, "documents")
DOCUMENTS = ("documents?", "passages?", "answers?")
LABELS = ("labels?",)
ACCEPTED = (
    "query, positive, negative; anchor, positive, negative; sent0, sent1, hard_neg; question, answer, negative; for reranking "
    "also query, document, label"
)


class Judged(NamedTuple):
    """A query, the documents that answer it, and some documents that do not."""

    query: str
    positives: list[str]
    negatives: list[str]


def judged_rows(rows: Dataset, name: str) -> list[Judged]:
    """Find the query, the positives and the negatives of each row.

    Args:
        rows: rows with the columns above, but not in the layout with labels.
        name: the name of the rows in messages.

    Raises:
        InputError: if a column is missing, or a cell is empty or not a text.
    """
    names = rows.column_names
    queries, positives, negatives = columns_of(names, name)
    for columns, what in ((queries, "query"), (positives, "positive"), (negatives, "negative")):
        if not columns:
            raise InputError(
                f"{name}: there is no column {what}; found {', '.join(names)}; rename the columns, for example to {ACCEPTED}"
            )
    warn_of_unused(names, [queries[0], *positives, *negatives], name)
    found = []
    for number, row in enumerate(plain_rows(rows, [queries[0], *positives, *negatives], name), 1):
        where = f"{name}, row {number}"
        query = cell_text(row.get(queries[0]), f"{where}, column '{queries[0]}'")
        right, wrong = (
            [text for column in columns for text in cell_texts(row.get(column), f"{where}, column '{column}'")]
            for columns in (positives, negatives)
        )
        if plain(negatives[0]) == "documents":
            wrong = [text for text in wrong if text not in set(right)]
        found.append(Judged(query, right, wrong))
    return found


def columns_of(names: list[str], name: str) -> list[list[str]]:
    """Return the columns of queries, positives and negatives. If one is missing, accept the columns of training rows."""
    found = [first_match(names, patterns) for patterns in (QUERIES, POSITIVES, NEGATIVES)]
    negatives = negative_columns(names)
    if negatives and not all(found):
        with suppress(InputError):  # raised if more than one pair of columns matches
            if pair := pair_of(names, name):
                return [pair[:1], pair[1:], negatives]
    return found


def judged_candidates(rows: Dataset, name: str) -> list[Judged]:
    """Return queries with their documents from rows of either layout.

    Raises:
        InputError: if a column is missing, a text is empty, or a label is not 0 or 1.
    """
    names = rows.column_names
    queries, documents, labels = (first_match(names, patterns) for patterns in (QUERIES, DOCUMENTS, LABELS))
    if not (queries and documents and labels) or first_match(names, (NEGATIVE_NAME, *POSITIVES[:2])):
        return judged_rows(rows, name)
    query, document, label = queries[0], documents[0], labels[0]
    check_label_names(rows, label, name)
    warn_of_unused(names, [query, document, label], name)
    found: dict[str, Judged] = {}
    for number, row in enumerate(plain_rows(rows, [query, document, label], name), 1):
        where = f"{name}, row {number}"
        text = cell_text(row.get(query), f"{where}, column '{query}'")
        candidates = cell_texts(row.get(document), f"{where}, column '{document}'")
        values = row.get(label) if isinstance(row.get(document), list) else [row.get(label)]
        if not isinstance(values, list) or len(values) != len(candidates):
            raise InputError(
                f"{where}: {document} and {label} must be one value each, or lists of the same length; correct the row"
            )
        judged = found.setdefault(text, Judged(text, [], []))
        for candidate, value in zip(candidates, values):
            is_right = label_number(value, f"{where}, column '{label}'")
            (judged.positives if is_right else judged.negatives).append(candidate)
    return list(found.values())


def warn_of_unused(names: list[str], used: list[str], name: str) -> None:
    """Warn about columns that are not used."""
    if unused := [column for column in names if column not in used]:
        logger.warning(f"{masked(name)}: columns {', '.join(unused)} are not used")
