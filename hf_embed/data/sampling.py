"""Samplers that choose the rows of each rank at each step. The choice depends only on (seed, epoch, step)."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def generator(*numbers: int) -> torch.Generator:
    """Return a random-number generator whose seed depends on all given numbers and on their order."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


class GlobalBatchSampler(Sampler[list[int]]):
    """A sampler that draws one rank's rows of each global batch.

    An epoch is one permutation of all rows, drawn from (seed, epoch). It is cut into global batches of `ranks * batch_size`
    rows. Each rank takes an equal part of a global batch, in rank order. So a global batch holds the same rows for any number
    of ranks with the same `ranks * batch_size`.

    The last batch may be smaller. An epoch leaves out the rows that cannot be divided evenly among the ranks (fewer than
    `ranks` rows). It also leaves out a last batch of one row in total, because that row would have no negatives.

        >>> list(GlobalBatchSampler(rows=5, batch_size=2, rank=0, ranks=1, seed=1))
        [[4, 2], [1, 0]]
        >>> [list(GlobalBatchSampler(rows=5, batch_size=1, rank=rank, ranks=2, seed=1)) for rank in (0, 1)]
        [[[4], [1]], [[2], [0]]]
    """

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int, seed: int, drop_last: bool = False):
        self.rows, self.batch_size, self.rank, self.ranks = rows, batch_size, rank, ranks
        self.seed, self.epoch = seed, 0
        full, rest = divmod(rows, batch_size * ranks)
        last_size = rest // ranks  # rows of the last, smaller batch on each rank
        self.sizes = [batch_size] * full
        if not drop_last and last_size * ranks > 1:
            self.sizes.append(last_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass over the sampler."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def left_out(self) -> int:
        """The number of rows that an epoch does not use."""
        return self.rows - self.ranks * sum(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        # A tensor, because a list of as many Python numbers would need five times the memory.
        order = torch.randperm(self.rows, generator=generator(self.seed, self.epoch))
        first = 0
        for size in self.sizes:
            start = first + self.rank * size
            yield order[start : start + size].tolist()
            first += self.ranks * size


class SourceBatchSampler(Sampler[list[tuple[int, int]]]):
    """A sampler that draws one rank's rows of each global batch as pairs (source, row). A batch has rows of one source only.

    The source of each step is drawn with the given probabilities from (seed, epoch), so all ranks draw the same source. The
    rows of a source form one endless sequence: a permutation of its rows, then another permutation, and so on. Each time the
    source is drawn, in any epoch, the next global batch is taken from this sequence. The number of steps of an epoch is the
    number of full global batches in all rows of all sources together, and at least 1.

        >>> list(SourceBatchSampler([4, 2], [0.5, 0.5], batch_size=2, rank=0, ranks=1, seed=3))
        [[(0, 2), (0, 3)], [(1, 0), (1, 1)], [(1, 1), (1, 0)]]

    A source in `streams` has no random access. Its rows are numbered in the order in which this rank reads them.
    """

    left_out = 0  # rows that do not fill a batch come first in the next batch of their source

    def __init__(
        self,
        sizes: list[int],
        probabilities: list[float],
        batch_size: int,
        rank: int,
        ranks: int,
        seed: int,
        streams: frozenset[int] = frozenset(),
    ):
        self.sizes, self.streams = sizes, streams
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)
        self.batch_size, self.rank, self.ranks, self.seed, self.epoch = batch_size, rank, ranks, seed, 0
        self.steps = max(1, sum(sizes) // (batch_size * ranks))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass over the sampler."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def draws(self, epoch: int) -> list[int]:
        """Draw the source of each step of an epoch."""
        return torch.multinomial(
            self.probabilities, self.steps, replacement=True, generator=generator(self.seed, epoch)
        ).tolist()  # fmt: skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = Counter(source for epoch in range(self.epoch) for source in self.draws(epoch))
        orders: dict[int, tuple[int, Tensor]] = {}  # source -> (number of its current permutation, the permutation)
        for source in self.draws(self.epoch):
            first = drawn[source] * self.batch_size
            drawn[source] += 1
            if source in self.streams:
                numbers = list(range(first, first + self.batch_size))
            else:
                first = first * self.ranks + self.rank * self.batch_size
                numbers = self.rows_from(first, source, orders)
            yield [(source, number) for number in numbers]

    def rows_from(self, first: int, source: int, orders: dict[int, tuple[int, Tensor]]) -> list[int]:
        """Return a batch from a position of a source's endless sequence on. Keep the current permutation in `orders`."""
        found: list[int] = []
        while len(found) < self.batch_size:
            turn, place = divmod(first + len(found), self.sizes[source])
            if source not in orders or orders[source][0] != turn:
                seeded = generator(self.seed, source + 1, turn)
                orders[source] = turn, torch.randperm(self.sizes[source], generator=seeded)
            found += orders[source][1][place : place + self.batch_size - len(found)].tolist()
        return found
