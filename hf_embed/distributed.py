"""The one place where ranks exchange embeddings.

The contract: each rank takes the mean loss of its own rows against the rows of all ranks; the backward pass of the gather
adds up what all ranks send back to a row; so the average over ranks, which DDP and FSDP take, is the gradient of the mean
loss over the global batch. No factor anywhere.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """Own rows (B, ...) to those of all ranks (R * B, ...), in rank order. B is the same on every rank."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, (R * B, ...) from (B, ...), differentiable under the contract above; `rows` on one rank."""
    return rows if world()[1] == 1 else _AllGather.apply(rows)


def gather_objects(thing: object) -> list:
    """A picklable object of every rank, in rank order."""
    ranks = world()[1]
    if ranks == 1:
        return [thing]
    everyones = [None] * ranks
    dist.all_gather_object(everyones, thing)
    return everyones
