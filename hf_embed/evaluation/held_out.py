"""The loss of the training on rows that it does not see: the validation loss.

It is the objective itself that computes it, on the embeddings of `encode`: without dropout, without a head that is for training
only, and without the masked-language-modelling auxiliary, whose masks are random. The rows go in their own order into batches
of `per_device_eval_batch_size` rows for each rank; as in training, a row's negatives are the other rows of its batch, so losses
can be compared where this number is the same. The loss is the mean over all rows, and each counts once, whatever the number of
ranks.

Shapes: B rows of a batch, V texts a row, D wide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_embed.data.collator import RaggedCollator, to_rows, used_columns
from hf_embed.data.python_rows import RowData
from hf_embed.data.tokenization import most_texts
from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.evaluation.tasks import Embed, EvaluationTask, Task
from hf_embed.objectives.base import Objective


@dataclass
class HeldOut(EvaluationTask):
    """Rows of texts that are kept from the training, with the columns that training rows have.

    The trainer makes a `HeldOutLoss` of it. The rows are a `Dataset`, or what else `hf_embed.data.python_rows` lists.
    """

    rows: RowData

    kind = "held_out"
    main = "loss"
    reported = ("loss",)


@dataclass
class HeldOutLoss(HeldOut):
    """Held-out rows as they are scored.

    Args:
        rows: the token ids and text hashes of rows, as `hf_embed.data.tokenization` gives them.
        objective: computes the loss.
        batch_size: rows of a batch on all ranks together.
        model: an `Encoder`, or what has one inside; it is called with token ids (S,) and lengths, and returns "embeddings"
            (N, D), with a learned temperature also "temperature".
        chunk_tokens: padded tokens that go through the model at once.
        sharded: ranks make equally many chunks (FSDP, ZeRO-3).
        temperature: a learned one, where the model does not say it.
    """

    rows: Dataset
    objective: Objective
    batch_size: int
    model: nn.Module
    chunk_tokens: int | None = None
    sharded: bool = False
    temperature: Tensor | None = None

    def score(self, embed: Embed) -> dict[str, float]:
        """Return the mean loss of all rows, the same on every rank. Each embeds a part of every batch; `embed` is not used."""
        collate = RaggedCollator([most_texts(self.rows)])
        total = 0.0
        with torch.inference_mode():
            for start, stop in batches(len(self.rows), self.batch_size):
                total += (stop - start) * self.batch_loss(collate, range(start, stop))
        return {"loss": total / len(self.rows)}

    def batch_loss(self, collate: RaggedCollator, numbers: range) -> float:
        """Return the mean loss of the rows with these numbers, which are each other's negatives."""
        rank, ranks = get_rank(), get_world_size()
        own = numbers[len(numbers) * rank // ranks : len(numbers) * (rank + 1) // ranks]
        # A rank without a row embeds one all the same: in a sharded model each call is a collective.
        batch = collate(self.rows.__getitems__(list(own) or [numbers[0]]))
        device = next(self.model.parameters()).device
        settings = {"chunk_tokens": self.chunk_tokens, "sharded": self.sharded}
        outputs = self.model(batch["input_ids"].to(device), batch["lengths"], **settings)
        vectors = to_rows(outputs["embeddings"], batch["slots"].to(device), batch["text_ids"].shape)[: len(own)]
        hashes: dict[str, Tensor] = {name: batch[name][: len(own)] for name in ("text_ids", "other_ids") if name in batch}
        parts = gather_objects((vectors.cpu(), *hashes.values()))
        rows, *ids = (torch.cat(part).to(device) for part in zip(*parts))  # (B, V, D), (B, V) and (B, W)
        given: dict[str, Any] = dict(zip(hashes, ids))
        text_ids = given.pop("text_ids")
        if "other_ids" in given:
            given["other_ids"] = used_columns(given["other_ids"])
        temperature = outputs.get("temperature", self.temperature)
        if temperature is not None:
            given["temperature"] = temperature
        return self.objective(rows, text_ids, rows, text_ids, 0, **given).item()  # a function has no defaults


def with_model(
    tasks: Mapping[str, Task], model: nn.Module, sharded: bool = False, temperature: Tensor | None = None
) -> dict[str, Task]:
    """Return the tasks, of which held-out rows are scored with `model`; the other arguments are those of `HeldOutLoss`."""
    return {
        name: replace(task, model=model, sharded=sharded, temperature=temperature) if isinstance(task, HeldOutLoss) else task
        for name, task in tasks.items()
    }


def batches(rows: int, size: int) -> list[tuple[int, int]]:
    """Return where each batch of `size` rows starts and stops.

    The last may be smaller; a single row, which would have no negatives, joins the batch before it.

    >>> batches(7, 3)
    [(0, 3), (3, 7)]
    """
    starts = list(range(0, rows, size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows]))


def seen_in_training(held_out: Dataset, training: Sequence[Dataset]) -> int:
    """Return how many of the held-out rows have the anchor and the positive of a row of the training, to the model."""
    own = pair_hashes(held_out)
    found = np.zeros(len(own), dtype=bool)
    for table in training:
        found |= np.isin(own, pair_hashes(table))
    return int(found.sum())


def pair_hashes(rows: Dataset) -> np.ndarray:
    """Return a hash of anchor and positive of each row, (rows,); a row of a single text is a pair of it and itself."""
    table = rows.with_format("arrow")[:]["text_ids"].combine_chunks()
    offsets = table.offsets.to_numpy()
    ids = table.values.to_numpy()
    with np.errstate(over="ignore"):
        last = np.minimum(offsets[:-1] + 1, offsets[1:] - 1)
        return ids[offsets[:-1]] * np.int64(1_000_003) + ids[last]
