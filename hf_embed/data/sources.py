"""Files and Hub datasets to rows of text, checked before anything is computed.

Accepted columns, first match wins (case does not matter):

    text | sentence                       one text a row: unsupervised, the text is its own positive
    sent0, sent1[, hard_neg]              SimCSE's own NLI files
    anchor, positive[, negatives]         sentence-transformers
    query, positive[, negatives]          retrieval

where negatives are `negative`, `negative_1`, `negative_2` ..., or `negatives`, each a text, a list of texts, or null (a row
may have fewer negatives than others).
"""

import csv
import glob
import gzip
import logging
import re
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pandas
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_embed.errors import InputError, masked

logger = logging.getLogger(__name__)

ACCEPTED = "text; sent0, sent1[, hard_neg]; anchor, positive[, negative...]; query, positive[, negative...]"
DROP_ADVICE = "--drop_empty_rows drops such rows and counts them"
LAYOUTS = [("anchor", "positive"), ("query", "positive"), ("sent0", "sent1")]
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_\d+)?", re.IGNORECASE)


def read_file(path: str | list[str], header: bool = True, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of a txt (one text a line, column `text`), csv, tsv, jsonl, json or parquet file, gzipped or not.

    Several files, of one kind and with the same columns, follow each other. A tsv file is read without quoting, as most
    corpora are written. With `header=False` the columns of csv and tsv files are named 0, 1, 2 ... With `streaming` nothing is
    stored: the rows are read anew in every pass. Raises InputError if a file is missing, empty or of another kind.
    """
    paths = [path] if isinstance(path, str) else path
    kinds = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = check_files(paths, kinds)
    path = paths[0]
    table = {"keep_default_na": False, "header": 0 if header else None}
    tabs = table | {"sep": "\t", "quoting": csv.QUOTE_NONE}
    options = {".csv": table, ".tsv": tabs}.get(kind, {})
    try:
        if options:  # every cell as text: "007", "NA" and "1e5" stay what they are
            head = read_head(path, options)
            if head.empty:
                raise InputError(f"{path}: no rows")
            if not isinstance(head.index, pandas.RangeIndex):
                raise InputError(f"{path}: the rows have more columns than the header; name every column")
            for other in paths[1:]:
                columns = read_head(other, options).columns
                if list(columns) != list(head.columns):
                    raise InputError(
                        f"{other}: its columns are {', '.join(map(str, columns))}, those of {path} "
                        f"{', '.join(map(str, head.columns))}; the files of a set need the same, in the same order"
                    )
            options["names"] = [str(c) for c in head.columns]
            options["features"] = Features({name: Value("string") for name in options["names"]})
        if kind == ".txt":
            options["encoding"] = "utf-8-sig"  # without the byte-order mark
        if kind == ".parquet" and path.endswith(".gz"):  # datasets does not unpack these
            if len(paths) > 1 or streaming:
                raise InputError(f"{path}: a gzipped parquet file can only be read alone and whole; unpack it")
            with gzip.open(path) as unpacked:
                rows = Dataset(pyarrow.parquet.read_table(unpacked))
        else:
            files = [p if "://" in p else glob.escape(p) for p in paths]
            rows = load_dataset(kinds[kind], data_files=files, split="train", streaming=streaming, **options)
        empty = len(rows) == 0 if isinstance(rows, Dataset) else next(iter(rows), None) is None
    except InputError:
        raise
    except Exception as error:
        # Of an address, the clients of many protocols raise what they like.
        if "://" not in path and not isinstance(error, DatasetGenerationError | ValueError | OSError | EOFError | zlib.error):
            raise
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read as {kind[1:]}: {masked(reason, *paths)}") from error
    if empty:
        raise InputError(f"{path}: no rows")
    return rows


def read_head(path: str, options: dict) -> pandas.DataFrame:
    """The columns and the first row of a csv or tsv file."""
    if "://" not in path:
        return pandas.read_csv(path, nrows=1, **options)
    zipped = "gzip" if file_of(path).suffix.lower() == ".gz" else None
    with fsspec.open(path, "rb", compression=zipped) as file:  # knows addresses with a user name, as pandas does not
        return pandas.read_csv(file, nrows=1, **options)


def file_of(path: str) -> Path:
    """A path, or the path within an address: its query has no say in what kind of file it is."""
    return Path(urlsplit(path).path if "://" in path else path)


def check_files(paths: list[str], kinds: dict[str, str]) -> str:
    """The one ending that all the files have, without .gz."""
    endings = set()
    for path in paths:
        file = file_of(path)
        if "://" not in path:  # a URL (https://, hf://datasets/...) is left to the reader
            if not file.is_file():
                raise InputError(f"{path}: no such file; check the path (folders and globs are not read)")
            if file.stat().st_size == 0:
                raise InputError(f"{path}: the file is empty")
        suffixes = [s.lower() for s in file.suffixes]
        kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
        if kind not in kinds:
            raise InputError(f"{path}: cannot read '{kind}' files; accepted are {', '.join(kinds)}, also with .gz")
        endings.add(kind)
    if len(endings) > 1:
        raise InputError(f"{paths[0]} and others: files of one kind belong together; found {', '.join(sorted(endings))}")
    return endings.pop()


def read_hub(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of a Hub dataset (or a local folder that `datasets.load_dataset` reads)."""
    try:
        rows = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the Hub client raises many kinds; each means: no rows from there
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"dataset '{name}' (config {config}, split {split}) cannot be loaded: {reason}; or give a local file"
        ) from error
    if isinstance(rows, DatasetDict):
        raise InputError(f"dataset '{name}' has the splits {', '.join(rows)}; choose a split")
    return rows


def text_columns(names: list[str], name: str, paired: bool | None = None) -> list[str]:
    """Which of the columns `names` hold texts, in the order anchor, positive, negatives.

    `paired` True asks for anchor and positive, False for single texts, None takes what is there. Raises InputError naming
    what was found and what is accepted.
    """
    found = {column.lower(): column for column in names}
    single = next((found[c] for c in ("text", "sentence") if c in found), None)
    if single is None and len(names) == 1:
        single = names[0]
    pair = next((pair for pair in LAYOUTS if all(c in found for c in pair)), None)
    if paired is not True and single is not None and (pair is None or paired is False):
        columns = [single]
    elif paired is not False and pair is not None:
        columns = [found[c] for c in pair]
        negatives = [c for c in names if NEGATIVE.fullmatch(c)]
        columns += sorted(negatives, key=lambda c: [int(n) for n in re.findall(r"\d+", c)])
    else:
        wanted = {True: ACCEPTED.removeprefix("text; "), False: "text or sentence", None: ACCEPTED}[paired]
        raise InputError(f"{name}: found the columns {', '.join(names)}; accepted are {wanted}; rename them")
    if ignored := [c for c in names if c not in columns]:
        logger.warning(f"{name}: columns {', '.join(ignored)} are not used")
    return columns


def read_texts(path: str) -> list[str]:
    """The texts of a txt, a line each, or of a file's column text (or sentence); empty ones left out."""
    rows = read_file(path)
    column = text_columns(rows.column_names, path, paired=False)[0]
    return [text for text in rows[column][:] if isinstance(text, str) and text.strip()]


def row_texts(row: dict, columns: list[str], where: str) -> list[str]:
    """The texts of one row: anchor, positive, negatives. Raises InputError with `where` if one is empty or no text."""
    texts = []
    for i, column in enumerate(columns):
        cell, is_negative = row[column], i >= 2
        if cell is None and is_negative:
            continue
        for text in cell if is_negative and isinstance(cell, list) else [cell]:  # only negatives may be several
            if not isinstance(text, str) or not text.strip():
                kind = "missing" if text is None else "empty" if isinstance(text, str) else f"not a text ({text!r})"
                raise InputError(f"{where}, column '{column}': the text is {kind}; fill it in or delete the row")
            texts.append(text)
    return texts
