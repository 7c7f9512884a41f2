"""Exact nearest neighbours by blocked matrix products: memory O(queries * block), whatever the size of the corpus.

    from hf_embed.search import exact_search

    blocks = (torch.from_numpy(numpy.load(path)).to("cuda") for path in shards)  # read one at a time
    scores, rows = exact_search(queries, blocks, k=10)                           # rows count through all shards

Shapes: Q queries, C rows of a block, D wide.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def exact_search(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k rows with the largest dot product for each query, best first.

    Args:
        queries: (Q, D).
        blocks: runs of rows, (C, D) each, which count on from one another; each is searched on the device where it is.
        k: how many rows to return for a query.

    Returns:
        Scores and row numbers, both (Q, k), or fewer columns if there are fewer rows. Of equal scores any may come first.
    """
    scores = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    first = 0
    for block in blocks:
        queries, scores, numbers = (tensor.to(block.device) for tensor in (queries, scores, numbers))
        block_scores, places = best(queries @ block.T, k)
        scores, numbers = merge([scores, block_scores], [numbers, places + first], k)
        first += len(block)
    return scores, numbers


def merge(scores: list[Tensor], numbers: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the best k of several lists of candidates, each (Q, any number)."""
    merged, places = best(torch.cat(scores, dim=1), k)
    return merged, torch.cat(numbers, dim=1).gather(1, places)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, or all of them, and their places."""
    return scores.topk(min(k, scores.shape[1]), dim=1)
