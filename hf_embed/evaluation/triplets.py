"""Triplets: is the anchor nearer to its positive than to its negative?

Shapes: T triplets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_embed.data.sources import FILL_IN
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.judged import judged_rows
from hf_embed.evaluation.rows import read_rows, text_lists
from hf_embed.evaluation.tasks import Embed, EvaluationTask, embed_once, pair_cosines, unranked


@dataclass
class Triplets(EvaluationTask):
    """Anchors, each with a near text and a distant text, like sentence-transformers' TripletEvaluator.

    Anchors are encoded with the model's prompt "query", the other texts with its prompt "document".

    Args:
        anchors, positives, negatives: T texts each.

    Raises:
        InputError: if the lists differ in length or are empty, or a text is empty.
    """

    anchors: Sequence[str]
    positives: Sequence[str]
    negatives: Sequence[str]

    kind = "triplet"
    main = "triplet_accuracy"
    reported = ("triplet_accuracy",)

    def __post_init__(self) -> None:
        lists = {"anchors": self.anchors, "positives": self.positives, "negatives": self.negatives}
        self.anchors, self.positives, self.negatives = text_lists(lists, "Triplets")

    def score(self, embed: Embed) -> dict[str, float]:
        """Return triplet_accuracy of `embed` x 100: the share of triplets whose positive has a higher cosine than the negative.

        A triplet with two equal cosines counts as wrong. The metric is NaN, with a warning, if the two cosines are equal in all
        triplets, or a cosine is not finite.
        """
        anchors = embed_once(self.anchors, embed, "query")
        documents = embed_once([*self.positives, *self.negatives], embed, "document")
        right, wrong = (pair_cosines(self.anchors, texts, anchors, documents) for texts in (self.positives, self.negatives))
        if not ordered(np.stack([right, wrong], axis=1)):
            return unranked(self.reported, f"accuracy is NaN for {len(right):,} triplets")
        return {"triplet_accuracy": 100 * float((right > wrong).mean())}


def read_triplets(path: str) -> Triplets:
    """Read anchors, positives and negatives from a file or the Hub; see `hf_embed.evaluation.judged`.

    A row with several positives or negatives becomes one triplet for each combination of a positive and a negative.

    Raises:
        InputError: if a column is missing, or a row has no positive or no negative.
    """
    triplets = []
    for number, row in enumerate(judged_rows(read_rows(path), path), 1):
        for texts, what in ((row.positives, "positive"), (row.negatives, "negative")):
            if not texts:
                raise InputError(f"{path}, row {number}: there is no {what}; {FILL_IN}")
        triplets += [(row.query, right, wrong) for right in row.positives for wrong in row.negatives]
    anchors, positives, negatives = map(list, zip(*triplets))
    return Triplets(anchors, positives, negatives)
