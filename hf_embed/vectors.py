"""Vectors as they are kept and compared: precisions that take less memory, and the similarities.

| precision | a vector of D numbers is kept as | bytes |
|---|---|---|
| float32 | itself | 4 D |
| int8 | int8, scaled so that its largest number is 127 or -127 | D |
| ubinary | the signs of its numbers, eight to a byte, uint8 (`numpy.packbits`) | D / 8 |
| binary | the same minus 128, int8 | D / 8 |

All but the first keep the direction of a vector and lose its length, so they are compared by the cosine. The scale of int8 is
of each vector by itself: vectors of two calls compare, and nothing has to be calibrated. (sentence-transformers takes the
ranges of the batch at hand.) `binary` and `ubinary` are bit for bit what its `quantize_embeddings` gives.

Shapes: N or M vectors, D wide before they are packed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.ranges import is_one_of

Vectors = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor] | Sequence[Sequence[float]]
Compare = Callable[[Tensor, Tensor], Tensor]

PRECISIONS = ("float32", "int8", "binary", "ubinary")
PACKED = ("binary", "ubinary")
# What sentence-transformers calls them -> the function, (..., N, D) and (..., M, D) -> (..., N, M); more is nearer.
SIMILARITIES: dict[str, Compare] = {
    "cosine": lambda a, b: F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT,
    "dot": lambda a, b: a.float() @ b.float().mT,
    "euclidean": lambda a, b: -torch.cdist(a.float(), b.float()),
    "manhattan": lambda a, b: -torch.cdist(a.float(), b.float(), p=1),
}


def check_precision(precision: str) -> None:
    """Raise InputError for a precision that there is not."""
    if is_one_of(precision, ("uint8",)):
        raise InputError("precision 'uint8' moves the zero, and cosines with it; take int8, or ubinary for packed signs")
    if not is_one_of(precision, PRECISIONS):
        raise InputError(f"unknown precision {precision!r}; take one of {', '.join(PRECISIONS)}")


def check_packable(precision: str, width: int) -> None:
    """Raise InputError for vectors of `width` numbers that have no whole bytes of signs."""
    if precision in PACKED and width % 8:
        raise InputError(f"precision {precision} packs 8 numbers to a byte, and a vector has {width}; set another truncate_dim")


def quantize(vectors: Tensor, precision: str) -> Tensor:
    """Reduce vectors (N, D) to one of `PRECISIONS`: (N, D), or (N, D / 8) packed.

    >>> quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0, 1.0, 1.0, -1.0, 2.0]]), "int8")
    tensor([[ 32, -64,  16,   0,  64,  64, -64, 127]], dtype=torch.int8)
    >>> quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0, 1.0, 1.0, -1.0, 2.0]]), "ubinary")
    tensor([[173]], dtype=torch.uint8)

    Raises:
        InputError: a number is not finite, which no other precision than float32 could show; D is no multiple of 8, packed.
    """
    check_precision(precision)
    if precision == "float32":
        return vectors
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(f"precision {precision}: there are vectors that are not finite; check the model")
    if precision == "int8":
        largest = vectors.abs().amax(dim=-1, keepdim=True) if vectors.numel() else vectors
        return (vectors * (127 / largest.clamp(min=torch.finfo(vectors.dtype).tiny))).round().to(torch.int8)
    check_packable(precision, vectors.shape[-1])
    bits = (vectors > 0).view(*vectors.shape[:-1], vectors.shape[-1] // 8, 8)
    packed = (bits * 2 ** torch.arange(7, -1, -1, device=vectors.device)).sum(-1)  # the first number is the highest bit
    return packed.to(torch.uint8) if precision == "ubinary" else (packed - 128).to(torch.int8)


def as_floats(vectors: Tensor, precision: str) -> Tensor:
    """Return vectors (N, D) in float32 of those that `quantize` gave: signs become 1 and -1."""
    if precision not in PACKED:
        return vectors.float()
    packed = vectors.int() + (128 if precision == "binary" else 0)
    bits = packed.unsqueeze(-1) >> torch.arange(7, -1, -1, device=vectors.device) & 1
    return bits.flatten(-2) * 2.0 - 1


def precision_of(vectors: Tensor, dimension: int, most: int, given: str | None = None) -> str:
    """Return the precision of vectors.

    Args:
        vectors: (N, D) or packed.
        dimension: what D is, as far as is known.
        most: what D is at most.
        given: int8 or binary, where the user has said which of them int8 vectors are.

    Raises:
        InputError: int8 vectors that may be packed or not; uint8 vectors that are too wide to be packed.
    """
    width = vectors.shape[-1]
    if vectors.dtype not in (torch.int8, torch.uint8):
        return "float32"
    can_be_packed = 8 * width <= most
    if vectors.dtype == torch.uint8:
        if not can_be_packed:
            raise InputError(f"uint8 vectors of {width} numbers are not packed bits of {dimension}; encode them by int8")
        return "ubinary"
    if given is not None:
        check_precision(given)
        return given
    if width == dimension or not can_be_packed:
        return "int8"
    if 8 * width == dimension:
        return "binary"
    raise InputError(
        f"int8 vectors of {width} numbers may be of the precision int8 or binary: say which by precision='int8' or "
        "precision='binary' (ubinary vectors need no word)"
    )


def as_matrix(vectors: Vectors) -> Tensor:
    """Return vectors, or a single one, as a tensor (N, D). Raises InputError for what is none."""
    try:
        if isinstance(vectors, list) and vectors and isinstance(vectors[0], np.ndarray | Tensor):
            vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
        found = torch.atleast_2d(torch.as_tensor(vectors))
    except Exception as error:  # of whatever was given
        raise InputError(f"vectors are {str(vectors)[:60]!r}, a {type(vectors).__name__}; give an array (N, D)") from error
    if found.dim() > 2 or found.is_complex():
        raise InputError(f"vectors are an array of shape {tuple(found.shape)} and type {found.dtype}; give real numbers (N, D)")
    return found


def check_widths(first: Tensor, second: Tensor) -> None:
    """Raise InputError for vectors of different widths."""
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"vectors of {first.shape[-1]} numbers cannot be compared with vectors of {second.shape[-1]}; encode both with one "
            "model and one truncate_dim"
        )
