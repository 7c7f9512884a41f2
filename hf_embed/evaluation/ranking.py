"""Metrics of scores and labels (0 or 1), as sentence-transformers' evaluators compute them with scikit-learn.

The order of items with equal scores matters only for the reciprocal rank.

Shapes: P scored items, C different scores.
"""

import numpy as np


def equal_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the different scores among (P,) scores, best first, and for each the number of labels 1 and the number of items.

    All three arrays have the shape (C,).
    """
    values, place = np.unique(-scores, return_inverse=True)
    return -values, np.bincount(place, labels), np.bincount(place)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the average precision, 0 to 1, of (P,) scores and (P,) labels. At least one label must be 1."""
    _, hits, items = equal_scores(scores, labels)
    return float((hits * hits.cumsum() / items.cumsum()).sum() / hits.sum())


def best_thresholds(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the best accuracy and the best F1, 0 to 1, over all thresholds, and the thresholds that give them.

    An item is predicted as 1 if its score is at or above the threshold. A threshold lies halfway between two scores. It is the
    lowest score if it is best to predict all items as 1, and lies above all scores if it is best to predict none.
    """
    values, hits, items = equal_scores(scores, labels)
    right, taken = hits.cumsum(), items.cumsum()  # items at or above each score
    halfway = np.append((values[:-1] + values[1:]) / 2, values[-1])
    f1 = 2 * right / (taken + labels.sum())
    zeros = len(labels) - labels.sum()
    accuracy = np.append(zeros, right + zeros - (taken - right)) / len(labels)  # the first entry predicts no item as 1
    return {
        "accuracy": float(accuracy.max()),
        "accuracy_threshold": float(np.append(np.nextafter(values[0], np.inf), halfway)[accuracy.argmax()]),
        "f1": float(f1.max()),
        "f1_threshold": float(halfway[f1.argmax()]),
    }


def reciprocal_rank(scores: np.ndarray, labels: np.ndarray, cutoff: int) -> float:
    """Return 1 / the rank of the best item with label 1, or 0 if it is not among the first `cutoff` items.

    Items with equal scores keep their order.
    """
    first = labels[np.argsort(-scores, kind="stable")][:cutoff]
    return 1 / (int(first.argmax()) + 1) if first.any() else 0.0


def ndcg(scores: np.ndarray, labels: np.ndarray, cutoff: int) -> float:
    """Return nDCG at `cutoff`, 0 to 1. Items with equal scores share the mean gain of their ranks."""
    _, hits, items = equal_scores(scores, labels)
    gains = np.repeat(hits / items, items)[:cutoff]
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    return float((gains * discounts).sum() / discounts[: labels.sum()].sum())
