"""Texts of one step, cut into length-sorted chunks, each encoded with hardly any padding.

1. A batch arrives flat: all its tokens in one row, and the length of each text. Nothing is padded yet.
2. The texts are sorted by length and cut into chunks of at most `chunk_tokens` padded tokens; the cut also falls where
   padding would begin to cost more than a small chunk does. Each chunk is padded to its own longest text.
3. The chunks' embeddings are put back into the order of the batch, so the loss never knows.

With `gradient_caching` each chunk runs under activation checkpointing: its activations are thrown away after the forward
pass and computed again, under the same random states, in the backward pass. Memory is then that of one chunk, whatever
the batch; gradients are bit for bit those of the same chunks without it. DDP sees one forward and one backward, and so
reduces gradients once.

Shapes: N texts with S tokens in all; a chunk has b texts padded to T tokens; D is the width of an embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_embed.distributed import gather_objects

# A chunk is closed early when the next text is this much shorter than its longest one ...
MAX_PADDING = 0.15
# ... unless the chunk is still smaller than this: tiny chunks leave the hardware idle.
MIN_CHUNK_TOKENS = {"cpu": 256, "default": 2048}


def plan_chunks(lengths: list[int], chunk_tokens: int, min_tokens: int) -> list[list[int]]:
    """Cut texts of the given lengths into chunks of text numbers, longest first.

    >>> plan_chunks([3, 9, 3, 8], chunk_tokens=18, min_tokens=4)
    [[1, 3], [0, 2]]

    A chunk has at most `chunk_tokens` padded tokens, a text longer than that a chunk of its own.
    """
    chunks, chunk = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if chunk:
            longest = lengths[chunk[0]]
            full = (len(chunk) + 1) * longest > chunk_tokens
            wasteful = len(chunk) * longest >= min_tokens and lengths[i] < (1 - MAX_PADDING) * longest
            if full or wasteful:
                chunks.append(chunk)
                chunk = []
        chunk.append(i)
    if chunk:
        chunks.append(chunk)
    return chunks


def split_chunks(chunks: list[list[int]], count: int) -> list[list[int]]:
    """Exactly `count` chunks, by halving the largest; where all are single texts, the last is encoded again."""
    chunks = list(chunks)
    while len(chunks) < count:
        i = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = len(chunks[i]) // 2
        chunks[i : i + 1] = [chunks[i][:half], chunks[i][half:]] if half else [chunks[i], chunks[i]]
    return chunks


def pad_chunk(flat: Tensor, starts: Tensor, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut b texts out of `flat` (S,): token ids (b, T), padded with `pad_id`, and their mask (b, T).

    `starts` and `lengths` (b,) are on the CPU, so that no GPU is waited for.
    """
    offsets = torch.arange(int(lengths.max()), device=flat.device)
    starts, lengths = starts.to(flat.device), lengths.to(flat.device)
    mask = offsets < lengths.unsqueeze(1)
    places = (starts.unsqueeze(1) + offsets).masked_fill(~mask, 0)
    return flat[places].masked_fill(~mask, pad_id), mask.long()


def encode_in_chunks(
    encode: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor,
    lengths: list[int],
    pad_id: int,
    chunk_tokens: int,
    gradient_caching: bool = False,
    equal_chunks: bool = False,
) -> Tensor:
    """Encode the texts of a flat batch, `input_ids` (S,) with `lengths` summing to S, to (N, D) in the batch's order.

    `encode` maps token ids and mask, both (b, T), to (b, D). With `equal_chunks` every rank encodes equally many chunks,
    which sharded models need: there each layer of each chunk is a collective.
    """
    min_tokens = MIN_CHUNK_TOKENS.get(input_ids.device.type, MIN_CHUNK_TOKENS["default"])
    chunks = plan_chunks(lengths, chunk_tokens, min(min_tokens, chunk_tokens))
    if equal_chunks:
        chunks = split_chunks(chunks, max(gather_objects(len(chunks))))
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    encoded = []
    for chunk in chunks:
        chunk = torch.tensor(chunk)
        ids, mask = pad_chunk(input_ids, starts[chunk], sizes[chunk], pad_id)
        if gradient_caching and torch.is_grad_enabled():
            encoded.append(checkpoint(encode, ids, mask, use_reentrant=False, preserve_rng_state=True))
        else:
            encoded.append(encode(ids, mask))
    order = torch.tensor([i for chunk in chunks for i in chunk])
    first = torch.empty(len(lengths), dtype=torch.long)
    first[order] = torch.arange(len(order))  # where each text stands among the encoded
    embeddings = torch.cat(encoded)
    together = embeddings[first.to(input_ids.device)]
    # A text encoded once more has its backward pass too, with nothing in it.
    return together if len(order) == len(lengths) else together + 0 * embeddings.sum()
