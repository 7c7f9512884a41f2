"""Training loops written from the papers in plain PyTorch, beside which the trainer is run. Nothing of hf_embed is used here.

SimCSE: https://arxiv.org/abs/2104.08821. GTE: https://arxiv.org/abs/2308.03281. Matryoshka: https://arxiv.org/abs/2205.13147.
Masked language modelling: Devlin et al., https://arxiv.org/abs/1810.04805.

A text is a tuple of token ids. A row is a list of texts: the anchor, its positive, then hard negatives, as many as it has.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Text: TypeAlias = tuple[int, ...]
Row: TypeAlias = list[Text]
PADDING = 0  # the id of the padding token

# ---- the loop ----


class Settings(NamedTuple):
    """Of the optimizer, AdamW, and of the learning rate, which rises and falls linearly."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    adam_epsilon: float
    warmup_steps: int
    steps: int
    seed: int  # of step 0's random numbers


def train(model: nn.Module, batches: list[list[Row]], loss_of: Callable[[list[Row]], Tensor], settings: Settings) -> None:
    """Change the weights of `model` by one step for each batch."""
    matrices = [p for p in model.parameters() if p.dim() > 1]  # biases and the weights of LayerNorm do not decay
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=settings.adam_epsilon, fused=True)
    model.train()
    for step, rows in enumerate(batches):
        rising = step / settings.warmup_steps
        falling = (settings.steps - step) / (settings.steps - settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(rising, falling)
        torch.manual_seed(settings.seed + step)
        optimizer.zero_grad()
        loss_of(rows).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient *= min(1.0, settings.max_grad_norm / (norm.item() + 1e-6))
        optimizer.step()


# ---- texts to vectors ----


def padded(texts: Iterable[Text]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (texts, tokens of the longest)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=PADDING)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    return ids, mask


def longest_first(texts: list[Text]) -> list[int]:
    """The numbers of the texts in the order in which the trainer puts them into a batch, on which dropout's draws depend."""
    return sorted(range(len(texts)), key=lambda number: -len(texts[number]))


def mean_of(states: Tensor, texts: list[Text]) -> Tensor:
    """The mean over each text's own tokens; `states` has those of the padding too."""
    return torch.stack([of_text[: len(text)].mean(0) for of_text, text in zip(states, texts)])


def first_token(output, texts, model):
    return output.last_hidden_state[:, 0]


def mlp_of_the_model(output, texts, model):
    dense = model.pooler.dense
    return torch.tanh(first_token(output, texts, model) @ dense.weight.T + dense.bias)


def mlp_of_the_training(output, texts, model):
    return torch.tanh(first_token(output, texts, model) @ model.training_head.weight.T + model.training_head.bias)


def average(output, texts, model):
    return mean_of(output.last_hidden_state, texts)


def average_of_first_and_last_layer(output, texts, model):
    after_layer = output.hidden_states[1:]  # [0] is before the first
    return mean_of((after_layer[0] + after_layer[-1]) / 2, texts)


def average_of_top_two_layers(output, texts, model):
    return mean_of((output.hidden_states[-1] + output.hidden_states[-2]) / 2, texts)


# The poolers of SimCSE's section 6.3 and its code.
POOLERS = {
    "cls": first_token,
    "cls_mlp": mlp_of_the_model,
    "cls_mlp_train": mlp_of_the_training,
    "mean": average,
    "first_last": average_of_first_and_last_layer,
    "top2": average_of_top_two_layers,
}


def embed(model: nn.Module, texts: list[Text], pooler: Callable) -> Tensor:
    """Vectors (texts, width), in one pass."""
    order = longest_first(texts)
    in_order = [texts[number] for number in order]
    ids, mask = padded(in_order)
    vectors = pooler(model(input_ids=ids, attention_mask=mask, output_hidden_states=True), in_order, model)
    return torch.stack([vectors[order.index(number)] for number in range(len(texts))])


# ---- the contrastive losses ----


class Batch:
    """The cosines of all texts of some rows; text k of row j is called (j, k)."""

    def __init__(self, vectors: Tensor, rows: list[Row]):
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        self.cosines = unit @ unit.T
        self.rows = rows
        self.texts = [(j, k) for j, row in enumerate(rows) for k in range(len(row))]
        self.numbers = {text: number for number, text in enumerate(self.texts)}
        self.queries = [(j, 0) for j in range(len(rows))]
        self.documents = [(j, k) for j, k in self.texts if k > 0]

    def scores(self, one: tuple[int, int], others: list[tuple[int, int]]) -> Tensor:
        """s(one, other) for each of the others."""
        return self.cosines[self.numbers[one], [self.numbers[other] for other in others]]

    def is_no_negative(self, i: int, text: tuple[int, int]) -> bool:
        """Whether the text is row i's anchor or positive once more, or stands in a pair with one of them.

        That is no rule of the papers, but the documented one of hf_embed.
        """
        j, k = text
        pair = self.rows[j][:2] if k < 2 else [self.rows[j][k]]  # a hard negative is in no pair
        return any(own in pair for own in self.rows[i][:2])


def simcse(
    vectors: Tensor,
    rows: list[Row],
    temperature: float = 0.05,
    hard_negative_weight: float = 0.0,
    masked: bool = True,
    in_denominator: bool = True,
) -> Tensor:
    """SimCSE's equation 5, and appendix: the weight is a logit of a row's own hard negatives.

    `masked` says whether the texts of `is_no_negative` are left out; with `in_denominator` False so is the positive.
    """
    batch, losses = Batch(vectors, rows), []
    for i in range(len(rows)):
        others = [text for text in batch.documents if text != (i, 1) and not (masked and batch.is_no_negative(i, text))]
        weights = torch.tensor([hard_negative_weight * (j == i) for j, _ in others], dtype=vectors.dtype)
        positive = batch.scores((i, 0), [(i, 1)]) / temperature
        logits = batch.scores((i, 0), others) / temperature + weights
        z = torch.cat([positive, logits] if in_denominator else [logits]).exp().sum()
        losses.append(z.log() - positive.squeeze())
    return torch.stack(losses).mean()


def gte(
    vectors: Tensor,
    rows: list[Row],
    temperature: float = 0.01,
    masked: bool = True,
    positive_twice: bool = True,
    sums: tuple[str, ...] = ("qd", "qq", "dq", "dd"),
) -> Tensor:
    """GTE's section 3.3, the improved contrastive loss, with the four sums of Z in the paper's order.

    Hard negatives, of which the formula does not speak, are documents: they stand in "qd" and in "dd".
    """
    batch, losses = Batch(vectors, rows), []
    for i in range(len(rows)):
        query, document = (i, 0), (i, 1)
        left_out = {text for text in batch.texts if masked and batch.is_no_negative(i, text)} - {query, document}
        queries, documents = ([text for text in side if text not in left_out] for side in (batch.queries, batch.documents))
        terms = {
            "qd": batch.scores(query, documents),
            "qq": batch.scores(query, [q for q in queries if q != query]),
            "dq": batch.scores(document, [q for q in queries if q != query or positive_twice]),
            "dd": batch.scores(document, [d for d in documents if d != document]),
        }
        z = sum((terms[name] / temperature).exp().sum() for name in sums)
        losses.append(z.log() - batch.scores(query, [document]).squeeze() / temperature)
    return torch.stack(losses).mean()


def matryoshka(vectors: Tensor, rows: list[Row], widths: tuple[int, ...], loss: Callable[..., Tensor]) -> Tensor:
    """Equation 1 of the paper, with every width weighing 1."""
    return sum(loss(vectors[:, :width], rows) for width in widths)


# ---- masked language modelling ----


class Words(NamedTuple):
    """What masking knows of the tokenizer."""

    count: int
    mask: int
    special: list[int]


def mask_words(ids: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """BERT's rule for token ids (tokens,): of 15% of them 80% become [MASK], 10% any word, and 10% stay.

    Also returns which were chosen, (tokens,). It draws, in this order, one number for each token that says whether it is
    chosen, one that says what becomes of it, and one word.
    """
    draws = torch.rand(len(ids)).tolist()
    fates = torch.rand(len(ids)).tolist()
    any_words = torch.randint(words.count, (len(ids),)).tolist()
    masked = ids.tolist()
    chosen = [draw < 0.15 and word not in words.special for draw, word in zip(draws, masked)]
    for place in range(len(ids)):
        if chosen[place] and fates[place] < 0.8:
            masked[place] = words.mask
        elif chosen[place] and fates[place] >= 0.9:
            masked[place] = any_words[place]
    return torch.tensor(masked), torch.tensor(chosen)


def masked_word_loss(model: nn.Module, texts: list[Text], masked: Tensor, chosen: Tensor) -> Tensor:
    """The mean cross-entropy of the chosen words of all texts.

    Args:
        model: a masked language model.
        texts: as they are before they are masked.
        masked: (tokens of all texts,) what the model sees in their place.
        chosen: (tokens of all texts,)
    """
    lengths = [len(text) for text in texts]
    seen = [tuple(part.tolist()) for part in masked.split(lengths)]
    order = longest_first(texts)
    ids, mask = padded([seen[number] for number in order])
    logits = model(input_ids=ids, attention_mask=mask).logits
    of_texts = chosen.split(lengths)
    places = [(place, token) for place, number in enumerate(order) for token in of_texts[number].nonzero().flatten().tolist()]
    if not places:
        return logits.sum() * 0
    right = torch.tensor([texts[order[place]][token] for place, token in places])
    return F.cross_entropy(torch.stack([logits[place, token] for place, token in places]), right)
