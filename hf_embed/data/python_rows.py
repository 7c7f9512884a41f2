"""Conversion of rows that a script holds in memory, for example a DataFrame or a list, to a `Dataset`.

    a list of dicts             each dict is a row; a key that a dict lacks is a missing value
    a list of lists or tuples   each is a row: anchor, positive and any negatives, by position; a named tuple by its names
    a list of texts             each text is a row of a single text
    a pandas DataFrame          its columns, without the index
    a path                      a file, which `hf_embed.data.sources.read_file` reads

None, NaN and the missing values of pandas (NA, NaT) are read as missing values.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets

from hf_embed.data.sources import read_file, unformatted
from hf_embed.data.text_files import check_names
from hf_embed.errors import InputError, first_line, shortened

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

RowData: TypeAlias = Union[Dataset, IterableDataset, "pandas.DataFrame", list, str, Path]  # noqa: UP007 (pandas may be absent)
ACCEPTED_ROWS = (
    "a datasets.Dataset, a pandas DataFrame, a list of dicts, of (anchor, positive) pairs or of texts, or the path of a file"
)


def as_rows(data: RowData, name: str) -> Dataset | IterableDataset:
    """Return rows of any of the kinds above as a `Dataset`. Of a `Dataset` or `IterableDataset`, only the format is removed.

    Raises:
        InputError: if `data` is of another kind, has no rows, mixes rows of several kinds, or has a column that mixes texts
            with other values. The message names the row.
    """
    if isinstance(data, Dataset | IterableDataset):
        return unformatted(data)
    if isinstance(data, str | Path):
        return read_file(str(data))
    if is_frame(data):
        return from_frame(data, name)
    if not isinstance(data, list):
        raise no_rows(data, name)
    if not data:
        raise InputError(f"{name}: the list is empty; there are no rows")
    return table_of(columns_of(data, name), name)


def described(thing: object) -> str:
    """Return the kind of an argument in words, for messages: "a list", "the class BertModel"."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def no_rows(data: object, name: str) -> InputError:
    """Return the error for an object that does not hold rows. Its message says what to give instead."""
    kind = type(data)
    mend = f"give {ACCEPTED_ROWS}"
    if isinstance(data, DatasetDict | IterableDatasetDict):
        mend = f"choose one of its splits, {', '.join(map(str, data))}"
    elif hasattr(data, "to_pandas"):
        mend = "convert it with to_pandas()"
    elif kind.__module__.startswith("sentence_transformers."):  # an evaluator
        mend = "give its texts: a dataset of pairs with scores, or a Retrieval, Triplets, PairClassification or Reranking"
    elif kind.__module__.split(".")[0] == "torch":
        mend = f"make a list of dicts from its texts, or {mend}"
    elif hasattr(data, "__next__") or callable(data):
        mend = "stream its rows with datasets.IterableDataset.from_generator, or store them with Dataset.from_generator"
    return InputError(f"{name}: {described(data)} cannot be used as rows; {mend}")


def is_frame(data: object) -> bool:
    """Return whether `data` is a pandas DataFrame. It cannot be one if pandas was never imported."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def from_frame(frame: Any, name: str) -> Dataset:
    """Return the columns of a DataFrame as a table."""
    names = [str(column) for column in frame.columns]
    if frame.columns.nlevels > 1:
        raise InputError(f"{name}: the DataFrame's columns have {frame.columns.nlevels} levels; flatten them to one level")
    check_names(names, name)
    if not len(frame) or not names:
        raise InputError(f"{name}: the DataFrame is empty; there are no rows")
    return table_of({column: frame.iloc[:, i].tolist() for i, column in enumerate(names)}, name)


def columns_of(rows: list, name: str) -> dict[str, list]:
    """Return the columns of a list of dicts, a list of lists or tuples, or a list of texts."""
    rows = [row._asdict() if hasattr(row, "_asdict") else row for row in rows]  # named tuples, such as those of itertuples()
    kinds: dict[type, str] = {str: "a text", dict: "a dict", list: "a list", tuple: "a tuple"}
    first = next((kind for kind in kinds if isinstance(rows[0], kind)), None)
    for number, row in enumerate(rows, 1):
        if first is None or not isinstance(row, first):
            wanted = f", but row 1 is {kinds[first]}" if first else ""
            raise InputError(
                f"{name}, row {number} is {shortened(repr(row))}, a {type(row).__name__}{wanted}; give {ACCEPTED_ROWS}"
            )
    assert first is not None
    if first is str:
        refuse_paths(rows, name)
        return {"text": rows}
    if first is dict:
        names = list(dict.fromkeys(key for row in rows for key in row))
        if odd := [key for key in names if not isinstance(key, str)]:
            raise InputError(f"{name}: the column name {odd[0]!r} is not a string; convert it to a string")
        return {key: [row.get(key) for row in rows] for key in names}
    if short := [number for number, row in enumerate(rows, 1) if len(row) < 2]:
        raise InputError(
            f"{name}, row {short[0]} is {kinds[first]} of length {len(rows[short[0] - 1])}; it needs an anchor and a positive"
        )
    columns = {"anchor": [row[0] for row in rows], "positive": [row[1] for row in rows]}
    return columns | {
        f"negative_{i - 1}": [row[i] if i < len(row) else None for row in rows] for i in range(2, max(map(len, rows)))
    }


def refuse_paths(texts: list[str], name: str) -> None:
    """Raise InputError if all texts of a list are the paths of files, which would be taken for the texts themselves."""
    if texts and all(isinstance(text, str) and os.path.isfile(text) for text in texts):
        raise InputError(
            f"{name}: {texts[0]!r} is a file, but each string of a list is a text; read the file, for example with "
            "datasets.load_dataset"
        )


def table_of(columns: dict[str, list], name: str) -> Dataset:
    """Return the columns as a table, with NaN as null. In a column with lists, a single text becomes a list of one.

    Raises:
        InputError: if a column mixes texts with other values, or if its values cannot be stored.
    """
    tables = []
    for column, given in columns.items():
        cells = [None if is_missing(cell) else cell for cell in given]
        if any(isinstance(cell, list | tuple) for cell in cells):
            cells = [[cell] if isinstance(cell, str) else cell for cell in cells]
        first = next((cell for cell in cells if cell is not None), None)
        for number, cell in enumerate(cells, 1):
            if cell is not None and isinstance(cell, str) != isinstance(first, str):
                raise InputError(
                    f"{name}, row {number}, column '{column}': {shortened(repr(cell))} has the type {type(cell).__name__}, but "
                    f"values above have the type {type(first).__name__}; use one type, or remove the column"
                )
        try:
            tables.append(Dataset.from_dict({column: cells}))
        except Exception as error:  # Arrow raises many kinds of errors
            raise InputError(
                f"{name}, column '{column}' cannot be stored: {first_line(error)}; correct or remove the column"
            ) from error
    if not tables:
        raise InputError(f"{name}: the rows have no columns; give {ACCEPTED_ROWS}")
    return concatenate_datasets(tables, axis=1)


def is_missing(cell: object) -> bool:
    """Return whether a cell is None, NaN of any kind, or pandas' NA or NaT."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return True
    return type(cell).__name__.startswith("float") and cell != cell
