"""Read the table of token embeddings in every chunk, but make one gradient of it for each step.

The gradient of an embedding table is as large as the table, and PyTorch makes one for each lookup. For a small chunk this takes
longer than the chunk itself. Here the backward pass of each lookup adds the gradients of its own tokens to one gradient that
all chunks of the step share. This gradient reaches the weight once, after the last lookup.

The model does its own lookups, wherever they are. Only the meaning of `F.embedding` changes, for the weight of this table and
while the table is called. So tables that scale their rows (Gemma) work too.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


def word_table(base: PreTrainedModel) -> nn.Embedding | None:
    """Return the model's table of token embeddings, or None if it is not an `nn.Embedding`."""
    try:
        table = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Embedding) else None


class SharedGradient:
    """The gradient of a word table in one step. The lookups of the backward pass add to it.

    Attributes:
        module: the table, with its weight (vocabulary, width).
        total: (vocabulary, width), at least in float32; None if no lookup has added to it.
    """

    def __init__(self, module: nn.Embedding):
        self.module = module
        self.total: Tensor | None = None

    def add(self, ids: Tensor, rows: Tensor) -> None:
        """Add the gradients `rows` (S, width) of a lookup of the tokens `ids` (S,)."""
        weight, padding = self.module.weight, self.module.padding_idx
        if self.total is None:
            self.total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        if padding is not None:  # as in nn.Embedding: the row of this token is not trained
            rows = rows.masked_fill((ids == padding).unsqueeze(1), 0)
        rows = rows.to(self.total.dtype)
        # Each function adds in a fixed order on its own device only. On the other one, rounding would differ from run to run.
        if ids.device.type == "cuda":
            self.total.index_put_((ids,), rows, accumulate=True)
        else:
            self.total.index_add_(0, ids, rows)


class _Share(torch.autograd.Function):
    """Map a weight to an empty tensor, which is an input of all lookups. The gradient of the weight is the shared one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.gradient = gradient
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, empty: Tensor) -> tuple[Tensor | None, None]:  # autograd runs it after that of the last lookup
        total, ctx.gradient.total = ctx.gradient.total, None
        return None if total is None else total.to(empty.dtype), None


class _Lookup(torch.autograd.Function):
    """Look up token ids of any shape (...): (..., width)."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, ids: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.gradient = gradient
        return F.embedding(ids, gradient.module.weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.gradient.add(ids.flatten(), rows.flatten(0, -2))
        return ctx.gradient.module.weight.new_empty(0), None, None


class Replaced(TorchFunctionMode):
    """A context in which calls of `function`, which is one of PyTorch's, are calls of `other`. Inside `other`, they are not."""

    def __init__(self, function: Callable, other: Callable):
        super().__init__()
        self.function, self.other = function, other

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call the function, or the other one."""
        return (self.other if function is self.function else function)(*args, **(kwargs or {}))


def share_gradient(table: nn.Embedding | None) -> tuple[SharedGradient | None, Tensor]:
    """Return the gradient that the lookups of one step share, and an empty tensor that connects them with the weight.

    There is no shared gradient if the table needs none, or is of a special kind. The empty tensor then connects nothing.
    """
    special = table is not None and (table.max_norm is not None or table.scale_grad_by_freq or table.sparse)
    if table is None or special or not torch.is_grad_enabled() or not table.weight.requires_grad:
        return None, torch.empty(0)
    gradient = SharedGradient(table)
    return gradient, _Share.apply(table.weight, gradient)


@contextlib.contextmanager
def sharing(gradient: SharedGradient | None, shared: Tensor) -> Iterator[None]:
    """Return a context in which calls of the table share their gradient. Code that torch.compile compiles does not."""
    if gradient is None or torch.compiler.is_compiling():
        yield
        return
    table = gradient.module
    own, call = vars(table).get("forward"), table.forward

    def lookup(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weight is table.weight:
            return _Lookup.apply(shared, input, gradient)
        return F.embedding(input, weight, *args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with Replaced(F.embedding, lookup):
            return call(*args, **kwargs)

    table.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del table.forward
        else:  # for example that of accelerate
            table.forward = own  # type: ignore[method-assign]
