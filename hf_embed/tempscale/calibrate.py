"""Which temperature suits a model and its texts: a sweep, and an honest account of what it gains.

Whoever takes the best of eight temperatures takes the luckiest too. So the gain is cross-validated: queries are dealt into
folds, each fold is scored at the temperature that is best on the others, and compared with itself at temperature 1.

Without labels the second half of a text is what its first half looks for. (Geometry alone is no
guide: docs/results.md has a model whose retrieval gains two points while its embeddings draw a little closer together.)

Shapes: F folds, Q queries or pairs of a task.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from hf_embed.errors import InputError
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import Task
from hf_embed.tempscale.attention import tempscale

GRID = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
STEP = 0.05  # on either side of the best of the grid


def halves(texts: Iterable[str], least: int = 20) -> Retrieval:
    """A retrieval set without labels: of each text of at least so many words, the first half looks for the second."""
    words = [text.split() for text in dict.fromkeys(texts)]
    words = [text for text in words if len(text) >= least]
    if len(words) < 2:
        raise InputError(f"{len(words)} text(s) of {least} words or more; their halves are to be told apart: give more texts")
    names = [str(i) for i in range(len(words))]
    first = {f"q{name}": " ".join(text[: len(text) // 2]) for name, text in zip(names, words)}
    second = {f"d{name}": " ".join(text[len(text) // 2 :]) for name, text in zip(names, words)}
    return Retrieval(first, second, {f"q{name}": {f"d{name}": 1} for name in names})


def fold_scores(task: Task, embed: Callable, folds: int) -> np.ndarray:
    """The task's main metric on all queries, on all but those of fold 1, 2 ... F, and on those of fold 1, 2 ... F: (1 + 2F,).

    nDCG@10 x 100 of a retrieval set, Spearman x 100 of an STS set. Raises InputError for another kind, or too few queries.
    """
    if isinstance(task, Retrieval):
        values = np.array([100 * metrics["ndcg@10"] for metrics in task.per_query(embed)])
        metric = lambda chosen: values[chosen].mean()  # noqa: E731
    elif isinstance(task, STS):
        values, scores = task.cosines(embed), np.array(task.rows["score"][:])
        metric = lambda chosen: 100 * spearmanr(values[chosen], scores[chosen]).statistic  # noqa: E731
    else:
        raise InputError(f"a temperature is chosen on retrieval or STS sets, not on {task.kind}")
    if len(values) < 2 * folds:
        raise InputError(f"{len(values)} queries are too few for {folds} folds; give more, or fewer --folds")
    fold = np.random.default_rng(0).permutation(len(values)) % folds
    everything = np.ones(len(values), bool)
    return np.array([metric(c) for c in [everything, *(fold != f for f in range(folds)), *(fold == f for f in range(folds))]])


def sweep(model, embed: Callable, tasks: dict[str, Task], grid: Iterable[float] = GRID, folds: int = 5) -> dict:
    """Score `tasks` at the temperatures of `grid`, at 1, and, if there is more than one, at two more around the best.

    `model` is what `embed` embeds with. Every temperature costs one encoding of the texts. -> {"temperature": the best on all
    queries, "curve": {temperature: {task: score, "mean": score}}, "gain": mean over tasks, against temperature 1, of the best
    on the queries that chose it, "cross_validated_gain": on queries that did not, "fold_temperatures": [...]}
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
    curve = {t: {name: float(s[0]) for name, s in zip(tasks, scores[t])} | {"mean": float(mean[t][0])} for t in sorted(scores)}
    return {
        "temperature": best,
        "curve": curve,
        "gain": float(mean[best][0] - mean[1.0][0]),
        "cross_validated_gain": float(np.mean(held_out)),
        "fold_temperatures": chosen,
    }


def best_of(scores: dict[float, float]) -> float:
    """The temperature that scores best; of equals the one nearest to 1."""
    return max(scores, key=lambda t: (round(scores[t], 6), -abs(t - 1)))


def lines(result: dict) -> list[str]:
    """A table for people, the chosen temperature starred."""
    names = list(next(iter(result["curve"].values())))
    names = names if len(names) > 2 else names[:1]  # the mean of one is that one
    out = ["temperature" + "".join(f"  {name:>12}" for name in names)]
    for temperature, scores in result["curve"].items():
        star = "*" if temperature == result["temperature"] else " "
        out.append(f"{temperature:>10g}{star}" + "".join(f"  {scores[name]:>12.2f}" for name in names))
    return out


def plot_sweep(result: dict, path: str | Path) -> None:
    """Change against temperature 1, a line for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = result["curve"]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    names = [name for name in curve[1.0] if name != "mean" or len(curve[1.0]) > 2]
    for name, style in zip(names, ["-", "--", ":", "-."] * len(names)):
        change = [scores[name] - curve[1.0][name] for scores in curve.values()]
        axes.plot(list(curve), change, marker="o", linestyle=style, linewidth=2.5 if name == "mean" else 1.2, label=name)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.axvline(result["temperature"], color="0.7", linewidth=1)
    axes.set_xlabel("temperature")
    axes.set_ylabel("change in nDCG@10 or Spearman, x 100")
    axes.set_title("TempScale")
    axes.legend()
    figure.savefig(path, dpi=125)
    plt.close(figure)
