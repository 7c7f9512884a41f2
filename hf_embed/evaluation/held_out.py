"""The validation loss: the training loss on rows that are held out from the training.

The objective itself computes the loss, on the embeddings of `encode`: without dropout, without a head that is used only in
training, and without the auxiliary masked-language-modeling loss, whose masks are random. The rows stay in their order and are
cut into batches of `per_device_eval_batch_size` rows per rank. As in training, the negatives of a row are the other rows of its
batch. So losses can be compared only between runs with the same batch size over all ranks. The result is the mean over all
rows. Each row counts once, whatever the number of ranks.

Shapes: B rows of a batch, V texts per row, W hashes of other positives per row, embeddings of dimension D.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from hf_embed.data.collator import RaggedCollator, further_arguments, to_rows
from hf_embed.data.python_rows import RowData
from hf_embed.data.teacher_vectors import TeacherVectors
from hf_embed.data.tokenization import most_texts
from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.evaluation.tasks import Embed, EvaluationTask, Task
from hf_embed.objectives.base import Objective

ROWS_AT_ONCE = 100_000  # rows whose hashes are in memory at once


@dataclass
class HeldOut(EvaluationTask):
    """Rows of texts that are held out from the training. They have the same columns as training rows.

    The trainer turns them into a `HeldOutLoss`. The rows are a `Dataset`, or another form that `hf_embed.data.python_rows`
    lists.
    """

    rows: RowData

    kind = "held_out"
    main = "loss"
    reported = ("loss",)


@dataclass
class HeldOutLoss(HeldOut):
    """Held-out rows in the form in which they are scored.

    Args:
        rows: token ids and text hashes of the rows, from `hf_embed.data.tokenization`.
        objective: the objective that computes the loss.
        batch_size: the number of rows in a batch over all ranks together.
        model: an `Encoder`, or a module that contains one. It is called with token ids (S,) and lengths, and returns a dict
            with "embeddings" (N, D) of N texts, and with "temperature" if the temperature is learned.
        chunk_tokens: the number of padded tokens that go through the model at once.
        temperature: a learned temperature, used if the model does not return one.
        vectors: a teacher's vectors, for an objective that needs them; see `RaggedCollator`.
        normalize: whether the model is saved as one that returns unit vectors.
    """

    rows: Dataset
    objective: Objective
    batch_size: int
    model: nn.Module
    chunk_tokens: int | None = None
    temperature: Tensor | None = None
    vectors: Mapping[str, TeacherVectors] | None = None
    normalize: bool = False

    def score(self, embed: Embed) -> dict[str, float]:
        """Return the mean loss over all rows, the same on every rank.

        Each rank embeds a part of every batch with `model`. `embed` is not used.
        """
        collate = RaggedCollator([most_texts(self.rows)], vectors=self.vectors)
        total = 0.0
        with torch.inference_mode():
            for start, stop in batches(len(self.rows), self.batch_size):
                total += (stop - start) * self.batch_loss(collate, range(start, stop))
        return {"loss": total / len(self.rows)}

    def batch_loss(self, collate: RaggedCollator, numbers: range) -> float:
        """Return the mean loss of the rows with these numbers. The rows are negatives of each other."""
        rank, ranks = get_rank(), get_world_size()
        own = numbers[len(numbers) * rank // ranks : len(numbers) * (rank + 1) // ranks]
        # A rank without rows still embeds one row, because in a sharded model each call runs collectives.
        batch = collate(self.rows.__getitems__(list(own) or [numbers[0]]))
        device = next(self.model.parameters()).device
        outputs = self.model(batch["input_ids"].to(device), batch["lengths"], chunk_tokens=self.chunk_tokens)
        own_vectors = to_rows(outputs["embeddings"], batch["slots"].to(device), batch["text_ids"].shape)
        own_vectors = F.normalize(own_vectors, dim=-1) if self.normalize else own_vectors

        def gathered(part: Tensor) -> Tensor:  # ranks may have different numbers of rows
            return torch.cat(gather_objects(part[: len(own)].cpu())).to(device)

        rows, text_ids = gathered(own_vectors), gathered(batch["text_ids"])  # (B, V, D), (B, V)
        given: dict[str, Any] = dict(further_arguments(batch["further"], self.objective.needs, gathered))
        temperature = outputs.get("temperature", self.temperature)
        if temperature is not None:
            given["temperature"] = temperature
        return self.objective(rows, text_ids, rows, text_ids, 0, **given).item()  # a plain function may lack defaults


def with_model(tasks: Mapping[str, Task], model: nn.Module, temperature: Tensor | None = None) -> dict[str, Task]:
    """Return the tasks, with `model` set as the model of the held-out rows.

    `temperature` is as for `HeldOutLoss`.
    """
    return {
        name: replace(task, model=model, temperature=temperature) if isinstance(task, HeldOutLoss) else task
        for name, task in tasks.items()
    }


def batches(rows: int, size: int) -> list[tuple[int, int]]:
    """Return the start and stop of each batch of `size` rows.

    The last batch may be smaller. A single last row would have no negatives, so it joins the batch before it.

    >>> batches(7, 3)
    [(0, 3), (3, 7)]
    """
    starts = list(range(0, rows, size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows]))


def seen_in_training(held_out: Dataset, training: Sequence[Dataset]) -> int:
    """Return how many held-out rows have the same anchor and positive as a training row, after tokenization."""
    own, places = np.unique(np.concatenate(list(pair_hashes(held_out))), return_inverse=True)
    found = np.zeros(len(own), dtype=bool)
    for table in training:
        for hashes in pair_hashes(table):
            nearest = np.minimum(np.searchsorted(own, hashes), len(own) - 1)
            found[nearest[own[nearest] == hashes]] = True
    return int(found[places].sum())


def pair_hashes(rows: Dataset) -> Iterator[np.ndarray]:
    """Yield a hash of anchor and positive for each row, (b,) in batches of b rows. A single text is a pair with itself."""
    for batch in rows.select_columns("text_ids").with_format("arrow").iter(ROWS_AT_ONCE):
        column = batch["text_ids"].combine_chunks()
        offsets = column.offsets.to_numpy()
        ids = column.values.to_numpy()
        with np.errstate(over="ignore"):
            last = np.minimum(offsets[:-1] + 1, offsets[1:] - 1)
            yield ids[offsets[:-1]] * np.int64(1_000_003) + ids[last]
