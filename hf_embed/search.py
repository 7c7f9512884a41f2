"""Exact nearest neighbors by blocked matrix products. Memory is O(queries * block), whatever the size of the corpus.

    from hf_embed import semantic_search

    hits = semantic_search(encoder.encode_query(queries), encoder.encode_document(texts), top_k=5)
    for hit in hits[0]:  # of the first query
        print(hit["score"], texts[hit["corpus_id"]])

    from hf_embed.search import exact_search

    blocks = (torch.from_numpy(numpy.load(path)).to("cuda") for path in shards)  # read one at a time
    scores, rows = exact_search(queries, blocks, k=10)                           # row numbers continue from shard to shard

Shapes: Q queries, C rows of a block, N rows in all, D numbers per vector.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.vectors import SIMILARITIES, Compare, Vectors, as_floats, as_matrix, check_precision, check_widths, precision_of

QUERIES = 2048  # queries per search; their scores against one block take 128 MiB
BLOCK = 16384  # rows of the corpus that are compared at a time, a block


def semantic_search(
    queries: Vectors, corpus: Vectors, top_k: int = 10, similarity: str = "cosine", precision: str | None = None
) -> list[list[dict[str, int | float]]]:
    """Return the nearest vectors of a corpus for each query, in the format of sentence_transformers.util.semantic_search.

    The search is exact: every query is compared with every vector of the corpus, block by block, on the device of the corpus.

    Args:
        queries: (Q, D), or one vector (D,).
        corpus: (N, D). An array may be memory-mapped; only one block of it is read at a time. Vectors with the precision int8,
            binary or ubinary are compared with queries of the same precision, or with float32 queries.
        top_k: number of results for each query.
        similarity: cosine, dot, euclidean or manhattan (negated distances); only cosine for precisions other than float32.
        precision: int8 or binary, if both queries and corpus are int8 vectors.

    Returns:
        For each query [{"corpus_id": row of the corpus, "score": ...}, ...], nearest first; fewer than `top_k` if N is smaller.

    Raises:
        InputError: if `top_k` is not a whole number of at least 1; if the widths differ; if a number is not finite; if the
            similarity is unknown or not possible for the precision; or if int8 vectors may be packed or not.
    """
    if similarity not in SIMILARITIES:
        raise InputError(f"unknown similarity {similarity!r}; use one of {', '.join(SIMILARITIES)}")
    if type(top_k) is not int or top_k < 1:
        raise InputError(f"top_k is {top_k!r}; it must be a whole number of at least 1")
    rows = corpus if isinstance(corpus, np.ndarray) and corpus.ndim == 2 else as_matrix(corpus)
    asked = as_matrix(queries)
    kinds = precisions(asked, as_matrix(rows[:1]), precision)
    if similarity != "cosine" and set(kinds) != {"float32"}:
        raise InputError(f"similarity {similarity}: vectors of the precision {kinds[1]} do not keep their length; use cosine")
    hits = []
    for part in as_floats(asked, kinds[0]).split(QUERIES):
        blocks = (as_floats(as_matrix(rows[start : start + BLOCK]), kinds[1]) for start in range(0, len(rows), BLOCK))
        scores, numbers = exact_search(part, blocks, top_k, finite(SIMILARITIES[similarity]))
        for pairs in zip(numbers.tolist(), scores.tolist()):
            hits.append([{"corpus_id": number, "score": score} for number, score in zip(*pairs)])
    return hits


def precisions(queries: Tensor, rows: Tensor, given: str | None) -> tuple[str, str]:
    """Return the precisions of queries and rows. Raise InputError if one is not known, or if the widths differ."""
    if given is not None:
        check_precision(given)
    whole = [vectors.shape[-1] for vectors in (queries, rows) if vectors.dtype not in (torch.int8, torch.uint8)]
    if torch.int8 in (queries.dtype, rows.dtype) and not whole and given is None:
        raise InputError("int8 vectors may have the precision int8 or binary; set precision='int8' or precision='binary'")
    width = whole[0] if whole else 8 * queries.shape[-1]
    first, second = (precision_of(vectors, width, width, given) for vectors in (queries, rows))
    check_widths(as_floats(queries[:1], first), as_floats(rows, second))
    return first, second


def finite(compare: Compare) -> Compare:
    """Wrap a comparison so that it raises InputError if a score is not finite; such a score would rank before all others."""

    def checked(queries: Tensor, block: Tensor) -> Tensor:
        scores = compare(queries, block)
        if not bool(torch.isfinite(scores).all()):
            raise InputError("some vectors are not finite; remove them or check the model")
        return scores

    return checked


def dot_products(queries: Tensor, block: Tensor) -> Tensor:
    """Return the dot products (Q, C) of queries (Q, D) and rows (C, D)."""
    return queries @ block.T


def exact_search(queries: Tensor, blocks: Iterable[Tensor], k: int, compare: Compare = dot_products) -> tuple[Tensor, Tensor]:
    """Return the k rows with the largest scores for each query, best first.

    Args:
        queries: (Q, D).
        blocks: consecutive blocks of rows, (C, D) each. Each block is searched on its own device.
        k: number of rows to return for each query.
        compare: (Q, D) and (C, D) -> scores (Q, C); default: the dot product.

    Returns:
        Scores and row numbers, both (Q, k), or with fewer columns if there are fewer rows. Of rows with equal scores, the one
        with the smaller number comes first.
    """
    scores = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    first = 0
    for block in blocks:
        queries, scores, numbers = (tensor.to(block.device) for tensor in (queries, scores, numbers))
        block_scores, places = best(compare(queries, block), k)
        scores, chosen = best(torch.cat([scores, block_scores], dim=1), k)
        numbers = torch.cat([numbers, places + first], dim=1).gather(1, chosen)
        first += len(block)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, numbers.gather(1, order)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row, or all of them, and their places. Of equal scores, the first are taken.

    The scores stay in their order:

    >>> best(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 3)
    (tensor([[1., 2., 1.]]), tensor([[0, 1, 2]]))
    """
    if scores.shape[1] <= k:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    values, places = scores.topk(k + 1, dim=1)
    tied = (values[:, k] == values[:, k - 1]).nonzero().squeeze(1)  # in these rows, `topk` takes any of several equal scores
    places = places[:, :k]
    if len(tied):
        rows, last = scores[tied], values[tied, k:]
        above = ~(rows <= last)  # with NaN, which `topk` takes first
        chosen = above | ((rows == last) & ((rows == last).cumsum(1) <= k - above.sum(1, keepdim=True)))
        places[tied] = chosen.nonzero()[:, 1].view(-1, k)
    places = places.sort(1).values
    return scores.gather(1, places), places
