"""Which rows a rank sees at which step: a function of (seed, epoch, step) and nothing else."""

import torch
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """One rank's rows of each global batch.

    An epoch is one permutation of all rows, drawn from (seed, epoch), and global batch g its g-th run of
    `ranks * batch_size` rows: the same rows whatever the number of ranks, each rank taking its share in rank order.
    The last batch may be smaller; what cannot be shared evenly among the ranks (fewer than `ranks` rows), or would be a
    batch of one row, without negatives, is left out of that epoch.

        >>> list(GlobalBatchSampler(rows=5, batch_size=2, rank=0, ranks=1, seed=1))
        [[4, 2], [1, 0]]
    """

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int, seed: int, drop_last: bool = False):
        self.rows, self.batch_size, self.rank, self.ranks = rows, batch_size, rank, ranks
        self.seed, self.epoch = seed, 0
        full, rest = divmod(rows, batch_size * ranks)
        share = rest // ranks  # rows of the last, smaller batch on each rank
        self.sizes = [batch_size] * full
        if not drop_last and share * ranks > 1:
            self.sizes.append(share)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def left_out(self) -> int:
        """How many rows an epoch does not use."""
        return self.rows - self.ranks * sum(self.sizes)

    def __iter__(self):
        # One 64-bit seed from both numbers, so that (1, 2) and (2, 1) differ.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.rows, generator=generator).tolist()
        first = 0
        for size in self.sizes:
            start = first + self.rank * size
            yield order[start : start + size]
            first += self.ranks * size
