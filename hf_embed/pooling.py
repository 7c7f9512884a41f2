"""The table of poolings, which turn the hidden states of a text into one vector. A new pooling is one entry of `POOLINGS`.

Shapes: B texts of T tokens; D numbers per hidden state. `mask` is (B, T), 1 on tokens and 0 on padding. Padding is on the
right.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_embed.ranges import check_one_of


@dataclass(frozen=True)
class Pooling:
    """One way to turn hidden states into a vector, and how a saved folder and its model card express it.

    Attributes:
        name: the name that users give.
        description: what the pooling computes, in words.
        function: maps the hidden states (B, T, D) and the mask (B, T) to the vectors (B, D).
        flag: the flag of the pooling in sentence-transformers' 1_Pooling/config.json, without `pooling_mode_`.
        card: the lines of code in the model card that compute `vectors` from `output` and `batch`.
        layers: the two layers whose hidden states are averaged before `function`, as indices of `hidden_states` (0 is the
            embedding layer). None: only the last layer. sentence-transformers has a separate module for this,
            WeightedLayerPooling.
        model_pooler: whether the vector is the model's own `pooler_output` instead of the result of `function`. The pooler is
            saved for sentence-transformers as a Dense module.
        training_head: whether a new dense layer and tanh follow the pooling in training. They are not saved.
        saved_as: the pooling of the saved encoder, if it is another one.
    """

    name: str
    description: str
    function: Callable[[Tensor, Tensor], Tensor]
    flag: str
    card: tuple[str, ...]
    layers: tuple[int, int] | None = None
    model_pooler: bool = False
    training_head: bool = False
    saved_as: str | None = None

    @property
    def mode(self) -> str:
        """The name of the pooling in sentence-transformers 6: "mean" for the flag "mean_tokens"."""
        return self.flag.removesuffix("s").removesuffix("_token")


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden state of each text's first token."""
    return states[:, 0]


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden state of each text's last token before the padding."""
    return states[torch.arange(states.shape[0], device=states.device), mask.sum(1) - 1]


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each text's hidden states, weighted by `mask`, which may contain other weights than 0 and 1."""
    weights = mask.unsqueeze(-1).to(torch.promote_types(states.dtype, torch.float32))  # (B, T, 1); half precision overflows
    return ((states * weights).sum(1) / weights.sum(1)).to(states.dtype)


def position_weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each text's hidden states, where the n-th token has the weight n (SGPT)."""
    return mean(states, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))


MASK_LINE = 'mask = batch["attention_mask"].unsqueeze(-1)'
MEAN_LINE = "vectors = (states * mask).sum(1) / mask.sum(1)"
# The MLP variants pass [CLS] through a dense layer and tanh (SimCSE, arXiv 2104.08821, section 6.3 and table 6). "First" in
# first_last is the first transformer layer and not the embedding layer, as in the released code of SimCSE.
POOLINGS: dict[str, Pooling] = {
    pooling.name: pooling
    for pooling in (
        Pooling(
            name="cls",
            description="the hidden state of the first token",
            function=first_token,
            flag="cls_token",
            card=("vectors = output.last_hidden_state[:, 0]",),
        ),
        Pooling(
            name="cls_mlp",
            description="the first token's hidden state through the model's own pooler (dense + tanh), which is saved",
            function=first_token,
            flag="cls_token",
            card=("vectors = output.pooler_output",),
            model_pooler=True,
        ),
        Pooling(
            name="cls_mlp_train",
            description="like cls_mlp in training; evaluated and saved as cls (SimCSE, unsupervised)",
            function=first_token,
            flag="cls_token",
            card=(),
            training_head=True,
            saved_as="cls",
        ),
        Pooling(
            name="mean",
            description="mean over the tokens",
            function=mean,
            flag="mean_tokens",
            card=(MASK_LINE, "vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)"),
        ),
        Pooling(
            name="last",
            description="the hidden state of the last token (for decoders)",
            function=last_token,
            flag="lasttoken",
            card=(
                'last = batch["attention_mask"].sum(1) - 1  # padding is on the right',
                "vectors = output.last_hidden_state[torch.arange(len(last)), last]",
            ),
        ),
        Pooling(
            name="weighted_mean",
            description="mean over the tokens, where the n-th token has the weight n (SGPT)",
            function=position_weighted_mean,
            flag="weightedmean_tokens",
            card=(
                'weights = (batch["attention_mask"].cumsum(1) * batch["attention_mask"]).unsqueeze(-1)'
                "  # 1, 2, 3 ... along the tokens",
                "vectors = (output.last_hidden_state * weights).sum(1) / weights.sum(1)",
            ),
        ),
        Pooling(
            name="first_last",
            description="mean over the tokens of the first and the last layer, averaged",
            function=mean,
            flag="mean_tokens",
            card=(MASK_LINE, "states = (output.hidden_states[1] + output.hidden_states[-1]) / 2", MEAN_LINE),
            layers=(1, -1),
        ),
        Pooling(
            name="top2",
            description="mean over the tokens of the last two layers, averaged",
            function=mean,
            flag="mean_tokens",
            card=(MASK_LINE, "states = (output.hidden_states[-2] + output.hidden_states[-1]) / 2", MEAN_LINE),
            layers=(-2, -1),
        ),
    )
}


class Dense(nn.Module):
    """A layer after the pooling, (B, D) -> (B, out), in the form that sentence-transformers saves.

    With `residual` the input is added to the output. If their widths differ, the input passes through its own linear map first.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: bool = False):
        super().__init__()
        self.linear, self.activation = linear, activation
        self.residual: nn.Module | None = None
        if residual:
            wide, narrow = linear.in_features, linear.out_features
            self.residual = nn.Identity() if wide == narrow else nn.Linear(wide, narrow, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (B, D) to vectors (B, out)."""
        out = self.activation(self.linear(embeddings))
        return out if self.residual is None else out + self.residual(embeddings)


def check_pooling(pooling: str) -> None:
    """Raise InputError, with the names of all poolings, if a name is not in the table."""
    check_one_of("pooling", pooling, POOLINGS)


def pool(pooling: str, hidden_states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Pool the hidden states of the layers, each (B, T, D), to vectors (B, D); see `states_to_pool`."""
    return POOLINGS[pooling].function(states_to_pool(pooling, hidden_states), mask)


def states_to_pool(pooling: str, hidden_states: tuple[Tensor, ...]) -> Tensor:
    """Return the hidden states, (B, T, D), that a pooling reads.

    `hidden_states[0]` is the embedding layer and `hidden_states[-1]` the last layer. A pooling of only the last layer reads
    only the last entry.
    """
    layers = POOLINGS[pooling].layers
    return hidden_states[-1] if layers is None else (hidden_states[layers[0]] + hidden_states[layers[1]]) / 2


def find_pooling(mode: str, layers: tuple[int, int] | None = None, model_pooler: bool = False) -> str | None:
    """Return the saved pooling that sentence-transformers calls `mode` (flag or name); None if there is none."""
    for entry in POOLINGS.values():
        same = (entry.layers, entry.model_pooler, entry.saved_as) == (layers, model_pooler, None)
        if same and mode in (entry.flag, entry.mode):
            return entry.name
    return None


def saved_pooling(pooling: str) -> str:
    """Return the pooling of the saved encoder, which does not contain a head that exists only in training."""
    return POOLINGS[pooling].saved_as or pooling


def uses_pooler(pooling: str | None) -> bool:
    """Return whether the vector of this pooling is the model's own `pooler_output`. False if `pooling` is None."""
    return pooling is not None and POOLINGS[pooling].model_pooler
