"""Alignment and uniformity (Wang and Isola, https://arxiv.org/abs/2005.10242), as used in section 4.3 of SimCSE.

Both are computed on unit vectors, and lower values are better. They are NaN if a vector is zero or not finite, because such a
vector has no direction:

    alignment  = E || f(x) - f(x+) ||^2                 over positive pairs
    uniformity = log E exp(-2 || f(x) - f(y) ||^2)      over pairs of different texts

Shapes: N texts, P pairs, Q rows of K cosines, vectors of dimension D.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hf_embed.safe_files import writing

# Cosines that differ by no more than this differ only by rounding errors, and cannot be ranked.
ROUNDING = 1e-6
DIGITS = 12  # of a cosine of unit vectors in float64
MOST_LABELS = 12  # points of the picture that are labeled with their step


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


def plot_trajectory(history: list[dict[str, Any]], path: str | Path) -> None:
    """Plot alignment against uniformity along a run, one point per evaluation, colored by the STS score.

    `history` has the form of the Trainer's `log_history`.
    """
    from matplotlib.figure import Figure

    points = [log for log in history if np.isfinite(log.get("eval_alignment", np.nan) + log.get("eval_uniformity", np.nan))]
    if not points:
        return
    x = [point["eval_uniformity"] for point in points]
    y = [point["eval_alignment"] for point in points]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, color="0.7", linewidth=1, zorder=1)
    dots = axes.scatter(x, y, c=[point["eval_spearman"] for point in points], cmap="viridis", s=36, zorder=2)
    axes.margins(0.12)  # room for the labels
    middle = (min(x) + max(x)) / 2
    every = -(-len(points) // MOST_LABELS)
    for number, point in enumerate(points):
        if number % every == 0 or point is points[-1]:
            side = -1 if x[number] > middle else 1  # towards the middle, so that the label stays inside the frame
            place: dict[str, Any] = {"xytext": (7 * side, 5), "ha": "right" if side < 0 else "left", "fontsize": 9}
            label = f"step {point.get('step', 0)}"
            axes.annotate(label, (x[number], y[number]), textcoords="offset points", **place)
    axes.set_xlabel("uniformity: are all sentences spread out? (lower is better)")
    axes.set_ylabel("alignment: are similar sentences close? (lower is better)")
    axes.set_title("Alignment and uniformity after each evaluation")
    figure.colorbar(dots, label="STS, Spearman x 100 (higher is better)")
    with writing(path) as aside:
        figure.savefig(aside, dpi=125)
