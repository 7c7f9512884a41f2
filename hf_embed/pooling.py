"""Token states to one vector per text.

Shapes: B texts of T tokens, D wide; `mask` is (B, T), 1 on tokens and 0 on padding, padding on the right.
"""

import torch
from torch import Tensor, nn

from hf_embed.errors import InputError

# pooling -> what it computes. The MLP variants take [CLS] through a dense layer and tanh (SimCSE, section 6.3).
POOLINGS = {
    "cls": "the first token's state",
    "cls_mlp": "the first token's state through the model's own pooler (dense + tanh), kept in the checkpoint",
    "cls_mlp_train": "like cls_mlp while training; evaluated and saved as cls (SimCSE, unsupervised)",
    "mean": "mean over the tokens",
    "last": "the last token's state (decoders)",
    "weighted_mean": "mean over the tokens, the n-th weighing n (SGPT)",
    "first_last": "mean over the tokens of the first and the last layer, averaged",
    "top2": "mean over the tokens of the last two layers, averaged",
}
MULTI_LAYER = {"first_last", "top2"}


class Dense(nn.Module):
    """A layer behind the pooling, (B, D) -> (B, out), as sentence-transformers saves them.

    With `residual` the embedding is added to what comes out, through a linear map of its own where the widths differ.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: bool = False):
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, None
        if residual:
            wide, narrow = linear.in_features, linear.out_features
            self.residual = nn.Identity() if wide == narrow else nn.Linear(wide, narrow, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        out = self.activation(self.linear(embeddings))
        return out if self.residual is None else out + self.residual(embeddings)


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise InputError(f"unknown pooling '{pooling}'; take one of {', '.join(POOLINGS)}")


def pool(pooling: str, hidden_states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Pool the layers' states, each (B, T, D), to (B, D). `hidden_states[0]` is the embedding layer, [-1] the last.

    A single-layer pooling reads only the last entry. "first" of first_last is the first transformer layer, not the
    embedding layer, as in SimCSE's code.
    """
    states = hidden_states[-1]
    if pooling in ("cls", "cls_mlp", "cls_mlp_train"):
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    if pooling == "weighted_mean":
        mask = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    elif pooling == "first_last":
        states = (hidden_states[1] + states) / 2
    elif pooling == "top2":
        states = (hidden_states[-2] + states) / 2
    weights = mask.unsqueeze(-1).to(torch.promote_types(states.dtype, torch.float32))  # (B, T, 1); half would overflow
    return ((states * weights).sum(1) / weights.sum(1)).to(states.dtype)


def saved_pooling(pooling: str) -> str:
    """The pooling of a saved encoder: a head that is for training only stays behind."""
    return "cls" if pooling == "cls_mlp_train" else pooling
