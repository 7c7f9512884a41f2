"""Metrics of scores against labels of 0 and 1, as sentence-transformers' evaluators compute them with scikit-learn.

In which order items of equal scores stand matters to the reciprocal rank alone.

Shapes: P scored items, C different scores.
"""

import numpy as np


def equal_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the different ones of (P,) scores, best first, and how many labels of 1 and how many items each has: (C,) each."""
    values, place = np.unique(-scores, return_inverse=True)
    return -values, np.bincount(place, labels), np.bincount(place)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the average precision, 0 to 1, of (P,) scores and (P,) labels, of which one is 1."""
    _, hits, items = equal_scores(scores, labels)
    return float((hits * hits.cumsum() / items.cumsum()).sum() / hits.sum())


def best_thresholds(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the best accuracy and the best F1, 0 to 1, that a threshold gives, and these thresholds.

    From the threshold on an item is taken for a 1. It lies halfway between two scores; above all of them if the best is to
    take none.
    """
    values, hits, items = equal_scores(scores, labels)
    right, taken = hits.cumsum(), items.cumsum()  # at each score or above
    halfway = np.append((values[:-1] + values[1:]) / 2, values[-1])
    f1 = 2 * right / (taken + labels.sum())
    zeros = len(labels) - labels.sum()
    accuracy = np.append(zeros, right + zeros - (taken - right)) / len(labels)  # the first one takes none
    return {
        "accuracy": float(accuracy.max()),
        "accuracy_threshold": float(np.append(np.nextafter(values[0], np.inf), halfway)[accuracy.argmax()]),
        "f1": float(f1.max()),
        "f1_threshold": float(halfway[f1.argmax()]),
    }


def reciprocal_rank(scores: np.ndarray, labels: np.ndarray, cutoff: int) -> float:
    """Return 1 / the rank of the best item of label 1, or 0 if it is not among the first; equal scores stay in their order."""
    first = labels[np.argsort(-scores, kind="stable")][:cutoff]
    return 1 / (int(first.argmax()) + 1) if first.any() else 0.0


def ndcg(scores: np.ndarray, labels: np.ndarray, cutoff: int) -> float:
    """Return nDCG, 0 to 1; equal scores share the mean gain of their places."""
    _, hits, items = equal_scores(scores, labels)
    gains = np.repeat(hits / items, items)[:cutoff]
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    return float((gains * discounts).sum() / discounts[: labels.sum()].sum())
