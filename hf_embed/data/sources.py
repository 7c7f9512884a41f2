"""Readers that turn files and Hub datasets into rows of text. The rows are checked before any computation starts.

(A `Source`, which is rows with settings of their own, is in `hf_embed.data.mixture`.)

`hf_embed.data.known_columns` lists the columns that rows may have. A cell holds a text. A cell of positives or negatives may
also hold a list of texts, as in FlagEmbedding's jsonl, and in place of a text a passage, {"title": ..., "text": ...}: it is
read as its title, a space and its text. A cell of negatives may be null, because a row may have fewer negatives than other
rows. A list of positives becomes one row for each positive, and the other positives of the list are never negatives of that
row.
"""

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, Value

from hf_embed.data import text_files
from hf_embed.data.cache import cached_map, checked_load
from hf_embed.data.columns import FEW_VALUES, column_names, text_columns
from hf_embed.data.known_columns import plain
from hf_embed.errors import EmptyTextError, InputError, first_line, masked, root_line, shortened
from hf_embed.files.disk import DiskError
from hf_embed.files.read_files import check_file, kind_of
from hf_embed.hub_access import check_dataset

logger = logging.getLogger(__name__)

FILL_IN = "fill it in or delete the row"
DROP_ADVICE = "--drop_empty_rows drops such rows and counts them"
KINDS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")


def read_file(
    path: str | list[str], header: bool = True, streaming: bool = False, quoting: bool = True
) -> Dataset | IterableDataset:
    """Read the rows of a txt (one text per line, column `text`), csv, tsv, jsonl, json or parquet file.

    All files except parquet may be gzipped.

    Args:
        path: a file, or several files of one kind with the same columns; their rows are concatenated.
        header: whether csv and tsv files have a header; without it the columns are named 0, 1, 2 ...
        streaming: store nothing, and read the rows again in every pass.
        quoting: whether quotes enclose cells of csv files; in tsv files they never do, because most corpora are written so.

    Raises:
        InputError: if a file is missing, empty, of another kind, or has an invalid line.
    """
    paths = [path] if isinstance(path, str) else path
    kind = checked_kind(paths)
    if kind != "parquet":
        table = text_files.Table(header, quoting)
        rows = text_files.stream(paths, table) if streaming else text_files.load(paths, table)
    else:
        rows = read_parquet(paths, streaming)
    if (len(rows) == 0) if isinstance(rows, Dataset) else is_empty(rows, paths[0]):
        raise InputError(f"{paths[0]}: there are no rows")
    if isinstance(rows, Dataset):
        warn_of_splits(rows, paths[0])
    return rows


def warn_of_splits(rows: Dataset, path: str) -> None:
    """Log a warning if a column says that the rows belong to several splits, such as train and test. All of them are read."""
    for column in rows.column_names:
        if plain(column) == "split" and rows.features[column] == Value("string"):
            splits = sorted(filter(None, rows.unique(column)))
            if 1 < len(splits) <= FEW_VALUES:
                logger.warning(
                    f"{masked(path)}: the column '{column}' names the splits {', '.join(splits)}, and the rows of all of them "
                    "are used; keep those of one in the file"
                )


def is_empty(rows: IterableDataset, path: str) -> bool:
    """Return whether a stream of the file has no rows. Raise InputError if the file cannot be read."""
    try:
        return next(iter(rows), None) is None
    except InputError:
        raise
    except Exception as error:  # Arrow and the URL clients raise many kinds of errors
        raise text_files.unreadable(path, first_line(error)) from error


def first_cells(path: str) -> list[str] | None:
    """Return the first row of a csv or tsv file, possibly a header, in lower case. Return None for other kinds of files."""
    if checked_kind([path]) not in text_files.SEPARATORS:
        return None
    return [cell.lower() for cell in text_files.table_columns(path, text_files.Table())]


def read_parquet(paths: list[str], streaming: bool) -> Dataset | IterableDataset:
    """Read parquet files. Raise InputError if one cannot be read."""
    try:
        for file in paths:
            check_parquet(file)
        check_alike([file for file in paths if "://" not in file])
        data_files = [file if "://" in file else glob.escape(file) for file in paths]
        return checked_load("parquet", data_files=data_files, split="train", streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # Arrow, datasets and the URL clients raise many kinds of errors
        raise text_files.unreadable(paths[0], root_line(error)) from error


def check_parquet(path: str) -> None:
    """Raise InputError if a local parquet file has no rows, or two columns of the same name."""
    if "://" in path:
        return
    found = pyarrow.parquet.read_metadata(path)
    text_files.check_names(found.schema.to_arrow_schema().names, path)
    if found.num_rows == 0:
        raise InputError(f"{path}: there are no rows")


def check_alike(paths: list[str]) -> None:
    """Raise InputError if a local parquet file has a column that the first one lacks, or that holds only nulls there.

    A column may be missing in a later file. `datasets` then reads nulls.
    """
    schemas = [pyarrow.parquet.read_schema(path) for path in paths]
    for path, schema in zip(paths[1:], schemas[1:]):
        for column in schema:
            first = schemas[0].field(column.name).type if column.name in schemas[0].names else pyarrow.null()
            if first != column.type and "null" in str(first).replace("not null", ""):
                raise InputError(
                    f"{path}: the column '{column.name}' has no values in {paths[0]}; give files with the same columns, or "
                    "name the one with most columns first"
                )


def checked_kind(paths: list[str]) -> str:
    """Return the kind of the files, which must be the same for all of them.

    Raises:
        InputError: if a file is missing, empty or of an unknown kind, or if the kinds differ.
    """
    endings = set()
    for path in paths:
        if "://" not in path:  # a URL (https://, hf://datasets/...) is checked when it is read
            try:
                check_file(path)
            except InputError as error:
                raise InputError(f"{error} (several files, or a pattern, can only be given in --sources)") from error
            if Path(path).stat().st_size == 0:
                raise InputError(f"{path}: the file is empty")
        kind = kind_of(path)
        if kind not in KINDS:
            accepted = ", ".join(f".{kind}" for kind in KINDS) + "; all but .parquet also with .gz"
            raise InputError(f"{path}: '{kind and '.' + kind}' files are not supported; use {accepted}")
        endings.add(kind)
    if len(endings) > 1:
        found = ", ".join(f".{kind}" for kind in sorted(endings))
        raise InputError(f"{paths[0]} and others: the files are of different kinds, {found}; give files of one kind")
    return endings.pop()


def read_hub(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Load the rows of a Hub dataset, or of a local folder that `datasets.load_dataset` reads.

    Raises:
        InputError: if the dataset cannot be loaded, or if it has several splits and none was chosen.
    """
    check_dataset(name)
    try:
        rows = checked_load(name, name=config, split=split, streaming=streaming)
    except DiskError:
        raise
    except Exception as error:  # the Hub client raises many kinds of errors, and all mean that no rows can be loaded
        part = f"split {split}" if config is None else f"config {config}, split {split}"
        raise InputError(
            f"dataset '{name}' ({part}) cannot be loaded: {first_line(error)}; check the name, or give a local file"
        ) from error
    if isinstance(rows, DatasetDict):
        raise InputError(f"dataset '{name}' has the splits {', '.join(rows)}; choose a split")
    return rows


def unformatted(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows as plain Python values.

    Only the columns that the format shows are kept. The function of `with_transform` is applied once, and a warning says so.
    """
    if isinstance(rows, IterableDataset):
        return rows.with_format(None)
    chosen, shows_all = rows.format["columns"], rows.format["output_all_columns"]
    if rows.format["type"] == "custom":
        logger.warning(
            "the function of with_transform is applied to the rows once, before the training; one that draws random numbers "
            "gives the same texts in every epoch"
        )
        replaced = chosen if shows_all else rows.column_names
        return cached_map(rows, dict, anew=True, batched=True, remove_columns=replaced).with_format(None)
    return rows.with_format(None).select_columns(rows.column_names if shows_all else chosen)


def leave_out(rows: Dataset | IterableDataset, columns: list[str], name: str) -> Dataset | IterableDataset:
    """Return `rows` without `columns`. Raise InputError if one of these columns does not exist."""
    if not columns:
        return rows
    found = column_names(rows)
    if missing := [column for column in columns if column not in found]:
        raise InputError(f"{name}: there is no column '{missing[0]}' to ignore; found {', '.join(found)}")
    return rows.remove_columns(columns)


def read_texts(path: str) -> list[str]:
    """Read the texts of a txt file (one per line), or of the column text (or sentence) of another file. Skip empty texts."""
    rows = read_file(path)
    column = text_column(rows.column_names, path, "rename the column of the texts to text")
    texts = rows[column][:]
    for i, text in enumerate(texts, 1):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path}, row {i}, column '{column}': the text is not a string ({text!r}); convert it to a string")
    return [text for text in texts if text and text.strip()]


def text_column(names: list[str], path: str, mend: str) -> str:
    """Return the column text (or sentence), or the only one, for a command without `--columns`. Otherwise, advise `mend`."""
    try:
        return text_columns(names, path, paired=False)[0]
    except InputError as error:
        if len(names) < 2:
            raise
        raise InputError(f"{path}: found the columns {', '.join(names)}; {mend}") from error


def cell_text(cell: object, where: str) -> str:
    """Return a cell that is a text. The messages of the errors begin with `where`.

    Raises:
        EmptyTextError: if the cell is missing or empty.
        InputError: if the cell is not a string.
    """
    if not isinstance(cell, str | None):
        raise InputError(
            f"{where}: the text is not a string ({shortened(repr(cell))}); convert it to a string or delete the row"
        )
    if cell is None or not cell.strip():
        raise EmptyTextError(f"{where}: the text is {'missing' if cell is None else 'empty'}; {FILL_IN}")
    return cell


def passage_text(cell: Any) -> Any:
    """Return the text of a passage {"title", "text"}, with its title first, as BEIR, Tevatron and DPR have them.

    Any other cell is returned unchanged.
    """
    if not isinstance(cell, dict) or not isinstance(cell.get("text"), str):
        return cell
    return f"{cell.get('title') or ''} {cell['text']}".strip()


def cell_texts(cell: object, where: str) -> list[str]:
    """Return the texts of a cell that holds one text, a list of texts, or null (no texts). Raise errors as `cell_text` does."""
    if isinstance(cell, str) and is_list(cell):
        raise InputError(
            f"{where}: the text looks like a list, {shortened(cell)}; write the rows as jsonl or parquet, or put each "
            "text into its own column, negative_1, negative_2 ..."
        )
    cells = [] if cell is None else cell if isinstance(cell, list | tuple) else [cell]
    return [cell_text(passage_text(text), where) for text in cells]


def row_texts(row: dict, columns: list[str], where: str) -> list[str]:
    """Return the texts of one row: anchor, positive, negatives.

    Raises:
        EmptyTextError: if a cell is missing or empty. The message begins with `where`, also in the other case.
        InputError: if a cell is not a text, or the negatives are a list that was written as a text.
    """
    texts = []
    for i, column in enumerate(columns):
        cell, place = row.get(column), f"{where}, column '{column}'"  # a row of a stream may lack a column
        # Only negatives may be several.
        texts += cell_texts(cell, place) if i >= 2 else [cell_text(passage_text(cell) if i else cell, place)]
    return texts


class RowTexts(NamedTuple):
    """The texts of a row with one of its positives."""

    texts: list[str]  # anchor, positive, negatives; or a single text
    others: list[str]  # the other positives of the row


def rows_by_positive(row: dict, columns: list[str], where: str) -> list[RowTexts]:
    """Return the texts of a row once for each of its positives.

        {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
        -> [RowTexts(["q", "a", "c"], others=["b"]), RowTexts(["q", "b", "c"], others=["a"])]

    Raises:
        EmptyTextError: if the list of positives is empty, or a text is missing or empty.
        InputError: for the other reasons of `row_texts`.
    """
    positives = row.get(columns[1]) if len(columns) > 1 else None
    if not isinstance(positives, list):
        return [RowTexts(row_texts(row, columns, where), [])]
    if not positives:
        raise EmptyTextError(f"{where}, column '{columns[1]}': there is no positive; add one or delete the row")
    texts = [row_texts(row | {columns[1]: positive}, columns, where) for positive in positives]
    different = {own[1]: own for own in texts}  # the same positive may be listed twice
    return [RowTexts(own, [other for other in different if other != positive]) for positive, own in different.items()]


def kept_rows(row: dict, columns: list[str], where: str, drop: bool) -> list[RowTexts]:
    """Return what `rows_by_positive` returns, or nothing for a row with an empty text if such rows are dropped."""
    try:
        return rows_by_positive(row, columns, where)
    except EmptyTextError as error:
        if not drop:
            raise InputError(f"{error} ({DROP_ADVICE})") from error
        return []


def plain_rows(rows: Dataset, columns: list[str], name: str) -> Iterator[dict]:
    """Yield the rows of a table with only these columns.

    Raises:
        InputError: if Python cannot represent the value of a cell, for example a date before the year 1.
    """
    try:
        yield from rows.select_columns(columns)
    except Exception as error:
        raise InputError(
            f"{name}: a cell of {', '.join(columns)} cannot be read: {first_line(error)}; correct the cell"
        ) from error


def texts_of(rows: Dataset, columns: list[str], name: str) -> Iterator[list[str]]:
    """Yield the texts of a table's rows, as `rows_by_positive` returns them. Raise InputError if a text is empty or wrong."""
    for number, row in enumerate(plain_rows(rows, columns, name), 1):
        yield from (made.texts for made in rows_by_positive(row, columns, f"{name}, row {number}"))


def check_first_texts(rows: Iterable[dict], columns: list[str], name: str) -> None:
    """Raise InputError if all anchors, or all positives, in some first rows are lists that were written as texts.

    A single such text is accepted, because it may be a real text. If all of them are whole numbers, a warning is logged.
    """
    rows = list(rows)
    for column in columns[:2]:
        cells = [row[column] for row in rows if isinstance(row[column], str)]
        if len(cells) > 1 and all(map(is_list, cells)):
            raise InputError(
                f"{name}, column '{column}': every text looks like a list, {shortened(cells[0])}; write one text per row"
            )
        if len(cells) > 1 and all(cell.strip().isdecimal() for cell in cells):
            logger.warning(
                f"{name}, column '{column}': every text looked at is a number, such as {cells[0]}; if these are ids of texts, "
                "put the texts in their place"
            )


def is_list(text: str) -> bool:
    """Return whether a text is a list of texts as pandas, numpy or json writes it: ['a', 'b'], ['a' 'b'], ["a", "b"], []."""
    text = text.strip()
    if text.startswith("array("):
        text = re.sub(r"^array\((.*?)(,\s*dtype=.*)?\)$", r"\1", text, flags=re.DOTALL)
    if not (text.startswith("[") and text.endswith("]")):
        return False
    inside = text[1:-1].strip()
    return not inside or (inside[0] in "'\"" and inside[-1] in "'\"")
