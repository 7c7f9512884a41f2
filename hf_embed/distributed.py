"""Communication between ranks. Only this module exchanges embeddings between ranks in training.

The gradient of a training step is that of the mean loss over the global batch, without any extra factor:

1. Each rank computes the mean loss of its own rows against the rows of all ranks.
2. The backward pass of the gather sums the gradients that all ranks compute for a row.
3. DDP and FSDP average the gradients over the ranks.

With two ranks of two rows, where 0c is the gradient of the loss of rank 0 with respect to row c:

            own rows   `gather_rows`   loss     gradients       after the backward pass of the gather
    rank 0    a b        a b c d         0     0a 0b 0c 0d      0a + 1a, 0b + 1b
    rank 1    c d        a b c d         1     1a 1b 1c 1d      0c + 1c, 0d + 1d

`hf_embed.ranks` says what happens if a rank ends or does not answer.
"""

import atexit
import functools
import logging
import os
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from hf_embed.errors import InputError

Gathered = TypeVar("Gathered")
MOMENT = 0.2  # seconds


# ---- the ranks ----


def get_rank() -> int:
    """Return the rank of this process in the process group, or 0 if there is no group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes in the process group, or 1 if there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is the main process, also before a launcher's processes have formed a process group."""
    return get_rank() == 0 and os.environ.get("RANK", "0") == "0"


def on_cpu() -> bool:
    """Return whether the work is done on the CPU: there is no CUDA GPU, or the launcher sets `use_cpu`."""
    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def warn_on_main_only() -> None:
    """Let only the main process warn. The others read the same rows and settings, and would repeat each warning.

    A level that the user has set for the logger "hf_embed" stays.
    """
    package = logging.getLogger("hf_embed")
    if not is_main_process() and package.level == logging.NOTSET:
        package.setLevel(logging.ERROR)


# ---- tensors of all ranks ----


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows (B, ...) of R ranks to (R * B, ...). With one rank, return `rows` unchanged.

    B must be the same on every rank. Gradients flow back as the module docstring describes.
    """
    return rows if get_world_size() == 1 else _AllGather.apply(rows)


class _AllGather(torch.autograd.Function):
    """Gather rows (B, ...) of each of R ranks to (R * B, ...), in rank order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = list(gradient.contiguous().split(ctx.rows))  # one for each rank
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def take_weights_of_main(module: nn.Module) -> None:
    """Replace the weights of a module by those of the main process, as DDP does when it wraps the module."""
    if get_world_size() > 1:
        for parameter in module.parameters():
            whole = parameter.detach().contiguous()
            dist.broadcast(whole, 0)
            parameter.detach().copy_(whole)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over the ranks, in place, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


# ---- Python objects of all ranks ----


def gather_objects(thing: Gathered) -> list[Gathered]:
    """Gather a picklable object from every rank, in rank order. Every rank must call this."""
    ranks = get_world_size()
    if ranks == 1:
        return [thing]
    wait_at_exit()
    gathered = [thing] * ranks  # placeholders that `all_gather_object` overwrites
    dist.all_gather_object(gathered, thing)
    return gathered


def check_same_on_ranks(what: str, value: Hashable) -> None:
    """Raise InputError on every rank if `value` is not the same on all of them. Every rank must call this.

    `what` names it in the message, in the plural.
    """
    values = gather_objects(value)
    if other := [str(rank) for rank, of_rank in enumerate(values) if of_rank != values[0]]:
        raise InputError(
            f"{what} of rank {', '.join(other)} differ from those of rank 0; give all ranks the same, in the same order (a set "
            "has another order in each process)"
        )


def on_main(make: Callable[[], Gathered]) -> Gathered:
    """Call `make` on the main process, and return its result on every rank, or raise its error on every rank."""
    made, problem = None, None
    if is_main_process():
        try:
            made = make()
        except Exception as error:
            problem = error
    made, reason = gather_objects((made, None if problem is None else str(problem)))[0]
    if reason is not None:
        raise problem or InputError(reason)
    return cast(Gathered, made)


@functools.cache
def wait_at_exit() -> None:
    """Let this process wait a moment before it exits, so that the threads of gloo can release their last tensors.

    A thread of gloo holds the tensors of a collective a little longer than the collective takes, and needs the interpreter to
    release them. If the interpreter has ended by then, the thread aborts the process ("terminate called without an active
    exception", SIGABRT). A run that had saved everything would then count as failed.
    """
    atexit.register(time.sleep, MOMENT)
