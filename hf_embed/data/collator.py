"""A collator that turns rows into one flat batch of texts of different lengths.

The collator does not pad. Each chunk of the batch is padded later, when the whole batch is known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_embed.data.teacher_vectors import TeacherVectors


class RaggedCollator:
    """A collator that concatenates the token ids of the texts of B rows.

    The example has two rows, and the second row has no negative. `views` lists the largest number of texts in a row for each
    source of a `Mixture`. Here the only source has 3 texts per row at most:

        >>> rows = [{"input_ids": [[1, 7, 2], [1, 8, 8, 2], [1, 9, 2]], "text_ids": [70, 80, 90]},
        ...         {"input_ids": [[1, 5, 2], [1, 6, 2]], "text_ids": [50, 60]}]
        >>> batch = RaggedCollator(views=[3])(rows)
        >>> batch["input_ids"]
        tensor([1, 7, 2, 1, 8, 8, 2, 1, 9, 2, 1, 5, 2, 1, 6, 2])
        >>> batch["lengths"]
        [3, 4, 3, 3, 3]
        >>> batch["slots"]  # the place of each text's embedding in the (B * views) grid
        tensor([0, 1, 2, 3, 4])
        >>> batch["text_ids"]
        tensor([[70, 80, 90],
                [50, 60,  0]])

    In unsupervised training a row has a single text. The batch then contains this text twice, and dropout makes the second copy
    the positive of the first. With `once` the batch contains the text once and gives it two slots: one embedding, computed with
    one dropout mask, serves as both views.

    The batch entry "further" holds what an objective may need beside these, by the name of the objective's argument:

        other_ids         (B, W) the hashes of a row's other positives, if the rows have them
        scores            (B, V - 1) the scores of the texts after the anchor, if the rows have them
        teacher, target   (B, V, E) the vectors of a teacher, if `vectors` has such a file

    Args:
        views: the largest number of texts in a row, for each source.
        once: encode a single text once, for both slots, as described above.
        vectors: files of a teacher's vectors by argument name. The column `vectors` of a row holds the numbers of its texts.
    """

    def __init__(self, views: list[int], once: bool = False, vectors: Mapping[str, TeacherVectors] | None = None):
        self.views, self.once, self.vectors = views, once, vectors or {}

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Return a batch with the entries of the example above, and "source", the index of the source of all rows."""
        ids: list[int] = []
        lengths: list[int] = []
        slots: list[int] = []
        source = rows[0].get("source", 0)
        views = self.views[source]  # fixed per source, so that the tensors have the same shape on every rank
        text_ids = torch.zeros(len(rows), views, dtype=torch.int64)
        for i, row in enumerate(rows):
            texts, hashes = row["input_ids"], row["text_ids"]
            if len(texts) == 1:
                hashes = hashes * 2
                if self.once:
                    slots.append(i * views + 1)
                else:
                    texts = texts * 2
            for view, text in enumerate(texts):
                ids += text
                lengths.append(len(text))
                slots.append(i * views + view)
            text_ids[i, : len(hashes)] = torch.tensor(hashes)
        return {
            "input_ids": torch.tensor(ids),
            "lengths": lengths,
            "slots": torch.tensor(slots),
            "text_ids": text_ids,
            "source": source,
            "further": self.further(rows, views),
        }

    def further(self, rows: list[dict], views: int) -> dict[str, Tensor]:
        """Return the further arguments of the objective that the rows provide."""
        found = {}
        if "other_ids" in rows[0]:
            found["other_ids"] = torch.tensor([row["other_ids"] for row in rows], dtype=torch.int64)
        if "scores" in rows[0]:
            filled = [row["scores"] + [0.0] * (views - 1 - len(row["scores"])) for row in rows]
            found["scores"] = torch.tensor(filled, dtype=torch.float32)
        if "vectors" in rows[0]:
            numbers = [row["vectors"] * (2 if len(row["vectors"]) == 1 else 1) for row in rows]
            there = torch.tensor([[view < len(row) for view in range(views)] for row in numbers])
            for name, vectors in self.vectors.items():
                own = torch.from_numpy(vectors[[number for row in numbers for number in row]])
                found[name] = own.new_zeros(len(rows), views, own.shape[1]).masked_scatter(there.unsqueeze(2), own)
        return found


def further_arguments(
    further: Mapping[str, Tensor], needs: Sequence[str], gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the arguments that an objective needs, for the rows of all ranks.

    Args:
        further: the entry of this name in a batch.
        needs: `Objective.needs`. The hashes of other positives are always returned.
        gather: maps the rows of this rank to those of all ranks.
    """
    given = {name: gather(further[name]) for name in ("other_ids", *needs) if name in further}
    if "other_ids" in given:
        given["other_ids"] = used_columns(given["other_ids"])
    return given


def used_columns(ids: Tensor) -> Tensor:
    """Return hashes (N, W) without the last columns that are 0 in every row."""
    return ids[:, : int((ids != 0).any(0).sum())]


def to_rows(embeddings: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Put embeddings (texts, D) into their slots of a tensor (B, V, D), in float32 or more precise. Missing texts become zeros.

    If each text has two slots, its embedding becomes both views of its row: the model ran once, with one dropout mask.
    """
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    if len(slots) > len(embeddings):
        embeddings = embeddings.repeat_interleave(2, 0)
    rows, views = shape
    empty = embeddings.new_zeros(rows * views, embeddings.shape[1])
    return empty.index_copy(0, slots, embeddings).view(rows, views, -1)
