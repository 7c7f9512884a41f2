"""The steps from the accepted forms of `train_dataset` to tokenized rows, and from these rows to the batches of one rank."""

import logging
import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import pyarrow.compute
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from hf_embed.data.collator import RaggedCollator
from hf_embed.data.mixture import (
    Mixture,
    Source,
    Stream,
    data_seed,
    has_several_positives,
    make_mixture,
    tokenize_source,
)
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler, generator
from hf_embed.data.tokenization import (
    most_texts,
    truncated_share,
    warn_of_truncation,
)
from hf_embed.distributed import get_rank
from hf_embed.encoding import room_for_text
from hf_embed.errors import InputError
from hf_embed.objectives import Matryoshka, SimCSE
from hf_embed.objectives.base import FunctionObjective, Objective, check_other_positives

if TYPE_CHECKING:
    from hf_embed.arguments import ContrastiveTrainingArguments
    from hf_embed.encoder import Encoder

logger = logging.getLogger(__name__)

TrainData: TypeAlias = Dataset | list[Source]


def tokenize_all(
    rows: TrainData,
    encoder: "Encoder",
    args: "ContrastiveTrainingArguments",
    objective: Objective,
    name: str,
    paired: bool | None = None,
) -> tuple[Dataset | Mixture, list[int]]:
    """Tokenize the rows to train on.

    Args:
        rows: one table, or a list of sources, which become a `Mixture`.
        encoder: the encoder whose tokenizer, maximum length and prompts are used.
        args: the training arguments.
        objective: the objective of rows whose source has none of its own.
        name: the name of the rows in messages.
        paired: see `hf_embed.data.columns.text_columns`.

    Returns:
        The tokenized rows, and the number of texts in a row for each source.

    Raises:
        InputError: if anything is wrong with the rows.
    """
    room_for_text(encoder.tokenizer, ["", *encoder.prompts.values()], encoder.max_length)  # raises InputError if there is none
    if not isinstance(rows, Dataset):
        if args.same_dropout_mask:
            raise not_single(name)
        mixture = make_mixture(rows, encoder, args, objective)
        return mixture, mixture.views
    # A table is a source without settings of its own.
    tokens = cast(Dataset, tokenize_source(Source(name, rows), encoder, args, objective, name, paired))
    texts = most_texts(tokens)
    if args.same_dropout_mask and texts > 1:
        raise not_single(name)
    warn_of_truncation({name: truncated_share(tokens)})
    return tokens, [max(2, texts)]


def not_single(name: str) -> InputError:
    """Return the error for rows of several texts when same_dropout_mask needs rows of a single text."""
    return InputError(
        f"{name}: same_dropout_mask requires rows of a single text, because this text is both views; remove same_dropout_mask"
    )


def check_objective(objective: Objective, tokens: Dataset | Stream, texts_per_row: int, name: str) -> None:
    """Check that an objective suits the tokenized rows.

    Args:
        objective: the objective of the rows.
        tokens: the tokenized rows of a table or a stream.
        texts_per_row: the number of texts in the largest row.
        name: the name of the rows in messages.

    Raises:
        InputError: if the objective does not suit the rows.
    """
    objective.check_rows(texts_per_row, name)
    of_user = isinstance(objective, FunctionObjective)  # which may need no negatives
    if get_rank() == 0 and not of_user and not {"scores", "target", "teacher"}.intersection(objective.needs):
        warn_without_negatives(tokens.probed_ids if isinstance(tokens, Stream) else tokens.data["text_ids"], objective, name)
    if "scores" in objective.needs and isinstance(tokens, Dataset) and "scores" in tokens.column_names:
        refuse_equal_scores(tokens, name)
    if has_several_positives(tokens):
        check_other_positives(objective, name)


def refuse_equal_scores(tokens: Dataset, name: str) -> None:
    """Raise InputError if all scores of a table are equal, because no order can be learned from them."""
    scores = pyarrow.compute.list_flatten(tokens.with_format("arrow")[:]["scores"])
    if are_equal(scores):
        raise InputError(
            f"{name}: all scores are {scores[0].as_py():g}, so there is nothing to learn; give rows with other scores"
        )


def warn_without_negatives(text_ids: pyarrow.ChunkedArray, objective: Objective, name: str) -> None:
    """Log a warning if no row can have a negative, because the positives, or the anchors, of all rows are the same text.

    Args:
        text_ids: the text hashes of each row: of a table, or of the first rows of a stream.
        objective: the objective of the rows.
        name: the name of the rows in messages.
    """
    if len(text_ids) < 2:
        return
    most = pyarrow.compute.max(pyarrow.compute.list_value_length(text_ids)).as_py()
    candidates = pyarrow.compute.list_flatten(pyarrow.compute.list_slice(text_ids, min(1, most - 1)))
    same = None
    if are_equal(candidates):
        same = "positives"
    elif most == 2 and masks_answers(objective) and are_equal(pyarrow.compute.list_element(text_ids, 0)):
        same = "anchors"
    if same:
        logger.warning(
            f"{name}: the {same} of all rows are the same text (after truncation to max_length tokens), so no row of a batch "
            f"has a negative, and nothing can be learned; give rows with different {same}, or raise max_length"
        )


def masks_answers(objective: Objective) -> bool:
    """Return True if the loss masks other positives of the same anchor."""
    inner = objective.inner if isinstance(objective, Matryoshka) else objective
    return not isinstance(inner, SimCSE) or inner.mask_other_positives


def are_equal(numbers: pyarrow.ChunkedArray) -> bool:
    """Return whether all numbers are equal."""
    limits = pyarrow.compute.min_max(numbers).as_py()
    return limits["min"] == limits["max"]


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
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(start_worker, num_workers=workers, rank=args.process_index),
    )
