"""Draw the masks of dropout faster on a CPU.

PyTorch draws one random number for each element of a mask, in one thread. Here a random number of 64 bits gives four elements,
of 16 bits each, so drawing takes a fifth of the time.

The numbers still come from PyTorch's generator of the CPU, so a seed, the states in a checkpoint and the states that gradient
caching restores determine the masks. An element is kept with a probability k / 65536, where k is the integer nearest to
65536 (1 - p), and divided by that probability. So the expectation is exact, and p is exact to 2^-17.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_embed.adapters import configs_of

DRAWS = 2**16  # values of a draw


class _Mask(torch.autograd.Function):
    """Multiply by a mask of 0 and 1, and by a number. Only the mask is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.factor = factor
        # The factor is not part of the mask, because a mask in bfloat16 would round it.
        return (values * mask.to(values.dtype)).mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask.to(gradient.dtype)).mul_(ctx.factor), None, None


def draw_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Draw a mask of 0 and 1 on the CPU, in int8. Return it and the factor for what it keeps.

    A probability that 16 bits cannot express is left to PyTorch.
    """
    kept = round((1 - p) * DRAWS)
    if not 0 < kept < DRAWS:
        return torch.empty(shape, dtype=torch.int8).bernoulli_(1 - p), 1 / (1 - p) if p < 1 else 0.0
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[: shape.numel()].view(shape)  # from -DRAWS / 2 to DRAWS / 2 - 1
    return draws.lt_(kept - DRAWS // 2).to(torch.int8), DRAWS / kept


def dropout(values: Tensor, p: float) -> Tensor:
    """Set each element to 0 with the probability p, and divide the others by 1 - p. `values` may have any shape.

    A tensor on another device than the CPU gets the dropout of PyTorch.
    """
    return _Mask.apply(values, *draw_mask(values.shape, p)) if values.device.type == "cpu" else F.dropout(values, p)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with faster masks on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the values after dropout in training mode, and the values themselves otherwise."""
        return dropout(input, self.p) if self.training and self.p else input


def use_fast_dropout(model: nn.Module) -> None:
    """Replace the dropout of a model in place. Modules of a subclass of `nn.Dropout` keep theirs."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = FastDropout


def use_plain_dropout(model: nn.Module) -> None:
    """Give a model the dropout of PyTorch again, so that it can be pickled and transformed without this package."""
    for module in model.modules():
        if type(module) is FastDropout:
            module.__class__ = nn.Dropout  # type: ignore[assignment]


def dropout_rates(backbone: PreTrainedModel) -> dict[str, float]:
    """Return the dropout rates in the configs of a model and its adapters, by name."""
    rates = {key: value for config in configs_of(backbone) for key, value in config.items() if "drop" in key}
    return {key: value for key, value in rates.items() if isinstance(value, int | float) and not isinstance(value, bool)}
