"""64-bit hashes of the texts of training rows: they show which texts are equal, and need 8 bytes each.

A text has two hashes. The exact hash is of the text as it is. The plain hash is of its words only: the text in Unicode's
compatibility form (NFKC) and in lower case, with one space in place of every run of characters that are not letters, marks or
numbers. "A cat!" and "a  cat" have different exact hashes and the same plain hash.

Shapes: R training rows, M negatives of all rows, T texts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from hf_embed.data.tokenization import rows_of_batch

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

    anchors: list[str]  # (R,)
    positives: list[str] | None  # (R,); None for single texts
    negatives: list[str]  # (M,)
    owners: np.ndarray  # (M,) the training row of each negative
    origins: np.ndarray  # (R,) the table row of each training row
    empty: np.ndarray  # the table rows that are left out

    def everything(self) -> list[str]:
        """Return all texts, (T,): anchors, positives, negatives."""
        return [*self.anchors, *(self.positives or []), *self.negatives]


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


def batches(rows: Dataset, columns: list[str], where: str, negatives: int | None = None) -> Iterator[Texts]:
    """Read the texts of a table in batches, as the training reads them, and leave out rows with an empty text.

    Args:
        rows: the table.
        columns: the columns of anchors, of positives if there are any, and of negatives, in this order.
        where: what messages call the rows.
        negatives: use only so many negatives of each row, the first ones. Default: all.

    Raises:
        InputError: if a column does not hold texts.
    """
    most, start = None if negatives is None else 2 + negatives, 0
    for batch in rows.select_columns(columns).iter(BATCH):
        numbers = list(range(start, start + len(batch[columns[0]])))
        start += len(numbers)
        made = list(rows_of_batch(batch, numbers, columns, [], where, most, drop=True))
        origins = np.array([row.number for row in made], int)
        yield Texts(
            anchors=[row.texts[0] for row in made],
            positives=[row.texts[1] for row in made] if len(columns) > 1 else None,
            negatives=[text for row in made for text in row.texts[2:]],
            owners=np.array([i for i, row in enumerate(made) for _ in row.texts[2:]], int),
            origins=origins,
            empty=np.setdiff1d(numbers, origins),
        )


# ---- hashes ----


def exact_ids(texts: Sequence[str]) -> np.ndarray:
    """Return the exact hashes of texts, (T,) uint64."""
    return np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))


def plain_texts(texts: Sequence[str]) -> list[str]:
    """Return the words of each text, as the module docstring defines them. Without words, return the lowercase text."""
    normal = pc.utf8_normalize(pyarrow.array(texts, pyarrow.string()), form="NFKC")
    lower = pc.utf8_lower(normal)
    words = pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, pattern=NO_WORD, replacement=" "))
    return pc.if_else(pc.equal(words, ""), pc.utf8_trim_whitespace(lower), words).to_pylist()


def text_ids(texts: Sequence[str]) -> Ids:
    """Return both hashes of texts."""
    return Ids(exact_ids(texts), exact_ids(plain_texts(texts)))


def hash_rows(read: Iterable[Texts]) -> RowIds:
    """Read a table to its end, and return the hashes of its texts."""
    parts: dict[str, list[np.ndarray]] = {}
    odd, first_odd, made, characters = Counter[str](), dict[str, int](), 0, 0
    for texts in read:
        count_odd(texts, odd, first_odd)
        characters += sum(map(len, texts.everything()))
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
    everything = pyarrow.array(texts.everything(), pyarrow.string())
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
        found[places] = looked_up(ids[places], known, counts, otherwise=found[places])
    return found


def looked_up(ids: np.ndarray, keys: np.ndarray, values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Return for each hash the value at its position in `keys` (sorted), or its entry of `otherwise` if it is not there."""
    if not len(keys):
        return otherwise
    places = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
    return np.where(keys[places] == ids, values[places], otherwise)


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
