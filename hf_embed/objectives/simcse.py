"""SimCSE: Simple Contrastive Learning of Sentence Embeddings (https://arxiv.org/abs/2104.08821).

Shapes: B own rows, N rows of all ranks, V texts a row (anchor, positive, then V - 2 negatives), D wide.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.objectives.masking import false_negatives
from hf_embed.ranges import FINITE, POSITIVE, Range, check_ranges


@dataclass
class SimCSE:
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
            rows with two positives keeps the loss above 0 on perfect embeddings.

    Raises:
        InputError: a number out of range.
    """

    temperature: float = field(default=0.05, metadata={"help": "Softmax temperature of the loss."})
    hard_negative_weight: float = field(default=0.0, metadata={"help": "Logit added to a row's own hard negatives."})
    mlm_weight: float = field(default=0.0, metadata={"help": "Weight of the masked-language-modelling auxiliary."})
    mask_other_positives: bool = field(
        default=True,
        metadata={"help": "Other positives of the same anchor are no negatives. False is the paper's form of the loss."},
    )

    def __post_init__(self):
        check_ranges(self, {"temperature": POSITIVE, "hard_negative_weight": FINITE, "mlm_weight": Range(least=0)})

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Mean loss of the own rows, a scalar.

        Args:
            embeddings: (B, V, D) of the own rows.
            text_ids: (B, V) hash of each text; 0 where a row has fewer than V - 2 negatives.
            all_embeddings, all_text_ids: the same for all ranks' rows, (N, V, D) and (N, V); default: the own.
            first_row: number of the first own row among all rows.
        """
        if all_embeddings is None:
            all_embeddings, all_text_ids = embeddings, text_ids
        rows, views, _ = embeddings.shape
        own = torch.arange(rows, device=embeddings.device)

        anchors = F.normalize(embeddings[:, 0], dim=-1)  # (B, D)
        # Candidates: all positives, then all first negatives, then all second negatives ...
        candidates = F.normalize(all_embeddings[:, 1:].transpose(0, 1).flatten(0, 1), dim=-1)  # ((V - 1) * N, D)
        logits = anchors @ candidates.T / self.temperature  # (B, (V - 1) * N)

        labels = first_row + own
        if self.hard_negative_weight:
            weight = torch.zeros_like(logits)
            for view in range(1, views - 1):
                weight[own, view * len(all_embeddings) + labels] = self.hard_negative_weight
            logits = logits + weight
        candidate_ids = all_text_ids[:, 1:].T.flatten()
        partner_ids = None
        if self.mask_other_positives:
            partner_ids = torch.zeros_like(candidate_ids)  # negatives have no partner
            partner_ids[: len(all_text_ids)] = all_text_ids[:, 0]
        logits = logits.masked_fill(false_negatives(text_ids, candidate_ids, labels, partner_ids), float("-inf"))
        return F.cross_entropy(logits, labels)
