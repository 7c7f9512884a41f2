"""The batches of this rank: the sampler that draws them, and the data loader that reads them, maybe in worker processes."""

import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from hf_embed.data.collator import RaggedCollator
from hf_embed.data.mixture import Mixture, data_seed
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler, generator
from hf_embed.library_internals import worker_settings

if TYPE_CHECKING:
    from hf_embed.arguments import ContrastiveTrainingArguments


def batch_sampler(
    rows: Dataset | Mixture, args: "ContrastiveTrainingArguments", batch_size: int
) -> GlobalBatchSampler | SourceBatchSampler:
    """Return the sampler that draws this rank's batches of tokenized rows."""
    settings = {"batch_size": batch_size, "rank": args.process_index, "ranks": args.world_size, "seed": data_seed(args)}
    if isinstance(rows, Mixture):
        return SourceBatchSampler(rows.sizes, rows.probabilities, streams=rows.streams, **settings)
    return GlobalBatchSampler(len(rows), drop_last=args.dataloader_drop_last, **settings)


def start_worker(worker: int, num_workers: int, rank: int) -> None:
    """Seed a worker of the data loader, and let it ignore signals that stop the whole run.

    Clusters and terminals send a signal to all processes of a run. The training process then still completes its current step,
    and needs its workers for that. So a worker ends only when the training process ends or stops the worker.
    """
    seed_worker(worker, num_workers=num_workers, rank=rank)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        noticed = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, noticed)
        threading.Thread(target=end_with_training, args=(noticed, os.getppid()), daemon=True).start()


def end_with_training(noticed: set[signal.Signals], training: int) -> None:
    """Wait until the training process sends SIGTERM to this worker, then end the worker. Ignore signals from other processes.

    `training` is the process id of the training process.
    """
    while True:
        received = signal.sigwaitinfo(noticed)
        if received.si_signo == signal.SIGTERM and received.si_pid == training:
            os.kill(os.getpid(), signal.SIGKILL)


class EpochDataLoader(DataLoader):
    """A data loader that passes the epoch to its sampler. The Trainer calls `set_epoch`.

    Each epoch begins with one draw from the global random number generator, with and without workers. So the dropout masks are
    the same in both cases.
    """

    batch_sampler: GlobalBatchSampler | SourceBatchSampler

    def __iter__(self) -> Any:
        if self.num_workers:  # without workers, torch itself draws this number
            torch.empty((), dtype=torch.int64).random_()
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch from which the sampler draws the next batches."""
        self.batch_sampler.set_epoch(epoch)


def make_loader(
    rows: Dataset | Mixture,
    sampler: GlobalBatchSampler | SourceBatchSampler,
    collator: RaggedCollator,
    args: "ContrastiveTrainingArguments",
) -> EpochDataLoader:
    """Return a loader of this rank's batches, with the settings of `args`.

    Workers are seeded from a separate generator. Otherwise torch would draw their seed from the global generator whenever
    workers start: in each epoch, or only once if the workers are persistent, and then again in a resumed run.
    """
    workers = args.dataloader_num_workers
    return EpochDataLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        generator=generator(data_seed(args)) if workers else None,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        **worker_settings(args),
        worker_init_fn=partial(start_worker, num_workers=workers, rank=args.process_index),
    )
