"""Training loops that follow the papers in plain PyTorch. Tests compare the trainer with them. They use no code of hf_embed.

SimCSE: https://arxiv.org/abs/2104.08821. GTE: https://arxiv.org/abs/2308.03281. Matryoshka: https://arxiv.org/abs/2205.13147.
Masked language modeling: Devlin et al., https://arxiv.org/abs/1810.04805.

A text is a tuple of token ids. A row is a list of texts: the anchor, its positive, then any number of hard negatives.
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
    """Settings of the AdamW optimizer and of the learning rate, which rises linearly and then falls linearly."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    adam_epsilon: float
    warmup_steps: int
    steps: int
    seed: int  # seed of the random numbers of step 0; step n uses seed + n


def train(model: nn.Module, batches: list[list[Row]], loss_of: Callable[[list[Row]], Tensor], settings: Settings) -> None:
    """Train `model` for one step on each batch."""
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
    """Return token ids and attention mask, both (texts, tokens of the longest text)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=PADDING)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    return ids, mask


def longest_first(texts: list[Text]) -> list[int]:
    """Return the indices of the texts in the order of the trainer's batches. Dropout's random numbers depend on this order."""
    return sorted(range(len(texts)), key=lambda number: -len(texts[number]))


def mean_of(states: Tensor, texts: list[Text]) -> Tensor:
    """Return the mean of the hidden states over each text's own tokens. `states` also holds the states of the padding."""
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
    after_layer = output.hidden_states[1:]  # hidden_states[0] is the input of the first layer
    return mean_of((after_layer[0] + after_layer[-1]) / 2, texts)


def average_of_top_two_layers(output, texts, model):
    return mean_of((output.hidden_states[-1] + output.hidden_states[-2]) / 2, texts)


# The poolers of section 6.3 of the SimCSE paper and of its code.
POOLERS = {
    "cls": first_token,
    "cls_mlp": mlp_of_the_model,
    "cls_mlp_train": mlp_of_the_training,
    "mean": average,
    "first_last": average_of_first_and_last_layer,
    "top2": average_of_top_two_layers,
}


def embed(model: nn.Module, texts: list[Text], pooler: Callable) -> Tensor:
    """Return the embeddings (texts, width), computed in one forward pass."""
    order = longest_first(texts)
    in_order = [texts[number] for number in order]
    ids, mask = padded(in_order)
    vectors = pooler(model(input_ids=ids, attention_mask=mask, output_hidden_states=True), in_order, model)
    return torch.stack([vectors[order.index(number)] for number in range(len(texts))])


# ---- the contrastive losses ----


class Batch:
    """The cosine similarities between all texts of some rows. The name of text k of row j is (j, k)."""

    def __init__(self, vectors: Tensor, rows: list[Row]):
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        self.cosines = unit @ unit.T
        self.rows = rows
        self.texts = [(j, k) for j, row in enumerate(rows) for k in range(len(row))]
        self.numbers = {text: number for number, text in enumerate(self.texts)}
        self.queries = [(j, 0) for j in range(len(rows))]
        self.documents = [(j, k) for j, k in self.texts if k > 0]

    def scores(self, one: tuple[int, int], others: list[tuple[int, int]]) -> Tensor:
        """Return the similarity s(one, other) for each of the others."""
        return self.cosines[self.numbers[one], [self.numbers[other] for other in others]]

    def is_no_negative(self, i: int, text: tuple[int, int]) -> bool:
        """Return True if the text must not be a negative of row i.

        This is so if the text equals the anchor or positive of row i, or if the other text of its pair does.
        The papers do not have this rule. It is the documented rule of hf_embed.
        """
        j, k = text
        pair = self.rows[j][:2] if k < 2 else [self.rows[j][k]]  # a hard negative is not part of a pair
        return any(own in pair for own in self.rows[i][:2])


def simcse(
    vectors: Tensor,
    rows: list[Row],
    temperature: float = 0.05,
    hard_negative_weight: float = 0.0,
    masked: bool = True,
    in_denominator: bool = True,
) -> Tensor:
    """Compute the loss of SimCSE's equation 5. The appendix adds a weight to the logits of a row's own hard negatives.

    Args:
        masked: leave the texts of `is_no_negative` out of the denominator.
        in_denominator: include the positive in the denominator.
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
    """Compute the improved contrastive loss of GTE's section 3.3, with the four sums of Z in the paper's order.

    The paper's formula does not include hard negatives. Here they are documents, so they are part of "qd" and "dd".
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
    """Compute equation 1 of the Matryoshka paper, with weight 1 for every width."""
    return sum(loss(vectors[:, :width], rows) for width in widths)


# ---- masked language modeling ----


class Words(NamedTuple):
    """The properties of the tokenizer that masking needs: vocabulary size, id of [MASK], ids of special tokens."""

    count: int
    mask: int
    special: list[int]


def mask_words(ids: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Apply BERT's masking rule to token ids (tokens,).

    15% of the tokens that are not special are chosen. Of these, 80% become [MASK], 10% become a random word, and 10% stay.
    The function also returns which tokens were chosen, (tokens,). It draws random values for all tokens in this order:
    first the numbers that decide which tokens are chosen, then the numbers that decide what the tokens become, then the words.
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
    """Return the mean cross-entropy of the chosen words of all texts.

    Args:
        model: a masked language model.
        texts: the texts before masking.
        masked: (tokens of all texts,) the token ids that the model receives.
        chosen: (tokens of all texts,) True where the model must predict the original word.
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
