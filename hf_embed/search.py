"""Exact nearest neighbours by blocked matrix products: memory O(queries * block), whatever the size of the corpus."""

from collections.abc import Iterable

import torch
from torch import Tensor


def search(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the largest dot product for each query, best first.

    `queries` is (Q, D); `blocks` are runs of rows, (C, D) each, which count on from one another and say the device. -> scores
    and row numbers, both (Q, k), or fewer columns if there are fewer rows.
    """
    best = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    first = 0
    for block in blocks:
        queries, best, numbers = (t.to(block.device) for t in (queries, best, numbers))
        scores, places = top(queries @ block.T, k)
        best, numbers = merge([best, scores], [numbers, places + first], k)
        first += len(block)
    return best, numbers


def merge(scores: list[Tensor], numbers: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best k of several lists of candidates, each (Q, any)."""
    best, places = top(torch.cat(scores, dim=1), k)
    return best, torch.cat(numbers, dim=1).gather(1, places)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores.topk(min(k, scores.shape[1]), dim=1)
