"""Token states to one vector per text: the table of poolings. A new pooling is one entry of `POOLINGS`.

Shapes: B texts of T tokens, D wide; `mask` is (B, T), 1 on tokens and 0 on padding, padding on the right.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_embed.errors import InputError
from hf_embed.ranges import is_one_of


@dataclass(frozen=True)
class Pooling:
    """One way to make a vector of a text's token states, and how a saved folder and its card express it.

    Attributes:
        name: what users call it.
        description: what it computes, in words.
        function: from the states (B, T, D) and the mask (B, T) to the vectors (B, D).
        flag: its flag in sentence-transformers' 1_Pooling/config.json, without `pooling_mode_`.
        mode: its name in sentence-transformers 6.
        card: the lines of code that the model card shows; from `output` and `batch` to `vectors`.
        layers: the two layers whose average is the states, as indices of `hidden_states` (0 is the embedding layer); None: the
            last layer alone. sentence-transformers has a module of its own for it, WeightedLayerPooling.
        model_pooler: whether the vector is the model's own `pooler_output`, in place of what `function` gives. The pooler is
            saved for sentence-transformers as a Dense module.
        training_head: whether a new dense layer and tanh follow it while training, which are not saved.
        saved_as: the pooling of the saved encoder, where it is another.
    """

    name: str
    description: str
    function: Callable[[Tensor, Tensor], Tensor]
    flag: str
    mode: str
    card: tuple[str, ...]
    layers: tuple[int, int] | None = None
    model_pooler: bool = False
    training_head: bool = False
    saved_as: str | None = None


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return each text's first state."""
    return states[:, 0]


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return each text's last state before the padding."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each text's states, weighted by `mask`, which may have other weights than 0 and 1."""
    weights = mask.unsqueeze(-1).to(torch.promote_types(states.dtype, torch.float32))  # (B, T, 1); half would overflow
    return ((states * weights).sum(1) / weights.sum(1)).to(states.dtype)


def position_weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each text's states, the n-th weighing n."""
    return mean(states, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))


MASK_LINE = 'mask = batch["attention_mask"].unsqueeze(-1)'
MEAN_LINE = "vectors = (states * mask).sum(1) / mask.sum(1)"
# The MLP variants take [CLS] through a dense layer and tanh (SimCSE, section 6.3). "First" of first_last is the first
# transformer layer, not the embedding layer, as in SimCSE's code.
POOLINGS: dict[str, Pooling] = {
    pooling.name: pooling
    for pooling in (
        Pooling(
            name="cls",
            description="the first token's state",
            function=first_token,
            flag="cls_token",
            mode="cls",
            card=("vectors = output.last_hidden_state[:, 0]",),
        ),
        Pooling(
            name="cls_mlp",
            description="the first token's state through the model's own pooler (dense + tanh), kept in the checkpoint",
            function=first_token,
            flag="cls_token",
            mode="cls",
            card=("vectors = output.pooler_output",),
            model_pooler=True,
        ),
        Pooling(
            name="cls_mlp_train",
            description="like cls_mlp while training; evaluated and saved as cls (SimCSE, unsupervised)",
            function=first_token,
            flag="cls_token",
            mode="cls",
            card=(),
            training_head=True,
            saved_as="cls",
        ),
        Pooling(
            name="mean",
            description="mean over the tokens",
            function=mean,
            flag="mean_tokens",
            mode="mean",
            card=(MASK_LINE, "vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)"),
        ),
        Pooling(
            name="last",
            description="the last token's state (decoders)",
            function=last_token,
            flag="lasttoken",
            mode="lasttoken",
            card=(
                'last = batch["attention_mask"].sum(1) - 1  # padding is on the right',
                "vectors = output.last_hidden_state[torch.arange(len(last)), last]",
            ),
        ),
        Pooling(
            name="weighted_mean",
            description="mean over the tokens, the n-th weighing n (SGPT)",
            function=position_weighted_mean,
            flag="weightedmean_tokens",
            mode="weightedmean",
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
            mode="mean",
            card=(MASK_LINE, "states = (output.hidden_states[1] + output.hidden_states[-1]) / 2", MEAN_LINE),
            layers=(1, -1),
        ),
        Pooling(
            name="top2",
            description="mean over the tokens of the last two layers, averaged",
            function=mean,
            flag="mean_tokens",
            mode="mean",
            card=(MASK_LINE, "states = (output.hidden_states[-2] + output.hidden_states[-1]) / 2", MEAN_LINE),
            layers=(-2, -1),
        ),
    )
}


class Dense(nn.Module):
    """A layer behind the pooling, (B, D) -> (B, out), as sentence-transformers saves them.

    With `residual` the embedding is added to what comes out, through a linear map of its own where the widths differ.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: bool = False):
        super().__init__()
        self.linear, self.activation = linear, activation
        self.residual: nn.Module | None = None
        if residual:
            wide, narrow = linear.in_features, linear.out_features
            self.residual = nn.Identity() if wide == narrow else nn.Linear(wide, narrow, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the layer's vectors (B, out) of `embeddings` (B, D)."""
        out = self.activation(self.linear(embeddings))
        return out if self.residual is None else out + self.residual(embeddings)


def check_pooling(pooling: str) -> None:
    """Raise InputError, naming those that there are, for a name that is not in the table."""
    if not is_one_of(pooling, POOLINGS):
        raise InputError(f"unknown pooling '{pooling}'; take one of {', '.join(POOLINGS)}")


def pool(pooling: str, hidden_states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Pool the layers' states, each (B, T, D), to (B, D). `hidden_states[0]` is the embedding layer, [-1] the last.

    A pooling of the last layer alone reads only the last entry.
    """
    entry, states = POOLINGS[pooling], hidden_states[-1]
    if entry.layers is not None:
        one, other = entry.layers
        states = (hidden_states[one] + hidden_states[other]) / 2
    return entry.function(states, mask)


def find_pooling(mode: str, layers: tuple[int, int] | None = None, model_pooler: bool = False) -> str | None:
    """Return the saved pooling that sentence-transformers knows by the flag or the name `mode`; None if there is none."""
    for entry in POOLINGS.values():
        same = (entry.layers, entry.model_pooler, entry.saved_as) == (layers, model_pooler, None)
        if same and mode in (entry.flag, entry.mode):
            return entry.name
    return None


def saved_pooling(pooling: str) -> str:
    """Return the pooling of a saved encoder: a head that is for training only stays behind."""
    return POOLINGS[pooling].saved_as or pooling


def uses_pooler(pooling: str | None) -> bool:
    """Return whether a pooling, if one is named, is the model's own `pooler_output`."""
    return pooling is not None and POOLINGS[pooling].model_pooler
