"""Pair classification: are the cosines of pairs that belong together higher than the cosines of other pairs?

Shapes: P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_embed.data.known_columns import ALIKE, LABELS
from hf_embed.data.scores import check_label_names
from hf_embed.data.sources import cell_text, plain_rows
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.ranking import average_precision, best_thresholds
from hf_embed.evaluation.rows import as_list, label_number, read_layout, text_lists
from hf_embed.evaluation.tasks import Embed, EvaluationTask, embed_once, pair_cosines, unranked

# Plain names of the columns: those of labeled training pairs, and one more pair of names.
LAYOUTS = [(label, *pair) for pair in [("sentence1", "sentence2"), *ALIKE, ("sent1", "sent2")] for label in LABELS]


@dataclass
class PairClassification(EvaluationTask):
    """Pairs of texts with labels for whether they belong together, like sentence-transformers' BinaryClassificationEvaluator.

    Args:
        sentences1, sentences2: P texts each; encoded without a prompt, or with the default prompt of the model if it has one.
        labels: P labels; 1 or True for a pair that belongs together, 0 or False for any other pair.

    Raises:
        InputError: if the lists differ in length, a text is empty, a label has another value, or all labels are equal.
    """

    sentences1: Sequence[str]
    sentences2: Sequence[str]
    labels: Sequence[int | bool]

    kind = "pair_classification"
    main = "pair_ap"
    reported = ("pair_ap", "pair_accuracy", "pair_accuracy_threshold", "pair_f1", "pair_f1_threshold")

    def __post_init__(self) -> None:
        lists = {
            "sentences1": self.sentences1,
            "sentences2": self.sentences2,
            "labels": list(map(str, as_list(self.labels, "PairClassification: labels"))),
        }
        self.sentences1, self.sentences2, labels = text_lists(lists, "PairClassification")
        self.labels = label_numbers(labels, "PairClassification")

    def score(self, embed: Embed) -> dict[str, float]:
        """Return the average precision of `embed` (pair_ap), and the best pair_accuracy and pair_f1 with their thresholds.

        All metrics but the thresholds are x 100. A threshold is a cosine, from -1 to 1. Pairs with this cosine or a higher one
        are predicted to belong together. All metrics are NaN, with a warning, if all cosines are equal or one is not finite.
        """
        vectors = embed_once([*self.sentences1, *self.sentences2], embed)
        cosines, labels = pair_cosines(self.sentences1, self.sentences2, vectors, vectors), np.array(self.labels)
        if not ordered(cosines[None]):
            return unranked(self.reported, f"average precision is NaN for {len(cosines):,} pairs")
        best = best_thresholds(cosines, labels)
        return {
            "pair_ap": 100 * average_precision(cosines, labels),
            "pair_accuracy": 100 * best["accuracy"],
            "pair_accuracy_threshold": best["accuracy_threshold"],
            "pair_f1": 100 * best["f1"],
            "pair_f1_threshold": best["f1_threshold"],
        }


def label_numbers(labels: Sequence[object], name: str) -> list[int]:
    """Return labels as 0 and 1. Raise InputError if a label has another value, or if all labels are equal."""
    numbers = [label_number(label, f"{name}, row {i}") for i, label in enumerate(labels, 1)]
    if len(set(numbers)) < 2:
        raise InputError(
            f"{name}: all labels are {numbers[0]}; average precision needs pairs with label 0 and pairs with label 1"
        )
    return numbers


# ---- reading ----


def read_pair_classification(path: str) -> PairClassification:
    """Read pairs from a file or the Hub: label, sentence1 and sentence2 or similar names; see `rows.read_layout`.

    The three cells of a row may be lists. In older datasets of mteb, a single row holds all pairs this way.

    Raises:
        InputError: if a column is missing, a text is empty, a label is not 0 or 1, all labels are equal, or the name of label 0
            says that its pairs belong together.
    """
    rows, _ = read_layout(path, LAYOUTS)
    label, first, second = rows.column_names
    check_label_names(rows, label, path)
    pairs: list[tuple[str, str]] = []
    labels: list[int] = []
    for number, row in enumerate(plain_rows(rows, rows.column_names, path), 1):
        cells, where = [row[column] for column in rows.column_names], f"{path}, row {number}"
        lists = [len(cell) for cell in cells if isinstance(cell, list)]
        if lists and (len(lists) < 3 or len(set(lists)) > 1):
            raise InputError(f"{where}: {first}, {second} and {label} must be lists of the same length; correct the row")
        for place, (value, left, right) in enumerate(zip(*cells) if lists else [cells], 1):
            item = f"{where}, item {place}" if lists else where
            pairs.append((cell_text(left, f"{item}, column '{first}'"), cell_text(right, f"{item}, column '{second}'")))
            labels.append(label_number(value, f"{item}, column '{label}'"))
    if not pairs:
        raise InputError(f"{path}: there are no rows")
    label_numbers(labels, path)
    return PairClassification([left for left, _ in pairs], [right for _, right in pairs], labels)
