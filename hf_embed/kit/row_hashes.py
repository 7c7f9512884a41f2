"""64-bit hashes of the texts of training rows: they show which texts are equal, and need 8 bytes each.

A text has two hashes. The exact hash is of the text as it is. The plain hash is of its words only: the text in Unicode's
compatibility form (NFKC) and in lower case, with one space in place of every run of characters that are not letters, marks or
numbers. "A cat!" and "a  cat" have different exact hashes and the same plain hash.

Shapes: R training rows, M negatives of all rows, T texts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from hf_embed.data.sources import cell_text, passage_text

SIDES = ("anchors", "positives", "negatives")
BATCH = 4_000  # rows read at a time
NO_WORD = r"[^\p{L}\p{M}\p{N}]+"
# Signs that a text was decoded wrongly. The last one is UTF-8 that was read as Latin-1 or cp1252: "cafÃ©", "donâ€™t".
ODD = {
    "replacement characters": "\ufffd",
    "control characters": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{80}-\x{9f}\x{200b}\x{feff}]",
    "mojibake": r"Ã[\x{80}-\x{bf}ƒ„…†‡ˆ‰Š‹ŒŽ•–—˜™š›œžŸ]|Â[\x{80}-\x{bf}]|â€[\x{80}-\x{bf}œ™˜“”¦¢]|ï¿½|ðŸ",
}


class Texts(NamedTuple):
    """The texts of some rows of a table. Each positive makes one training row. Rows with an empty text are left out."""

    anchors: pyarrow.Array  # (R,) strings
    positives: pyarrow.Array | None  # (R,); None for single texts
    negatives: pyarrow.Array  # (M,)
    owners: np.ndarray  # (M,) the training row of each negative
    origins: np.ndarray  # (R,) the table row of each training row
    empty: np.ndarray  # the table rows that are left out

    def everything(self) -> pyarrow.Array:
        """Return all texts, (T,): anchors, positives, negatives."""
        parts = [self.anchors, self.negatives] if self.positives is None else [self.anchors, self.positives, self.negatives]
        return pyarrow.concat_arrays(parts)


class Ids(NamedTuple):
    """The hashes of texts, or of rows."""

    exact: np.ndarray  # (T,) uint64
    plain: np.ndarray  # (T,) uint64


class RowIds(NamedTuple):
    """The hashes of the texts of a whole table, and counts that were made while it was read."""

    anchors: Ids
    positives: Ids | None
    negatives: Ids
    owners: np.ndarray  # (M,) the training row of each negative
    origins: np.ndarray  # (R,) the table row of each training row
    empty: np.ndarray  # the table rows that are left out
    odd: Counter[str]  # the number of texts that match each pattern of `ODD`
    first_odd: dict[str, int]  # the first table row that matches each pattern
    characters: int  # of all texts together

    def everything(self, kind: str) -> np.ndarray:
        """Return the hashes of all texts, (T,). `kind` is "exact" or "plain"."""
        parts = [getattr(ids, kind) for ids in (self.anchors, self.positives, self.negatives) if ids is not None]
        return np.concatenate(parts)

    def row_of_each(self) -> np.ndarray:
        """Return the training row of each text of `everything`, (T,)."""
        rows = np.arange(len(self.origins))
        return np.concatenate([rows, self.owners] if self.positives is None else [rows, rows, self.owners])


# ---- the texts of a table ----


def cells(
    column: pyarrow.ChunkedArray, name: str, where: str, start: int, lists: bool = True
) -> tuple[pyarrow.Array, np.ndarray]:
    """Return the texts of a column, and the row of each text. A null in a list becomes an empty text.

    Args:
        column: a batch of the column: texts, or lists of texts.
        name: name of the column, for messages.
        where: what messages call the rows.
        start: number of rows before the batch.
        lists: whether a cell may be a list of texts.

    Raises:
        InputError: if the column holds something else. The message is the one of the training.
    """
    array = pyarrow.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if not is_text(array.type) and not (lists and is_listed(array.type) and is_text(array.type.value_type)):
        array = checked_texts(array, name, where, start, lists)
    listed = is_listed(array.type)
    parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False) if listed else np.arange(len(array))
    texts = (pc.list_flatten(array) if listed else array).cast(pyarrow.string())
    return (pc.fill_null(texts, "") if listed else texts), parents


def is_text(kind: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is one of texts."""
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def is_listed(kind: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is one of lists."""
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def checked_texts(array: pyarrow.Array, name: str, where: str, start: int, lists: bool) -> pyarrow.Array:
    """Return the cells of a JSON column, or of a column of another type, as texts or lists of texts.

    The arguments are those of `cells`.

    Raises:
        InputError: if a cell is neither a text nor null.
    """
    values = array.to_pylist()
    if isinstance(array, pyarrow.ExtensionArray):  # JSON
        values = [None if cell is None else json.loads(cell) for cell in array.storage.to_pylist()]
    if lists:
        values = [list(map(passage_text, cell)) if isinstance(cell, list) else passage_text(cell) for cell in values]
    for number, cell in enumerate(values, start + 1):
        for text in cell if lists and isinstance(cell, list) else [cell]:
            if not isinstance(text, str | None):
                cell_text(text, f"{where}, row {number}, column '{name}'")  # raises the InputError
    if not lists:
        return pyarrow.array(values, pyarrow.string())
    return pyarrow.array([[cell] if isinstance(cell, str) else cell for cell in values], pyarrow.list_(pyarrow.string()))


def blank(texts: pyarrow.Array) -> np.ndarray:
    """Return which texts are null or contain only whitespace, (T,) bool."""
    return pc.equal(pc.utf8_trim_whitespace(pc.fill_null(texts, "")), "").to_numpy(zero_copy_only=False)


def batches(rows: Dataset, columns: list[str], where: str, negatives: int | None = None) -> Iterator[Texts]:
    """Read the texts of a table in batches. Row numbers in `origins` and `empty` count from the first row of the table.

    Args:
        rows: the table.
        columns: the columns of anchors, of positives if there are any, and of negatives, in this order.
        where: what messages call the rows.
        negatives: use only so many negatives of each row, the first ones. Default: all.

    Raises:
        InputError: if a column does not hold texts.
    """
    chosen, start = rows.select_columns(columns), 0
    for table in chosen.with_format("arrow").iter(BATCH):
        parts = [cells(table[name], name, where, start, lists=i > 0) for i, name in enumerate(columns)]
        texts = texts_of(parts, len(table), negatives)
        yield texts._replace(origins=texts.origins + start, empty=texts.empty + start)
        start += len(table)


def texts_of(parts: list[tuple[pyarrow.Array, np.ndarray]], rows: int, most: int | None = None) -> Texts:
    """Make training rows from the columns of one batch.

    Args:
        parts: the texts of each column, and the row of each text; see `cells`.
        rows: number of rows in the batch.
        most: use only so many negatives of each row, the first ones. Default: all.
    """
    anchors, positives = parts[0], parts[1] if len(parts) > 1 else None
    # A null cell means that a row has no negative. A null in a list counts as an empty text.
    negatives = [(texts.filter(texts.is_valid()), where[np.asarray(texts.is_valid())]) for texts, where in parts[2:]]
    sides = [side for side in (anchors, positives) if side is not None]
    bad = np.zeros(rows, dtype=bool)
    for texts, where in [*sides, *negatives]:
        bad[where[blank(texts)]] = True
    for _, where in sides:
        bad |= np.bincount(where, minlength=rows) == 0
    origins = (anchors if positives is None else positives)[1]
    kept = np.flatnonzero(~bad[origins])
    if positives is not None and len(origins) > rows - bad.sum():  # a list may contain a positive twice
        kept = kept[first_of_each(origins[kept], exact_ids(positives[0].take(pyarrow.array(kept))))]
    made = origins[kept]
    negatives.append((pyarrow.array([], pyarrow.string()), np.array([], int)))  # in case there is no column of negatives
    places, owners = joined(np.concatenate([where for _, where in negatives]), made, most)
    return Texts(
        anchors=anchors[0].take(pyarrow.array(made)),
        positives=None if positives is None else positives[0].take(pyarrow.array(kept)),
        negatives=pyarrow.concat_arrays([texts for texts, _ in negatives]).take(pyarrow.array(places)),
        owners=owners,
        origins=made,
        empty=np.flatnonzero(bad),
    )  # fmt: skip


def first_of_each(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the positions, in order, at which a text occurs for the first time in its row."""
    order = np.lexsort((np.arange(len(ids)), ids, rows))
    same = (np.diff(rows[order]) == 0) & (ids[order][1:] == ids[order][:-1])
    return np.sort(order[np.concatenate([[True], ~same])]) if len(order) else order


def joined(where: np.ndarray, made: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Assign to each training row the negatives of its table row.

    Args:
        where: the table row of each negative.
        made: the table row of each training row, in order.
        most: assign only so many negatives to each training row, the first ones. Default: all.

    Returns:
        Positions in `where`, and the training row that each of these negatives belongs to, in the order of the training rows.
    """
    order = np.argsort(where, kind="stable")
    start, stop = (np.searchsorted(where[order], made, side) for side in ("left", "right"))
    counts = stop - start if most is None else np.minimum(stop - start, most)
    owners = np.repeat(np.arange(len(made)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.repeat(start, counts) + offsets], owners


# ---- hashes ----


def exact_ids(texts: pyarrow.Array) -> np.ndarray:
    """Return the exact hashes of texts, (T,) uint64."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts.cast(pyarrow.binary()).to_pylist()), np.uint64, len(texts))


def plain_texts(texts: pyarrow.Array) -> pyarrow.Array:
    """Return the words of each text, as the module docstring defines them. Without words, return the lowercase text."""
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        texts = pc.utf8_normalize(texts, form="NFKC")
    lower = pc.utf8_lower(texts)
    words = pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, pattern=NO_WORD, replacement=" "))
    return pc.if_else(pc.equal(words, ""), pc.utf8_trim_whitespace(lower), words)


def text_ids(texts: pyarrow.Array) -> Ids:
    """Return both hashes of texts."""
    return Ids(exact_ids(texts), exact_ids(plain_texts(texts)))


def hash_rows(read: Iterable[Texts]) -> RowIds:
    """Read a table to its end, and return the hashes of its texts."""
    parts: dict[str, list[np.ndarray]] = {}
    odd, first_odd, made, characters = Counter[str](), dict[str, int](), 0, 0
    for texts in read:
        count_odd(texts, odd, first_odd)
        characters += pc.sum(pc.utf8_length(texts.everything())).as_py() or 0
        found = {
            "owners": (texts.owners + made).astype(np.int32),
            "origins": texts.origins.astype(np.int32),
            "empty": texts.empty,
        }
        for side in SIDES:
            if (own := getattr(texts, side)) is not None:
                found[f"{side} exact"], found[f"{side} plain"] = text_ids(own)
        for name, array in found.items():
            parts.setdefault(name, []).append(array)
        made += len(texts.origins)
    whole = {name: np.concatenate(parts.pop(name)) for name in list(parts)}  # `pop` frees the parts
    sides = {side: Ids(whole.pop(f"{side} exact"), whole.pop(f"{side} plain")) for side in SIDES if f"{side} exact" in whole}
    return RowIds(**({"positives": None} | sides | whole), odd=odd, first_odd=first_odd, characters=characters)  # type: ignore[arg-type]


def count_odd(texts: Texts, odd: Counter[str], first_odd: dict[str, int]) -> None:
    """Add to `odd` the texts that match each pattern of `ODD`, and note in `first_odd` the first table row with one."""
    everything = texts.everything()
    rows = [texts.origins, *([] if texts.positives is None else [texts.origins]), texts.origins[texts.owners]]
    places = np.concatenate(rows)
    for name, pattern in ODD.items():
        found = pc.match_substring_regex(everything, pattern).to_numpy(zero_copy_only=False)
        if found.any():
            odd[name] += int(found.sum())
            first_odd.setdefault(name, int(places[found].min()))


def in_parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions of the hashes in 16 groups, by their first 4 bits. Sorting one group needs 1/16 of the memory."""
    for first in range(16):
        yield np.flatnonzero(ids >> np.uint64(60) == first)


def repeated(ids: np.ndarray) -> np.ndarray:
    """Return which hashes also occur earlier in the array, bool of the same length."""
    again = np.ones(len(ids), bool)
    for places in in_parts(ids):
        _, first = np.unique(ids[places], return_index=True)
        again[places[first]] = False
    return again


def counts_of(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return how often each hash of `ids` occurs in `among`, int32 of the length of `ids`."""
    found = np.zeros(len(ids), np.int32)
    for places, others in zip(in_parts(ids), in_parts(among)):
        known, counts = np.unique(among[others], return_counts=True)
        if len(known):
            where = np.minimum(np.searchsorted(known, ids[places]), len(known) - 1)
            found[places] = np.where(known[where] == ids[places], counts[where], 0)
    return found


def mixed(ids: np.ndarray) -> np.ndarray:
    """Scramble hashes (first half of the finalizer of MurmurHash3), so that different rows have different sums of hashes."""
    ids = ids ^ (ids >> np.uint64(33))
    ids = ids * np.uint64(0xFF51AFD7ED558CCD)
    return ids ^ (ids >> np.uint64(33))


def row_ids(ids: RowIds) -> Ids:
    """Return hashes of whole rows, (R,): anchor, positive and negatives. The order of the negatives makes no difference."""
    found = []
    for kind in ("exact", "plain"):
        total = mixed(getattr(ids.anchors, kind))
        if ids.positives is not None:
            total = total + mixed(mixed(getattr(ids.positives, kind)) + np.uint64(1))
        np.add.at(total, ids.owners, mixed(mixed(getattr(ids.negatives, kind)) + np.uint64(2)))
        found.append(mixed(total))
    return Ids(*found)
