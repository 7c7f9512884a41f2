"""SimCSE: Simple Contrastive Learning of Sentence Embeddings (https://arxiv.org/abs/2104.08821).

Shapes: B rows of this rank ("own rows"), N rows of all ranks, V texts per row (an anchor, a positive and V - 2 negatives), D
numbers per embedding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import GUIDE_HELP, Batch, Objective
from hf_embed.objectives.masking import false_negatives
from hf_embed.objectives.tiles import by_tiles
from hf_embed.ranges import ABOVE_ZERO, FINITE, Range, check_ranges, setting


@dataclass
class SimCSE(Objective):
    """The contrastive loss of SimCSE: cosine similarity with in-batch and hard negatives.

    Each anchor has to find its positive among the positives and hard negatives of all rows:

        loss_i = - log  e^{s(a_i, p_i) / t} / ( sum_j e^{s(a_i, p_j) / t} + sum_{j,k} w_ij e^{s(a_i, n_jk) / t} )

    Without hard negatives this is equation 1 of the paper, and equation 4 (unsupervised) if anchor and positive are the same
    text under two dropout masks. With hard negatives it is equation 5, and with their weight equation 8.

    The code deviates from the paper in two points:

    - The paper keeps false negatives. Here the denominator of row i leaves out texts equal to a_i or p_i, and further positives
      if `mask_other_positives` is set.
    - A row may have any number k of hard negatives, or none, where the paper has exactly one. The weight applies to each of
      them.

    Args:
        temperature: t, 0.05 in the paper.
        hard_negative_weight: a logit added to the row's own hard negatives, as in the released code: w_ii = e^weight and
            w_ij = 1 for j != i. In equation 8 (section 6.3) w_ii is called alpha; alpha = 1, a weight of 0, was best.
        mlm_weight: lambda, the weight of the auxiliary masked-language-modeling loss, which the trainer adds (appendix A of the
            paper, and table D.2, where 0.1 is best for transfer tasks).
        mask_other_positives: leave further correct answers out of the denominator of row i: positives of other rows with the
            same anchor, and of rows whose anchor is the positive of row i. False is the paper's form; then, if an anchor is in
            two rows with two positives, the loss stays above 0 even for perfect embeddings. If the data gives a row several
            positives (`other_ids`), these are left out wherever they occur, even as a hard negative of another row.
        guide_margin: leave out candidates that a teacher model scores above its score of the positive minus this margin. 0 is
            the rule of GISTEmbed (https://arxiv.org/abs/2402.16829), for the anchor and the candidates. None: no
            teacher.

    Raises:
        InputError: if a number is out of range.
    """

    equation: ClassVar[str] = "loss_i = -log e^(cos(h_i, h_i+) / t) / sum_j [ e^(cos(h_i, h_j+) / t) + e^(cos(h_i, h_j-) / t) ]"
    paper: ClassVar[str] = (
        "Gao, Yao, Chen: SimCSE: Simple Contrastive Learning of Sentence Embeddings, https://arxiv.org/abs/2104.08821"
    )

    temperature: float = setting(0.05, "Softmax temperature of the loss.")
    hard_negative_weight: float = setting(0.0, "Number added to the logits of own hard negatives.")
    mlm_weight: float = setting(0.0, "Weight of the masked-language-modeling loss.")
    mask_other_positives: bool = setting(
        True, "Do not use other positives of the same anchor as negatives. False is the paper's form of the loss."
    )
    guide_margin: float | None = setting(None, GUIDE_HELP)

    def __post_init__(self) -> None:
        ranges = {
            "temperature": ABOVE_ZERO,
            "hard_negative_weight": FINITE,
            "mlm_weight": Range(least=0),
            "guide_margin": FINITE,
        }
        check_ranges(self, ranges)

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse a weight of hard negatives if no row has a hard negative.

        Raises:
            InputError: if `hard_negative_weight` is set and the rows are pairs.
        """
        if self.hard_negative_weight and texts_per_row < 3:
            raise InputError(f"{name}: hard_negative_weight is set, but no row has a negative; remove it")

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar."""
        ids, teacher = batch.all_text_ids, batch.needed.get("teacher")
        labels = torch.arange(batch.own.start, batch.own.stop, device=ids.device)  # (B,) each positive among the candidates
        anchors = F.normalize(batch.embeddings[:, 0], dim=-1)  # (B, D)
        # Candidates: all positives, then all first negatives, and so on; with two rows of three texts p0 p1 n0 n1.
        candidates = F.normalize(by_view(batch.all_embeddings[:, 1:]), dim=-1)  # ((V - 1) * N, D)
        candidate_ids = by_view(ids[:, 1:])
        partners = None
        if self.mask_other_positives:
            partners = torch.zeros_like(ids[:, 1:])  # hard negatives have no partner
            partners[:, 0] = ids[:, 0]
            partners = by_view(partners)

        def losses(tile: slice) -> Tensor:
            """Return the losses of T of the own rows, (T,)."""
            places = labels[tile]
            rows = torch.arange(len(places), device=places.device)
            logits = anchors[tile] @ candidates.T / batch.temperature  # (T, (V - 1) * N)
            if self.hard_negative_weight:  # equation 8: a logit w multiplies the row's own terms by alpha = e^w
                views = torch.arange(1, ids.shape[1] - 1, device=places.device)
                own_negatives = rows.unsqueeze(1), places.unsqueeze(1) + len(ids) * views  # (T, 1) and (T, V - 2)
                logits = logits.index_put(own_negatives, logits.new_full((), self.hard_negative_weight), accumulate=True)
            judged = limit = others = None
            if self.guide_margin is not None and teacher is not None:
                judged = teacher[places, 0] @ by_view(teacher[:, 1:]).T  # (T, (V - 1) * N)
                limit = judged[rows, places] - self.guide_margin
            if self.mask_other_positives and batch.other_ids is not None:
                others = batch.other_ids[places]
            dropped = false_negatives(batch.text_ids[tile], candidate_ids, places, partners, judged, limit, others)
            # Equations 1, 4 and 5: minus the log of the positive's share in the softmax. A left-out candidate gets -inf.
            return F.cross_entropy(logits.masked_fill(dropped, float("-inf")), places, reduction="none")

        return by_tiles(losses, len(anchors), len(candidates)).mean()


def by_view(rows: Tensor) -> Tensor:
    """Flatten (N, V, ...) to (V * N, ...): the first text of all rows, then the second text of all rows, and so on."""
    return rows.transpose(0, 1).flatten(0, 1)
