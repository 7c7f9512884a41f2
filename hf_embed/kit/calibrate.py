"""The search for the attention temperature that suits a model and its texts, with a cross-validated estimate of the gain.

The best of eight temperatures is the best partly by luck, so its score is too optimistic. The gain is therefore
cross-validated. The queries are divided into parts. Each part is scored at the temperature that is best on the other parts,
and this score is compared with the score of the same part at temperature 1. (The search also tries the two temperatures next to
the one that is best on all queries. The temperature for a part may be one of these two, or any other.)

Without labels, the first half of each text is a query, and its second half is the relevant document. (The geometry of the
embeddings alone is not a reliable guide: docs/results/tempscale.md describes a model whose retrieval score gains two points
while its embeddings move slightly closer together.)

The gain may come from long documents alone. For retrieval sets, the scores are therefore also reported for thirds of the
queries: those with the shortest relevant documents, those with medium ones, and those with the longest.

Shapes: P parts of the cross-validation, Q queries of a retrieval set or pairs of an STS set.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_embed.checkpoint.card import read_results, write_card, write_results
from hf_embed.checkpoint.save import renewed
from hf_embed.checkpoint.tables import swept_columns
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval
from hf_embed.evaluation.sts import STS, spearman
from hf_embed.evaluation.tasks import NO_ORDER, Embed, Task
from hf_embed.files.disk import check_folder
from hf_embed.files.safe_files import writing
from hf_embed.progress import progress_bar
from hf_embed.tempscale import TempScaleConfig, fold_tempscale, tempscale
from hf_embed.tempscale.fold import folded

TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
FOLDS = 5
MAX_TEXTS = 1000
STEP = 0.05  # distance of the two additional temperatures from the best of these


def halves(texts: Iterable[str], least: int = 20) -> Retrieval:
    """Make a retrieval set without labels: the first half of each text is a query, the second half its document.

    Raises:
        InputError: if fewer than two different texts have `least` words or more.
    """
    words = [text.split() for text in dict.fromkeys(texts)]
    words = [text for text in words if len(text) >= least]
    if len(words) < 2:
        raise InputError(f"only {len(words)} text(s) have {least} words or more, and at least 2 are needed; give more texts")
    return pairs_to_retrieval([(" ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])) for text in words])


def document_words(task: Retrieval) -> np.ndarray:
    """Count the words of each query's relevant document, (Q,). For several documents, return the mean."""
    words = {document: len(text.split()) for document, text in task.corpus.items()}
    found = [[words[d] for d, grade in judged.items() if grade > 0 and d in words] for judged in task.qrels.values()]
    return np.array([np.mean(counts or [0]) for counts in found])  # 0 if the corpus holds none of the relevant documents


def thirds(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the queries in the shortest, the middle and the longest third of `lengths` (Q,)."""
    return np.array_split(np.argsort(lengths, kind="stable"), 3)


def part_scores(task: Task, embed: Embed, parts: int) -> np.ndarray:
    """Return the task's main metric on groups of its queries: (1 + 2P + 3,).

        1    all queries
        P    for each part: all queries except those of the part
        P    for each part: the queries of the part
        3    for a retrieval set: the `thirds` of the queries by the length of the relevant document; for an STS set: NaN

    The metric is nDCG@10 x 100 for a retrieval set, and Spearman x 100 for an STS set.

    Raises:
        InputError: if the task is of another kind, if it has too few queries for `parts` parts, if its cosine similarities
            define no order, or if all pairs of a part have the same score.
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
        raise InputError(f"a temperature can be chosen on retrieval or STS sets only, not on {task.kind}; remove this set")
    if not has_order:
        raise InputError(f"a temperature cannot be chosen: {NO_ORDER}")
    if len(values) < 2 * parts:
        raise InputError(f"{len(values)} queries are too few for {parts} folds; give more, or a smaller --folds")
    part_of = np.random.default_rng(0).permutation(len(values)) % parts  # (Q,)
    everything = np.ones(len(values), bool)
    others, own = [part_of != part for part in range(parts)], [part_of == part for part in range(parts)]
    found = np.array([metric(chosen) for chosen in [everything, *others, *own]])
    if not np.isfinite(found).all():
        raise InputError(
            f"with {len(values)} pairs and {parts} folds, all pairs of one fold have the same score; give more pairs, or a "
            "smaller --folds"
        )
    by_length = [metric(third) for third in thirds(document_words(task))] if isinstance(task, Retrieval) else [np.nan] * 3
    return np.append(found, by_length)


def sweep(
    model: nn.Module,
    embed: Embed,
    tasks: Mapping[str, Task],
    temperatures: Iterable[float] = TEMPERATURES,
    parts: int = FOLDS,
) -> dict[str, Any]:
    """Find the temperature at which the model scores best on `tasks`.

    The model is scored at each of `temperatures` and at 1. If several temperatures are given, it is also scored at two more:
    `STEP` below and `STEP` above the best one.

    Args:
        model: the model that `embed` uses.
        embed: a function from texts to vectors. At every temperature, it encodes all texts once.
        tasks: STS and retrieval sets by name.
        temperatures: the temperatures to try.
        parts: the number of parts of the cross-validation.

    Returns:
        The temperature that is best on all queries, and what it gains:

            {"temperature": 0.8, "curve": [{"temperature": 0.6, "mine": 39.0, "mean": 39.0}, ...],
             "gain": 1.3,                    from temperature 1 to the best, mean over tasks, on the queries that chose the best
             "cross_validated_gain": 1.2,    the same gain on queries that did not choose the temperature
             "fold_temperatures": [0.8, 0.8, 0.75, 0.8, 0.8],     for each part: the best on all queries except the part's
             "by_length": [{"set": "mine", "words": [12, 80], "queries": 40, "before": 38.0, "after": 38.1}, ...]}
    """
    scores: dict[float, np.ndarray] = {}  # for each temperature: (tasks, 1 + 2P + 3)

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
    """Return a row for each third of each retrieval set.

    Args:
        tasks: the tasks by name; STS sets have no rows.
        before: the scores at temperature 1, (tasks, 1 + 2P + 3).
        after: the scores at the best temperature, (tasks, 1 + 2P + 3).
    """
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
    """Return the result of `sweep` without "by_length".

    Args:
        scores: for each temperature, the scores (tasks, 1 + 2P + 3).
        names: the names of the tasks.
        parts: the number of parts, P.
    """
    mean = {temperature: found.mean(0) for temperature, found in scores.items()}  # (1 + 2P + 3,)
    best = best_of({temperature: found[0] for temperature, found in mean.items()})
    chosen, held_out = [], []
    for part in range(parts):
        others, own = 1 + part, 1 + parts + part  # columns: all queries except the part's, and the part's
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
    """Return the temperature with the best score. If several have the same score, return the one nearest to 1."""
    return max(scores, key=lambda temperature: (round(scores[temperature], 6), -abs(temperature - 1)))


def check_temperatures(temperature: float | None, grid: Sequence[float], folds: int) -> None:
    """Raise InputError if a temperature is not possible, or if a temperature is given together with flags of the search."""
    for wanted in grid if temperature is None else [temperature]:
        TempScaleConfig(wanted)
    for flag, changed in {"grid": tuple(grid) != TEMPERATURES, "folds": folds != FOLDS}.items():
        if changed and temperature is not None:
            raise InputError(f"--{flag} has no effect with --temperature, which needs no search; remove one of them")


def check_max_texts(most: int, texts: str | None, needed: bool) -> None:
    """Raise InputError if --max_texts is given, but neither --texts nor the built-in texts, which may be `needed`, are read."""
    if most != MAX_TEXTS and texts is None and not needed:
        raise InputError("--max_texts has no effect without --texts if there is other data or a temperature; remove it")


def check_request(temperature: float | None, tasks: Mapping[str, Task], folder: Path, model: Path, overwrite: bool) -> None:
    """Check the user's flags before anything is loaded.

    Args:
        temperature: the temperature that the user gave, or None to search for one.
        tasks: the tasks for the search.
        folder: the output folder.
        model: the folder of the model.
        overwrite: files in the output folder may be replaced.

    Raises:
        InputError: if both a temperature and data for a search are given, if a set has the name of another column of the
            results, or if the output folder cannot be written, is the model's own folder, or holds files that may not be
            replaced.
    """
    if temperature is not None and tasks:
        raise InputError(f"--temperature {temperature:g} needs no search, but data for a search is given; remove one of them")
    if taken := sorted(tasks.keys() & {"temperature", "mean"}):
        raise InputError(f"evaluation set '{taken[0]}': another column of the results has this name; rename the evaluation set")
    check_folder_to_fill(folder, [str(model)], overwrite)


def check_folder_to_fill(folder: Path, models: Iterable[str], overwrite: bool) -> None:
    """Check the output folder of a recipe that makes a model from other models.

    Args:
        folder: the output folder.
        models: the folders or names of the models.
        overwrite: files in the output folder may be replaced.

    Raises:
        InputError: if the folder cannot be written, is the folder of one of the models, or holds files that may not be
            replaced.
    """
    check_folder(folder, "--output_dir")
    if any(folder.resolve() == Path(model).resolve() for model in models):
        raise InputError(f"--output_dir {folder} is the model's own folder; give another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"--output_dir {folder} holds files; give another folder, or replace them with --overwrite_output_dir")


def check_foldable_at(encoder: Encoder, temperature: float) -> None:
    """Raise InputError if a temperature cannot be folded into the weights. The check runs before the slow search."""
    with tempscale(encoder.backbone, temperature):
        folded(encoder.backbone)


def save_folded(encoder: Encoder, temperature: float, folder: Path, origin: str, result: dict[str, Any] | None = None) -> None:
    """Fold a temperature into the weights of an encoder, and save the encoder with its card and the result of `sweep`.

    Of the results in the folder `origin`, from which the model was loaded, only the record of the training is kept. The scores
    there belong to the model without the temperature.
    """
    results = {"train": train} if (train := read_results(origin).get("train")) else {}
    if temperature != 1:
        fold_tempscale(encoder.backbone, temperature)
    with renewed(folder, clear=True) as place:
        encoder.save_pretrained(str(place))
        write_results(place, results if result is None else results | {"tempscale": result})
        if result is not None:
            plot_sweep(result, place / "tempscale.png")
        write_card(encoder, place)


def plot_sweep(result: dict[str, Any], path: str | Path) -> None:
    """Plot the result of `sweep`: the change of the score against temperature 1, with one line for each task."""
    from matplotlib.figure import Figure

    temperatures = [row["temperature"] for row in result["curve"]]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    names = swept_columns(result)
    for name, style in zip(names, ["-", "--", ":", "-."] * len(names)):
        scores = [row[name] for row in result["curve"]]
        change = np.array(scores) - scores[temperatures.index(1.0)]
        axes.plot(temperatures, change, marker="o", linestyle=style, linewidth=2.5 if name == "mean" else 1.2, label=name)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.axvline(result["temperature"], color="0.7", linewidth=1, label=f"chosen: {result['temperature']:g}")
    axes.set_xlabel("attention temperature")
    axes.set_ylabel("change in nDCG@10 or Spearman, x 100")
    axes.set_title("TempScale: change of the score against temperature 1")
    axes.legend()
    with writing(path) as aside:
        figure.savefig(aside, dpi=125)
