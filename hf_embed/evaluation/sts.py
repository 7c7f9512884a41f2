"""Semantic textual similarity (STS): do cosines rank sentence pairs as people do?

The main metric is Spearman x 100 over all pairs of a dataset at once, the "all" aggregation of the SimCSE paper (appendix B).
In addition, alignment is computed over the positives, which are the pairs with scores in the top fifth of the scale, and
uniformity over all sentences.

Shapes: N different sentences, P pairs, embeddings of dimension D.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import EvalPrediction

from hf_embed.data.scores import check_label_names
from hf_embed.data.sources import cell_text, read_hub
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import alignment, cosines_of, ordered, uniformity
from hf_embed.evaluation.rows import is_number, read_layout
from hf_embed.evaluation.tasks import NO_ORDER, Embed, EvaluationTask, embed_once

logger = logging.getLogger(__name__)

COLUMNS = ["sentence1", "sentence2", "score"]
# The paper's seven tasks on the Hub (the copies of mteb, split "test").
SEVEN_TASKS = {
    "STS12": "mteb/sts12-sts",
    "STS13": "mteb/sts13-sts",
    "STS14": "mteb/sts14-sts",
    "STS15": "mteb/sts15-sts",
    "STS16": "mteb/sts16-sts",
    "STSB": "mteb/stsbenchmark-sts",
    "SICKR": "mteb/sickr-sts",
}


def spearman(cosines: np.ndarray, scores: np.ndarray) -> float:
    """Return the rank correlation of (P,) and (P,), -1 to 1. It is NaN, with a warning, if one of them cannot be ranked.

    Cosines that differ only by rounding errors cannot be ranked: scipy would correlate the rounding errors.
    """
    if not ordered(np.asarray(cosines)[None]):
        logger.warning(f"Spearman is NaN for {len(cosines)} pairs: {NO_ORDER}")
        return math.nan
    if np.ptp(scores) == 0:
        logger.warning(f"Spearman is NaN for {len(cosines)} pairs: all scores are {scores[0]:g}")
        return math.nan
    return float(spearmanr(cosines, scores).statistic)


def read_sts(path: str) -> Dataset:
    """Read an STS set with the columns score, sentence1, sentence2 from a file or the Hub; see `read_layout`.

    A file without a header may have further columns, which are not used.
    """
    names = ["score", "sentence1", "sentence2"]
    rows, named = read_layout(path, [names], further=True)
    score, *others = rows.column_names
    if not named and not is_number(first := rows[0][score]):
        raise InputError(
            f"{path}: the first row does not name score, sentence1 and sentence2, so the first column should hold the "
            f"scores, but it begins with {first!r}; add a header with these names"
        )
    if not named and (numbers := [i for i, column in enumerate(others, 2) if all(map(is_number, rows[column][:]))]):
        raise InputError(
            f"{path}: the columns of a file without a header are score, sentence1 and sentence2, but column {numbers[0]} "
            "holds only numbers too; remove a column of row numbers, or add a header with these names"
        )
    used = rows.column_names[: len(names)]
    return check_sts(rows.select_columns(used).rename_columns(dict(zip(used, names))), path)


def check_sts(rows: Dataset, name: str) -> Dataset:
    """Return `rows` with their scores as floats. `name` is the name of the rows in messages.

    Raises:
        InputError: if a column is missing, a score is not a finite number, a sentence is empty or not a text, all scores are
            equal, or there are fewer than two rows.
    """
    if missing := [c for c in COLUMNS if c not in rows.column_names]:
        raise InputError(
            f"{name}: there is no column {', '.join(missing)}; found {', '.join(rows.column_names)}; "
            "an STS dataset has sentence1, sentence2 and score; rename the columns"
        )
    check_label_names(rows, "score", name)
    rows = rows[:]
    for i, (first, second, score) in enumerate(zip(rows["sentence1"], rows["sentence2"], rows["score"]), 1):
        if not is_number(score) or not math.isfinite(float(score)):
            raise InputError(f"{name}, row {i}: the score is {score!r}, not a number; correct it or delete the row")
        for column, text in (("sentence1", first), ("sentence2", second)):
            cell_text(text, f"{name}, row {i}, column '{column}'")
    scores = list(map(float, rows["score"]))
    if len(scores) < 2:
        raise InputError(f"{name}: there are {len(scores)} row(s), but a rank correlation needs at least 2; give more rows")
    if min(scores) == max(scores):
        raise InputError(f"{name}: all scores are {scores[0]:g}, so they give no ranking; give rows with different scores")
    return Dataset.from_dict({"sentence1": rows["sentence1"], "sentence2": rows["sentence2"], "score": scores})


def seven_tasks() -> dict[str, "STS"]:
    """Read the seven STS tasks of the SimCSE paper from the Hub."""
    return {name: STS(check_sts(read_hub(hub, split="test"), hub)) for name, hub in SEVEN_TASKS.items()}


@dataclass
class STS(EvaluationTask):
    """Sentence pairs with scores.

    Args:
        rows: rows in the form that `check_sts` returns.
        compute_metrics: a function that returns further metrics by name. It gets an `EvalPrediction` with the cosines of the
            pairs as `predictions` and their scores as `label_ids`, (P,) each.
    """

    rows: Dataset
    compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None
    named: tuple[str, ...] = field(default=(), init=False)  # the metrics that `compute_metrics` returned in the last evaluation

    kind = "sts"
    main = "spearman"
    reported = ("spearman", "alignment", "uniformity")

    @property
    def logged(self) -> Sequence[str]:
        """The reported metrics, and those of `compute_metrics`, whose names are known after the first evaluation."""
        return (*self.reported, *self.named)

    def further(self, cosines: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """Return the metrics of `compute_metrics`.

        Raises:
            InputError: if one of them has the name of a reported metric.
        """
        if self.compute_metrics is None:
            return {}
        found = {str(name): float(value) for name, value in self.compute_metrics(EvalPrediction(cosines, scores)).items()}
        if taken := set(found) & set(self.reported):
            raise InputError(f"compute_metrics returns '{min(taken)}', which is already a metric; give it another name")
        self.named = tuple(found)
        return found

    def score(self, embed: Embed) -> dict[str, float]:
        """Return Spearman x 100, alignment and uniformity, and the metrics of `compute_metrics`."""
        vectors, first, second = self.vectors(embed)
        scores = np.array(self.rows["score"][:])
        cosines = cosines_of(first, second)
        positive = scores >= scores.max() - (scores.max() - scores.min()) / 5
        return {
            "spearman": 100 * spearman(cosines, scores),
            "alignment": alignment(first[positive], second[positive]),
            "uniformity": uniformity(vectors),
            **self.further(cosines, scores),
        }

    def cosines(self, embed: Embed) -> np.ndarray:
        """Return the cosines of the pairs, (P,)."""
        _, first, second = self.vectors(embed)
        return cosines_of(first, second)

    def vectors(self, embed: Embed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return normalized embeddings of the different sentences (N, D), and of the pairs' first and second ones (P, D)."""
        rows = self.rows[:]  # columns as lists, because iterating over a Dataset column formats each row separately
        texts = list(dict.fromkeys(rows["sentence1"] + rows["sentence2"]))
        vectors = embed_once(texts, embed)
        return vectors(texts), vectors(rows["sentence1"]), vectors(rows["sentence2"])
