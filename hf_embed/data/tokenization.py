"""Tokenization of rows of text, done only once: `datasets` caches the token ids and text hashes in an Arrow table on disk."""

import hashlib
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow.compute
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from hf_embed.data.cache import cached_map
from hf_embed.data.columns import text_columns, warn_of_judgements
from hf_embed.data.scores import check_gaps, check_label_names, refuse_inference_labels, row_scores, score_columns
from hf_embed.data.sources import check_first_texts, kept_rows
from hf_embed.encoding import beginning, room_for_text
from hf_embed.errors import InputError
from hf_embed.progress import table_bars

logger = logging.getLogger(__name__)

# If the share of truncated texts is above this value, a warning is logged.
TRUNCATION_WARNING = 0.05


def text_id(tokens: list[int]) -> int:
    """Return a 64-bit hash of a text's token ids, never 0. Equal token ids have equal hashes on every rank."""
    return int.from_bytes(hashlib.blake2b(array("q", tokens), digest_size=8).digest(), "big", signed=True) or 1


@dataclass
class RowTokenizer:
    """Map rows of texts to token ids and text hashes, and count the truncated texts of each row.

        [["a cat", "a kitten", "a dog"]]
        -> {"input_ids": [[[101, 1037, 4937, 102], [101, 1037, 18401, 102], [101, 1037, 3899, 102]]],
            "text_ids": [[6027..., -1185..., 7743...]], "truncated": [0]}

    `truncated` is the number of texts in the row that were longer than `max_length` tokens. `text_ids` tell which texts are the
    same for the model: they are hashes of the tokens after truncation. Texts have the same hash if they differ only in case and
    the tokenizer is uncased, or if they differ only after `max_length` tokens.

    Prompts are not part of the hash: a query and a document of the same text have the same hash, whatever their prompts are.
    With prompts, the text is tokenized again without a prompt for the hash. It is then truncated to `text_length`, the length
    that the longest prompt leaves for the text. So two texts that the model sees as the same tokens have the same hash with
    either prompt. But two long texts also have the same hash if they differ only in the last n tokens before `max_length`,
    where n is the length of the longest prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    query_prompt: str = ""
    document_prompt: str = ""
    scored: bool = False  # tables get the column `scores` too: one score for each text after the anchor
    keeps_texts: bool = False  # tables get the column `texts` too
    text_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.text_length = room_for_text(self.tokenizer, [self.query_prompt, self.document_prompt], self.max_length)

    def __call__(self, rows: list[list[str]], others: list[list[str]] | None = None, most_others: int = 0) -> dict[str, list]:
        """Return the three columns of the rows, and with `others` also the column `other_ids`.

        Args:
            rows: the texts of each row.
            others: the other positives of each row.
            most_others: the number of hashes in each row of `other_ids`, the same on every rank. The text hashes of `others`
                are padded with 0 to this number.
        """
        prompted = [(self.document_prompt if i else self.query_prompt) + text for row in rows for i, text in enumerate(row)]
        ids, long = self.tokenize(prompted, self.max_length)
        hashed = ids
        if self.query_prompt or self.document_prompt:
            hashed, _ = self.tokenize([text for row in rows for text in row], self.text_length)
        start = 0
        columns: dict[str, list] = {"input_ids": [], "text_ids": [], "truncated": []}
        for row in rows:
            stop = start + len(row)
            columns["input_ids"].append(ids[start:stop])
            columns["text_ids"].append([text_id(tokens) for tokens in hashed[start:stop]])
            columns["truncated"].append(len(long.intersection(range(start, stop))))
            start = stop
        if others is not None:
            columns["other_ids"] = self.hashes(others, most_others)
        return columns

    def hashes(self, rows: list[list[str]], width: int) -> list[list[int]]:
        """Return the text hashes of the texts in each row, padded with 0 to `width` hashes."""
        texts = list(dict.fromkeys(text for row in rows for text in row))
        ids, _ = self.tokenize(texts, self.text_length)
        known = dict(zip(texts, map(text_id, ids)))
        return [[known[text] for text in row] + [0] * (width - len(row)) for row in rows]

    def tokenize(self, texts: list[str], max_length: int) -> tuple[list[list[int]], set[int]]:
        """Return the token ids of texts, truncated to `max_length`, and the indices of the texts that were longer."""
        texts = [beginning(text, max_length, self.tokenizer) for text in texts]
        ids = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        if empty := [text for text, tokens in zip(texts, ids) if not tokens]:
            raise InputError(
                f"the tokenizer returns no tokens for the text {empty[0][:60]!r}, so it has no embedding; delete the row"
            )
        long = [i for i, tokens in enumerate(ids) if len(tokens) > max_length]
        if long:
            truncated = self.tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
            for i, tokens in zip(long, truncated):
                ids[i] = tokens
        return ids, set(long)


def tokenize_table(
    rows: Dataset,
    tokenizer: RowTokenizer,
    name: str,
    paired: bool | None = None,
    drop_empty_rows: bool = False,
    negatives: int | None = None,
) -> Dataset:
    """Tokenize a table of text rows into the columns of `RowTokenizer`: `input_ids`, `text_ids`, `truncated`.

    A row with a list of positives becomes one row for each positive. If any row has several positives, the table also has the
    columns `other_ids` and `row`, the number of the original row.

    Args:
        rows: rows with the columns that `hf_embed.data.known_columns` lists, and without a format.
        tokenizer: the tokenizer of the texts. If it is `scored`, the scores of each row are read as well.
        name: the name of the rows in messages.
        paired: see `hf_embed.data.columns.text_columns`.
        drop_empty_rows: drop and count rows with an empty text.
        negatives: how many negatives of each row to use, from the first one on; default: all.

    Raises:
        InputError: if the columns are not recognized, a text is empty, a score is wrong, or there are too few rows.
    """
    columns, scores = columns_to_read(rows, tokenizer.scored, name, paired)
    if len(columns) > 1 and not scores:
        warn_of_judgements(rows, [column for column in rows.column_names if column not in columns], name)
    rows = rows.select_columns(columns + scores)  # cells of other columns may hold values that Python cannot represent
    most_others = most_positives(rows, columns) - 1
    texts_used = None if negatives is None else 2 + negatives

    def convert(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        found = list(rows_of_batch(batch, numbers, columns, scores, name, texts_used, drop_empty_rows))
        texts = [row.texts for row in found]
        made = tokenizer(texts, [row.others for row in found] if most_others else None, most_others)
        if most_others:
            made["row"] = [row.number for row in found]
        if scores:
            made["scores"] = [row.scores for row in found]
        if tokenizer.keeps_texts:
            made["texts"] = texts
        return made

    with table_bars():
        settings = {"batched": True, "with_indices": True, "remove_columns": rows.column_names, "desc": f"Tokenizing {name}"}
        tokens = cached_map(rows, convert, **settings)
    report_rows(tokens, len(rows), most_others > 0, name)
    return tokens


def columns_to_read(rows: Dataset, scored: bool, name: str, paired: bool | None = None) -> tuple[list[str], list[str]]:
    """Return the columns of the texts of a table, in the order anchor, positive, negatives, and the columns of its scores.

    Args:
        rows: the table.
        scored: whether the scores of the rows are read.
        name: the name of the rows in messages.
        paired: see `hf_embed.data.columns.text_columns`.

    Raises:
        InputError: if the columns are not recognized, if texts look like lists, or if labels cannot be scores.
    """
    scores = score_columns(rows.column_names, name) if scored else []
    for column in scores:
        check_label_names(rows, column, name)
        refuse_inference_labels(rows, column, name)
    columns = text_columns(rows.column_names, name, paired, scores)
    check_first_texts(islice(rows.select_columns(columns), 20), columns, name)
    return columns, scores


class Row(NamedTuple):
    """A row that is ready to be tokenized."""

    number: int  # the number of the row in the table, from 0
    texts: list[str]  # anchor, positive, negatives; or a single text
    others: list[str]  # the other positives of the row
    scores: list[float]  # one for each text after the anchor, or nothing if the rows have no scores


def rows_of_batch(
    batch: dict[str, list], numbers: list[int], columns: list[str], scores: list[str], name: str, most: int | None, drop: bool
) -> Iterator[Row]:
    """Read the rows of a batch of cells. A row with a list of positives becomes one row for each positive.

    Args:
        batch: the cells by column.
        numbers: the numbers of the rows in the table, from 0.
        columns: the columns of the texts, in the order anchor, positive, negatives.
        scores: the columns of the scores.
        name: the name of the rows in messages.
        most: the number of texts of a row to use, from the first one on; None: all.
        drop: leave out rows with an empty text.

    Raises:
        InputError: if a text is empty and such rows are not left out, if a score is wrong, or if a row with scores has several
            positives.
    """
    for i, number in enumerate(numbers):
        cells = {column: values[i] for column, values in batch.items()}
        where = f"{name}, row {number + 1}"
        made = kept_rows(cells, columns, where, drop)
        if scores and len(made) > 1:
            raise InputError(f"{where}: there are {len(made)} positives, but scores need one positive per row; split the row")
        if made:
            check_gaps(cells, columns[1:], scores, where)
        for texts, others in made:
            graded = row_scores({column: cells[column] for column in scores}, len(texts), where) if scores else []
            yield Row(number, texts[:most], others, graded[: len(texts[:most]) - 1])


def report_rows(tokens: Dataset, rows_before: int, several_positives: bool, name: str) -> None:
    """Warn about rows that were dropped and rows with several positives.

    Args:
        tokens: the tokenized rows.
        rows_before: the number of rows of the table.
        several_positives: whether a row of the table has several positives, so that `tokens` has the column `row`.
        name: the name of the rows in messages.

    Raises:
        InputError: if fewer than two rows are left.
    """
    several_positives = several_positives and len(tokens) > 0  # a table without rows has no columns
    kept = different_rows(tokens) if several_positives else len(tokens)
    if kept < rows_before:
        logger.warning(f"{name}: {rows_before - kept:,} of {rows_before:,} rows had an empty text and were dropped")
    if several_positives:
        logger.warning(
            f"{name}: {kept:,} rows became {len(tokens):,}, one per positive; a row's other positives are not its negatives"
        )
    if len(tokens) < 2:
        raise too_few_rows(len(tokens), name)


def too_few_rows(rows: int, name: str) -> InputError:
    """Return the error for rows that are too few to be negatives of each other."""
    return InputError(f"{name}: there are {rows} row(s), but in-batch negatives need at least 2; give more rows")


def different_rows(tokens: Dataset) -> int:
    """Return how many rows of the original table are left. The numbers in the column `row` are in ascending order."""
    found, last = 0, -1
    for chunk in tokens.data["row"].chunks:
        numbers = chunk.to_numpy()
        if len(numbers):
            found, last = found + int(np.count_nonzero(np.diff(numbers, prepend=last))), numbers[-1]
    return found


def most_positives(rows: Dataset, columns: list[str]) -> int:
    """Return the largest number of positives in a row. A single text counts as one positive."""
    if len(columns) < 2 or isinstance(rows.features[columns[1]], Value):
        return 1
    cells = (cell for batch in rows.select_columns(columns[1]).iter(10_000) for cell in batch[columns[1]])
    return max((len(cell) for cell in cells if isinstance(cell, list)), default=1) or 1


def most_texts(tokens: Dataset) -> int:
    """Return the largest number of texts in a row."""
    return pyarrow.compute.max(pyarrow.compute.list_value_length(tokens.data["text_ids"])).as_py()


def count_texts(tokens: Dataset) -> tuple[int, int]:
    """Return the number of texts in all rows, and how many of them were truncated."""
    texts = pyarrow.compute.sum(pyarrow.compute.list_value_length(tokens.data["text_ids"])).as_py()
    return texts, pyarrow.compute.sum(tokens.data["truncated"]).as_py()


def truncated_share(tokens: Dataset) -> float:
    """Return the share of texts that were truncated."""
    texts, truncated = count_texts(tokens)
    return truncated / texts


def warn_of_truncation(shares: dict[str, float]) -> None:
    """Log one warning about all datasets with too many truncated texts, given as {name: truncated share}, the worst first."""
    worst = sorted(((share, name) for name, share in shares.items() if share > TRUNCATION_WARNING), reverse=True)
    if worst:
        named = ", ".join(f"{share:.0%} in {name}" for share, name in worst[:5])
        more = f" and less in {len(worst) - 5} more" if len(worst) > 5 else ""
        logger.warning(f"texts truncated to max_length tokens: {named}{more}")
