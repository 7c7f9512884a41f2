"""GTE: Towards General Text Embeddings with Multi-stage Contrastive Learning (https://arxiv.org/abs/2308.03281).

The loss compares every text of a batch with every other text. With 16,384 pairs that is four matrices of 16,384 x 16,384. To
save memory, the code takes the rows in tiles. It computes the gradient of a tile by hand and in place, together with the loss
of the tile, before it drops the tile. With t the temperature and c a candidate:

    loss_i = log Z_i - s(q_i, d_i) / t        w_ic = e^{s_ic / t} / Z_i, the softmax over all candidates in Z_i
    d loss_i / d s_ic = w_ic / t              and in addition - 1 / t for s(q_i, d_i)

Besides the embeddings and their gradients, only one tile is in memory. Nothing is computed twice, and the result is exact.

Shapes: B rows of this rank ("own rows"), N rows of all ranks, V texts per row (a query, a document and V - 2 hard negatives),
D numbers per embedding, T rows per tile, W other positives per row, C candidates: the N queries or the N * (V - 1) documents.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import GUIDE_HELP, Batch, Objective
from hf_embed.objectives.masking import false_negatives
from hf_embed.ranges import ABOVE_ZERO, COUNT, FINITE, check_ranges, is_one_of, setting

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TILE_SIZE = 2**26  # largest number of similarities in a tile: 256 MiB in float32


@dataclass
class ImprovedContrastive(Objective):
    """The improved contrastive loss of GTE: negatives of a pair are all other queries and all other documents.

        loss_i = - log  e^{s(q_i, d_i) / t} / Z_i        s: cosine similarity
        Z_i = sum_j e^{s(q_i, d_j) / t} + sum_{j != i} e^{s(q_i, q_j) / t}          query_to_doc, query_to_query
            + sum_j e^{s(q_j, d_i) / t} + sum_{j != i} e^{s(d_j, d_i) / t}          doc_to_query, doc_to_doc

    This is the paper's formula ("Improved Contrastive Loss" in the section on training details), taken literally. The own
    positive is in both cross terms, so the loss of a perfect model is ln 2; with `positive_once` it is 0.

    The code deviates from the paper in two points:

    - The formula does not mention hard negatives. Here hard negatives are documents: those of all rows, also those of row i,
      join the sums over d_j in query_to_doc and in doc_to_doc.
    - False negatives are left out of Z_i: texts equal to the row's query or document, and texts that form a pair with one of
      these (other documents of the same query, other queries of the same document). If the data gives a query several positives
      (`other_ids`), all of them count as its documents. It does not matter which of them is in the row, or in which row they
      are.

    Args:
        temperature: t, 0.01 in the paper.
        directions: which of the four sums make up Z; ("query_to_doc",) alone is the standard loss with in-batch negatives.
        partition_mode: "joint" is one Z, as in the paper. "per_direction" is one softmax per direction and the mean of their
            losses; with ("query_to_doc", "doc_to_query") that is bidirectional InfoNCE, the loss of CLIP.
        positive_once: leave the positive out of doc_to_query, so that the loss of a perfect model is 0.
        margin: leave out candidates that score above s(q_i, d_i) - margin, because they are probably unlabeled positives. The
            margin may be negative: -0.1 leaves out candidates that score more than 0.1 above the positive. None: keep all.
        guide_margin: the same, but the vectors of a teacher model give all scores, in every direction. 0 is the rule of
            GISTEmbed (https://arxiv.org/abs/2402.16829). None: no teacher.
        learn_temperature: train the temperature too, with `temperature` as its initial value.
        tile_rows: T; default: as many rows as keep a tile within 2^26 similarities.

    Raises:
        InputError: if a direction or the partition_mode is unknown, a number is out of range, or options exclude each other.
    """

    equation: ClassVar[str] = "loss_i = -log e^(cos(q_i, d_i) / t) / Z_i, where Z_i sums e^(cos / t) over the given directions"
    paper: ClassVar[str] = (
        "Li et al.: Towards General Text Embeddings with Multi-stage Contrastive Learning, https://arxiv.org/abs/2308.03281"
    )

    temperature: float = setting(0.01, "Softmax temperature of the loss.")
    directions: tuple[str, ...] = setting(
        DIRECTIONS,
        "The sums in the loss: query_to_doc query_to_query doc_to_query doc_to_doc. query_to_doc alone is the standard loss "
        "with in-batch negatives.",
    )
    partition_mode: Literal["joint", "per_direction"] = setting(
        "joint", "One softmax over all directions, or one for each direction."
    )
    positive_once: bool = setting(False, "Count the positive only once in the joint softmax.")
    margin: float | None = setting(None, "Ignore candidates that score above the positive's score minus this margin.")
    guide_margin: float | None = setting(None, GUIDE_HELP)
    learn_temperature: bool = setting(False, "Learn the temperature in training.")
    tile_rows: int | None = field(default=None, metadata={"flag": False})

    def __post_init__(self) -> None:
        if not isinstance(self.directions, list | tuple | str):
            raise InputError(f"directions are {self.directions!r}; give a list of {', '.join(DIRECTIONS)}")
        self.directions = tuple(self.directions)
        check_ranges(self, {"temperature": ABOVE_ZERO, "margin": FINITE, "guide_margin": FINITE, "tile_rows": COUNT})
        if self.margin is not None and self.guide_margin is not None:
            raise InputError(
                "margin and guide_margin are both set; choose whether the model itself or a teacher judges candidates"
            )
        if unknown := [name for name in self.directions if not is_one_of(name, DIRECTIONS)]:
            raise InputError(f"unknown direction '{unknown[0]}'; use {', '.join(DIRECTIONS)}")
        if len(set(self.directions)) < len(self.directions):
            raise InputError(f"directions are {' '.join(self.directions)}; name each direction only once")
        if "query_to_doc" not in self.directions:
            raise InputError("directions need query_to_doc, because it contains the positive pair; add it")
        if self.partition_mode == "per_direction":
            if lacking := {"query_to_query", "doc_to_doc"} & set(self.directions):
                raise InputError(f"per_direction does not support {max(lacking)}, which contains no positive; use joint")
            if self.positive_once:
                raise InputError(
                    "positive_once needs partition_mode joint, because each softmax of per_direction needs its positive"
                )

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        The backward pass can run only once. The gradient flows only through `all_embeddings`, which contains the own rows.
        """
        temperature = batch.temperature
        if not isinstance(temperature, Tensor):
            temperature = batch.all_embeddings.new_full((), temperature)  # `new_tensor` would wait for the GPU
        queries, documents = batch.all_embeddings.split([1, batch.all_embeddings.shape[1] - 1], dim=1)
        queries = F.normalize(queries.flatten(0, 1), dim=-1)  # (N, D)
        documents = F.normalize(documents.flatten(0, 1), dim=-1)  # (N * (V - 1), D), row by row
        guide = batch.needed.get("teacher") if self.guide_margin is not None else None
        ids = RowIds(batch.all_text_ids, batch.other_ids, guide)
        return _MeanLoss.apply(queries, documents, temperature, ids, range(batch.own.start, batch.own.stop), self)


class RowIds(NamedTuple):
    """What says which candidates are negatives, for some rows: for all rows, or for the rows of one tile."""

    texts: Tensor  # (N, V), or (T, V) for one tile: hashes of the texts; 0 for an absent text
    others: Tensor | None  # (N, W) or (T, W) hashes of the other positives, filled up with 0; None if no row has any
    guide: Tensor | None  # (N, V, E) or (T, V, E) a teacher's unit vectors of the texts; None without a guide


class _MeanLoss(torch.autograd.Function):
    """Map unit queries (N, D), unit documents (N * (V - 1), D) and the temperature () to the mean loss () of the own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        temperature: Tensor,
        ids: RowIds,
        own_rows: range,
        objective: ImprovedContrastive,
    ) -> Tensor:
        inputs = (queries, documents, temperature)
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if any(ctx.needs_input_grad) else None
        tile_rows = objective.tile_rows or max(1, TILE_SIZE // (2 * ids.texts.numel()))
        loss = queries.new_zeros(())
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(own_rows.start, own_rows.stop, tile_rows):
                rows = range(start, min(start + tile_rows, own_rows.stop))
                loss += tile_loss(queries, documents, temperature, ids, rows, objective, gradients)
        ctx.row_count, ctx.gradients = len(own_rows), gradients
        return loss / len(own_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of this loss can be computed only once: it is as large as the batch and is not kept"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(grad_output / ctx.row_count) for gradient in gradients), None, None, None


def tile_loss(
    queries: Tensor,
    documents: Tensor,
    temperature: Tensor,
    ids: RowIds,
    rows: range,
    objective: ImprovedContrastive,
    gradients: list[Tensor] | None,
) -> Tensor:
    """Return the summed loss, (), of the rows numbered `rows`.

    If `gradients` is given, add the gradients with respect to the first three arguments to it.
    """
    # The improved contrastive loss of arXiv 2308.03281, with log Z_i as a logsumexp over the terms of each direction.
    sides = candidates_of(queries, documents, ids, rows)
    tile = slice(rows.start, rows.stop)
    tile_ids = RowIds(ids.texts[tile], *(None if part is None else part[tile] for part in ids[1:]))
    positive = (sides["query"].tile_vectors * sides["doc"].tile_vectors).sum(-1)  # s(q_i, d_i), (T,)
    limit = None if objective.margin is None else positive - objective.margin
    if tile_ids.guide is not None and objective.guide_margin is not None:
        limit = (tile_ids.guide[:, 0] * tile_ids.guide[:, 1]).sum(-1) - objective.guide_margin
    logits = {}
    for direction in objective.directions:
        keep_positive = direction == "query_to_doc" or (direction == "doc_to_query" and not objective.positive_once)
        logits[direction] = masked_logits(direction, sides, tile_ids, temperature, keep_positive, limit)
    # (T, directions): log Z_i of each direction. `loss_weight` is the weight of a direction's loss in the gradient.
    log_z, loss_weight = torch.stack([block.logsumexp(1) for block in logits.values()], dim=1), 1 / len(logits)
    if objective.partition_mode == "joint":  # the directions share one Z_i, so each column holds the same log Z_i
        log_z, loss_weight = log_z.logsumexp(1, keepdim=True).expand_as(log_z), 1.0
    if gradients is not None:
        add_gradients(logits, log_z, loss_weight, sides, temperature, positive, gradients)
    return (log_z.mean(1) - positive / temperature).sum()  # loss_i = log Z_i - s(q_i, d_i) / t, averaged over directions


class Candidates(NamedTuple):
    """The queries or the documents of all rows, and where those of the tile are among them."""

    vectors: Tensor  # (C, D), unit length
    ids: Tensor  # (C,) hash of each text, 0 for an absent text
    partner_ids: Tensor  # (C, 1 + W) hashes of the partners; see `candidates_of`. 0 for none
    tile_places: slice  # places of the tile's queries, or of their positives
    guide: Tensor | None  # (C, E) a teacher's unit vectors; None without a guide

    @property
    def tile_vectors(self) -> Tensor:
        """The tile's queries or positives, (T, D)."""
        return self.vectors[self.tile_places]


def candidates_of(queries: Tensor, documents: Tensor, ids: RowIds, rows: range) -> dict[str, Candidates]:
    """Return the queries and the documents of all rows under the names "query" and "doc", which the directions use.

    The partners of a query are the positive and the other positives of its row. The first partner of a positive is its query;
    its further partners are the other positives of its row. A hard negative has no partner. With two rows of three texts, q0 d0
    n0 and q1 d1 n1, and row 1 as the tile:

                 vectors        partner_ids    tile_places
        query    q0 q1          d0 d1          1:2
        doc      d0 n0 d1 n1    q0 0 q1 0      2:4:2
    """
    per_row, text_ids = len(documents) // len(queries), ids.texts
    others = text_ids[:, :0] if ids.others is None else ids.others  # (N, W)
    answered = text_ids.new_zeros(len(text_ids), per_row, 1 + others.shape[1])
    answered[:, 0] = torch.cat([text_ids[:, :1], others], dim=1)
    guides = (None, None) if ids.guide is None else (ids.guide[:, 0], ids.guide[:, 1:].flatten(0, 1))
    places = slice(rows.start, rows.stop)
    positive_places = slice(rows.start * per_row, rows.stop * per_row, per_row)
    return {
        "query": Candidates(queries, text_ids[:, 0], torch.cat([text_ids[:, 1:2], others], dim=1), places, guides[0]),
        "doc": Candidates(documents, text_ids[:, 1:].flatten(), answered.flatten(0, 1), positive_places, guides[1]),
    }


def masked_logits(
    direction: str,
    sides: dict[str, Candidates],
    tile_ids: RowIds,
    temperature: Tensor,
    keep_positive: bool,
    limit: Tensor | None,
) -> Tensor:
    """Return s_ic / t of the tile's texts and the candidates of one direction, (T, C); -inf for candidates outside Z_i."""
    left, right = (sides[side] for side in direction.split("_to_"))
    scores = left.tile_vectors @ right.vectors.T  # (T, C)
    # `j != i` in the formula needs no code: candidate i has the id of text i, so `false_negatives` drops it.
    positives = torch.arange(len(right.vectors), device=scores.device)[right.tile_places] if keep_positive else None
    # doc_to_doc: documents of two rows are not negatives of each other if the rows share a document. query_to_doc: for a query,
    # the document of such another row remains a negative, so only the candidate's own query counts as its partner.
    partners = right.partner_ids[:, :1] if direction == "query_to_doc" else right.partner_ids
    judged = scores if left.guide is None or right.guide is None else left.guide[left.tile_places] @ right.guide.T
    dropped = false_negatives(tile_ids.texts, right.ids, positives, partners, judged, limit, tile_ids.others)
    return scores.div_(temperature).masked_fill_(dropped, float("-inf"))


def add_gradients(
    logits: dict[str, Tensor],
    log_z: Tensor,
    loss_weight: float,
    sides: dict[str, Candidates],
    temperature: Tensor,
    positive: Tensor,
    gradients: list[Tensor],
) -> None:
    """Add the gradients of a tile's loss to `gradients`: by queries, documents and temperature. Overwrite the logits."""
    by_side, by_temperature = {"query": gradients[0], "doc": gradients[1]}, gradients[2]
    for (direction, block), log_z_i in zip(logits.items(), log_z.unbind(1)):
        left, right = direction.split("_to_")
        # w_ic = e^{s_ic / t} / Z_i
        weights = block.sub_(log_z_i.unsqueeze(1)).exp_()
        # d log Z_i / dt = - sum_c w_ic s_ic / t^2, where s_ic / t = log w_ic + log Z_i. If w_ic is 0, xlogy gives 0.
        sum_of_logits = torch.xlogy(weights, weights).sum() + (weights.sum(1) * log_z_i).sum()
        by_temperature -= loss_weight / temperature * sum_of_logits
        # d log Z_i / d s_ic = w_ic / t, and s_ic is the dot product of left_i and right_c.
        weights.mul_(loss_weight / temperature)
        by_side[left][sides[left].tile_places].addmm_(weights, sides[right].vectors)
        by_side[right].addmm_(weights.T, sides[left].tile_vectors)
    # The gradient of the other term of loss_i, - s(q_i, d_i) / t.
    by_side["query"][sides["query"].tile_places] -= sides["doc"].tile_vectors / temperature
    by_side["doc"][sides["doc"].tile_places] -= sides["query"].tile_vectors / temperature
    by_temperature += positive.sum() / temperature**2
