"""Find candidates that are not true negatives: absent texts, duplicates, further answers, and texts that score too high.

Shapes: B rows of V texts (an anchor, a positive and negatives), C candidates, P partners per candidate, W other positives per
row.
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
    """Mark the candidates to leave out of the denominator of each row.

    Args:
        text_ids: (B, V) hash of each text of the rows.
        candidate_ids: (C,) hash of each candidate; 0 for an absent text.
        positives: (B,) number of each row's own positive among the candidates, which is always kept. None: the own positive is
            not among the candidates.
        partner_ids: (C,) or (C, P) hashes of the texts that form a pair with each candidate, 0 for none. A candidate whose
            partner is the anchor or the positive of a row answers the same query or asks for the same document, so it is not a
            negative of the row either.
        scores: (B, C) score of each row and candidate; needed if there is a limit. No gradient flows through them.
        limit: (B,) leave out candidates that score above the limit of the row.
        other_ids: (B, W) hashes of the other positives of each row, filled up with 0. They are treated like the positive.

    Returns:
        (B, C) bool, True for a candidate to leave out.
    """
    dropped = (candidate_ids == 0).expand(len(text_ids), -1).clone()
    own_ids = list(text_ids[:, :2].unbind(1))
    if other_ids is not None:  # a 0 would match a candidate without partner, so the positive's id replaces it
        own_ids += torch.where(other_ids == 0, text_ids[:, 1:2], other_ids).unbind(1)
    partners = [] if partner_ids is None else list(partner_ids.view(len(candidate_ids), -1).unbind(1))
    for ids in (candidate_ids, *partners):
        for own in own_ids:
            dropped |= ids == own.unsqueeze(1)
    if scores is not None and limit is not None:
        dropped |= scores.detach() > limit.detach().unsqueeze(1)
    return dropped if positives is None else dropped.scatter(1, positives.unsqueeze(1), False)
