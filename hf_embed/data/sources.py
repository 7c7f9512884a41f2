"""Files and Hub datasets to rows of text, checked before anything is computed.

Accepted columns (case, spaces, hyphens and underscores do not matter):

    text | sentence                             one text a row: unsupervised, the text is its own positive
    anchor | query | question, positive         sentence-transformers, and retrieval; also `positives` or `pos`, each a text or
                                                a list of texts, as in FlagEmbedding's jsonl
    sent0, sent1                                SimCSE's own NLI files
    anchor | premise, entailment                with `contradiction` as the negative
    question | query, answer | passage | document | context
    title, body | abstract                      and title, text where pairs are asked for
    summary, article; comment, code
    sentence1, sentence2                        also question, text, title or caption with 1 and 2, and sentence_A, sentence_B
    premise, hypothesis, label                  and the pairs of the line above with a column of labels:
                                                `hf_embed.data.labelled` makes positives and negatives of them

each with any negatives: `negative`, `negative_1`, `negative_2` ..., or `negatives`, `neg`, `hard_neg`, each a text, a list of
texts, or null (a row may have fewer negatives than others). The first three lines of pairs name their positives, and the first
match is taken; of the others there may be one alone (`hf_embed.data.columns`). A list of positives becomes a row for each, and
the others of the list are never its negatives. Columns of other names are named by `--columns anchor=frage positive=antwort`.

Other columns are not used; one that judges the pairs, by its name a label or a score, is refused, for not every pair may be a
positive.
"""

import glob
import gzip
import logging
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from hf_embed.data import files
from hf_embed.data.cache import cached_map, checked_load
from hf_embed.data.columns import column_names, text_columns
from hf_embed.disk import DiskError
from hf_embed.errors import InputError
from hf_embed.hub_access import check_dataset

logger = logging.getLogger(__name__)

DROP_ADVICE = "--drop_empty_rows drops such rows and counts them"
KINDS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")


def read_file(
    path: str | list[str], header: bool = True, streaming: bool = False, quoting: bool = True, optional: list[str] | None = None
) -> Dataset | IterableDataset:
    """Read the rows of a txt (one text a line, column `text`), csv, tsv, jsonl, json or parquet file, gzipped or not.

    Args:
        path: a file, or several of one kind and with the same columns, whose rows follow each other.
        header: whether csv and tsv files have one; without it the columns are named 0, 1, 2 ...
        streaming: store nothing, and read the rows anew in every pass.
        quoting: whether quotes enclose cells of csv files. In tsv files they never do, as most corpora are written.
        optional: columns that a jsonl stream may lack in its first rows; see `hf_embed.data.files.stream`.

    Raises:
        InputError: a file is missing, empty, of another kind, or wrong in a line.
    """
    paths = [path] if isinstance(path, str) else path
    kind = check_files(paths)
    if kind != "parquet":
        table = files.Table(header, quoting)
        rows = files.stream(paths, table, optional) if streaming else files.load(paths, table)
    else:
        rows = read_parquet(paths, streaming)
    if (len(rows) == 0) if isinstance(rows, Dataset) else (next(iter(rows), None) is None):
        raise InputError(f"{paths[0]}: no rows")
    return rows


def first_cells(path: str) -> list[str] | None:
    """Return what may be the header of a csv or tsv file, in lower case; None for a file of another kind."""
    if check_files([path]) not in files.SEPARATORS:
        return None
    return [cell.lower() for cell in files.table_columns(path, files.Table())]


def read_parquet(paths: list[str], streaming: bool) -> Dataset | IterableDataset:
    """Read parquet files; InputError for what cannot be read."""
    path = paths[0]
    try:
        if path.endswith(".gz"):  # datasets does not unpack these
            if len(paths) > 1 or streaming:
                raise InputError(f"{path}: a gzipped parquet file can only be read alone and whole; unpack it")
            with gzip.open(path) as unpacked:
                return Dataset(pyarrow.parquet.read_table(unpacked))
        data_files = [file if "://" in file else glob.escape(file) for file in paths]
        return checked_load("parquet", data_files=data_files, split="train", streaming=streaming)
    except InputError:
        raise
    except (DatasetGenerationError, ValueError, OSError, EOFError, zlib.error) as error:
        raise files.unreadable(path, files.first_line(error.__cause__ or error)) from error


def check_files(paths: list[str]) -> str:
    """Return the one kind that all the files are of.

    Raises:
        InputError: a file is missing, empty or of no such kind.
    """
    endings = set()
    for path in paths:
        file = Path(path)
        if "://" not in path:  # a URL (https://, hf://datasets/...) is left to the reader
            if not file.is_file():
                what = "this is a folder; name a file in it" if file.is_dir() else "no such file; check the path"
                raise InputError(f"{path}: {what} (folders and globs are not read)")
            if file.stat().st_size == 0:
                raise InputError(f"{path}: the file is empty")
        kind = files.kind_of(path)
        if kind not in KINDS:
            accepted = ", ".join(f".{kind}" for kind in KINDS)
            raise InputError(f"{path}: cannot read '{kind and '.' + kind}' files; accepted are {accepted}, also with .gz")
        endings.add(kind)
    if len(endings) > 1:
        found = ", ".join(f".{kind}" for kind in sorted(endings))
        raise InputError(f"{paths[0]} and others: files of one kind belong together; found {found}")
    return endings.pop()


def read_hub(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Load the rows of a Hub dataset (or of a local folder that `datasets.load_dataset` reads).

    Raises:
        InputError: it cannot be loaded, or has several splits.
    """
    check_dataset(name)
    try:
        rows = checked_load(name, name=config, split=split, streaming=streaming)
    except DiskError:
        raise
    except Exception as error:  # the Hub client raises many kinds; each means: no rows from there
        reason = files.first_line(error)
        raise InputError(
            f"dataset '{name}' (config {config}, split {split}) cannot be loaded: {reason}; or give a local file"
        ) from error
    if isinstance(rows, DatasetDict):
        raise InputError(f"dataset '{name}' has the splits {', '.join(rows)}; choose a split")
    return rows


def unformatted(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows as plain Python values: the columns that `with_format` left, or what `with_transform` makes of them."""
    if isinstance(rows, IterableDataset):
        return rows.with_format(None)
    if rows.format["type"] == "custom":
        return cached_map(rows, dict, batched=True, remove_columns=rows.column_names).with_format(None)
    return rows.with_format(None).select_columns(rows.format["columns"])


def leave_out(rows: Dataset | IterableDataset, columns: list[str], name: str) -> Dataset | IterableDataset:
    """Return `rows` without `columns`; InputError if one of them is not there."""
    if not columns:
        return rows
    found = column_names(rows)
    if missing := [column for column in columns if column not in found]:
        raise InputError(f"{name}: no column '{missing[0]}' to ignore; found {', '.join(found)}")
    return rows.remove_columns(columns)


def read_texts(path: str) -> list[str]:
    """Read the texts of a txt, a line each, or of a file's column text (or sentence); empty ones are left out."""
    rows = read_file(path)
    column = text_columns(rows.column_names, path, paired=False)[0]
    texts = rows[column][:]
    for i, text in enumerate(texts, 1):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path}, row {i}, column '{column}': the text is not a text ({text!r}); write texts")
    return [text for text in texts if text and text.strip()]


def row_texts(row: dict, columns: list[str], where: str) -> list[str]:
    """Return the texts of one row: anchor, positive, negatives.

    Raises:
        InputError: one is empty or no text, or the negatives are a list written as a text. The message begins with `where`.
    """
    texts = []
    for i, column in enumerate(columns):
        cell, is_negative = row[column], i >= 2
        if cell is None and is_negative:
            continue
        if is_negative and isinstance(cell, str) and is_list(cell):
            raise InputError(
                f"{where}, column '{column}': the text is a list, {files.shortened(cell)}; write the rows as jsonl or parquet, "
                "or the negatives into columns of their own, negative_1, negative_2 ..."
            )
        for text in cell if is_negative and isinstance(cell, list) else [cell]:  # only negatives may be several
            if wrong := files.missing_text(text):
                raise InputError(f"{where}, column '{column}': the text is {wrong}; {files.FILL_IN}")
            texts.append(text)
    return texts


def rows_of_texts(row: dict, columns: list[str], where: str) -> list[tuple[list[str], list[str]]]:
    """Return the texts of a row as `row_texts` does, and its other positives, for each of its positives.

        {"query": "q", "pos": ["a", "b"], "neg": ["c"]} -> [(["q", "a", "c"], ["b"]), (["q", "b", "c"], ["a"])]

    Raises:
        InputError: as `row_texts`, or the list of positives is empty.
    """
    positives = row[columns[1]] if len(columns) > 1 else None
    if not isinstance(positives, list):
        return [(row_texts(row, columns, where), [])]
    if not positives:
        raise InputError(f"{where}, column '{columns[1]}': there is no positive; give one or delete the row")
    texts = [row_texts(row | {columns[1]: positive}, columns, where) for positive in positives]
    different = {own[1]: own for own in texts}  # a positive may stand twice
    return [(own, [other for other in different if other != positive]) for positive, own in different.items()]


def refuse_lists(rows: Iterable[dict], columns: list[str], name: str) -> None:
    """Refuse anchors or positives that are lists written as texts in all of some first rows; one alone may be a text."""
    rows = list(rows)
    for column in columns[:2]:
        cells = [row[column] for row in rows if isinstance(row[column], str)]
        if len(cells) > 1 and all(map(is_list, cells)):
            raise InputError(
                f"{name}, column '{column}': every text is a list, {files.shortened(cells[0])}; write a row for each of them"
            )


def is_list(text: str) -> bool:
    """Return whether a text is a list of texts as pandas, numpy and json write it: ['a', 'b'], ['a' 'b'], ["a", "b"], []."""
    text = re.sub(r"^array\((.*?)(,\s*dtype=.*)?\)$", r"\1", text.strip(), flags=re.DOTALL)
    if not (text.startswith("[") and text.endswith("]")):
        return False
    inside = text[1:-1].strip()
    return not inside or (inside[0] in "'\"" and inside[-1] in "'\"")
