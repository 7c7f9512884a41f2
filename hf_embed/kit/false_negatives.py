"""False negatives that a batch of random rows is expected to have, and the loss of a model that guesses.

A row's candidates are the positives and the hard negatives of a batch. One of another row is a false negative where it is the
row's own anchor or positive, or the positive of an anchor that is one of these. Counted are all pairs of a row and a candidate
of another row; of `pairs` among R rows, a batch of B different rows has pairs * B (B - 1) / (R (R - 1)) on average.

Shapes: R rows, M negatives of all rows.
"""

import dataclasses
import math

import numpy as np
import torch

from hf_embed.kit.row_hashes import counts_of, mixed
from hf_embed.objectives import ImprovedContrastive, Matryoshka, Objective


def equal_candidates(anchors: np.ndarray, positives: np.ndarray, negatives: np.ndarray, owners: np.ndarray) -> tuple[int, int]:
    """Count the pairs of a row and a candidate of another row that is no negative of it.

    Args:
        anchors: (R,) uint64 hashes.
        positives: (R,) uint64 hashes; of single texts, the anchors'.
        negatives: (M,) uint64 hashes.
        owners: (M,) the row of each negative.

    Returns:
        How many candidates are the row's anchor or positive; and how many are another positive of one of these two.
    """
    same = anchors == positives
    with_positive = positives[~same]

    def rows_with(texts: np.ndarray) -> np.ndarray:
        """Count the rows that have each text as anchor or positive."""
        return counts_of(texts, anchors) + counts_of(texts, with_positive)

    in_own_row = len(anchors) + int(((negatives == anchors[owners]) | (negatives == positives[owners])).sum())
    equal = int(rows_with(positives).sum()) + int(rows_with(negatives).sum()) - in_own_row
    with_anchor = rows_with(anchors)  # (R,)
    # An unordered pair is of the same two texts in the same two rows or the other way round.
    pairs = mixed(np.minimum(anchors, positives)) + np.maximum(anchors, positives)
    with_both = np.where(same, with_anchor, counts_of(pairs, pairs))
    return equal, int((with_anchor - with_both).sum())


def in_a_batch(pairs: int, rows: int, batch: int) -> float:
    """Return how many of the pairs among all rows a batch of random rows has on average."""
    batch = min(batch, rows)
    return pairs * batch * (batch - 1) / (rows * (rows - 1)) if rows > 1 else 0.0


def guessing(objective: Objective, batch: int, negatives: float) -> float:
    """Return the loss of a model to which all texts are the same: the logarithm of the number of candidates.

    Args:
        objective: its loss, without a margin.
        batch: rows of all ranks.
        negatives: hard negatives that a row has on average.
    """
    if isinstance(objective, Matryoshka):
        return sum(objective.weights or ()) * guessing(objective.inner, batch, negatives)
    if isinstance(objective, ImprovedContrastive):
        objective = dataclasses.replace(objective, margin=None)
    texts = 2 + math.ceil(negatives)
    ids = torch.arange(1, batch * texts + 1).view(batch, texts)
    absent = round(batch * (texts - 2 - negatives))  # in the last rows; the loss is that of the first
    ids[batch - absent :, -1] = 0
    vectors = torch.ones(batch, texts, 1)
    return float(objective(vectors[:1], ids[:1], vectors, ids))
