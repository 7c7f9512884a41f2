"""SimCSE: Simple Contrastive Learning of Sentence Embeddings (https://arxiv.org/abs/2104.08821).

Shapes: B own rows, N rows of all ranks, V texts a row (anchor, positive, then V - 2 negatives), D wide.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import ContrastiveObjective
from hf_embed.objectives.masking import false_negatives
from hf_embed.ranges import FINITE, POSITIVE, Range, check_ranges


@dataclass
class SimCSE(ContrastiveObjective):
    """In-batch contrastive loss on cosine similarities, equations 1 (unsupervised), 4 and 5 (hard negatives).

    Each anchor has to find its positive among the positives and hard negatives of all rows:

        loss_i = - log  e^{s(a_i, p_i) / t} / ( sum_j e^{s(a_i, p_j) / t} + sum_{j,k} w_ij e^{s(a_i, n_jk) / t} )

    Args:
        temperature: t, 0.05 in the paper.
        hard_negative_weight: a logit added to the row's own hard negatives: w_ii = e^weight, w_ij = 1 otherwise
            (appendix of the paper; its code's `hard_negative_weight`).
        mlm_weight: weight of the masked-language-modelling auxiliary (section 3.3; 0.1 in the paper). The trainer adds it.
        mask_other_positives: leave out of row i's denominator the positives of other rows with the same anchor, and of rows
            whose anchor is row i's positive: they are right answers too. False is the paper's form, in which one anchor in two
            rows with two positives keeps the loss above 0 on perfect embeddings. Where the data gives a row several positives
            (`other_ids`), these are left out wherever they stand, as a hard negative of another row too.

    Raises:
        InputError: a number out of range.
    """

    equation: ClassVar[str] = "loss_i = -log e^(cos(h_i, h_i+) / t) / sum_j [ e^(cos(h_i, h_j+) / t) + e^(cos(h_i, h_j-) / t) ]"
    paper: ClassVar[str] = (
        "Gao, Yao, Chen: SimCSE: Simple Contrastive Learning of Sentence Embeddings, https://arxiv.org/abs/2104.08821"
    )

    temperature: float = field(default=0.05, metadata={"help": "Softmax temperature of the loss."})
    hard_negative_weight: float = field(default=0.0, metadata={"help": "Logit added to a row's own hard negatives."})
    mlm_weight: float = field(default=0.0, metadata={"help": "Weight of the masked-language-modelling auxiliary."})
    mask_other_positives: bool = field(
        default=True,
        metadata={"help": "Other positives of the same anchor are no negatives. False is the paper's form of the loss."},
    )

    def __post_init__(self) -> None:
        check_ranges(self, {"temperature": POSITIVE, "hard_negative_weight": FINITE, "mlm_weight": Range(least=0)})

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse a weight of hard negatives where no row has one."""
        if self.hard_negative_weight and texts_per_row < 3:
            raise InputError(f"{name}: hard_negative_weight is set, but no row has a negative; leave it out")

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
        other_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar; see `hf_embed.objectives.base.Objective`."""
        if all_embeddings is None or all_text_ids is None:
            all_embeddings, all_text_ids = embeddings, text_ids
        own_rows = torch.arange(len(embeddings), device=embeddings.device)  # numbered among the own
        labels = first_row + own_rows  # each row's positive among the candidates

        anchors = F.normalize(embeddings[:, 0], dim=-1)  # (B, D)
        # Candidates: all positives, then all first negatives, then all second negatives ...
        candidates = F.normalize(by_view(all_embeddings[:, 1:]), dim=-1)  # ((V - 1) * N, D)
        logits = anchors @ candidates.T / (self.temperature if temperature is None else temperature)  # (B, (V - 1) * N)
        if self.hard_negative_weight:
            weights = torch.zeros_like(logits)
            for negative in range(1, all_embeddings.shape[1] - 1):
                weights[own_rows, negative * len(all_embeddings) + labels] = self.hard_negative_weight
            logits = logits + weights

        partners = others = None
        if self.mask_other_positives:
            others = None if other_ids is None else other_ids[first_row : first_row + len(embeddings)]
            partners = torch.zeros_like(all_text_ids[:, 1:])  # negatives have no partner
            partners[:, 0] = all_text_ids[:, 0]
            partners = by_view(partners)
        dropped = false_negatives(text_ids, by_view(all_text_ids[:, 1:]), labels, partners, other_ids=others)
        return F.cross_entropy(logits.masked_fill(dropped, float("-inf")), labels)


def by_view(rows: Tensor) -> Tensor:
    """Flatten (N, V, ...) to (V * N, ...): the first of all rows, then the second of all rows, and so on."""
    return rows.transpose(0, 1).flatten(0, 1)
