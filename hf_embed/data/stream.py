"""A stream of rows to train on, read by number. Nothing of it is stored, so only its first rows are checked in advance."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_embed.data.columns import FIRST_ROWS, column_names, negative_columns, text_columns, warn_of_judgements
from hf_embed.data.sampling import generator
from hf_embed.data.sources import RowTexts, check_first_texts, kept_rows
from hf_embed.data.tokenization import RowTokenizer, too_few_rows
from hf_embed.errors import InputError, RankError, first_line
from hf_embed.library_internals import was_cut, was_split

if TYPE_CHECKING:
    from hf_embed.data.mixture import Source

logger = logging.getLogger(__name__)

# The largest number of positives in a row of a stream. The actual number is unknown in advance.
MOST_POSITIVES = 64


class Stream:
    """This rank's rows of an iterable dataset, numbered from 0. The rows are shuffled in a buffer and repeated without end.

    Each pass over the rows is shuffled differently, from (seed, pass). To read a row, all rows before it are read too. Reading
    an earlier row again starts from the beginning of the first pass.
    """

    def __init__(
        self, source: "Source", tokenizer: RowTokenizer, rank: int, ranks: int, seed: int, buffer_size: int, drop: bool
    ):
        self.label, self.tokenizer, self.negatives, self.drop = source.label, tokenizer, source.negatives, drop
        self.columns = text_columns(column_names(source.rows), source.label)
        self.rows, self.rank, self.ranks, self.seed, self.buffer_size = source.rows, rank, ranks, seed, buffer_size
        self.size = source.size or 0  # `Source` guarantees that the size is set
        self.endless: Iterator[RowTexts] | None = None  # all passes, from the row with the number `next_number` on
        self.next_number = 0
        self.texts_per_row = 2 + (len(self.columns[2:]) if source.negatives is None else source.negatives)
        first = list(islice(source.rows, FIRST_ROWS))
        lists = any(isinstance(row.get(column), list) for row in first for column in self.columns[2:])
        if lists and source.negatives is None:
            raise InputError(
                f"{source.label}: a streaming dataset with lists of negatives needs negatives: (the number to use per row), or "
                "Source(name, rows, negatives=..., size=...) in a script"
            )
        if ranks > 1 and was_split(source.rows):
            raise InputError(f"{source.label}: the stream is split among processes twice; give each process the whole stream")
        self.probe(first)

    def probe(self, first: list[dict]) -> None:
        """Check the first rows, and store what they tell of all rows.

        Raises:
            InputError: if something is wrong with one of them, or if there are fewer than two.
        """
        check_first_texts(first, self.columns, self.label)
        if len(self.columns) > 1:
            unused = dict.fromkeys(column for row in first for column in row if column not in self.columns)
            warn_of_judgements(first, list(unused), self.label)
        # Whether the cells of positives are lists.
        self.several_positives = any(isinstance(row.get(column), list) for row in first for column in self.columns[1:2])
        texts = [made.texts for number, row in enumerate(first, 1) for made in self.by_positive(row, f"row {number}")]
        if max(len(first), len(texts)) < 2:
            raise too_few_rows(len(texts), self.label)
        tokens = self.tokenizer(texts)
        self.truncated_share = sum(tokens["truncated"]) / max(1, sum(map(len, texts)))
        self.probed_ids = pyarrow.chunked_array([tokens["text_ids"]], pyarrow.list_(pyarrow.int64()))  # of the first rows

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        if self.endless is None or numbers[0] < self.next_number:
            self.endless, self.next_number = self.passes(), 0
        rows = list(islice(self.endless, numbers[0] - self.next_number, numbers[-1] + 1 - self.next_number))
        self.next_number = numbers[-1] + 1
        others = [row.others for row in rows] if self.several_positives else None
        columns = self.tokenizer([row.texts for row in rows], others, MOST_POSITIVES - 1)
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def one_pass(self, turn: int) -> IterableDataset:
        """Return this rank's rows of one pass, shuffled, as a separate dataset.

        With a shared dataset, `set_epoch` would also change the passes of other worker processes. After `take` or `skip`, the
        ranks share the rows and not the files, because `datasets` would take or skip a part of the rows in each rank's files.
        """
        shuffled = self.rows.shuffle(seed=generator(self.seed, turn).initial_seed(), buffer_size=self.buffer_size)
        if self.ranks > 1 and was_cut(self.rows):
            return shuffled.filter(lambda row, number: number % self.ranks == self.rank, with_indices=True)
        return split_dataset_by_node(shuffled, self.rank, self.ranks)

    def passes(self) -> Iterator[RowTexts]:
        """Read one pass after another, without end."""
        turn = 0
        while True:
            kept = dropped = 0
            for made in self.rows_of_pass(turn):
                kept += bool(made)
                dropped += not made
                yield from made
            if dropped and turn == 0:
                logger.warning(f"{self.label}: {dropped:,} of {kept + dropped:,} rows had an empty text and were dropped")
            if not kept:
                raise RankError(f"{self.label}: there are no rows for this process; give more rows or files than processes")
            turn += 1

    def rows_of_pass(self, turn: int) -> Iterator[list[RowTexts]]:
        """Yield what `by_positive` returns for each row of a pass. The rows are checked 256 at a time."""
        try:
            # iter() would give a worker process only a part of the rows. Here each worker skips the rows of other workers.
            for batch in self.one_pass(turn).iter(batch_size=256):
                late = negative_columns([column for column in batch if column not in self.columns])
                if late and self.negatives != 0:
                    raise InputError(
                        f"{self.label}: column {late[0]} begins after the first rows; give it in each row, maybe as null, or "
                        "set negatives: 0 to use none"
                    )
                numbers = range(max(map(len, batch.values())))
                rows = [{name: batch[name][i] for name in self.columns if name in batch} for i in numbers]
                yield from [self.by_positive(row) for row in rows]
        except InputError as error:
            raise RankError(str(error)) from error
        except Exception as error:  # the readers and the file systems below them raise many kinds of errors
            raise RankError(f"{self.label}: the next rows cannot be read: {first_line(error)}") from error

    def by_positive(self, row: dict, place: str = "") -> list[RowTexts]:
        """Return the texts of a row once for each of its positives, or nothing if the row is dropped.

        `place` is what messages call the row. Default: its first characters, because the rows are shuffled.
        """
        where = f"{self.label}, {place or f'the row {str(row)[:60]}...'}"
        made = kept_rows(row, self.columns, where, self.drop)
        if len(made) > (MOST_POSITIVES if self.several_positives else 1):
            most = f"at most {MOST_POSITIVES}" if self.several_positives else f"one, as in its first {FIRST_ROWS} rows"
            raise InputError(
                f"{where} has {len(made)} positives, but a row of this stream may have {most}; remove streaming: true"
            )
        return [RowTexts(texts[: self.texts_per_row], others) for texts, others in made]
