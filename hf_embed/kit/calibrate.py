"""Which temperature suits a model and its texts: a sweep, and an honest account of what it gains.

Whoever takes the best of eight temperatures takes the luckiest too. So the gain is cross-validated: queries are dealt into
parts, each part is scored at the temperature that is best on the others, and compared with itself at temperature 1. (The two
temperatures beside the best are tried for the best on all queries; a part may choose them, or not.)

Without labels the second half of a text is what its first half looks for. (Geometry alone is no
guide: docs/results/tempscale.md has a model whose retrieval gains two points while its embeddings draw a little closer
together.)

A gain may be that of long documents alone: of retrieval sets the scores are told by thirds of the queries too, from those whose
relevant documents are shortest to those whose are longest.

Shapes: P parts, Q queries or pairs of a task.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_embed.checkpoint.card import store_results, stored_results, write_card
from hf_embed.checkpoint.save import renewed
from hf_embed.checkpoint.tables import swept_columns
from hf_embed.disk import check_folder
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval
from hf_embed.evaluation.sts import STS, spearman
from hf_embed.evaluation.tasks import NO_ORDER, Embed, Task
from hf_embed.progress import progress_bar
from hf_embed.safe_files import writing
from hf_embed.tempscale import fold_tempscale, tempscale
from hf_embed.tempscale.fold import folded

TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
STEP = 0.05  # on either side of the best of these


def halves(texts: Iterable[str], least: int = 20) -> Retrieval:
    """Make a retrieval set without labels: the first half of each text looks for the second.

    Raises:
        InputError: fewer than two texts have `least` words.
    """
    words = [text.split() for text in dict.fromkeys(texts)]
    words = [text for text in words if len(text) >= least]
    if len(words) < 2:
        raise InputError(f"{len(words)} text(s) of {least} words or more; their halves are to be told apart: give more texts")
    return pairs_to_retrieval([(" ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])) for text in words])


def document_words(task: Retrieval) -> np.ndarray:
    """Return the words of each query's relevant document, the mean where there are several: (Q,)."""
    words = {document: len(text.split()) for document, text in task.corpus.items()}
    found = [[words[d] for d, grade in judged.items() if grade > 0 and d in words] for judged in task.qrels.values()]
    return np.array([np.mean(counts or [0]) for counts in found])  # none of them may be in the corpus


def thirds(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the queries in the shortest, the middle and the longest third of lengths (Q,)."""
    return np.array_split(np.argsort(lengths, kind="stable"), 3)


def part_scores(task: Task, embed: Embed, parts: int) -> np.ndarray:
    """Return the task's main metric on parts of its queries: (1 + 2P + 3,).

    They are all queries, all but those of part 1 to P, those of part 1 to P, and of a retrieval set the `thirds` by length of
    the relevant document (NaN of an STS set). The metric is nDCG@10 x 100 of a retrieval set, Spearman x 100 of an STS set.

    Raises:
        InputError: a task of another kind, too few queries, or cosines that have no order.
    """
    if isinstance(task, Retrieval):
        values = np.array([100 * metrics["ndcg@10"] for metrics in task.per_query(embed)])
        has_order = bool(np.isfinite(values).all())

        def metric(chosen: np.ndarray) -> float:
            return values[chosen].mean()
    elif isinstance(task, STS):
        values, scores = task.cosines(embed), np.array(task.rows["score"][:])
        has_order = ordered(values[None])

        def metric(chosen: np.ndarray) -> float:
            return 100 * spearman(values[chosen], scores[chosen])
    else:
        raise InputError(f"a temperature is chosen on retrieval or STS sets, not on {task.kind}")
    if not has_order:
        raise InputError(f"nothing to choose a temperature by: {NO_ORDER}")
    if len(values) < 2 * parts:
        raise InputError(f"{len(values)} queries are too few for {parts} folds; give more, or fewer --folds")
    part_of = np.random.default_rng(0).permutation(len(values)) % parts  # (Q,)
    everything = np.ones(len(values), bool)
    others, own = [part_of != part for part in range(parts)], [part_of == part for part in range(parts)]
    found = np.array([metric(chosen) for chosen in [everything, *others, *own]])
    if not np.isfinite(found).all():
        raise InputError(f"{len(values)} pairs in {parts} folds leave one with equal scores only; give more, or fewer --folds")
    by_length = [metric(third) for third in thirds(document_words(task))] if isinstance(task, Retrieval) else [np.nan] * 3
    return np.append(found, by_length)


def sweep(
    model: nn.Module,
    embed: Embed,
    tasks: Mapping[str, Task],
    temperatures: Iterable[float] = TEMPERATURES,
    parts: int = 5,
) -> dict[str, Any]:
    """Score `tasks` at `temperatures`, at 1, and, if several are given, at two more around the best.

    Args:
        model: what `embed` embeds with.
        embed: a function from texts to vectors. Every temperature costs one encoding of the texts.
        tasks: STS and retrieval sets by name.
        temperatures: to try.
        parts: of the cross-validation.

    Returns:
        The temperature that is best on all queries, and what it gains:

            {"temperature": 0.8, "curve": [{"temperature": 0.6, "mine": 39.0, "mean": 39.0}, ...],
             "gain": 1.3,                    of the best temperature against 1, mean over tasks, on the queries that chose it
             "cross_validated_gain": 1.2,    on queries that did not
             "fold_temperatures": [0.8, 0.8, 0.75, 0.8, 0.8],     chosen on all queries but those of a part
             "by_length": [{"set": "mine", "words": [12, 80], "queries": 40, "before": 38.0, "after": 38.1}, ...]}
    """
    scores: dict[float, np.ndarray] = {}  # (tasks, 1 + 2P + 3) at each temperature

    def visit(wanted: Iterable[float]) -> None:
        for temperature in progress_bar(sorted({round(t, 4) for t in wanted} - scores.keys()), desc="Temperatures"):
            with tempscale(model, temperature):
                scores[temperature] = np.stack([part_scores(task, embed, parts) for task in tasks.values()])

    temperatures = list(temperatures)
    visit([*temperatures, 1.0])
    if len(temperatures) > 1:
        best = best_of({temperature: found[:, 0].mean() for temperature, found in scores.items()})
        visit(temperature for temperature in (best - STEP, best + STEP) if temperature > 0)
    result = summarise(scores, list(tasks), parts)
    return result | {"by_length": length_rows(tasks, scores[1.0], scores[result["temperature"]])}


def length_rows(tasks: Mapping[str, Task], before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Return a row for each third of each retrieval set, of the scores (tasks, 1 + 2P + 3) at temperature 1 and at the best."""
    rows = []
    for (name, task), old, new in zip(tasks.items(), before, after):
        if isinstance(task, Retrieval):
            words = document_words(task)
            for third, *scores in zip(thirds(words), old[-3:], new[-3:]):
                ends = [round(float(words[third].min())), round(float(words[third].max()))]
                row = {"set": name, "words": ends, "queries": len(third)}
                rows.append(row | dict(zip(("before", "after"), map(float, scores))))
    return rows


def summarise(scores: dict[float, np.ndarray], names: list[str], parts: int) -> dict[str, Any]:
    """Return what `sweep` returns but for the rows by length, of the scores (tasks, 1 + 2P + 3) at each temperature."""
    mean = {temperature: found.mean(0) for temperature, found in scores.items()}  # (1 + 2P + 3,)
    best = best_of({temperature: found[0] for temperature, found in mean.items()})
    chosen, held_out = [], []
    for part in range(parts):
        others, own = 1 + part, 1 + parts + part  # the places of all queries but the part's, and of the part's
        chosen.append(best_of({temperature: found[others] for temperature, found in mean.items()}))
        held_out.append(mean[chosen[-1]][own] - mean[1.0][own])
    curve = []
    for temperature in sorted(scores):
        by_task = {name: float(found[0]) for name, found in zip(names, scores[temperature])}
        curve.append({"temperature": temperature} | by_task | {"mean": float(mean[temperature][0])})
    return {
        "temperature": best,
        "curve": curve,
        "gain": float(mean[best][0] - mean[1.0][0]),
        "cross_validated_gain": float(np.mean(held_out)),
        "fold_temperatures": chosen,
    }


def best_of(scores: Mapping[float, float]) -> float:
    """Return the temperature that scores best; of equals the one nearest to 1."""
    return max(scores, key=lambda temperature: (round(scores[temperature], 6), -abs(temperature - 1)))


def check_request(temperature: float | None, tasks: Mapping[str, Task], folder: Path, model: Path, overwrite: bool) -> None:
    """Check what is asked for, before anything is loaded.

    Raises:
        InputError: a temperature and data to find one; a folder that cannot be written, is the model's own, or holds files
            that may not be replaced.
    """
    if temperature is not None and tasks:
        raise InputError(f"--temperature {temperature:g} is taken as it is, and data for a search given; leave one of them out")
    check_folder(folder, "--output_dir")
    if folder.resolve() == model.resolve():
        raise InputError(f"--output_dir {folder} is the model's own folder; name another")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"--output_dir {folder} holds files; name another folder, or replace them by --overwrite_output_dir")


def check_foldable_at(encoder: Encoder, temperature: float) -> None:
    """Raise InputError for whatever stands in the way of saving: it is known before the search, not after."""
    with tempscale(encoder.backbone, temperature):
        folded(encoder.backbone)


def save_folded(encoder: Encoder, temperature: float, folder: Path, origin: str, result: dict[str, Any] | None = None) -> None:
    """Save an encoder with a temperature in its weights, and beside it the card, and what `sweep` returned.

    Of the results of the folder `origin`, where the model is from, how it was trained is kept: the scores are of the model as
    it was.
    """
    results = {"train": train} if (train := stored_results(origin).get("train")) else {}
    if temperature != 1:
        fold_tempscale(encoder.backbone, temperature)
    with renewed(folder, clear=True) as place:
        encoder.save_pretrained(str(place))
        store_results(place, results if result is None else results | {"tempscale": result})
        if result is not None:
            plot_sweep(result, place / "tempscale.png")
        write_card(encoder, place)


def plot_sweep(result: dict[str, Any], path: str | Path) -> None:
    """Plot the change against temperature 1, a line for each task, of what `sweep` returns."""
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
    with writing(path) as aside:
        figure.savefig(aside, dpi=125)
    plt.close(figure)
