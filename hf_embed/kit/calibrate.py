"""Which temperature suits a model and its texts: a sweep, and an honest account of what it gains.

Whoever takes the best of eight temperatures takes the luckiest too. So the gain is cross-validated: queries are dealt into
folds, each fold is scored at the temperature that is best on the others, and compared with itself at temperature 1. (The two
temperatures beside the best of the grid are tried for the best on all queries; a fold may choose them, or not.)

Without labels the second half of a text is what its first half looks for. (Geometry alone is no
guide: docs/results.md has a model whose retrieval gains two points while its embeddings draw a little closer together.)

Shapes: F folds, Q queries or pairs of a task.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from hf_embed.checkpoint.tables import swept_columns
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval
from hf_embed.evaluation.sts import STS, spearman
from hf_embed.evaluation.tasks import NO_ORDER, Task
from hf_embed.tempscale.attention import tempscale

GRID = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
STEP = 0.05  # on either side of the best of the grid


def halves(texts: Iterable[str], least: int = 20) -> Retrieval:
    """A retrieval set without labels: of each text of at least so many words, the first half looks for the second."""
    words = [text.split() for text in dict.fromkeys(texts)]
    words = [text for text in words if len(text) >= least]
    if len(words) < 2:
        raise InputError(f"{len(words)} text(s) of {least} words or more; their halves are to be told apart: give more texts")
    return pairs_to_retrieval([(" ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])) for text in words])


def fold_scores(task: Task, embed: Callable, folds: int) -> np.ndarray:
    """The task's main metric on all queries, on all but those of fold 1, 2 ... F, and on those of fold 1, 2 ... F: (1 + 2F,).

    nDCG@10 x 100 of a retrieval set, Spearman x 100 of an STS set. Raises InputError for another kind, or too few queries.
    """
    if isinstance(task, Retrieval):
        values = np.array([100 * metrics["ndcg@10"] for metrics in task.per_query(embed)])
        metric = lambda chosen: values[chosen].mean()  # noqa: E731
    elif isinstance(task, STS):
        values, scores = task.cosines(embed), np.array(task.rows["score"][:])
        metric = lambda chosen: 100 * spearman(values[chosen], scores[chosen])  # noqa: E731
    else:
        raise InputError(f"a temperature is chosen on retrieval or STS sets, not on {task.kind}")
    if not ordered(values[None]) if isinstance(task, STS) else not np.isfinite(values).all():
        raise InputError(f"nothing to choose a temperature by: {NO_ORDER}")
    if len(values) < 2 * folds:
        raise InputError(f"{len(values)} queries are too few for {folds} folds; give more, or fewer --folds")
    fold = np.random.default_rng(0).permutation(len(values)) % folds
    everything = np.ones(len(values), bool)
    scores = [metric(c) for c in [everything, *(fold != f for f in range(folds)), *(fold == f for f in range(folds))]]
    if not np.isfinite(scores).all():
        raise InputError(f"{len(values)} pairs in {folds} folds leave one with equal scores only; give more, or fewer --folds")
    return np.array(scores)


def sweep(model, embed: Callable, tasks: dict[str, Task], grid: Iterable[float] = GRID, folds: int = 5) -> dict:
    """Score `tasks` at the temperatures of `grid`, at 1, and, if there is more than one, at two more around the best.

    `model` is what `embed` embeds with. Every temperature costs one encoding of the texts.

        {"temperature": 0.8, "curve": [{"temperature": 0.6, "mine": 39.0, "mean": 39.0}, ...],
         "gain": 1.3,                    of the best temperature against 1, mean over tasks, on the queries that chose it
         "cross_validated_gain": 1.2,    on queries that did not
         "fold_temperatures": [0.8, 0.8, 0.75, 0.8, 0.8]}
    """
    scores: dict[float, np.ndarray] = {}

    def visit(temperatures: Iterable[float]) -> None:
        for temperature in tqdm(sorted({round(t, 4) for t in temperatures} - scores.keys()), desc="Temperatures"):
            with tempscale(model, temperature):
                scores[temperature] = np.stack([fold_scores(task, embed, folds) for task in tasks.values()])

    grid = list(grid)
    visit([*grid, 1.0])
    best = best_of({t: s[:, 0].mean() for t, s in scores.items()})
    if len(grid) > 1:
        visit(t for t in (best - STEP, best + STEP) if t > 0)
        best = best_of({t: s[:, 0].mean() for t, s in scores.items()})
    mean = {t: s.mean(0) for t, s in scores.items()}  # (1 + 2F,)
    chosen = [best_of({t: s[1 + f] for t, s in mean.items()}) for f in range(folds)]
    held_out = [mean[t][1 + folds + f] - mean[1.0][1 + folds + f] for f, t in enumerate(chosen)]
    return {
        "temperature": best,
        "curve": [
            {"temperature": t} | {name: float(s[0]) for name, s in zip(tasks, scores[t])} | {"mean": float(mean[t][0])}
            for t in sorted(scores)
        ],
        "gain": float(mean[best][0] - mean[1.0][0]),
        "cross_validated_gain": float(np.mean(held_out)),
        "fold_temperatures": chosen,
    }


def best_of(scores: dict[float, float]) -> float:
    """The temperature that scores best; of equals the one nearest to 1."""
    return max(scores, key=lambda t: (round(scores[t], 6), -abs(t - 1)))


def plot_sweep(result: dict, path: str | Path) -> None:
    """Change against temperature 1, a line for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    temperatures = [row["temperature"] for row in result["curve"]]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    names = swept_columns(result)
    for name, style in zip(names, ["-", "--", ":", "-."] * len(names)):
        scores = [row[name] for row in result["curve"]]
        change = np.array(scores) - scores[temperatures.index(1.0)]
        axes.plot(temperatures, change, marker="o", linestyle=style, linewidth=2.5 if name == "mean" else 1.2, label=name)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.axvline(result["temperature"], color="0.7", linewidth=1)
    axes.set_xlabel("temperature")
    axes.set_ylabel("change in nDCG@10 or Spearman, x 100")
    axes.set_title("TempScale")
    axes.legend()
    figure.savefig(path, dpi=125)
    plt.close(figure)
