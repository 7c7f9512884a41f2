"""The texts of training rows as 64-bit hashes, a batch of rows at a time: what equals what, in 8 bytes a text.

A text has two hashes. The exact one is of the text as it stands. The plain one is of its words alone: in Unicode's
compatibility form (NFKC) and in lower case, with one space for whatever is no letter, mark or number. "A cat!" and "a  cat"
differ in the first and agree in the second.

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

from hf_embed.data.sources import row_texts

SIDES = ("anchors", "positives", "negatives")
BATCH = 4_000  # rows read at a time
NO_WORD = r"[^\p{L}\p{M}\p{N}]+"
# What a text holds that was decoded wrongly. The last is UTF-8 that was read as Latin-1 or cp1252: "cafÃ©", "donâ€™t".
ODD = {
    "replacement characters": "\ufffd",
    "control characters": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{80}-\x{9f}\x{200b}\x{feff}]",
    "mojibake": r"Ã[\x{80}-\x{bf}ƒ„…†‡ˆ‰Š‹ŒŽ•–—˜™š›œžŸ]|Â[\x{80}-\x{bf}]|â€[\x{80}-\x{bf}œ™˜“”¦¢]|ï¿½|ðŸ",
}


class Texts(NamedTuple):
    """The texts of some rows: a training row for each positive of a row of the table, without rows with an empty text."""

    anchors: pyarrow.Array  # (R,) of strings
    positives: pyarrow.Array | None  # (R,); None for single texts
    negatives: pyarrow.Array  # (M,)
    owners: np.ndarray  # (M,) the training row of each negative
    origins: np.ndarray  # (R,) the row of the table that each is of
    empty: np.ndarray  # the rows of the table that are left out

    def everything(self) -> pyarrow.Array:
        """Return all texts, (T,)."""
        parts = [self.anchors, self.negatives] if self.positives is None else [self.anchors, self.positives, self.negatives]
        return pyarrow.concat_arrays(parts)


class Ids(NamedTuple):
    """The hashes of texts, or of rows."""

    exact: np.ndarray  # (T,) uint64
    plain: np.ndarray  # (T,) uint64


class RowIds(NamedTuple):
    """The hashes of the texts of all rows of a table, and what was counted on the way."""

    anchors: Ids
    positives: Ids | None
    negatives: Ids
    owners: np.ndarray  # (M,) the training row of each negative
    origins: np.ndarray  # (R,) the row of the table that each is of
    empty: np.ndarray  # the rows of the table that are left out
    odd: Counter[str]  # texts that hold what `ODD` names
    first_odd: dict[str, int]  # the first row of the table with one
    characters: int  # of all texts

    def everything(self, kind: str) -> np.ndarray:
        """Return the hashes of all texts, (T,), exact or plain."""
        parts = [getattr(ids, kind) for ids in (self.anchors, self.positives, self.negatives) if ids is not None]
        return np.concatenate(parts)


# ---- the texts of a table ----


def cells(column: pyarrow.ChunkedArray, name: str, where: str, start: int) -> tuple[pyarrow.Array, np.ndarray]:
    """Return the texts of a column, and the row of each. In a list, a null is an empty text.

    Args:
        column: a batch of it.
        name: of the column, for messages.
        where: what messages call the rows.
        start: how many rows stand before the batch.

    Raises:
        InputError: the column holds something else.
    """
    array = pyarrow.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pyarrow.ExtensionArray):  # JSON: texts and lists of texts, mixed
        values = [None if cell is None else json.loads(cell) for cell in array.storage.to_pylist()]
        array = pyarrow.array([[cell] if isinstance(cell, str) else cell for cell in values], pyarrow.list_(pyarrow.string()))
    listed = pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)
    parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False) if listed else np.arange(len(array))
    texts = pc.list_flatten(array) if listed else array
    if pyarrow.types.is_null(texts.type):
        texts = texts.cast(pyarrow.string())
    if not (pyarrow.types.is_string(texts.type) or pyarrow.types.is_large_string(texts.type)):
        found = ((number, cell) for number, cell in enumerate(array.to_pylist(), start + 1) if cell is not None)
        number, cell = next(found, (start + 1, 0))
        row_texts(
            {name: cell[0] if isinstance(cell, list) and cell else cell}, [name], f"{where}, row {number}"
        )  # which refuses it
    texts = texts.cast(pyarrow.string())
    return (pc.fill_null(texts, "") if listed else texts), parents


def blank(texts: pyarrow.Array) -> np.ndarray:
    """Return which texts are missing or nothing but spaces, (T,) bool."""
    return pc.equal(pc.utf8_trim_whitespace(pc.fill_null(texts, "")), "").to_numpy(zero_copy_only=False)


def batches(rows: Dataset, columns: list[str], where: str, negatives: int | None = None) -> Iterator[Texts]:
    """Read the texts of a table in batches; origins and empty rows are numbered from the table's first row.

    Args:
        rows: with the columns.
        columns: those of anchors, of positives if there are any, and of negatives.
        where: what messages call the rows.
        negatives: how many of each row's negatives to take, the first ones; default: all.

    Raises:
        InputError: a column that holds no texts.
    """
    chosen, start = rows.select_columns(columns), 0
    for table in chosen.with_format("arrow").iter(BATCH):
        parts = [cells(table[name], name, where, start) for name in columns]
        texts = texts_of(parts, len(table), negatives)
        yield texts._replace(origins=texts.origins + start, empty=texts.empty + start)
        start += len(table)


def texts_of(parts: list[tuple[pyarrow.Array, np.ndarray]], rows: int, most: int | None = None) -> Texts:
    """Make training rows of the texts of each column and the rows that they stand in.

    Args:
        parts: the texts of each column, and the row of each; see `cells`.
        rows: how many rows these are.
        most: how many of each row's negatives to take; default: all.
    """
    anchors, positives = parts[0], parts[1] if len(parts) > 1 else None
    # A cell without a negative is no empty text; one in a list is.
    negatives = [(texts.filter(texts.is_valid()), where[np.asarray(texts.is_valid())]) for texts, where in parts[2:]]
    sides = [side for side in (anchors, positives) if side is not None]
    bad = np.zeros(rows, dtype=bool)
    for texts, where in [*sides, *negatives]:
        bad[where[blank(texts)]] = True
    for _, where in sides:
        bad |= np.bincount(where, minlength=rows) == 0
    origins = (anchors if positives is None else positives)[1]
    kept = np.flatnonzero(~bad[origins])
    if positives is not None and len(origins) > rows - bad.sum():  # a positive may stand twice in a list
        kept = kept[first_of_each(origins[kept], exact_ids(positives[0].take(pyarrow.array(kept))))]
    made = origins[kept]
    negatives.append((pyarrow.array([], pyarrow.string()), np.array([], int)))  # there may be no column
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
    """Return the places of the first of each different text in its row, in order."""
    order = np.lexsort((np.arange(len(ids)), ids, rows))
    same = (np.diff(rows[order]) == 0) & (ids[order][1:] == ids[order][:-1])
    return np.sort(order[np.concatenate([[True], ~same])]) if len(order) else order


def joined(where: np.ndarray, made: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Give each training row the negatives of the table's row that it is of.

    Args:
        where: the table's row of each negative.
        made: the table's row of each training row, in order.
        most: how many each gets, the first ones; default: all.

    Returns:
        The places of negatives, and the training row that has each; in the order of the training rows.
    """
    order = np.argsort(where, kind="stable")
    start, stop = (np.searchsorted(where[order], made, side) for side in ("left", "right"))
    counts = stop - start if most is None else np.minimum(stop - start, most)
    owners = np.repeat(np.arange(len(made)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.repeat(start, counts) + offsets], owners


# ---- hashes ----


def exact_ids(texts: pyarrow.Array) -> np.ndarray:
    """Return the hashes of texts as they stand, (T,) uint64."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts.cast(pyarrow.binary()).to_pylist()), np.uint64, len(texts))


def plain_texts(texts: pyarrow.Array) -> pyarrow.Array:
    """Return the words of texts, as the module says; of a text without words, the text in lower case."""
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
    whole = {name: np.concatenate(parts.pop(name)) for name in list(parts)}  # each is freed when it is put together
    sides = {side: Ids(whole.pop(f"{side} exact"), whole.pop(f"{side} plain")) for side in SIDES if f"{side} exact" in whole}
    return RowIds(**({"positives": None} | sides | whole), odd=odd, first_odd=first_odd, characters=characters)  # type: ignore[arg-type]


def count_odd(texts: Texts, odd: Counter[str], first_odd: dict[str, int]) -> None:
    """Count the texts that hold what `ODD` names, and note the first row of the table with one."""
    everything = texts.everything()
    rows = [texts.origins, *([] if texts.positives is None else [texts.origins]), texts.origins[texts.owners]]
    places = np.concatenate(rows)
    for name, pattern in ODD.items():
        found = pc.match_substring_regex(everything, pattern).to_numpy(zero_copy_only=False)
        if found.any():
            odd[name] += int(found.sum())
            first_odd.setdefault(name, int(places[found].min()))


def in_parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places of the hashes that begin with the same 4 bits: what sorts them needs a 16th of the memory."""
    for first in range(16):
        yield np.flatnonzero(ids >> np.uint64(60) == first)


def repeated(ids: np.ndarray) -> np.ndarray:
    """Return which hashes stand further up too, bool of the same length."""
    again = np.ones(len(ids), bool)
    for places in in_parts(ids):
        _, first = np.unique(ids[places], return_index=True)
        again[places[first]] = False
    return again


def counts_of(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return how often each hash stands among others, int32 of the same length."""
    found = np.zeros(len(ids), np.int32)
    for places, others in zip(in_parts(ids), in_parts(among)):
        known, counts = np.unique(among[others], return_counts=True)
        if len(known):
            where = np.minimum(np.searchsorted(known, ids[places]), len(known) - 1)
            found[places] = np.where(known[where] == ids[places], counts[where], 0)
    return found


def mixed(ids: np.ndarray) -> np.ndarray:
    """Scramble hashes (the finalizer of MurmurHash3), so that their sums tell rows apart."""
    ids = ids ^ (ids >> np.uint64(33))
    ids = ids * np.uint64(0xFF51AFD7ED558CCD)
    return ids ^ (ids >> np.uint64(33))


def row_ids(ids: RowIds) -> Ids:
    """Return hashes of whole rows, (R,): of the anchor, the positive, and the negatives in any order."""
    found = []
    for kind in ("exact", "plain"):
        total = mixed(getattr(ids.anchors, kind))
        if ids.positives is not None:
            total = total + mixed(mixed(getattr(ids.positives, kind)) + np.uint64(1))
        np.add.at(total, ids.owners, mixed(mixed(getattr(ids.negatives, kind)) + np.uint64(2)))
        found.append(mixed(total))
    return Ids(*found)
