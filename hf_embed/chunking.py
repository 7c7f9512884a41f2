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
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_embed.distributed import gather_objects

# A chunk is closed early when the next text is this much shorter than its longest one ...
MAX_PADDING = 0.15
# ... unless the chunk is still smaller than this: tiny chunks leave the hardware idle.
MIN_CHUNK_TOKENS = {"cpu": 512, "default": 2048}


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


def pad_chunk(ids: Tensor, words: Tensor | None, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk's tokens, a row of S ids, to b padded texts.

    `words` (S + 1, width) are the ids' rows of the word table, and last the padding token's. `lengths` (b,) is on the CPU, so
    that no GPU is waited for. -> token ids (b, T), padded with `pad_id`; mask (b, T); words (b, T, width).
    """
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    places = (mask.flatten().cumsum(0) - 1).view_as(mask).masked_fill(~mask, len(ids)).to(ids.device)
    padded = torch.cat([ids, ids.new_tensor([pad_id])])[places]
    return padded, mask.long().to(ids.device), None if words is None else F.embedding(places, words)


def encode_in_chunks(
    encode: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    input_ids: Tensor,
    lengths: list[int],
    pad_id: int,
    chunk_tokens: int,
    gradient_caching: bool = False,
    equal_chunks: bool = False,
    embed_tokens: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Encode the texts of a flat batch, `input_ids` (S,) with `lengths` summing to S, to (N, D) in the batch's order.

    `encode` maps token ids and mask, both (b, T), and the ids' rows of the word table (b, T, width) or None, to (b, D). With
    `equal_chunks` every rank encodes equally many chunks, which sharded models need: there each layer of each chunk is a
    collective. With `embed_tokens`, (S,) -> (S, width), the word table is read once for all chunks: its gradient is as large
    as the table, and one for each chunk would cost more than the chunk.
    """
    min_tokens = MIN_CHUNK_TOKENS.get(input_ids.device.type, MIN_CHUNK_TOKENS["default"])
    chunks = plan_chunks(lengths, chunk_tokens, min(min_tokens, chunk_tokens))
    if equal_chunks:
        chunks = split_chunks(chunks, max(gather_objects(len(chunks))))
    order = torch.tensor([i for chunk in chunks for i in chunk])
    sizes = torch.tensor(lengths)
    # The tokens in the order of the chunks, so that each chunk is a slice.
    starts, places = sizes.cumsum(0) - sizes, torch.arange(int(sizes[order].sum()))
    moved = torch.repeat_interleave(starts[order] - (sizes[order].cumsum(0) - sizes[order]), sizes[order])
    input_ids = input_ids[(places + moved).to(input_ids.device)]
    counts = [sum(lengths[i] for i in chunk) for chunk in chunks]
    words = [None] * len(chunks)
    if embed_tokens is not None:
        *words, padding = embed_tokens(torch.cat([input_ids, input_ids.new_tensor([pad_id])])).split([*counts, 1])
        words = [torch.cat([rows, padding]) for rows in words]

    encoded = []
    for chunk, ids, rows in zip(chunks, input_ids.split(counts), words):
        ids, mask, rows = pad_chunk(ids, rows, sizes[chunk], pad_id)
        if gradient_caching and torch.is_grad_enabled():
            encoded.append(checkpoint(encode, ids, mask, rows, use_reentrant=False, preserve_rng_state=True))
        else:
            encoded.append(encode(ids, mask, rows))
    back = torch.empty(len(lengths), dtype=torch.long)
    back[order] = torch.arange(len(order))  # where each text stands among the encoded
    embeddings = torch.cat(encoded)
    together = embeddings[back.to(input_ids.device)]
    # A text encoded once more has its backward pass too, with nothing in it.
    return together if len(order) == len(lengths) else together + 0 * embeddings.sum()
