"""Attention within the texts of a packed row (`hf_embed.forward.packing`), for models with PyTorch's attention ("sdpa").

transformers passes the bounds of the texts from the arguments of the model to `attend_by_text`. Their name is not that of the
bounds for flash attention, because other callers may pass `cu_seq_lens_q` to PyTorch's attention together with a mask.

On a GPU, PyTorch has kernels that read the bounds of the texts. On a CPU, consecutive texts of the same length are computed
together: a chunk is sorted by length, so these are few groups.

Shapes: S tokens in all. H heads of d numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

from hf_embed.forward.dropout import draw_mask
from hf_embed.library_internals import EFFICIENT_DROPOUT, efficient_attention, flash_attention

# What transformers may pass to an attention function beside its known arguments, and what changes nothing there.
IGNORED_ARGUMENTS = {"position_ids", "output_attentions", "output_hidden_states", "use_cache", "cu_seq_lens_q", "cu_seq_lens_k",
                     "max_length_q", "max_length_k"}  # fmt: skip

# Up to this number of tokens, training is faster with attention from here (`_Attend`) than with PyTorch's function.
SHORT = 128

# On a GPU, flash attention is faster than the memory-efficient attention for texts of more tokens than this. It computes tiles
# of 128 x 128 scores, and the other one tiles of 64 x 64. Forward and backward pass of BERT-base's attention with dropout, on
# an H200: 1,170 texts of 18 tokens take 1.68 ms and 0.72 ms, 118 texts of 236 tokens take 0.70 ms and 1.38 ms.
FLASH_TOKENS = 64
# The largest number of numbers in a head for which flash attention has a backward pass with dropout on every GPU. On consumer
# cards (compute capability 8.6, 8.9 and 12), that of larger heads ends in an error.
FLASH_WIDTH = 192

CUDNN = False  # whether padded texts may have the attention of cuDNN; see `without_cudnn`


class CannotPack(NotImplementedError):
    """The attention of a model needs something that a packed row does not have."""


class CannotDrop(CannotPack):
    """There is a kernel for a packed row, but none with dropout, so the texts are padded in training only."""


def attend_by_text(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    text_bounds: Tensor | None = None,
    longest_text: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' "sdpa" does. In a packed row, the tokens of a text attend to that text only.

    Args:
        module: the attention module.
        query: (1, H, S, d) for a packed row, otherwise (b, H, T, d).
        key: as `query`; it may have fewer heads.
        value: as `key`.
        attention_mask: None in a packed row.
        dropout: the probability of dropping a weight.
        scaling: the factor of the scores; None: 1 / sqrt(d).
        is_causal: whether a token attends only to earlier ones; None: what the module says. Never in a packed row.
        text_bounds: (b + 1,) int32, the first token of each text in a packed row, and S; None: the texts are padded.
        longest_text: the number of tokens of the longest text in a packed row.
        others: further arguments of "sdpa".

    Returns:
        (1, S, H, d), or (b, T, H, d) for padded texts, and None.

    Raises:
        CannotPack: if the model needs more than scores within texts.
    """
    if text_bounds is None:
        return PADDED(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)
    unknown = [name for name, given in others.items() if given is not None and name not in IGNORED_ARGUMENTS]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal  # as "sdpa" reads None
    if attention_mask is not None or unknown or causal:
        raise CannotPack(f"attention with {', '.join(unknown) or 'a mask'} in a packed row")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (S, H, d)
    if query.device.type != "cpu":
        return attend_on_gpu(q, k, v, text_bounds, longest_text, dropout, scaling).unsqueeze(0), None
    lengths = tuple(text_bounds.diff().tolist())
    # The choice must not depend on whether a gradient is needed: gradient caching encodes a chunk without, then with one.
    short = module.training and max(lengths) <= SHORT
    if (dropout or short) and query.shape[1] == key.shape[1]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = _Attend.apply(q, k, v, by_head(lengths, query.shape[1]), dropout, scale)
    else:
        attended = attend_by_function(q, k, v, lengths, dropout, scaling)
    return attended.unsqueeze(0), None


PADDED = AttentionInterface()["sdpa"]
# With padded texts this is still `PADDED`, so other models in this process compute what they did.
AttentionInterface.register("sdpa", attend_by_text)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Let PyTorch's attention for padded texts use other kernels than those of cuDNN inside a `with` block.

    On some GPUs (H100, H200, B200), PyTorch prefers cuDNN in half precision. It prepares its kernels for each new number of
    texts and of tokens, which takes longer than a chunk, and nearly every chunk is new. And with a mask, its gradients can be
    NaN for some numbers of tokens (https://github.com/pytorch/pytorch/issues/196678).
    """
    if CUDNN or torch.compiler.is_compiling() or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scale: float | None
) -> Tensor:
    """Attend with the kernels of PyTorch that read the bounds of texts. Query and result are (S, H, d).

    The choice of the kernel depends on shapes only, because reading the bounds would make the host wait for the GPU.

    Raises:
        CannotPack: if there is no kernel for the precision or for d.
        CannotDrop: if there is one, but without dropout.
    """
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's function for padded texts does
        query, key, value = (states.to(torch.get_autocast_dtype(query.device.type)) for states in (query, key, value))
    long = len(query) > FLASH_TOKENS * (len(bounds) - 1)
    kernel = gpu_kernel(query.device, query.dtype, query.shape[2], long, dropout > 0)
    if kernel is None:
        plain = gpu_kernel(query.device, query.dtype, query.shape[2], long, False)
        kind = CannotPack if plain is None else CannotDrop
        raise kind(f"attention in {query.dtype} with heads of {query.shape[2]} numbers in a packed row")
    if query.shape[1] != key.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    return kernel(query, key, value, bounds, longest, dropout, scale)


@lru_cache
def gpu_kernel(device: torch.device, dtype: torch.dtype, width: int, long: bool, drops: bool) -> Callable[..., Tensor] | None:
    """Return the kernel that attends within the texts of a packed row; None: there is none.

    Args:
        device: the GPU.
        dtype: the precision of the states.
        width: d, the numbers of a head.
        long: whether a text has more than `FLASH_TOKENS` tokens on average.
        drops: whether there is dropout.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or width % 8:
        return None
    recent = torch.cuda.get_device_capability(device) >= (8, 0)  # unlike a T4, which computes bfloat16 without kernels for it
    flash = recent and dtype != torch.float32 and width <= FLASH_WIDTH
    efficient = (recent or dtype != torch.bfloat16) and (EFFICIENT_DROPOUT or not drops)
    if flash and (long or not efficient):
        return flash_attention
    return efficient_attention if efficient else None


def groups_of(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (length, number of texts) of each group of consecutive texts of the same length.

    >>> groups_of((3, 2, 2))
    [(3, 1), (2, 2)]
    """
    return [(length, len(list(texts))) for length, texts in groupby(lengths)]


def attend_by_function(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float, scale: float | None
) -> Tensor:
    """Attend with PyTorch's function, group by group. Key and value may have fewer heads. All tensors are (S, H, d)."""
    groups, outputs = groups_of(lengths), []
    tokens = [length * texts for length, texts in groups]
    # `split` has one backward pass for all groups, where slices would each fill a gradient of the whole row.
    for (length, texts), *parts in zip(groups, *(states.split(tokens) for states in (query, key, value))):
        q, k, v = (part.unflatten(0, (texts, length)).transpose(1, 2) for part in parts)  # (texts, H, length, d)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(value.dtype)


class ByHead:
    """Another order of the rows of a matrix (S * H, d): those of one head of one text lie together.

    A packed row has the order (text, token, head). Here it is (text, head, token), so a group of texts of the same length is a
    tensor (texts * H, length, d) without a copy. Two texts of 2 and 1 tokens, 2 heads:

        packed row      a0 a1 b0 b1 c0 c1
        by head         a0 b0 a1 b1 c0 c1
    """

    def __init__(self, lengths: tuple[int, ...], heads: int):
        self.heads, self.groups = heads, groups_of(lengths)
        sizes = torch.tensor(lengths)
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (S,) the first token of the text of each token
        tokens = torch.arange(len(starts)) - starts
        places = (starts * heads + tokens).unsqueeze(1) + sizes.repeat_interleave(sizes).unsqueeze(1) * torch.arange(heads)
        self.places = places.flatten()  # (S * H,) the new place of each row
        self.rows = torch.empty_like(self.places)  # (S * H,) the row at each new place
        self.rows[self.places] = torch.arange(len(self.places))

    def sort(self, states: Tensor) -> Tensor:
        """Return states (S, H, d) in this order: (S * H, d)."""
        return states.flatten(0, 1).index_select(0, self.rows)

    def restore(self, states: Tensor) -> Tensor:
        """Return states (S * H, d) in the order of the packed row: (S, H, d)."""
        return states.index_select(0, self.places).unflatten(0, (-1, self.heads))

    def split(self, states: Tensor) -> list[Tensor]:
        """Return the groups of states (S * H, d): a view (texts * H, length, d) for each."""
        parts = states.split([length * texts * self.heads for length, texts in self.groups])
        return [part.view(-1, length, states.shape[1]) for part, (length, _) in zip(parts, self.groups)]


by_head = lru_cache(maxsize=2)(ByHead)  # all layers of a chunk need the same one


class _Attend(torch.autograd.Function):
    """Attend within texts, group by group. Query, key, value and the result are (S, H, d).

    On a CPU, PyTorch's function is slow for short texts. With dropout, it draws its masks in one thread. And in bfloat16, its
    backward pass is made for long texts. The products here have at least the precision of float32: for products in bfloat16,
    oneDNN would compile and keep a kernel for every number of texts and tokens, which takes half a gigabyte.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, order: ByHead, p: float, scale: float) -> Tensor:
        """Return softmax(scale * query @ key') @ value for each text and head, with dropout of the softmax."""
        ctx.order, ctx.scale, ctx.factor = order, scale, 1.0
        recorded = any(ctx.needs_input_grad)  # otherwise nothing is kept for a backward pass
        rows = [order.sort(states) for states in (query, key, value)]
        queries, keys, values = map(as_wide, rows)
        output, kept, masks = torch.empty_like(values), [], []
        with torch.autocast("cpu", enabled=False):
            for q, k, v, out in zip(*map(order.split, (queries * scale, keys, values, output))):
                weights = torch.bmm(q, k.mT).softmax(-1)  # (texts * H, length, length)
                kept += [weights] if recorded else []
                if p:
                    mask, ctx.factor = draw_mask(weights.shape, p)
                    masks += [mask] if recorded else []
                    weights = (weights * mask.to(weights.dtype)).mul_(ctx.factor)
                torch.bmm(weights, v, out=out)
        if recorded:
            ctx.save_for_backward(*rows, *kept, *masks)
        return order.restore(output).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        order, saved, count = ctx.order, ctx.saved_tensors, len(ctx.order.groups)
        rows, kept, masks = saved[:3], saved[3 : 3 + count], saved[3 + count :] or [None] * count
        queries, keys, values, outputs = map(as_wide, (*rows, order.sort(gradient)))
        found = [torch.empty_like(states) for states in (queries, keys, values)]
        groups = zip(kept, masks, *map(order.split, (queries * ctx.scale, keys, values, outputs, *found)))
        with torch.autocast("cpu", enabled=False):
            for weights, mask, q, k, v, to_out, to_q, to_k, to_v in groups:  # "to": a gradient
                to_scores, dropped = torch.bmm(to_out, v.mT), weights
                if mask is not None:
                    factors = mask.to(weights.dtype).mul_(ctx.factor)
                    to_scores *= factors
                    dropped = weights * factors
                torch.bmm(dropped.mT, to_out, out=to_v)
                to_scores *= weights
                to_scores -= weights * to_scores.sum(-1, keepdim=True)  # the gradient of softmax
                torch.bmm(to_scores, k, out=to_q)
                torch.bmm(to_scores.mT, q, out=to_k)
        found[0] *= ctx.scale
        return *(order.restore(states).to(row.dtype) for states, row in zip(found, rows)), None, None, None


def as_wide(states: Tensor) -> Tensor:
    """Return states in the precision of the products: float64 as it is, everything else in float32."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
