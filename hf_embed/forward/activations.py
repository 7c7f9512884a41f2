"""Keep the activations of as many chunks as fit into the GPU's memory, and recompute only those of the other chunks.

This is `gradient_caching="as_needed"`:

1. In the first step, all chunks but the last are recomputed in the backward pass. The last one is measured: how many bytes
   its activations take for each token.
2. After the first update, the peak of the memory shows how much of it no step needs.
3. From then on, most of this memory holds the activations of the last chunks of each step. The backward pass begins with
   these chunks, so their memory is free again before it recomputes the others.

Recomputation uses the same random states, so the gradients are bit for bit the same, whichever chunks are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from hf_embed.errors import InputError
from hf_embed.forward.packed_attention import without_cudnn
from hf_embed.forward.word_table import share_gradient, sharing, word_table
from hf_embed.library_internals import has_gradient_hook

AS_NEEDED = "as_needed"

# The share of the unused memory that activations may fill. The rest is for fragmentation, and for chunks that need more memory
# for each token than those that were measured.
SHARE = 0.8


def caching_mode(text: str) -> bool | str:
    """Return the value of `gradient_caching` that a word on the command line or in a YAML file means."""
    return text if text == AS_NEEDED else string_to_bool(text)


def check_caching(caching: object, device: torch.device) -> None:
    """Raise InputError if `gradient_caching` has an unknown value, or one that needs a GPU where there is none."""
    if not isinstance(caching, bool) and caching != AS_NEEDED:
        raise InputError(f"gradient_caching is {caching!r}; it must be True, False or {AS_NEEDED!r}")
    if caching == AS_NEEDED and device.type != "cuda":
        raise InputError(
            f"gradient_caching is {AS_NEEDED}, which needs a GPU, because only there it is known how much memory is free; set "
            "it to true or false"
        )


def allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU."""
    return torch.cuda.memory_allocated(device)


def unused(device: torch.device) -> int:
    """Return the bytes of a GPU that were free when this process used the most memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def forget_peak(device: torch.device) -> None:
    """Let the most memory that this process used on a GPU count from now on."""
    torch.cuda.reset_peak_memory_stats(device)


class Activations:
    """Decides how many chunks of a step keep their activations.

    Attributes:
        limit: the bytes that activations may fill. It is 0 until the first update.
        per_token: the most bytes that the activations of a measured chunk took for each token.
    """

    def __init__(self, limit: float = 0.0):
        self.limit, self.per_token = limit, 0.0
        self.first_step: int | None = None

    def begin(self, step: int, device: torch.device) -> None:
        """Set the limit if `step` is the first one after an update. Call this at the beginning of every step."""
        if self.first_step is None:
            self.first_step = step
            forget_peak(device)  # of an earlier training in this process, or of an evaluation
        elif not self.limit and step > self.first_step:
            self.limit = max(1.0, SHARE * unused(device))  # at least 1, so that it is measured only once

    def recomputed(self, tokens: list[int]) -> int:
        """Return how many of the chunks are recomputed: the first ones. The last chunk is always kept.

        Args:
            tokens: the number of tokens in each chunk, padding included.

        >>> activations = Activations(limit=1000)
        >>> activations.per_token = 10.0
        >>> activations.recomputed([50, 40, 40, 30])
        2
        """
        count = len(tokens) - 1
        left = self.limit - self.per_token * tokens[-1]
        while self.per_token and count > 0 and (left := left - self.per_token * tokens[count - 1]) >= 0:
            count -= 1
        return count

    def keep(self, encode: Callable[..., Tensor], tokens: int, *inputs: Any) -> Tensor:
        """Return `encode(*inputs)`, keep its activations, and measure them. `tokens` is the number of tokens in the chunk."""
        device = inputs[0].device
        before = allocated(device)
        embeddings = encode(*inputs)
        self.per_token = max(self.per_token, (allocated(device) - before) / tokens)
        return embeddings


class _Recompute(torch.autograd.Function):
    """Encode a chunk on a CPU without a graph, and once more in the backward pass, with the same random state.

    `torch.utils.checkpoint` keeps the graph of every chunk: many small objects, which lie between the activations that are
    freed. The C library could not use this memory for the next chunks, and the process grew with each chunk.
    """

    @staticmethod
    def forward(ctx: Any, encode: "ChunkEncoder", inputs: tuple, shared: Tensor, *trained: Tensor) -> Tensor:
        ctx.encode, ctx.inputs, ctx.shared, ctx.trained = encode, inputs, shared, trained
        ctx.random, ctx.autocast = torch.get_rng_state(), torch.is_autocast_enabled("cpu")
        ctx.dtype = torch.get_autocast_dtype("cpu")
        return encode.run(shared, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shared = ctx.shared.detach().requires_grad_()  # the lookups of this chunk end here
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", ctx.dtype, ctx.autocast):
            torch.set_rng_state(ctx.random)
            embeddings = ctx.encode.run(shared, ctx.inputs)
        gradients = torch.autograd.grad(embeddings, (shared, *ctx.trained), gradient, allow_unused=True)
        return None, None, *gradients


class ChunkEncoder:
    """The function that encodes the chunks of one step.

    Args:
        encode: maps the tensors of a chunk to its embeddings (b, D).
        module: the module whose parameters `encode` uses.
        base: the model that reads the word table.
        sharded: the parameters are sharded (FSDP, ZeRO). The chunks then share no gradient of the word table, which is a
            sharded tensor outside the forward pass of its own layer.
    """

    def __init__(self, encode: Callable[..., Tensor], module: nn.Module, base: PreTrainedModel, sharded: bool):
        self.encode, self.module, self.sharded = encode, module, sharded
        self.gradient, self.shared = share_gradient(None if sharded else word_table(base))

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get a gradient. Only recomputed chunks ask for them."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def run(self, shared: Tensor, inputs: tuple) -> Tensor:
        """Encode a chunk whose lookups take `shared` as an input.

        Under autocast, each chunk casts the weights itself. With the cache of autocast, the gradients of all chunks would be
        summed in half precision, and chunks with a graph could take weights that were cast without one.
        """
        try:
            with sharing(self.gradient, shared), without_cudnn():
                return self.encode(*inputs)
        finally:
            torch.clear_autocast_cache()

    def __call__(self, *inputs: Any) -> Tensor:
        """Encode a chunk, and keep its activations if a gradient is needed."""
        return self.run(self.shared, inputs)

    def recomputed(self, *inputs: Any) -> Tensor:
        """Encode a chunk, and recompute it in the backward pass."""
        # A hook on a parameter would see, and could change, the gradient of each chunk and then their sum.
        hooked = any(map(has_gradient_hook, self.trained))
        if self.sharded or hooked or inputs[0].device.type != "cpu":
            contexts = on_apple if inputs[0].device.type == "mps" else noop_context_fn
            return checkpoint(self, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
        return _Recompute.apply(self, inputs, self.shared, *self.trained)


def on_apple() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return contexts for a forward pass on Apple's GPU that begins now, and for its repetition with the same random state.

    `torch.utils.checkpoint` restores this state on all other devices.
    """
    return nullcontext(), random_state_of_apple(torch.mps.get_rng_state())


@contextmanager
def random_state_of_apple(state: Tensor) -> Iterator[None]:
    """Inside a `with` block, let random numbers on Apple's GPU follow `state`, and afterwards the state from before."""
    before = torch.mps.get_rng_state()
    torch.mps.set_rng_state(state)
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)


def with_caching(encode: ChunkEncoder, caching: bool | Activations, tokens: list[int]) -> list[Callable[..., Tensor]]:
    """Return for each chunk the function that encodes it as `encode` does.

    Args:
        encode: the function that encodes a chunk. Its first argument is a tensor.
        caching: True: the backward pass recomputes every chunk. False: none. `Activations` decides which ones.
        tokens: the number of tokens in each chunk, padding included.
    """
    if not caching or not torch.is_grad_enabled():
        return [encode] * len(tokens)
    if caching is True:
        return [encode.recomputed] * len(tokens)
    count = caching.recomputed(tokens)
    return [encode.recomputed] * count + [partial(caching.keep, encode, size) for size in tokens[count:]]
