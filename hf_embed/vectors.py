"""The forms in which vectors are stored and compared: precisions that need less memory, and similarities.

| precision | a vector of D numbers is stored as | bytes |
|---|---|---|
| float32 | itself | 4 D |
| int8 | int8, scaled so that its largest number is 127 or -127 | D |
| ubinary | the signs of its numbers, eight per byte, uint8 (`numpy.packbits`) | D / 8 |
| binary | the same minus 128, int8 | D / 8 |

All precisions except float32 keep the direction of a vector and lose its length, so such vectors are compared by the cosine. In
int8 each vector has its own scale. So vectors of different calls can be compared, and nothing has to be calibrated.
(sentence-transformers takes the ranges of the current batch.) `binary` and `ubinary` are bit for bit the results of its
`quantize_embeddings`.

Shapes: N or M vectors of D numbers each, before they are packed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.ranges import check_one_of, is_one_of

Vectors = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor] | Sequence[Sequence[float]]
Compare = Callable[[Tensor, Tensor], Tensor]

PRECISIONS = ("float32", "int8", "binary", "ubinary")
PACKED = ("binary", "ubinary")


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the euclidean distances of vectors (N, D) and (M, D) as (N, M) in float32.

    PyTorch computes them from squares and products. In float32, this loses the distances of vectors that are near each other.
    """
    if a.device.type == "mps":  # which has no float64
        return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.cdist(a.double(), b.double()).float()


# Name in sentence-transformers -> function, (..., N, D) and (..., M, D) -> (..., N, M). A larger value means nearer vectors.
SIMILARITIES: dict[str, Compare] = {
    "cosine": lambda a, b: F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT,
    "dot": lambda a, b: a.float() @ b.float().mT,
    "euclidean": lambda a, b: -distances(a, b),
    "manhattan": lambda a, b: -torch.cdist(a.float(), b.float(), p=1),
}


def check_precision(precision: str) -> None:
    """Raise InputError if there is no precision of this name."""
    if is_one_of(precision, ("uint8",)):
        raise InputError("precision 'uint8' shifts the zero and changes cosines; use int8, or ubinary for packed signs")
    check_one_of("precision", precision, PRECISIONS)


def check_packable(precision: str, width: int) -> None:
    """Raise InputError if a packed precision is asked for and `width` is not a multiple of 8."""
    if precision in PACKED and width % 8:
        raise InputError(
            f"precision {precision} packs 8 numbers into a byte, but a vector has {width}; set truncate_dim to a multiple of 8"
        )


def quantize(vectors: Tensor, precision: str) -> Tensor:
    """Reduce vectors (N, D) to one of `PRECISIONS`: (N, D), or packed (N, D / 8), for which D has to be a multiple of 8.

    >>> quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0, 1.0, 1.0, -1.0, 2.0]]), "int8")
    tensor([[ 32, -64,  16,   0,  64,  64, -64, 127]], dtype=torch.int8)
    >>> quantize(torch.tensor([[0.5, -1.0, 0.25, 0.0, 1.0, 1.0, -1.0, 2.0]]), "ubinary")
    tensor([[173]], dtype=torch.uint8)

    Raises:
        InputError: if a number is not finite and the precision is not float32, which alone can represent it.
    """
    if precision == "float32":
        return vectors
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(f"precision {precision}: some vectors are not finite; check the model")
    if precision == "int8":
        largest = vectors.abs().amax(dim=-1, keepdim=True) if vectors.numel() else vectors
        return (vectors * (127 / largest.clamp(min=torch.finfo(vectors.dtype).tiny))).round().to(torch.int8)
    bits = (vectors > 0).view(*vectors.shape[:-1], vectors.shape[-1] // 8, 8)
    packed = (bits * 2 ** torch.arange(7, -1, -1, device=vectors.device)).sum(-1)  # the first number is the highest bit
    return packed.to(torch.uint8) if precision == "ubinary" else (packed - 128).to(torch.int8)


def as_floats(vectors: Tensor, precision: str) -> Tensor:
    """Return the vectors that `quantize` returned as float32 vectors (N, D); packed signs become 1 and -1."""
    if precision not in PACKED:
        return vectors.float()
    packed = vectors.int() + (128 if precision == "binary" else 0)
    bits = packed.unsqueeze(-1) >> torch.arange(7, -1, -1, device=vectors.device) & 1
    return bits.flatten(-2) * 2.0 - 1


def precision_of(vectors: Tensor, dimension: int, most: int, given: str | None = None) -> str:
    """Return the precision of vectors.

    Args:
        vectors: (N, D) or packed.
        dimension: D, as far as it is known.
        most: the largest possible D.
        given: int8 or binary, if the user has said which of them int8 vectors are.

    Raises:
        InputError: if int8 vectors may be packed or not, or if uint8 vectors are too wide to be packed.
    """
    width = vectors.shape[-1]
    if vectors.dtype not in (torch.int8, torch.uint8):
        return "float32"
    can_be_packed = 8 * width <= most
    if vectors.dtype == torch.uint8:
        if not can_be_packed:
            raise InputError(
                f"uint8 vectors of {width} numbers are not the packed signs of {dimension} numbers; encode with int8"
            )
        return "ubinary"
    if given is not None:
        if not is_one_of(given, ("int8", "binary")):
            raise InputError(f"precision is {given!r}, but int8 vectors have the precision int8 or binary; set one of these")
        return given
    if width == dimension or not can_be_packed:
        return "int8"
    if 8 * width == dimension:
        return "binary"
    raise InputError(
        f"int8 vectors of {width} numbers may have the precision int8 or binary; set precision='int8' or precision='binary' "
        "(ubinary vectors do not need it)"
    )


def as_matrix(vectors: Vectors) -> Tensor:
    """Return vectors, or a single vector, as a tensor (N, D). Raise InputError for anything else."""
    try:
        if isinstance(vectors, list) and vectors and isinstance(vectors[0], np.ndarray | Tensor):
            vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
        if isinstance(vectors, np.ndarray):  # a copy, because PyTorch takes none that is reversed, read-only, or of a file
            vectors = np.array(vectors, vectors.dtype.newbyteorder("="))
        found = torch.atleast_2d(torch.as_tensor(vectors))
    except Exception as error:  # the argument may be anything
        raise InputError(f"vectors are {str(vectors)[:60]!r}, a {type(vectors).__name__}; give an array (N, D)") from error
    if found.dim() > 2 or found.is_complex():
        raise InputError(f"vectors are an array of shape {tuple(found.shape)} and type {found.dtype}; give real numbers (N, D)")
    return found


def check_widths(first: Tensor, second: Tensor) -> None:
    """Raise InputError if the vectors of both tensors have different widths."""
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"vectors of {first.shape[-1]} numbers cannot be compared with vectors of {second.shape[-1]}; encode both with the "
            "same model and truncate_dim"
        )
