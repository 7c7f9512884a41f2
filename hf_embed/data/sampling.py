"""Which rows a rank sees at which step: a function of (seed, epoch, step) and nothing else."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def generator(*numbers: int) -> torch.Generator:
    """Return a generator of random numbers that depend on all the given ones, and on their order."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


class GlobalBatchSampler(Sampler[list[int]]):
    """Draw one rank's rows of each global batch.

    An epoch is one permutation of all rows, drawn from (seed, epoch), and global batch g its g-th run of
    `ranks * batch_size` rows: the same rows whatever the number of ranks, each rank taking an equal part in rank order.
    The last batch may be smaller; what cannot be divided evenly among the ranks (fewer than `ranks` rows), or would be a
    batch of one row, without negatives, is left out of that epoch.

        >>> list(GlobalBatchSampler(rows=5, batch_size=2, rank=0, ranks=1, seed=1))
        [[4, 2], [1, 0]]
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
        """Let the next pass be that of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def left_out(self) -> int:
        """The number of rows that an epoch does not use."""
        return self.rows - self.ranks * sum(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.rows, generator=generator(self.seed, self.epoch)).tolist()
        first = 0
        for size in self.sizes:
            start = first + self.rank * size
            yield order[start : start + size]
            first += self.ranks * size


class SourceBatchSampler(Sampler[list[tuple[int, int]]]):
    """Draw one rank's rows of each global batch, where a batch is of one source: pairs (source, row).

    The source of every step is drawn with the given probabilities from (seed, epoch), alike on all ranks. The rows of a source
    are one endless sequence, cut into global batches in the order in which they are drawn, over all epochs: a permutation
    of its rows, then another, and so on. An epoch is as many steps as it takes to see as many rows as there are.

        >>> list(SourceBatchSampler([4, 2], [0.5, 0.5], batch_size=2, rank=0, ranks=1, seed=3))
        [[(0, 2), (0, 3)], [(1, 0), (1, 1)], [(1, 1), (1, 0)]]

    A source in `streams` has no random access: its rows are numbered as this rank will read them.
    """

    left_out = 0  # what does not fill a batch comes first in the next one of its source

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
        """Let the next pass be that of an epoch."""
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
        orders: dict[int, tuple[int, Tensor]] = {}  # of each source, the number of the permutation in use, and it
        for source in self.draws(self.epoch):
            first = drawn[source] * self.batch_size
            drawn[source] += 1
            if source in self.streams:
                numbers = list(range(first, first + self.batch_size))
            else:
                first = first * self.ranks + self.rank * self.batch_size
                numbers = [self.row(source, place, orders) for place in range(first, first + self.batch_size)]
            yield [(source, number) for number in numbers]

    def row(self, source: int, place: int, orders: dict[int, tuple[int, Tensor]]) -> int:
        """Return the row at a place of a source's endless sequence; keep the permutation that it is in."""
        turn, place = divmod(place, self.sizes[source])
        if source not in orders or orders[source][0] != turn:
            seeded = generator(self.seed, source + 1, turn)
            orders[source] = turn, torch.randperm(self.sizes[source], generator=seeded)
        return int(orders[source][1][place])
