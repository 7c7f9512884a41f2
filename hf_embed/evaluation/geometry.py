"""Alignment and uniformity (Wang and Isola, https://arxiv.org/abs/2005.10242), as SimCSE's section 4.3 uses them.

Both are of unit vectors, and lower is better; NaN where a vector is zero or not finite, for such a one has no direction:

    alignment  = E || f(x) - f(x+) ||^2                 over positive pairs
    uniformity = log E exp(-2 || f(x) - f(y) ||^2)      over pairs of different texts

Shapes: N texts, P pairs, D wide.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hf_embed.safe_files import writing

# Cosines that lie no further apart are equal but for rounding: there is no order in them.
ROUNDING = 1e-6
MOST_LABELS = 12  # points of the picture that are labelled with their step


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (..., D) at length 1, in float64; NaN for one that is zero or not finite."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)


def ordered(cosines: np.ndarray) -> bool:
    """Return whether some row of (Q, K) has an order: all are finite, and some further apart than rounding puts them."""
    return bool(np.isfinite(cosines).all() and (np.ptp(cosines, axis=-1) > ROUNDING).any())


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean squared distance of positive pairs, (P, D) and (P, D). NaN without a pair."""
    if len(first) == 0:
        return float("nan")
    return float(((unit(first) - unit(second)) ** 2).sum(-1).mean())


def uniformity(vectors: np.ndarray, block: int = 2048) -> float:
    """Return the log of the mean Gaussian potential over all pairs i < j of (N, D); NaN for fewer than two texts.

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
    """Plot alignment against uniformity along a run, a point per evaluation, coloured by STS. `history` as in `log_history`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [log for log in history if np.isfinite(log.get("eval_alignment", np.nan) + log.get("eval_uniformity", np.nan))]
    if not points:
        return
    x = [point["eval_uniformity"] for point in points]
    y = [point["eval_alignment"] for point in points]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
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
    plt.close(figure)
