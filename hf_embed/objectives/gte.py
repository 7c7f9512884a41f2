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
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.masking import false_negatives
from hf_embed.ranges import COUNT, FINITE, POSITIVE, check_ranges

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TILE_SIZE = 2**26  # similarities in a tile: 256 MB in float32


@dataclass
class ImprovedContrastive:
    """The improved contrastive loss: a query is told from the other queries too, and a document from other documents.

        loss_i = - log  e^{s(q_i, d_i) / t} / Z_i        s: cosine
        Z_i = sum_j e^{s(q_i, d_j) / t} + sum_{j != i} e^{s(q_i, q_j) / t}          query_to_doc, query_to_query
            + sum_j e^{s(q_j, d_i) / t} + sum_{j != i} e^{s(d_j, d_i) / t}          doc_to_query, doc_to_doc

    as the paper prints it (section 3.3). The own positive stands in both cross terms, so a perfect model's loss is ln 2.
    Hard negatives are documents: those of all rows join the sums over d_j, in query_to_doc and in doc_to_doc. Left out are
    absent negatives, texts equal to the row's query or document, and texts that stand in a pair with one of these: other
    documents of the same query, other queries of the same document.

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

    mlm_weight = 0.0

    def __post_init__(self):
        self.directions = tuple(self.directions)
        check_ranges(self, {"temperature": POSITIVE, "margin": FINITE, "tile_rows": COUNT})
        if unknown := [d for d in self.directions if d not in DIRECTIONS]:
            raise InputError(f"unknown direction '{unknown[0]}'; there are {', '.join(DIRECTIONS)}")
        if len(set(self.directions)) < len(self.directions):
            raise InputError(f"directions are {' '.join(self.directions)}; name each once, for a sum counts once")
        if "query_to_doc" not in self.directions:
            raise InputError("directions need query_to_doc: the positive pair stands there")
        if self.partition_mode not in ("joint", "per_direction"):
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
    ) -> Tensor:
        """Mean loss of the own rows, a scalar. Its gradient can be taken once, and flows through `all_embeddings` alone,
        where the own rows stand too.

        Args:
            embeddings: (B, V, D) of the own rows.
            text_ids: (B, V) hash of each text; 0 where a row has fewer than V - 2 negatives.
            all_embeddings, all_text_ids: the same for all ranks' rows, (N, V, D) and (N, V); default: the own.
            first_row: number of the first own row among all rows.
            temperature: a learned one; default: the fixed one.
        """
        if all_embeddings is None:
            all_embeddings, all_text_ids = embeddings, text_ids
        if temperature is None:
            temperature = all_embeddings.new_tensor(self.temperature)
        queries, documents = all_embeddings.split([1, all_embeddings.shape[1] - 1], dim=1)
        queries = F.normalize(queries.flatten(0, 1), dim=-1)  # (N, D)
        documents = F.normalize(documents.flatten(0, 1), dim=-1)  # (N * (V - 1), D), the documents of a row together
        own = range(first_row, first_row + len(embeddings))
        return _MeanLoss.apply(queries, documents, temperature, all_text_ids, own, self)


class _MeanLoss(torch.autograd.Function):
    """Unit queries (N, D), unit documents (N * (V - 1), D) and the temperature () to the mean loss () of the rows `own`."""

    @staticmethod
    def forward(ctx, queries, documents, temperature, ids, own: range, objective: ImprovedContrastive) -> Tensor:
        gradients = [torch.zeros_like(t) for t in (queries, documents, temperature)] if any(ctx.needs_input_grad) else None
        tile_rows = objective.tile_rows or max(1, TILE_SIZE // (2 * ids.numel()))
        loss = queries.new_zeros(())
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(own.start, own.stop, tile_rows):
                rows = range(start, min(start + tile_rows, own.stop))
                loss += tile_loss(queries, documents, temperature, ids, rows, objective, gradients)
        ctx.rows, ctx.gradients = len(own), gradients
        return loss / len(own)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss can be taken once: it is as large as the batch and is not kept")
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(grad_output / ctx.rows) for gradient in gradients), None, None, None


def tile_loss(queries, documents, temperature, ids, rows: range, objective, gradients: list[Tensor] | None) -> Tensor:
    """Summed loss, (), of the rows numbered `rows`. Its gradient by the first three arguments is added to `gradients`."""
    per_row = len(documents) // len(queries)
    candidates = {"query": queries, "doc": documents}
    candidate_ids = {"query": ids[:, 0], "doc": ids[:, 1:].flatten()}
    answered = torch.zeros_like(ids[:, 1:])  # by each document: the row's positive answers its query, its negatives none
    answered[:, 0] = ids[:, 0]
    partner_ids = {"query": ids[:, 1], "doc": answered.flatten()}
    own = {"query": slice(rows.start, rows.stop), "doc": slice(rows.start * per_row, rows.stop * per_row, per_row)}
    texts = {side: candidates[side][own[side]] for side in own}  # (T, D)
    number = torch.arange(rows.start, rows.stop, device=ids.device)
    positives = {"query_to_doc": number * per_row, "doc_to_query": None if objective.positive_once else number}
    positive = (texts["query"] * texts["doc"]).sum(-1)  # (T,)
    limit = None if objective.margin is None else positive - objective.margin

    blocks = []
    for direction in objective.directions:
        left, right = direction.split("_to_")
        scores = texts[left] @ candidates[right].T  # (T, C)
        # j != i needs no rule of its own: a text's id equals its own.
        dropped = false_negatives(
            ids[own["query"]], candidate_ids[right], positives.get(direction), partner_ids[right], scores, limit
        )
        blocks.append((left, right, scores.div_(temperature).masked_fill_(dropped, float("-inf"))))
    log_z = torch.stack([logits.logsumexp(1) for *_, logits in blocks], dim=1)  # (T, directions)
    share = 1 / len(blocks)
    if objective.partition_mode == "joint":
        log_z, share = log_z.logsumexp(1, keepdim=True).expand_as(log_z), 1.0

    if gradients is not None:
        of_temperature, of = gradients[2], {"query": gradients[0], "doc": gradients[1]}
        for (left, right, logits), z in zip(blocks, log_z.unbind(1)):
            weights = logits.sub_(z.unsqueeze(1)).exp_()
            # The logits were log(weights) + z; where a weight is 0, its product with the logit is too.
            of_temperature -= share / temperature * (torch.xlogy(weights, weights).sum() + (weights.sum(1) * z).sum())
            weights.mul_(share / temperature)
            of[left][own[left]].addmm_(weights, candidates[right])
            of[right].addmm_(weights.T, texts[left])
        of["query"][own["query"]] -= texts["doc"] / temperature
        of["doc"][own["doc"]] -= texts["query"] / temperature
        of_temperature += positive.sum() / temperature**2
    return (log_z.mean(1) - positive / temperature).sum()
