"""CoSENT: learn from pairs with scores (Su, https://kexue.fm/archives/8847).

Shapes: B rows of this rank ("own rows"), N rows of all ranks, D numbers per embedding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import Batch, Objective
from hf_embed.objectives.tiles import by_tiles
from hf_embed.ranges import ABOVE_ZERO, check_ranges, setting


@dataclass
class CoSENT(Objective):
    """The CoSENT loss: a pair with a higher score should have a higher cosine similarity than a pair with a lower score.

        loss = log [ 1 + sum_{(i, j): y_i > y_j} e^{(s_j - s_i) / t} ]        s_i: cosine of pair i, y_i: its score

    The scores are only compared with each other, so their scale does not matter: 0 to 1, or 0 to 5. Pairs with equal scores
    are not compared. If all scores of a batch are equal, the loss and its gradient are 0.

    The loss compares the pairs of all ranks, so it is the same number on every rank. Example: three pairs with the
    scores 5, 1 and 1 and the cosines 0.8, 0.9 and 0.2. The sum has the terms (i, j) = (1, 2) and (1, 3), so with t = 0.05

        loss = log [ 1 + e^{(0.9 - 0.8) / 0.05} + e^{(0.2 - 0.8) / 0.05} ] = log [ 1 + 7.389 + 0.000 ] = 2.127

    Args:
        temperature: t. The default 0.05 is a scale of 20, as in the author's code and in sentence-transformers.

    Raises:
        InputError: if the temperature is not above 0.
    """

    equation: ClassVar[str] = "loss = log [ 1 + sum_(i, j with y_i > y_j) e^((cos_j - cos_i) / t) ]"
    paper: ClassVar[str] = "Su: CoSENT, https://kexue.fm/archives/8847"
    needs = ("scores",)  # of each pair

    temperature: float = setting(0.05, "Temperature that the cosine similarities are divided by.")

    def __post_init__(self) -> None:
        check_ranges(self, {"temperature": ABOVE_ZERO})

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse rows with negatives, because a score belongs to a pair.

        Raises:
            InputError: if a row has more than two texts.
        """
        if texts_per_row > 2:
            raise InputError(f"{name}: CoSENT trains on pairs with one score each, and some rows have negatives; remove them")

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the loss of the pairs of all ranks, a scalar."""
        scores = batch.needed["scores"]  # (N, 1)
        pairs = F.normalize(batch.all_embeddings, dim=-1)  # (N, 2, D)
        cosines = (pairs[:, 0] * pairs[:, 1]).sum(-1)  # (N,)
        lowest = torch.finfo(cosines.dtype).min

        def row_terms(rows: slice) -> Tensor:
            """Return the log of the sum of the terms of each of the T pairs i of a tile, (T,)."""
            higher = scores[rows, :1] > scores[:, 0]  # (T, N): entry (i, j) is True if pair i has a higher score than pair j
            differences = (cosines - cosines[rows].unsqueeze(1)) / batch.temperature
            return differences.masked_fill(~higher, lowest).logsumexp(1)

        terms = by_tiles(row_terms, len(cosines), len(cosines))
        return torch.cat([terms.new_zeros(1), terms]).logsumexp(0)
