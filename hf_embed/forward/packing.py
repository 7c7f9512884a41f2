"""Pack the texts of a chunk into one row without padding, and let the tokens of a text attend to that text only.

Three texts of 3, 2 and 1 tokens, padded and packed:

    padded, (3, 3)     packed, (1, 6)        positions      cu_seq_lens
    a b c              a b c d e f           0 1 2 0 1 0    0 3 5 6
    d e .
    f . .

In the packed row, every layer except attention computes no padding. Attention gets the bounds of the texts, `cu_seq_lens`:
the package flash_attn reads them, and for PyTorch's attention `hf_embed.forward.packed_attention` does.

Not every model can be packed: position biases, sliding windows or positions of another kind give other vectors, or an error.
Therefore `hf_embed.forward.check` computes a few texts both ways, and a model whose vectors differ is padded.

Shapes: a chunk has b texts of at most T tokens, S tokens in all. D is the width of a hidden state.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from hf_embed.forward.packed_attention import attend_by_text
from hf_embed.library_internals import attention_backend

# The attentions that can be packed, with the kinds of devices on which they can.
PACKED_ATTENTION = [("sdpa", "cpu"), ("sdpa", "cuda"), ("flash_attention_2", "cuda")]
# Under autocast, the size of a packed row of at least the square of this number is a multiple of it. For products in bfloat16
# on a CPU, oneDNN compiles and keeps a kernel for each size, so fewer sizes need less memory.
MULTIPLE = 16
# The texts of a packed row are padded for the pooling: all at once if that is at most this number of times their tokens.
MOST_PADDED = 4

Numbering = Callable[[Tensor, Tensor, int], Tensor]  # (token ids (S,), lengths (b,), id of the padding token) -> positions (S,)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, if it is not there. From the CPU to a GPU, the host does not wait for the GPU."""
    waits = device.type != "cuda" or tensor.device.type != "cpu"  # only tensors on the CPU can be pinned
    return tensor.to(device) if waits else tensor.pin_memory().to(device, non_blocking=True)


def from_zero(ids: Tensor, lengths: Tensor, pad_id: int) -> Tensor:
    """Return the position of each token in its text, counted from 0, as most models count.

    >>> from_zero(torch.tensor([7, 8, 9, 7, 8]), torch.tensor([3, 2]), pad_id=1)
    tensor([0, 1, 2, 0, 1])
    """
    starts = lengths.cumsum(0) - lengths
    return copy_to(torch.arange(len(ids)) - starts.repeat_interleave(lengths), ids.device)


def after_padding(ids: Tensor, lengths: Tensor, pad_id: int) -> Tensor:
    """Return the position of each token in its text, counted from `pad_id` + 1, as RoBERTa counts.

    The padding token, if it occurs in a text, is not counted.

    >>> after_padding(torch.tensor([7, 1, 9, 7, 8]), torch.tensor([3, 2]), pad_id=1)
    tensor([2, 1, 3, 2, 3])
    """
    real = ids != pad_id
    counts = real.cumsum(0)
    starts = copy_to((lengths.cumsum(0) - lengths).repeat_interleave(lengths), ids.device)  # (S,) where each text begins
    return (counts - F.pad(counts, (1, 0))[starts]) * real + pad_id


class Packable(NamedTuple):
    """How a model can be packed: with this attention, and with tokens numbered in this way."""

    attention: str
    numbering: Numbering


def place_of(model: PreTrainedModel) -> tuple[Any, str]:
    """Return what decides whether a model can be packed: its attention, and the kind of its device."""
    return attention_backend(model.config), next(model.parameters()).device.type


def ways_to_pack(model: PreTrainedModel) -> list[Packable]:
    """Return the ways that could pack a model: none if there is no packed attention for its attention and its device."""
    place = place_of(model)
    replaced = place[0] == "sdpa" and AttentionInterface()["sdpa"] is not attend_by_text  # by another library
    if replaced or place not in PACKED_ATTENTION:
        return []
    return [Packable(place[0], numbering) for numbering in (from_zero, after_padding)]


def rounds_to_half(model: PreTrainedModel) -> bool:
    """Return whether the model has float32 weights and flash attention, which knows only half precision."""
    return "flash" in str(attention_backend(model.config)) and model.dtype == torch.float32


def precision(model: PreTrainedModel) -> AbstractContextManager:
    """Return the context in which the model runs: autocast to bfloat16 if it needs it and the caller has not chosen one."""
    if not rounds_to_half(model):
        return nullcontext()
    device = next(model.parameters()).device.type
    return nullcontext() if torch.is_autocast_enabled(device) else torch.autocast(device, torch.bfloat16)


class Packing(NamedTuple):
    """Where the texts of a packed row lie.

    Attributes:
        position_ids: (1, S) the position of each token in its text.
        cu_seq_lens: (b + 1,) the first token of each text, and S. With padding tokens at the end, (b + 2,).
        longest: the number of tokens of the longest text.
        places: (b, T) the place of each token in the row. Padding has the place 0.
        groups: the groups of texts that are padded together for the pooling; see `groups_to_pool`.
    """

    position_ids: Tensor
    cu_seq_lens: Tensor
    longest: int
    places: Tensor
    groups: list[tuple[int, int]]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that make a model of transformers attend within texts: with flash_attn, and with "sdpa"."""
        bounds, longest = self.cu_seq_lens, self.longest
        return {"position_ids": self.position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest,
                "max_length_k": longest, "text_bounds": bounds, "longest_text": longest}  # fmt: skip

    def unpack(self, states: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states (1, S, D) of the row as those of padded texts, (n, t, D), and their mask (n, t), by group.

        `mask` is that of all texts, (b, T). Padding has finite numbers.
        """
        first = 0
        for texts, longest in self.groups:
            group = slice(first, first + texts)
            yield F.embedding(self.places[group, :longest], states[0]), mask[group, :longest]
            first += texts


def groups_to_pool(lengths: list[int]) -> list[tuple[int, int]]:
    """Return (number of texts, longest length) of the groups of consecutive texts that are padded together for the pooling.

    All texts are one group, unless few of them are long, as in the second example. A group then ends before a text that has
    less than half the tokens of its longest text, because one long text would multiply the memory of a chunk of short ones.

    >>> groups_to_pool([4, 3, 1])
    [(3, 4)]
    >>> groups_to_pool([60, 5, 4, 4, 3, 2])
    [(1, 60), (4, 5), (1, 2)]
    """
    if len(lengths) * max(lengths) <= MOST_PADDED * sum(lengths):
        return [(len(lengths), max(lengths))]
    groups: list[tuple[int, int]] = []
    for length in lengths:
        texts, longest = groups.pop() if groups and 2 * length >= groups[-1][1] else (0, 0)
        groups.append((texts + 1, max(longest, length)))
    return groups


def row_size(tokens: int, device: str) -> int:
    """Return the size of the packed row for texts of so many tokens in all: under autocast, a multiple of `MULTIPLE`.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     row_size(2045, "cpu"), row_size(2048, "cpu"), row_size(9, "cpu")
    (2048, 2048, 9)
    >>> row_size(2045, "cpu")
    2045
    """
    rounded = torch.is_autocast_enabled(device) and tokens >= MULTIPLE**2
    return tokens + -tokens % MULTIPLE if rounded else tokens


def pack(ids: Tensor, lengths: Tensor, pad_id: int, numbering: Numbering) -> tuple[Tensor, Tensor, Packing]:
    """Pack a chunk. If its size has to be rounded up (`row_size`), the padding tokens at its end are a text of their own.

    Args:
        ids: (S,) the tokens of all texts, one text after the other.
        lengths: (b,) the number of tokens of each text. It is a CPU tensor, so that reading it does not wait for the GPU.
        pad_id: the id of the padding token.
        numbering: what gives each token its position.

    Returns:
        Token ids (1, S), with the padding tokens; attention mask (b, T) of the padded texts; and the packing.
    """
    ends = lengths.cumsum(0)
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths.unsqueeze(1)
    places, groups = ((ends - lengths).unsqueeze(1) + columns).masked_fill(~mask, 0), groups_to_pool(lengths.tolist())
    if filler := row_size(len(ids), ids.device.type) - len(ids):
        ids, lengths = F.pad(ids, (0, filler), value=pad_id), F.pad(lengths, (0, 1), value=filler)
    packing = Packing(
        position_ids=numbering(ids, lengths, pad_id).unsqueeze(0),
        cu_seq_lens=copy_to(F.pad(lengths.cumsum(0), (1, 0)).int(), ids.device),
        longest=max(len(columns), filler),
        places=copy_to(places, ids.device),
        groups=groups,
    )
    return ids.unsqueeze(0), copy_to(mask.long(), ids.device), packing
