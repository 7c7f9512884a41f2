"""Reranking: are the documents that answer a query nearer to it than its other candidates?

Shapes: C candidates of a query.
"""

import logging
from dataclasses import dataclass
from typing import cast

import numpy as np
from datasets import Dataset

from hf_embed.data.python_rows import RowData, as_rows
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.geometry import cosines_of, ordered
from hf_embed.evaluation.judged import Judged, judged_candidates
from hf_embed.evaluation.ranking import average_precision, ndcg, reciprocal_rank
from hf_embed.evaluation.rows import read_rows
from hf_embed.evaluation.tasks import Embed, EvaluationTask, embed_once, unranked

logger = logging.getLogger(__name__)


@dataclass
class Reranking(EvaluationTask):
    """Queries with documents that answer them and documents that do not, like sentence-transformers' RerankingEvaluator.

    Queries are encoded with the model's prompt "query", documents with its prompt "document". A query is left out, with a
    warning that counts such queries, if it lacks a positive or a negative document. Its score would be the same for every
    model.

    Args:
        samples: rows with the columns that `hf_embed.evaluation.judged` lists, for example dicts {"query": text, "positive":
            list of texts, "negative": list of texts}; also the rows of a `Dataset` or of another kind that
            `hf_embed.data.python_rows` lists.
        name: the name of the rows in messages.

    Raises:
        InputError: if a sample has another form, or no sample has both a positive and a negative document.
    """

    samples: RowData
    name: str = "Reranking"

    kind = "reranking"
    main = "rerank_map"
    reported = ("rerank_map", "rerank_mrr@10", "rerank_ndcg@10")

    def __post_init__(self) -> None:
        rows = cast(Dataset, as_rows(self.samples, self.name))
        self.judged = without_one_sided_queries(judged_candidates(rows, self.name), self.name)

    def score(self, embed: Embed) -> dict[str, float]:
        """Return rerank_map, rerank_mrr@10 and rerank_ndcg@10 of `embed`, x 100, as means over the queries.

        If a positive and a negative have equal cosines, the positive comes first in the mean reciprocal rank, as in
        sentence-transformers. The order of equal cosines does not matter for the other two metrics. All metrics are NaN, with a
        warning, if all candidates of each query have equal cosines, or a cosine is not finite.
        """
        queries = embed_once([sample.query for sample in self.judged], embed, "query")
        candidates = [text for sample in self.judged for text in (*sample.positives, *sample.negatives)]
        documents = embed_once(candidates, embed, "document")
        per_query, finite, has_order = [], True, False
        for query, positives, negatives in self.judged:
            cosines = cosines_of(documents(positives + negatives), queries([query]))  # (C,)
            labels = (np.arange(len(cosines)) < len(positives)).astype(int)
            per_query.append(
                [average_precision(cosines, labels), reciprocal_rank(cosines, labels, 10), ndcg(cosines, labels, 10)]
            )
            finite, has_order = finite and bool(np.isfinite(cosines).all()), has_order or ordered(cosines[None])
        if not (finite and has_order):
            return unranked(self.reported, f"MAP is NaN for {len(self.judged):,} queries")
        return dict(zip(self.reported, (100 * np.mean(per_query, axis=0)).tolist()))


def read_reranking(path: str) -> Reranking:
    """Read queries and their documents from a file or the Hub; see `hf_embed.evaluation.judged`.

    Raises:
        InputError: if a column is missing, a text is empty, or no query has both a positive and a negative document.
    """
    return Reranking(read_rows(path), path)


def without_one_sided_queries(samples: list[Judged], name: str) -> list[Judged]:
    """Return the samples with both positives and negatives, and warn about the others. Raise InputError if none is left."""
    found = [sample for sample in samples if sample.positives and sample.negatives]
    if not found:
        raise InputError(f"{name}: no query has both a positive and a negative document; add documents to rank")
    if left_out := len(samples) - len(found):
        logger.warning(
            f"{masked(name)}: {left_out:,} of {len(samples):,} queries have no positive or no negative document; they are left "
            "out"
        )
    return found
