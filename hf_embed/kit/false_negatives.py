"""The expected number of false negatives in a batch of random rows, and the loss of a model that guesses.

A row's candidates are the positives and the hard negatives of the batch. A candidate of another row is a false negative in two
cases: it equals the row's own anchor or positive, or it is the positive of an anchor that equals one of these two texts.

This module counts these false negatives among all pairs of a row and a candidate of another row. If R rows have `pairs` of
them, a batch of B different rows has pairs * B (B - 1) / (R (R - 1)) on average.

Shapes: R rows, M negatives of all rows.
"""

import dataclasses
import math

import numpy as np
import torch

from hf_embed.kit.row_hashes import counts_of, mixed
from hf_embed.objectives import ImprovedContrastive, Matryoshka, Objective, SimCSE


def equal_candidates(anchors: np.ndarray, positives: np.ndarray, negatives: np.ndarray, owners: np.ndarray) -> tuple[int, int]:
    """Count the pairs of a row and a candidate of another row that is a false negative of the row.

    Args:
        anchors: (R,) uint64 hashes.
        positives: (R,) uint64 hashes. If the rows are single texts, the same array as `anchors`.
        negatives: (M,) uint64 hashes.
        owners: (M,) the row of each negative.

    Returns:
        Two counts. In the first, the candidate equals the row's anchor or positive. In the second, the candidate is another
        text, and its anchor equals the row's anchor or positive.
    """
    same = anchors == positives
    with_positive = positives[~same]

    def rows_with(texts: np.ndarray) -> np.ndarray:
        """Count the rows that have each text as anchor or positive."""
        return counts_of(texts, anchors) + counts_of(texts, with_positive)

    in_own_row = len(anchors) + int(((negatives == anchors[owners]) | (negatives == positives[owners])).sum())
    equal = int(rows_with(positives).sum()) + int(rows_with(negatives).sum()) - in_own_row
    with_anchor = rows_with(anchors)  # (R,)
    # A hash of both texts of a row that does not change if anchor and positive are exchanged.
    pairs = mixed(np.minimum(anchors, positives)) + np.maximum(anchors, positives)
    with_both = np.where(same, with_anchor, counts_of(pairs, pairs))
    return equal, int((with_anchor - with_both).sum())


def in_a_batch(pairs: int, rows: int, batch: int) -> float:
    """Return how many of the `pairs` among all `rows` a batch of random rows has on average."""
    batch = min(batch, rows)
    return pairs * batch * (batch - 1) / (rows * (rows - 1)) if rows > 1 else 0.0


def uses_batch(objective: Objective) -> bool:
    """Return whether an objective takes the texts of other rows as negatives."""
    return not objective.needs or isinstance(objective, SimCSE | ImprovedContrastive | Matryoshka)


def guessing(objective: Objective, batch: int, negatives: float) -> float:
    """Return the loss of a model that gives all texts the same embedding: the logarithm of the number of candidates.

    Args:
        objective: the loss. A margin is ignored.
        batch: the rows of a batch on all ranks together.
        negatives: the mean number of hard negatives of a row.
    """
    if isinstance(objective, Matryoshka):
        return sum(objective.weights or ()) * guessing(objective.inner, batch, negatives)
    if isinstance(objective, ImprovedContrastive):
        objective = dataclasses.replace(objective, margin=None)
    texts = 2 + math.ceil(negatives)
    ids = torch.arange(1, batch * texts + 1).view(batch, texts)
    absent = round(batch * (texts - 2 - negatives))  # negatives missing from the last rows. The loss is that of the first row
    ids[batch - absent :, -1] = 0
    vectors = torch.ones(batch, texts, 1)
    return float(objective(vectors[:1], ids[:1], vectors, ids))
