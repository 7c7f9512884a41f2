"""Readers of text files. They turn lines into rows, and each error message names the line.

    txt          each line is a row, in the column `text`
    csv, tsv     a header and rows of cells; each cell is a text, so "007", "NA" and "1e5" are not changed
    jsonl, json  one object per line, or one list of objects (or of texts)

A file is read twice. First, `survey` reads all of it. So every error is reported before any computation starts, and the column
types are known for the whole file (`datasets` guesses them from the first 10 MB). Then the rows are written to the cache of
`datasets`, in batches. A stream, in contrast, is read again in every pass, and only its first rows are checked in advance.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_embed.data.cache import check_cache, stored, versions
from hf_embed.data.known_columns import is_negative
from hf_embed.errors import InputError, masked, root_line, shortened
from hf_embed.files.read_files import LFS_POINTER, NOT_FETCHED, is_packed, kind_of, other_kind, parse_json
from hf_embed.files.safe_files import hash_of

logger = logging.getLogger(__name__)

SEPARATORS = {"csv": ",", "tsv": "\t"}
SEPARATOR_NAMES = {",": "a comma", "\t": "a tab", ";": "';'", "|": "'|'"}
BATCH_ROWS, BATCH_CHARACTERS = 2000, 10_000_000
# A cell that is enclosed in quotes, with quotes inside that are written twice: "He said ""hi"".".
QUOTED = re.compile(r'"(?=.*"")(?:[^"]|"")+"')
# The number of first rows of a stream that determine its columns.
PROBED_ROWS = 1000
NO_QUOTING = " if quotes belong to the texts, set --no_quoting (quoting: false in a sources file), or save the file as tsv"


@dataclass(frozen=True)
class Table:
    """Settings for reading a csv or tsv file.

    Args:
        header: whether the first row names the columns; otherwise their names are 0, 1, 2 ...
        quoting: whether quotes enclose cells of a csv file; in a tsv file they never do.
    """

    header: bool = True
    quoting: bool = True


def unreadable(path: str, reason: str) -> InputError:
    """Return the error for a file that cannot be read."""
    if reason.startswith("Not a gzipped file"):  # gzip.BadGzipFile
        reason = "the file is not compressed by gzip; remove .gz from its name"
    return InputError(f"{path}: cannot be read as {kind_of(path)}: {masked(reason, path)}")


# ---- lines ----

DOWNLOADED: dict[str, str] = {}  # URL -> its downloaded file; `download` fills this, and streams do not use it


def download(address: str) -> None:
    """Download a file into the cache of `datasets`, unless the cache already has it."""
    try:
        DOWNLOADED[address] = datasets.DownloadManager().download(address)
    except Exception as error:  # each client raises its own kinds of errors
        raise unreadable(address, root_line(error)) from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[BufferedReader]:
    """Open a file or URL as bytes. Decompress it if its name ends in .gz."""
    local = DOWNLOADED.get(path, path)
    with fsspec.open(local, "rb") if "://" in local else open(local, "rb") as file:
        yield BufferedReader(gzip.GzipFile(fileobj=file) if is_packed(path) else file, 1 << 20)


def lines(path: str) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 file with their line numbers and line ends. A byte-order mark is skipped.

    Raises:
        InputError: if the file has another encoding or contains NUL bytes, or cannot be read or decompressed.
    """
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    if kind := other_kind(line):
                        raise unreadable(path, f"the file is {kind}")
                    if line.startswith(LFS_POINTER):
                        raise InputError(f"{path} {NOT_FETCHED}")
                    line = line.removeprefix(codecs.BOM_UTF8)
                if b"\0" in line:
                    raise unreadable(path, f"line {number} contains a NUL byte; if the file is UTF-16, save it as UTF-8")
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    raise unreadable(
                        path,
                        f"'utf-8' codec can't decode byte 0x{line[error.start]:02x} in line {number}; save the file as "
                        "UTF-8, for example: iconv -f cp1252 -t UTF-8",
                    ) from error
    except InputError:
        raise
    except Exception as error:  # file systems, decompression and URL clients raise many kinds of errors
        raise unreadable(path, root_line(error)) from error


# ---- csv and tsv ----


def table_rows(path: str, table: Table) -> Iterator[tuple[int, int, list[str]]]:
    """Read the rows, including the header, as (first line, last line, cells). Blank lines are skipped.

    Raises:
        InputError: if a quote in a csv file is not closed, or if text follows a closing quote.
    """
    separator = SEPARATORS[kind_of(path)]
    if separator == "\t" or not table.quoting:
        for number, line in lines(path):
            if line := line.rstrip("\r\n"):
                yield number, number, line.split(separator)
        return
    csv.field_size_limit(2**31 - 1)  # applies to the whole process; the default is 131,072 characters
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    before = 0
    try:
        for cells in reader:
            if cells:
                yield before + 1, reader.line_num, cells
            before = reader.line_num
    except csv.Error as error:
        reason = f"line {reader.line_num}: {error}; write a quote within a quoted cell twice, or{NO_QUOTING}"
        if "end of data" in str(error):
            reason = f"a quote in line {before + 1} is not closed; close it, or{NO_QUOTING}"
        elif "new-line character" in str(error):
            reason = f"line {reader.line_num} has a carriage return outside of quotes; save the file with line feeds"
        raise unreadable(path, reason) from error


def table_columns(path: str, table: Table) -> list[str]:
    """Return the names of the columns.

    Raises:
        InputError: if there is no row, or if the file seems to use another separator.
    """
    _, _, cells = next(table_rows(path, table), (0, 0, []))
    if not cells:
        raise unreadable(path, "the file has only blank lines")
    if any("\r" in cell for cell in cells):
        raise unreadable(path, "its lines end with carriage returns alone; save it with line feeds")
    own = SEPARATORS[kind_of(path)]
    if len(cells) == 1 and (other := other_separator(cells[0], own)):
        ending = {"\t": "tsv", ",": "csv"}.get(other)
        mend = f"give the file the ending .{ending}" if ending else f"save it with {SEPARATOR_NAMES[own]} as the separator"
        raise InputError(
            f"{path}: there is only one column, '{shortened(cells[0])}'; the separator seems to be {SEPARATOR_NAMES[other]}, "
            f"but {kind_of(path)} files need {SEPARATOR_NAMES[own]}; {mend}"
        )
    if not table.header:
        return list(map(str, range(len(cells))))
    return [cell or f"Unnamed: {i}" for i, cell in enumerate(cells)]  # the name that pandas gives to such a column


def other_separator(header: str, own: str = "") -> str | None:
    """Return another separator that occurs in the name of a file's only column, or None."""
    return next((separator for separator in ";|\t," if separator != own and separator in header), None)


def check_names(names: Sequence[str], where: str) -> None:
    """Raise InputError if two columns have the same name. `where` begins the message."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"{where}: two columns are named '{twice[0]}'; rename one of them")


def common_columns(paths: list[str], table: Table) -> list[str]:
    """Return the column names that all files share.

    Raises:
        InputError: if the files do not have the same columns in the same order, or if two columns have the same name.
    """
    names = table_columns(paths[0], table)
    check_names(names, paths[0])
    for path in paths[1:]:
        columns = table_columns(path, table)
        if columns != names:
            raise InputError(
                f"{path}: its columns are {', '.join(columns)}, but those of {paths[0]} are {', '.join(names)}; give files "
                "with the same columns in the same order"
            )
    return names


def body_rows(path: str, table: Table) -> Iterator[tuple[int, int, list[str]]]:
    """Read the rows of `table_rows` after the header.

    Raises:
        InputError: if a row has more cells than there are columns.
    """
    rows, width = table_rows(path, table), 0
    for first, last, cells in rows:
        if not width:
            width = len(cells)
            if table.header or cells == list(map(str, range(width))):  # by pandas, for columns without names
                continue
        if len(cells) > width:
            separator = SEPARATOR_NAMES[SEPARATORS[kind_of(path)]]
            quotes = table.quoting and kind_of(path) == "csv"
            mend = f"quote a cell that contains {separator}" if quotes else f"remove {separator} from a cell that contains one"
            raise InputError(
                f"{path}: line {first} has {len(cells)} cells, but the {'header' if table.header else 'first row'} has "
                f"{width}; name every column, and {mend}"
            )
        yield first, last, cells


def survey_tables(paths: list[str], table: Table) -> Features:
    """Return the columns of csv or tsv files, all as texts. Warn about quoted cells with line breaks, or in a tsv file."""
    names, rows = common_columns(paths, table), 0
    for path in paths:
        broken = inside = count = last = quoted = 0  # `broken` rows have line breaks, which begin `inside` lines
        place = ""
        for first, last, cells in body_rows(path, table):
            count += 1
            quoted += kind_of(path) == "tsv" and any(map(QUOTED.fullmatch, cells))
            if last > first:
                place = place or f"{first} to {last}"
                broken, inside = broken + 1, inside + last - first
        rows += count
        if broken:
            logger.warning(
                f"{masked(path)}: {broken:,} of {count:,} rows have line breaks in a quoted cell, the first in lines {place}; "
                f"{inside:,} of the file's {last:,} lines continue such a cell;{NO_QUOTING}"
            )
        if quoted:
            logger.warning(
                f"{masked(path)}: {quoted:,} of {count:,} rows have a cell that is quoted as in a csv file; the quotes in a "
                "tsv file are part of its texts; if they are not, save the file as csv"
            )
    return Features({name: Value("string") for name in names}) if rows else Features()


# ---- json ----

OBJECT = 'such as {"anchor": "a question", "positive": "its answer"}'


def json_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Read the objects of a file with their line numbers (in a single list: their positions). Blank lines are skipped."""
    numbered = lines(path)
    start, head = next(((number, line) for number, line in numbered if not line.isspace()), (0, ""))
    if head.lstrip().startswith("[") or (kind_of(path) == "json" and not is_json(head)):
        rest = "".join(line for _, line in numbered)
        if rest.strip() and is_json(head):  # each line is a list, and a list does not say what its texts are
            raise unreadable(path, f"line {start} is a list; expected a JSON object in each line, {OBJECT}")
        items = parsed(head + rest, path, start)
        if not isinstance(items, list):
            raise unreadable(path, "expected a list of JSON objects, or one object per line")
        for number, item in enumerate(items, 1):
            if not isinstance(item, dict | str):
                raise unreadable(path, f"row {number}: expected a JSON object, {OBJECT}")
            yield number, {"text": item} if isinstance(item, str) else item
        return
    for number, line in chain([(start, head)], numbered):
        if line and not line.isspace():
            row = parsed(line, path, number)
            if not isinstance(row, dict):
                raise unreadable(path, f"line {number}: expected a JSON object")
            yield number, row


def is_json(text: str) -> bool:
    """Return whether a text is a JSON value."""
    try:
        parse_json(text, missing_value)
    except ValueError:
        return False
    return True


def missing_value(constant: str) -> None:
    """Return None for NaN and Infinity: pandas and json.dumps write missing values as these constants."""


def parsed(text: str, path: str, number: int) -> Any:
    """Parse a JSON text whose first line has the line number `number`.

    Raises:
        InputError: if the text is not JSON, or if a string in it cannot be encoded.
    """
    try:
        # Without rstrip, an error at the line end would be reported for the next line.
        return parse_json(text.rstrip(), missing_value, number)
    except ValueError as error:
        raise unreadable(path, f"{error}; correct or delete it") from error


def features_of(rows: Iterable[dict]) -> Features:
    """Return the type of each column that occurs in the rows."""
    kinds: dict[str, set[str | None]] = {}
    for row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).add("text" if type(value) is str else kind_of_value(value))
    return Features({key: type_of(found - {None}) for key, found in kinds.items()})


def kind_of_value(value: object) -> str | None:
    """Return a word for the type of a value, or None for null."""
    if isinstance(value, list):
        if all(item is None for item in value):
            return "empty"  # it fits lists of texts and lists of numbers
        if all(item is None or isinstance(item, str) for item in value):
            return "texts"
        items = {kind_of_value(item) for item in value} - {None}
        return "ints" if items == {"int"} else "floats" if items <= {"int", "float"} else "any"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):  # above 2^53, not every number is a float
        return "int" if abs(value) <= 2**53 else "long" if -(2**63) <= value < 2**63 else "any"
    return {str: "text", float: "float", type(None): None}.get(type(value), "any")


def type_of(kinds: set[str | None]) -> Any:
    """Return the narrowest type of `datasets` that holds all values of a column."""
    if kinds <= {"text"}:  # also a column that holds only nulls
        return Value("string")
    if kinds <= {"text", "texts", "empty"}:  # a single text becomes a list of one
        return List(Value("string"))
    for simple, name in (({"bool"}, "bool"), ({"int", "long"}, "int64"), ({"int", "float"}, "float64")):
        if kinds <= simple:
            return Value(name)
    if kinds <= {"ints", "floats", "empty"}:
        return List(Value("float64" if "floats" in kinds else "int64"))
    return datasets.Json()


def as_column(values: list, feature: Any) -> pyarrow.Array:
    """Return the values of a column as an Arrow array of the column's type."""
    if isinstance(feature, List):
        of = pyarrow.list_(feature.feature.pa_type)
        return pyarrow.array([[value] if isinstance(value, str) else value for value in values], of)
    if isinstance(feature, Value):
        return pyarrow.array(values, feature.pa_type)
    texts = pyarrow.array(
        [None if value is None else json.dumps(storable(value), default=str) for value in values], pyarrow.string()
    )
    return pyarrow.ExtensionArray.from_storage(feature.pa_type, texts)


def storable(value: Any) -> Any:
    """Return a JSON value that `datasets` can read back: integers over 64 bits become floats, infinity and NaN become None."""
    if isinstance(value, list):
        return [storable(item) for item in value]
    if isinstance(value, dict):
        return {key: storable(item) for key, item in value.items()}
    if not isinstance(value, int | float) or -(2**63) <= value < 2**63:
        return value
    return float(value) if abs(value) <= sys.float_info.max else None  # NaN too


# ---- all kinds of files ----


def rows_of(path: str, table: Table) -> Iterator[dict]:
    """Read the rows of a file of any kind."""
    kind = kind_of(path)
    if kind in SEPARATORS:
        names = table_columns(path, table)
        absent = set(filter(is_negative, names))  # an empty cell says that there is no negative
        for _, _, cells in body_rows(path, table):
            row = zip(names, chain(cells, [None] * (len(names) - len(cells))))
            yield {name: None if cell == "" and name in absent else cell for name, cell in row}
    elif kind == "txt":
        for _, line in lines(path):
            for text in line.removesuffix("\n").removesuffix("\r").split("\r"):
                yield {"text": text}
    else:
        yield from (row for _, row in json_rows(path))


def survey(paths: list[str], table: Table) -> Features:
    """Read the files completely, and return their columns with the types.

    Raises:
        InputError: if anything is wrong with the files.
    """
    kind = kind_of(paths[0])
    if kind in SEPARATORS:
        features = survey_tables(paths, table)
    elif kind == "txt":
        tabs = {line.count("\t") for _, line in chain.from_iterable(map(lines, paths)) if not line.isspace()}
        if len(tabs) == 1 and tabs != {0}:
            logger.warning(
                f"{masked(paths[0])}: each line has {tabs.pop()} tab(s), which are read as part of its text; if they separate "
                "columns, give the file the ending .tsv"
            )
        features = Features({"text": Value("string")})
    else:
        features = features_of(row for path in paths for _, row in json_rows(path))
    if not features:
        raise InputError(f"{paths[0]}: there are no rows")
    return features


def batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Group rows into batches that are limited in rows and in characters."""
    batch: list[dict] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str | list))
        if len(batch) >= BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def load(paths: list[str], table: Table) -> Dataset:
    """Load all rows of text files through a table in the cache of `datasets`, which is written only once."""
    for path in paths:
        if "://" in path:
            download(path)
    check_cache()
    features = survey(paths, table)
    hashes = [(kind_of(path), hash_of(Path(DOWNLOADED.get(path, path)))) for path in paths]
    identity = hashlib.sha256(repr((hashes, table, features)).encode()).hexdigest()[:32]
    return cached_rows(identity, features, chain.from_iterable(rows_of(path, table) for path in paths))


def cached_rows(identity: str, features: Features, rows: Iterable[dict]) -> Dataset:
    """Return the cached table with this identity. If the cache has none, write `rows` to it first.

    Args:
        identity: a hash of everything that the rows depend on.
        features: the columns.
        rows: the rows.
    """

    def write(path: Path) -> None:
        with ArrowWriter(features=features, path=str(path)) as writer:
            for batch in batches(rows):
                columns = [as_column([row.get(name) for row in batch], feature) for name, feature in features.items()]
                writer.write_table(pyarrow.table(columns, schema=features.arrow_schema))
            writer.finalize()

    identity = hashlib.sha256(repr([identity, *versions()]).encode()).hexdigest()[:32]
    return stored(identity, write)


def stream(paths: list[str], table: Table) -> IterableDataset:
    """Return the rows of text files as a stream, which reads the files again in every pass.

    The first rows determine the columns. Only columns of negatives may begin later (`hf_embed.data.stream.Stream` refuses
    them, unless the source uses no negatives).
    """
    if kind_of(paths[0]) in SEPARATORS:
        common_columns(paths, table)
    columns = dict.fromkeys(key for row in islice(rows_of(paths[0], table), PROBED_ROWS) for key in row)
    kwargs = {"paths": list(paths), "table": table, "columns": tuple(columns)}
    return IterableDataset.from_generator(streamed, gen_kwargs=kwargs)


def streamed(paths: list[str], table: Table, columns: tuple[str, ...]) -> Iterator[dict]:
    """Read the rows of a stream."""
    known = set(columns)
    for path in paths:
        for row in rows_of(path, table):
            late = {key: row[key] for key in row.keys() - known if is_negative(key) and row[key]}
            yield {name: row.get(name) for name in columns} | late
