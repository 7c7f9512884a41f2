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

from collections.abc import Callable, Sequence

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
    chunks: list[list[int]] = []
    chunk: list[int] = []
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
    """Make exactly `count` chunks by halving the largest; where all are single texts, the first is encoded again."""
    chunks = list(chunks)
    while len(chunks) < count:
        i = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = len(chunks[i]) // 2
        chunks[i : i + 1] = [chunks[i][:half], chunks[i][half:]] if half else [chunks[i], chunks[i]]
    return chunks


def pad_chunk(ids: Tensor, words: Tensor | None, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad the texts of one chunk, whose tokens stand in one row of S ids.

    Args:
        ids: (S,) the tokens.
        words: (S + 1, width) the ids' rows of the word table, and last the padding token's; or None.
        lengths: (b,) the tokens of each text, on the CPU, so that no GPU is waited for.
        pad_id: what the ids are padded with.

    Returns:
        Token ids (b, T); mask (b, T); words (b, T, width) or None.
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
    """Encode the texts of a flat batch, chunk by chunk.

    Args:
        encode: maps token ids and mask, both (b, T), and the ids' rows of the word table (b, T, width) or None, to (b, D).
        input_ids: (S,) the tokens of all texts, one text behind the other.
        lengths: the tokens of each text, N numbers that sum to S.
        pad_id: what chunks are padded with.
        chunk_tokens: padded tokens of a chunk.
        gradient_caching: compute a chunk again in the backward pass instead of keeping its activations.
        equal_chunks: every rank encodes equally many chunks, which sharded models need: there each layer of each chunk is a
            collective.
        embed_tokens: the word table, (S,) -> (S, width), read once for all chunks: its gradient is as large as the table, and
            one for each chunk would cost more than the chunk. None: each chunk reads it inside the model.

    Returns:
        (N, D), in the batch's order.
    """
    min_tokens = MIN_CHUNK_TOKENS.get(input_ids.device.type, MIN_CHUNK_TOKENS["default"])
    chunks = plan_chunks(lengths, chunk_tokens, min(min_tokens, chunk_tokens))
    if equal_chunks:
        chunks = split_chunks(chunks, max(gather_objects(len(chunks))))
    sizes, order = torch.tensor(lengths), torch.tensor([i for chunk in chunks for i in chunk])
    input_ids = input_ids[move_tokens(sizes, order).to(input_ids.device)]  # now each chunk is a slice
    counts = [sum(lengths[i] for i in chunk) for chunk in chunks]
    encoded = []
    for chunk, ids, words in zip(chunks, input_ids.split(counts), words_of_chunks(embed_tokens, input_ids, counts, pad_id)):
        padded = pad_chunk(ids, words, sizes[chunk], pad_id)
        if gradient_caching and torch.is_grad_enabled():
            encoded.append(checkpoint(encode, *padded, use_reentrant=False, preserve_rng_state=True))
        else:
            encoded.append(encode(*padded))
    embeddings = torch.cat(encoded)
    restored = embeddings[move_back(order, len(lengths)).to(input_ids.device)]
    # A text encoded once more has its backward pass too, with nothing in it.
    return restored if len(order) == len(lengths) else restored + 0 * embeddings.sum()


def move_tokens(lengths: Tensor, order: Tensor) -> Tensor:
    """Return where the tokens of text order[0] stand in the batch, then those of text order[1], and so on.

    Three texts with the tokens 0 1 | 2 | 3 4 5, and the longest first:

        >>> move_tokens(torch.tensor([2, 1, 3]), order=torch.tensor([2, 0, 1]))
        tensor([3, 4, 5, 0, 1, 2])
    """
    starts = lengths.cumsum(0) - lengths  # the first token of each text, in the batch
    sizes = lengths[order]
    new_starts = sizes.cumsum(0) - sizes  # the first token of each text, in the new order
    return torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts[order] - new_starts, sizes)


def move_back(order: Tensor, texts: int) -> Tensor:
    """Return where each of so many texts stands in `order`.

    >>> move_back(torch.tensor([2, 0, 1]), texts=3)
    tensor([1, 2, 0])
    """
    places = torch.empty(texts, dtype=torch.long)
    places[order] = torch.arange(len(order))
    return places


def words_of_chunks(
    embed_tokens: Callable[[Tensor], Tensor] | None, input_ids: Tensor, counts: list[int], pad_id: int
) -> Sequence[Tensor | None]:
    """Read the word table once: for each chunk of so many tokens their rows, (tokens + 1, width), and last the padding's."""
    if embed_tokens is None:
        return [None] * len(counts)
    *words, padding = embed_tokens(torch.cat([input_ids, input_ids.new_tensor([pad_id])])).split([*counts, 1])
    return [torch.cat([rows, padding]) for rows in words]
