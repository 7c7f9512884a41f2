"""Finds texts that are nearly the same, by MinHash of their 5-byte pieces (Broder, 1997) and an exact comparison.

Two texts are similar if the Jaccard index of their sets of pieces is at least `SIMILAR`. Each text has 64 smallest hashes, in
16 bands of 4. Two texts that agree in a whole band are candidates. This finds a pair with index 0.8 with a probability above
0.999. Each pair of candidates is then compared piece by piece, so every reported pair is really similar.

Shapes: T texts, H = 64 hash functions.
"""

from collections.abc import Sequence

import numpy as np

PIECE = 5  # bytes
SIMILAR = 0.8
BANDS, ROWS = 16, 4
BLOCK = 500  # texts whose pieces are hashed at a time


def pieces(text: str) -> set[bytes]:
    """Return the set of all 5-byte pieces of a text in UTF-8. A shorter text is its own only piece."""
    encoded = text.encode()
    return {encoded[i : i + PIECE] for i in range(max(1, len(encoded) - PIECE + 1))}


def jaccard(first: str, second: str) -> float:
    """Return the share of common pieces among all pieces of two texts, from 0 to 1."""
    left, right = pieces(first), pieces(second)
    return len(left & right) / len(left | right)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return, for each text and each hash function, the smallest hash of the text's pieces: (T, H) uint32."""
    random = np.random.default_rng(0)
    factors, shifts = (random.integers(1, 2**32, BANDS * ROWS, dtype=np.uint64) for _ in range(2))
    found = np.empty((len(texts), BANDS * ROWS), np.uint32)
    for start in range(0, len(texts), BLOCK):
        hashes, starts = piece_hashes(texts[start : start + BLOCK])
        for i, (factor, shift) in enumerate(zip(factors, shifts)):
            mixed = ((hashes * (factor | np.uint64(1)) + shift) >> np.uint64(32)).astype(np.uint32)
            found[start : start + BLOCK, i] = np.minimum.reduceat(mixed, starts)
    return found


def piece_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of each piece of all texts, uint64, and the positions at which the hashes of each text start."""
    encoded = [text.encode().ljust(PIECE, b"\0") for text in texts]
    lengths = np.array([len(text) - PIECE + 1 for text in encoded])
    data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
    hashes = np.zeros(len(data) - PIECE + 1, np.uint64)
    for i in range(PIECE):
        hashes = hashes * np.uint64(257) + data[i : len(data) - PIECE + 1 + i]
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    # Leave out the pieces that reach from one text into the next.
    ends = np.cumsum(lengths + PIECE - 1)
    inside = np.ones(len(hashes) + PIECE - 1, bool)
    for i in range(1, PIECE):
        inside[ends - i] = False
    return hashes[inside[: len(hashes)]], np.cumsum(lengths) - lengths


def candidates(found: np.ndarray) -> np.ndarray:
    """Return the pairs of texts, (pairs, 2), that agree in a band of their signatures (T, H).

    Among the texts that agree in a band, each is paired with the next one and with the first one only, so that the number of
    pairs stays proportional to the number of texts.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        keys = np.ascontiguousarray(found[:, band * ROWS : (band + 1) * ROWS]).view(np.dtype((np.void, 4 * ROWS))).ravel()
        _, codes = np.unique(keys, return_inverse=True)
        order = np.argsort(codes, kind="stable")
        same = codes[order][1:] == codes[order][:-1]
        pairs.append(np.stack([order[:-1][same], order[1:][same]], axis=1))
        starts = np.concatenate([[True], ~same]) if len(order) else np.array([], bool)
        firsts = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
        pairs.append(np.stack([firsts[~starts], order[~starts]], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def similar_pairs(texts: Sequence[str]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Find the texts that have a similar text among the others.

    Args:
        texts: different texts.

    Returns:
        Which texts have a similar one, (T,) bool; and the pairs of text numbers that show it. Not all similar pairs are listed.
    """
    has, pairs = np.zeros(len(texts), bool), []
    for first, second in candidates(signatures(texts)).tolist() if len(texts) > 1 else []:
        if not (has[first] and has[second]) and jaccard(texts[first], texts[second]) >= SIMILAR:
            has[first] = has[second] = True
            pairs.append((first, second))
    return has, pairs
