"""Alignment and uniformity (Wang and Isola, https://arxiv.org/abs/2005.10242), as used in section 4.3 of SimCSE.

Both are computed on unit vectors, and lower values are better. They are NaN if a vector is zero or not finite, because such a
vector has no direction:

    alignment  = E || f(x) - f(x+) ||^2                 over positive pairs
    uniformity = log E exp(-2 || f(x) - f(y) ||^2)      over pairs of different texts

Shapes: N texts, P pairs, Q rows of K cosines, vectors of dimension D.
"""

import numpy as np

# Cosines that differ by no more than this differ only by rounding errors, and cannot be ranked.
ROUNDING = 1e-6
DIGITS = 12  # of a cosine of unit vectors in float64


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (..., D) normalized to length 1, in float64. A vector that is zero or not finite becomes NaN."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)


def cosines_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosines (...) of pairs of unit vectors (..., D), without the rounding errors of the last digits.

    So all pairs of equal vectors have exactly the cosine 1.
    """
    return (first * second).sum(-1).round(DIGITS)


def ordered(cosines: np.ndarray) -> bool:
    """Return whether cosines (Q, K) can be ranked.

    All cosines must be finite, and in at least one row they must differ by more than rounding errors.
    """
    return bool(np.isfinite(cosines).all() and (np.ptp(cosines, axis=-1) > ROUNDING).any())


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean squared distance of positive pairs (P, D) and (P, D), or NaN if there are no pairs."""
    if len(first) == 0:
        return float("nan")
    return float(((unit(first) - unit(second)) ** 2).sum(-1).mean())


def uniformity(vectors: np.ndarray, block: int = 2048) -> float:
    """Return the log of the mean Gaussian potential over all pairs i < j of (N, D), or NaN for fewer than two texts.

    It needs O(block * N) memory.
    """
    vectors, total = unit(vectors), 0.0
    n = len(vectors)
    if n < 2:
        return float("nan")
    for start in range(0, n, block):
        rows = vectors[start : start + block]
        potential = np.exp(-2 * (2 - 2 * rows @ vectors[start:].T))  # ||x - y||^2 = 2 - 2 x.y
        total += np.triu(potential, k=1).sum()
    return float(np.log(total / (n * (n - 1) / 2)))
