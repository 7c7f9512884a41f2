"""A collator that turns rows into one flat batch of texts of different lengths.

The collator does not pad. Each chunk of the batch is padded later, when the whole batch is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_embed.data.teacher_vectors import TeacherVectors


@dataclass(eq=False)
class RaggedCollator:
    """A collator that concatenates the token ids of the texts of B rows.

    The example has two rows of one source. The longest row of the source has 3 texts; the second row here has no negative:

        >>> rows = [{"input_ids": [[1, 7, 2], [1, 8, 8, 2], [1, 9, 2]], "text_ids": [70, 80, 90]},
        ...         {"input_ids": [[1, 5, 2], [1, 6, 2]], "text_ids": [50, 60]}]
        >>> batch = RaggedCollator(texts_per_row=[3])(rows)
        >>> batch["input_ids"]
        tensor([1, 7, 2, 1, 8, 8, 2, 1, 9, 2, 1, 5, 2, 1, 6, 2])
        >>> batch["lengths"]
        [3, 4, 3, 3, 3]
        >>> batch["slots"]  # where the embedding of each text belongs in the block (B, 3) of rows, counted row by row
        tensor([0, 1, 2, 3, 4])
        >>> batch["text_ids"]
        tensor([[70, 80, 90],
                [50, 60,  0]])

    In unsupervised training a row has a single text. The batch then contains this text twice, and dropout makes the second copy
    the positive of the first. With `same_dropout_mask` the batch contains the text once and gives it two slots: its embedding
    is both the anchor and the positive.

    The batch entry "further" holds what an objective may need beside these, by the name of the objective's argument:

        other_ids         (B, W) the hashes of a row's other positives, if the rows have them
        scores            (B, V - 1) the scores of the texts after the anchor, if the rows have them
        teacher, target   (B, V, E) the vectors of a teacher, if `vectors` has such a file

    Args:
        texts_per_row: the largest number of texts in a row, for each source. All batches of a source have so many columns.
        same_dropout_mask: encode a single text once, for both slots, as described above.
        vectors: files of a teacher's vectors by argument name. The column `vectors` of a row holds the numbers of its texts.
    """

    texts_per_row: list[int]
    same_dropout_mask: bool = False
    vectors: Mapping[str, TeacherVectors] | None = None

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Return a batch with the entries of the example above, and "source", the index of the source of all rows."""
        ids: list[int] = []
        lengths: list[int] = []
        slots: list[int] = []
        source = rows[0].get("source", 0)
        width = self.texts_per_row[source]  # not that of these rows, because all ranks need tensors of one shape
        text_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            texts, hashes = row["input_ids"], row["text_ids"]
            if len(texts) == 1:
                hashes = hashes * 2
                if self.same_dropout_mask:
                    slots.append(i * width + 1)  # beside the slot that every first text gets
                else:
                    texts = texts * 2
            for place, text in enumerate(texts):
                ids += text
                lengths.append(len(text))
                slots.append(i * width + place)
            text_ids[i, : len(hashes)] = torch.tensor(hashes)
        return {
            "input_ids": torch.tensor(ids),
            "lengths": lengths,
            "slots": torch.tensor(slots),
            "text_ids": text_ids,
            "source": source,
            "further": self.further(rows, width),
        }

    def further(self, rows: list[dict], width: int) -> dict[str, Tensor]:
        """Return the further arguments of the objective that the rows provide, for V = `width` texts per row."""
        found = {}
        if "other_ids" in rows[0]:
            found["other_ids"] = torch.tensor([row["other_ids"] for row in rows], dtype=torch.int64)
        if "scores" in rows[0]:
            filled = [row["scores"] + [0.0] * (width - 1 - len(row["scores"])) for row in rows]
            found["scores"] = torch.tensor(filled, dtype=torch.float32)
        if "vectors" in rows[0]:
            numbers = [row["vectors"] * (2 if len(row["vectors"]) == 1 else 1) for row in rows]
            present = torch.tensor([[place < len(row) for place in range(width)] for row in numbers])  # (B, V)
            for name, vectors in (self.vectors or {}).items():
                own = torch.from_numpy(vectors[[number for row in numbers for number in row]])
                found[name] = own.new_zeros(len(rows), width, own.shape[1]).masked_scatter(present.unsqueeze(2), own)
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
    """Put embeddings (texts, D) into their slots of a tensor (B, V, D), in float32 or more precise. Absent texts become zeros.

    Args:
        embeddings: those of the texts of a batch, in its order.
        slots: of the batch. There are two for each text if the batch was made with `same_dropout_mask`.
        shape: (B, V).
    """
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    if len(slots) > len(embeddings):
        embeddings = embeddings.repeat_interleave(2, 0)
    empty = embeddings.new_zeros(shape[0] * shape[1], embeddings.shape[1])
    return empty.index_copy(0, slots, embeddings).view(*shape, -1)
