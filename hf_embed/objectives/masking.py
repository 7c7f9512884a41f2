"""Candidates that are no negatives: absent, equal to the anchor or its positive, paired with one of them, or too close.

Shapes: B rows of V texts (anchor, positive, negatives), C candidates.
"""

import torch
from torch import Tensor


def false_negatives(
    text_ids: Tensor,
    candidate_ids: Tensor,
    positives: Tensor | None = None,
    partner_ids: Tensor | None = None,
    scores: Tensor | None = None,
    limit: Tensor | None = None,
    other_ids: Tensor | None = None,
) -> Tensor:
    """Mark the candidates to leave out of each row's denominator.

    Args:
        text_ids: (B, V) hash of each text of the rows.
        candidate_ids: (C,) hash of each candidate; 0 for one that is absent.
        positives: (B,) number of each row's own positive among the candidates: always kept. None: it is not among them.
        partner_ids: (C,) or (C, P) hashes of the texts that each candidate stands in a pair with, 0 for none. A candidate
            paired with the anchor or its positive is an answer to the same query, or asks for the same document: no negative
            either.
        scores: (B, C) of each row and candidate, where there is a limit. No gradient flows here.
        limit: (B,) also leave out what scores above the row's limit.
        other_ids: (B, W) hashes of each row's other positives, 0 for none: no negatives, as its own positive is none.

    Returns:
        (B, C) bool, True for a candidate to leave out.
    """
    dropped = (candidate_ids == 0).expand(len(text_ids), -1).clone()
    own_ids = list(text_ids[:, :2].unbind(1))
    if other_ids is not None:  # in place of a 0, which would equal the 0 of no partner, the positive stands once more
        own_ids += torch.where(other_ids == 0, text_ids[:, 1:2], other_ids).unbind(1)
    partners = [] if partner_ids is None else list(partner_ids.view(len(candidate_ids), -1).unbind(1))
    for ids in (candidate_ids, *partners):
        for own in own_ids:
            dropped |= ids == own.unsqueeze(1)
    if scores is not None and limit is not None:
        dropped |= scores.detach() > limit.detach().unsqueeze(1)
    return dropped if positives is None else dropped.scatter(1, positives.unsqueeze(1), False)
