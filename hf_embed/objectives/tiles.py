"""Compute the losses of rows in tiles, so that the similarities of a large batch are never in memory all at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_SIZE = 2**23  # largest number of similarities in a tile: 32 MiB in float32


def by_tiles(losses: Callable[[slice], Tensor], rows: int, columns: int) -> Tensor:
    """Return the losses of all rows, (B,).

    If there is more than one tile, the backward pass computes each tile once more instead of keeping its matrices.

    Args:
        losses: maps some of the rows to their losses.
        rows: B, the number of rows.
        columns: the number of similarities of each row.
    """
    size = max(1, TILE_SIZE // max(1, columns))
    if rows <= size:
        return losses(slice(0, rows))
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return torch.cat([checkpoint(losses, tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles])
