"""GTE: Towards General Text Embeddings with Multi-stage Contrastive Learning (https://arxiv.org/abs/2308.03281).

The loss compares every text of a batch with every other: at 16,384 pairs that is four matrices of 16,384 x 16,384. So rows
are taken in tiles, and the gradient of a tile is taken with its loss, by hand and in place, before the tile is dropped:

    loss_i = log Z_i - s(q_i, d_i) / t        w_ic = e^{s_ic / t} / Z_i, the softmax over all that Z_i sums
    d loss_i / d s_ic = w_ic / t              and another - 1 / t for s(q_i, d_i)

Beyond the embeddings and their gradients that needs the memory of one tile. Nothing is computed twice; nothing is approximate.

Shapes: B own rows, N rows of all ranks, V texts a row (query, document, then V - 2 hard negatives), D wide; T rows a tile;
C candidates, which are the N queries or the N * (V - 1) documents.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import ContrastiveObjective
from hf_embed.objectives.masking import false_negatives
from hf_embed.ranges import COUNT, FINITE, POSITIVE, check_ranges, is_one_of

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TILE_SIZE = 2**26  # similarities in a tile: 256 MB in float32


@dataclass
class ImprovedContrastive(ContrastiveObjective):
    """The improved contrastive loss: a query is told from the other queries too, and a document from other documents.

        loss_i = - log  e^{s(q_i, d_i) / t} / Z_i        s: cosine
        Z_i = sum_j e^{s(q_i, d_j) / t} + sum_{j != i} e^{s(q_i, q_j) / t}          query_to_doc, query_to_query
            + sum_j e^{s(q_j, d_i) / t} + sum_{j != i} e^{s(d_j, d_i) / t}          doc_to_query, doc_to_doc

    as the paper prints it (section 3.3). The own positive stands in both cross terms, so a perfect model's loss is ln 2.
    Hard negatives are documents: those of all rows join the sums over d_j, in query_to_doc and in doc_to_doc. Left out are
    absent negatives, texts equal to the row's query or document, and texts that stand in a pair with one of these: other
    documents of the same query, other queries of the same document. Where the data gives a query several positives
    (`other_ids`), all of them are its documents, whichever stands in the row, and in whichever row a document stands.

    Args:
        temperature: t, 0.01 in the paper.
        directions: which of the four sums make up Z; ("query_to_doc",) is the vanilla in-batch loss.
        partition_mode: "joint", one Z, as in the paper; or "per_direction", a softmax for each direction and the mean of
            their losses: with ("query_to_doc", "doc_to_query") that is bidirectional InfoNCE, the loss of CLIP.
        positive_once: leave the positive out of doc_to_query, so that a perfect model's loss is 0.
        margin: leave out candidates whose score is above s(q_i, d_i) - margin: probably unlabelled positives. May be
            negative: -0.1 leaves out what is closer than the positive by 0.1. None: keep all.
        learn_temperature: let training change the temperature, from `temperature` on.
        tile_rows: T; default: as many as keep a tile at 2^26 similarities.

    Raises:
        InputError: an unknown direction or partition_mode, a number out of range, or a combination without a meaning.
    """

    equation: ClassVar[str] = "loss_i = -log e^(cos(q_i, d_i) / t) / Z_i, where Z_i sums e^(cos / t) over the directions named"
    paper: ClassVar[str] = (
        "Li et al.: Towards General Text Embeddings with Multi-stage Contrastive Learning, https://arxiv.org/abs/2308.03281"
    )

    temperature: float = field(default=0.01, metadata={"help": "Softmax temperature of the loss."})
    directions: tuple[str, ...] = field(
        default=DIRECTIONS,
        metadata={"help": "The sums in the loss: query_to_doc query_to_query doc_to_query doc_to_doc. query_to_doc alone is "
                          "the vanilla in-batch loss."},
    )  # fmt: skip
    partition_mode: Literal["joint", "per_direction"] = field(
        default="joint", metadata={"help": "One softmax over all directions, or one per direction."}
    )
    positive_once: bool = field(default=False, metadata={"help": "Count the positive once in the joint softmax."})
    margin: float | None = field(
        default=None, metadata={"help": "Leave out candidates that score above the positive's score less this margin."}
    )
    learn_temperature: bool = field(default=False, metadata={"help": "Train the temperature too."})
    tile_rows: int | None = field(default=None, metadata={"flag": False})

    def __post_init__(self) -> None:
        if not isinstance(self.directions, list | tuple | str):
            raise InputError(f"directions are {self.directions!r}; give a list of {', '.join(DIRECTIONS)}")
        self.directions = tuple(self.directions)
        check_ranges(self, {"temperature": POSITIVE, "margin": FINITE, "tile_rows": COUNT})
        if unknown := [name for name in self.directions if not is_one_of(name, DIRECTIONS)]:
            raise InputError(f"unknown direction '{unknown[0]}'; there are {', '.join(DIRECTIONS)}")
        if len(set(self.directions)) < len(self.directions):
            raise InputError(f"directions are {' '.join(self.directions)}; name each once, for a sum counts once")
        if "query_to_doc" not in self.directions:
            raise InputError("directions need query_to_doc: the positive pair stands there")
        if not is_one_of(self.partition_mode, ("joint", "per_direction")):
            raise InputError(f"unknown partition_mode '{self.partition_mode}'; there are joint and per_direction")
        if self.partition_mode == "per_direction":
            if lacking := {"query_to_query", "doc_to_doc"} & set(self.directions):
                raise InputError(f"per_direction cannot have {max(lacking)}: no positive stands in it; take joint")
            if self.positive_once:
                raise InputError("positive_once needs partition_mode joint: a softmax of its own needs its positive")

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
        """Return the mean loss of the own rows, a scalar; see `hf_embed.objectives.base.Objective`.

        Its gradient can be taken once, and flows through `all_embeddings` alone, where the own rows stand too.
        """
        if all_embeddings is None or all_text_ids is None:
            all_embeddings, all_text_ids = embeddings, text_ids
        if temperature is None:
            temperature = all_embeddings.new_tensor(self.temperature)
        queries, documents = all_embeddings.split([1, all_embeddings.shape[1] - 1], dim=1)
        queries = F.normalize(queries.flatten(0, 1), dim=-1)  # (N, D)
        documents = F.normalize(documents.flatten(0, 1), dim=-1)  # (N * (V - 1), D), the documents of a row together
        own_rows = range(first_row, first_row + len(embeddings))
        return _MeanLoss.apply(queries, documents, temperature, RowIds(all_text_ids, other_ids), own_rows, self)


class RowIds(NamedTuple):
    """The hashes of the texts of all rows."""

    texts: Tensor  # (N, V), 0 for an absent one
    others: Tensor | None  # (N, W) of each row's other positives, 0 for none; None where no row has any


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
            raise RuntimeError("the gradient of this loss can be taken once: it is as large as the batch and is not kept")
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

    The gradients by the first three arguments are added to `gradients`, if they are wanted.
    """
    sides = candidates_of(queries, documents, ids, rows)
    tile = slice(rows.start, rows.stop)
    tile_ids = RowIds(ids.texts[tile], None if ids.others is None else ids.others[tile])
    positive = (sides["query"].tile_vectors * sides["doc"].tile_vectors).sum(-1)  # s(q_i, d_i), (T,)
    limit = None if objective.margin is None else positive - objective.margin
    logits = {}
    for direction in objective.directions:
        keep_positive = direction == "query_to_doc" or (direction == "doc_to_query" and not objective.positive_once)
        logits[direction] = masked_logits(direction, sides, tile_ids, temperature, keep_positive, limit)
    # log Z_i of each direction's loss, (T, directions), and the weight of these losses in the gradient.
    log_z, loss_weight = torch.stack([block.logsumexp(1) for block in logits.values()], dim=1), 1 / len(logits)
    if objective.partition_mode == "joint":  # one Z_i for all directions
        log_z, loss_weight = log_z.logsumexp(1, keepdim=True).expand_as(log_z), 1.0
    if gradients is not None:
        add_gradients(logits, log_z, loss_weight, sides, temperature, positive, gradients)
    return (log_z.mean(1) - positive / temperature).sum()  # loss_i = log Z_i - s(q_i, d_i) / t


class Candidates(NamedTuple):
    """The queries or the documents of all rows, and the tile's among them."""

    vectors: Tensor  # (C, D), unit length
    ids: Tensor  # (C,) hash of each text, 0 for an absent one
    partner_ids: Tensor  # (C, 1 or 1 + W) hash of the text that each stands in a pair with, then of the others; 0 for none
    tile_places: slice  # where the queries of the tile stand, or their positives

    @property
    def tile_vectors(self) -> Tensor:
        """The tile's queries, or their positives, (T, D)."""
        return self.vectors[self.tile_places]


def candidates_of(queries: Tensor, documents: Tensor, ids: RowIds, rows: range) -> dict[str, Candidates]:
    """Return both sides of the similarities, by the names that directions have for them.

    The partners of a query are its row's positive and other positives. The first partner of a positive is its query, and the
    further ones are its row's other positives; a negative has none.
    """
    per_row, text_ids = len(documents) // len(queries), ids.texts
    others = text_ids[:, :0] if ids.others is None else ids.others  # (N, W)
    answered = text_ids.new_zeros(len(text_ids), per_row, 1 + others.shape[1])
    answered[:, 0] = torch.cat([text_ids[:, :1], others], dim=1)
    places = slice(rows.start, rows.stop)
    positive_places = slice(rows.start * per_row, rows.stop * per_row, per_row)
    return {
        "query": Candidates(queries, text_ids[:, 0], torch.cat([text_ids[:, 1:2], others], dim=1), places),
        "doc": Candidates(documents, text_ids[:, 1:].flatten(), answered.flatten(0, 1), positive_places),
    }


def masked_logits(
    direction: str,
    sides: dict[str, Candidates],
    tile_ids: RowIds,
    temperature: Tensor,
    keep_positive: bool,
    limit: Tensor | None,
) -> Tensor:
    """Return s_ic / t of the tile's texts and a direction's candidates, (T, C); -inf for what is left out of Z_i."""
    left, right = (sides[side] for side in direction.split("_to_"))
    scores = left.tile_vectors @ right.vectors.T  # (T, C)
    # j != i needs no rule of its own: a text's id equals its own.
    positives = torch.arange(len(right.vectors), device=scores.device)[right.tile_places] if keep_positive else None
    # Two documents whose queries have a document in common are no negatives of each other. For a query such a document is one.
    partners = right.partner_ids[:, :1] if direction == "query_to_doc" else right.partner_ids
    dropped = false_negatives(tile_ids.texts, right.ids, positives, partners, scores, limit, tile_ids.others)
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
    """Add the gradients of a tile's loss by queries, documents and temperature to `gradients`; overwrite the logits."""
    by_side, by_temperature = {"query": gradients[0], "doc": gradients[1]}, gradients[2]
    for (direction, block), log_z_i in zip(logits.items(), log_z.unbind(1)):
        left, right = direction.split("_to_")
        # w_ic = e^{s_ic / t} / Z_i
        weights = block.sub_(log_z_i.unsqueeze(1)).exp_()
        # d log Z_i / dt = - sum_c w_ic s_ic / t^2, where s_ic / t = log w_ic + log Z_i; where w_ic is 0, so is the product.
        sum_of_logits = torch.xlogy(weights, weights).sum() + (weights.sum(1) * log_z_i).sum()
        by_temperature -= loss_weight / temperature * sum_of_logits
        # d log Z_i / d s_ic = w_ic / t, and s_ic is the product of left_i and right_c.
        weights.mul_(loss_weight / temperature)
        by_side[left][sides[left].tile_places].addmm_(weights, sides[right].vectors)
        by_side[right].addmm_(weights.T, sides[left].tile_vectors)
    # The gradient of - s(q_i, d_i) / t.
    by_side["query"][sides["query"].tile_places] -= sides["doc"].tile_vectors / temperature
    by_side["doc"][sides["doc"].tile_places] -= sides["query"].tile_vectors / temperature
    by_temperature += positive.sum() / temperature**2
