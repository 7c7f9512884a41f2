"""Candidates that are no negatives: absent, equal to the anchor or its positive, paired with one of them, or too close.

Shapes: B rows of V texts (anchor, positive, negatives), C candidates.
"""

from torch import Tensor


def false_negatives(
    text_ids: Tensor,
    candidate_ids: Tensor,
    positives: Tensor | None = None,
    partner_ids: Tensor | None = None,
    scores: Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """Mark the candidates to leave out of each row's denominator.

    Args:
        text_ids: (B, V) hash of each text of the rows.
        candidate_ids: (C,) hash of each candidate; 0 for one that is absent.
        positives: (B,) number of each row's own positive among the candidates: always kept. None: it is not among them.
        partner_ids: (C,) hash of the text that each candidate stands in a pair with, 0 for none. A candidate paired with the
            anchor or its positive is an answer to the same query, or asks for the same document: no negative either.
        scores: (B, C) of each row and candidate, where there is a limit. No gradient flows here.
        limit: (B,) also leave out what scores above the row's limit.

    Returns:
        (B, C) bool, True for a candidate to leave out.
    """
    dropped = (candidate_ids == 0).expand(len(text_ids), -1).clone()
    for ids in (candidate_ids,) if partner_ids is None else (candidate_ids, partner_ids):
        dropped |= ids == text_ids[:, :1]
        dropped |= ids == text_ids[:, 1:2]
    if scores is not None and limit is not None:
        dropped |= scores.detach() > limit.detach().unsqueeze(1)
    return dropped if positives is None else dropped.scatter(1, positives.unsqueeze(1), False)
