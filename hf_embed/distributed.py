"""The one place where ranks exchange embeddings.

The contract: each rank takes the mean loss of its own rows against the rows of all ranks; the backward pass of the gather
adds up what all ranks send back to a row; so the average over ranks, which DDP and FSDP take, is the gradient of the mean
loss over the global batch. No factor anywhere.
"""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Gathered = TypeVar("Gathered")


def get_rank() -> int:
    """Return the number of this process among those of the process group; 0 where there is no group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this is the process that speaks for all, also where a launcher has started several without a group yet."""
    return get_rank() == 0 and os.environ.get("RANK", "0") == "0"


def get_world_size() -> int:
    """Return the number of processes of the process group; 1 where there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    """Map own rows (B, ...) to those of all ranks (R * B, ...), in rank order. B is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, (R * B, ...) from (B, ...), differentiable under the contract above; `rows` on one rank."""
    return rows if get_world_size() == 1 else _AllGather.apply(rows)


def same_on_all_ranks(tensor: Tensor) -> None:
    """Replace a tensor by the one of the main process, in place."""
    if get_world_size() > 1:
        dist.broadcast(tensor, 0)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over the ranks, in place, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def gather_objects(thing: Gathered) -> list[Gathered]:
    """Return a picklable object of every rank, in rank order."""
    ranks = get_world_size()
    if ranks == 1:
        return [thing]
    gathered = [thing] * ranks  # each is overwritten
    dist.all_gather_object(gathered, thing)
    return gathered
