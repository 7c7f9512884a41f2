"""Encode the texts of one step in length-sorted chunks, with very little padding.

1. A batch arrives flat: the tokens of all texts in one row, and the length of each text. Nothing is padded yet.
2. The texts are sorted by length and divided into chunks of at most `chunk_tokens` tokens, padding included. A chunk also ends
   where more padding would cost more time than a further small chunk. Each chunk is padded to its own longest text.
   If the model can be packed (`hf_embed.forward.packing`), a chunk is one row without padding instead.
3. The embeddings of the chunks are put back into the order of the batch, so the objective does not need to know the chunks.

With `gradient_caching`, each chunk uses activation checkpointing. Its activations are freed after the forward pass and
recomputed in the backward pass, with the same random states. The memory for activations is then that of one chunk, whatever the
batch size. The gradients are bit for bit the same as with the same chunks and no caching. DDP still sees one forward and one
backward pass, so it reduces gradients once. `activations.py` recomputes only the chunks whose activations do not fit.

Shapes: N texts with S tokens in total. A chunk has b texts, padded to T tokens. D is the width of an embedding.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_embed.forward.activations import Activations, ChunkEncoder, with_caching
from hf_embed.forward.packing import Numbering, copy_to, pack
from hf_embed.ranks import largest

# A chunk ends early if the next text is shorter than the longest text of the chunk by more than this share.
MAX_PADDING = 0.15
# But a chunk with fewer padded tokens than this does not end early, because very small chunks use the hardware badly.
MIN_CHUNK_TOKENS = {"cpu": 512, "default": 8192}
# Largest number of tokens in a chunk, padding included. A GPU needs large chunks. A CPU is fastest if a chunk's activations fit
# its cache.
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "default": 16384}
# The same if a step keeps the activations of all its chunks, so that smaller chunks would save no memory. On a GPU, each chunk
# costs the time in which the host starts its kernels.
CHUNK_TOKENS_KEPT = DEFAULT_CHUNK_TOKENS | {"cuda": 65536}


def default_chunk_tokens(device: torch.device, kept: bool = False) -> int:
    """Return the largest number of padded tokens in a chunk if the user sets none.

    `kept`: the activations of all chunks are kept for a backward pass.
    """
    sizes = CHUNK_TOKENS_KEPT if kept else DEFAULT_CHUNK_TOKENS
    return sizes.get(device.type, sizes["default"])


def plan_chunks(lengths: list[int], chunk_tokens: int, min_tokens: int | None) -> list[list[int]]:
    """Divide texts with the given lengths into chunks. Each chunk is a list of indices of texts, longest text first.

    >>> plan_chunks([3, 9, 3, 8], chunk_tokens=18, min_tokens=4)
    [[1, 3], [0, 2]]

    A chunk has at most `chunk_tokens` tokens, padding included. A text that is longer than that gets a chunk of its own. A
    chunk of at least `min_tokens` tokens ends early to save padding. None: the chunks are not padded.
    """
    chunks: list[list[int]] = []
    longest = tokens = 0  # of the last chunk; with its padding
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[i] if min_tokens is None else longest
        wasteful = min_tokens is not None and tokens >= min_tokens and lengths[i] < (1 - MAX_PADDING) * longest
        if not chunks or tokens + size > chunk_tokens or wasteful:
            chunks.append([])
            longest = size = lengths[i]
            tokens = 0
        chunks[-1].append(i)
        tokens += size
    return chunks


def split_chunks(chunks: list[list[int]], count: int) -> list[list[int]]:
    """Increase the number of chunks to `count`: halve the largest, or duplicate the first if all are single texts."""
    chunks = list(chunks)
    while len(chunks) < count:
        i = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = len(chunks[i]) // 2
        chunks[i : i + 1] = [chunks[i][:half], chunks[i][half:]] if half else [chunks[i], chunks[i]]
    return chunks


def pad_chunk(ids: Tensor, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad the texts of one chunk. Here S is the number of tokens in the chunk.

    >>> pad_chunk(torch.tensor([7, 8, 9, 5]), torch.tensor([3, 1]), pad_id=0)
    (tensor([[7, 8, 9],
            [5, 0, 0]]), tensor([[1, 1, 1],
            [1, 0, 0]]))

    Args:
        ids: (S,) token ids of all texts of the chunk, one text after the other.
        lengths: (b,) the number of tokens of each text. It is a CPU tensor, so that reading it does not wait for the GPU.
        pad_id: the id of the padding token.

    Returns:
        Token ids (b, T) and attention mask (b, T).
    """
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    places = copy_to((mask.flatten().cumsum(0) - 1).view_as(mask).masked_fill(~mask, len(ids)), ids.device)
    padded = torch.cat([ids, ids.new_full((1,), pad_id)])[places]
    return padded, copy_to(mask.long(), ids.device)


def encode_in_chunks(
    encode: ChunkEncoder,
    input_ids: Tensor,
    lengths: list[int],
    pad_id: int,
    chunk_tokens: int,
    gradient_caching: bool | Activations = False,
    equal_chunks: bool = False,
    numbering: Numbering | None = None,
) -> Tensor:
    """Encode the texts of a flat batch, chunk by chunk.

    Args:
        encode: maps token ids (b, T) and attention mask (b, T) to (b, D). With `numbering`, the token ids are (1, S), and the
            third argument is the `Packing`.
        input_ids: (S,) the tokens of all texts, one text after the other.
        lengths: the number of tokens of each text: N numbers that sum to S.
        pad_id: the id of the padding token.
        chunk_tokens: the maximum number of tokens in a chunk, padding included.
        gradient_caching: recompute each chunk in the backward pass instead of keeping its activations. `Activations` decides
            for which chunks.
        equal_chunks: encode the same number of chunks on every rank. Sharded models need this, because each layer of each chunk
            is a collective.
        numbering: pack each chunk into one row, and number its tokens in this way. None: pad the chunks.

    Returns:
        Embeddings (N, D), in the order of the batch.
    """
    lay_out: Callable[..., tuple]
    min_tokens = MIN_CHUNK_TOKENS.get(input_ids.device.type, MIN_CHUNK_TOKENS["default"])
    if numbering is None:
        lay_out, chunks = pad_chunk, plan_chunks(lengths, chunk_tokens, min(min_tokens, chunk_tokens))
    else:
        lay_out, chunks = partial(pack, numbering=numbering), plan_chunks(lengths, chunk_tokens, min_tokens=None)
    if equal_chunks:
        chunks = split_chunks(chunks, largest(len(chunks)))
    sizes, order = torch.tensor(lengths), torch.tensor([i for chunk in chunks for i in chunk])
    input_ids = input_ids[copy_to(move_tokens(sizes, order), input_ids.device)]  # now each chunk is a slice
    counts = [sum(lengths[i] for i in chunk) for chunk in chunks]
    padded = [len(chunk) * lengths[chunk[0]] for chunk in chunks] if numbering is None else counts
    encoders = with_caching(encode, gradient_caching, padded)
    parts = zip(encoders, chunks, input_ids.split(counts))
    encoded = [encode(*lay_out(ids, sizes[chunk], pad_id)) for encode, chunk, ids in parts]
    embeddings = torch.cat(encoded)
    restored = embeddings[copy_to(move_back(order, len(lengths)), input_ids.device)]
    # Keep duplicate chunks in the autograd graph with zero gradient, so every rank runs the same number of collectives.
    return restored if len(order) == len(lengths) else restored + 0 * embeddings.sum()


def move_tokens(lengths: Tensor, order: Tensor) -> Tensor:
    """Return the positions in the batch of the tokens of text order[0], then those of text order[1], and so on.

    Three texts with the tokens 0 1 | 2 | 3 4 5, reordered so that the longest comes first:

        >>> move_tokens(torch.tensor([2, 1, 3]), order=torch.tensor([2, 0, 1]))
        tensor([3, 4, 5, 0, 1, 2])
    """
    starts = lengths.cumsum(0) - lengths  # the first token of each text, in the batch
    sizes = lengths[order]
    new_starts = sizes.cumsum(0) - sizes  # the first token of each text, in the new order
    return torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts[order] - new_starts, sizes)


def move_back(order: Tensor, texts: int) -> Tensor:
    """Return the position of each text in `order`. `texts` is the number of texts.

    >>> move_back(torch.tensor([2, 0, 1]), texts=3)
    tensor([1, 2, 0])
    """
    places = torch.empty(texts, dtype=torch.long)
    places[order] = torch.arange(len(order))
    return places
