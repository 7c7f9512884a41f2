"""Learn from a teacher: from its scores of the candidates of a row, or from its vectors.

Shapes: B rows of this rank ("own rows"), N rows of all ranks, V texts per row (an anchor, a positive and V - 2 negatives), D
numbers per embedding.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.errors import InputError
from hf_embed.objectives.base import ContrastiveObjective
from hf_embed.ranges import POSITIVE, check_ranges, is_one_of


def check_candidates(texts_per_row: int, loss: str, name: str) -> None:
    """Raise InputError if the rows have no negatives: a teacher's opinion on a single candidate says nothing."""
    if texts_per_row < 3:
        raise InputError(
            f"{name}: {loss} compares the candidates of a row, and no row has a negative; add columns of negatives (for example "
            "with mine_hard_negatives.py)"
        )


@dataclass
class TeacherKL(ContrastiveObjective):
    """The Kullback-Leibler divergence between a teacher's and the student's distribution over the candidates of a row.

        loss_i = sum_c P_ic log (P_ic / Q_ic)        P_i = softmax_c(y_ic / t'),  Q_i = softmax_c(cos(a_i, c) / t)

    The candidates c of row i are its positive and its own negatives; y_ic is the teacher's score of candidate c. This is the
    loss of RocketQAv2 (Ren et al., equation 3) and of many rerankers' students.

    Args:
        temperature: t, for the student's cosine similarities.
        teacher_temperature: t', for the teacher's scores. 1 suits the logits of a reranker; for cosine similarities use t.

    Raises:
        InputError: if a temperature is not above 0.
    """

    equation: ClassVar[str] = "loss_i = KL( softmax_c(y_ic / t') || softmax_c(cos(a_i, c) / t) )"
    paper: ClassVar[str] = "Ren et al.: RocketQAv2, https://arxiv.org/abs/2110.07367"
    needs_scores: ClassVar[bool] = True

    temperature: float = field(default=0.05, metadata={"help": "Temperature of the student's similarities."})
    teacher_temperature: float = field(default=1.0, metadata={"help": "Temperature of the teacher's scores."})

    def __post_init__(self) -> None:
        check_ranges(self, {"temperature": POSITIVE, "teacher_temperature": POSITIVE})

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse rows without negatives.

        Raises:
            InputError: if no row has a negative.
        """
        check_candidates(texts_per_row, "TeacherKL", name)

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        Args:
            embeddings, text_ids, all_embeddings, all_text_ids, first_row, temperature: as in `Objective`.
            scores: (N, V - 1) the teacher's scores of the candidates of all rows; values of absent texts are not used.
        """
        assert scores is not None  # the trainer checks that the rows have scores
        absent = text_ids[:, 1:] == 0  # (B, V - 1)
        student = cosines(embeddings) / (self.temperature if temperature is None else temperature)
        student = student.masked_fill(absent, float("-inf")).log_softmax(1)
        own = scores[first_row : first_row + len(embeddings)].to(student.dtype)
        teacher = (own / self.teacher_temperature).masked_fill(absent, float("-inf")).log_softmax(1)
        terms = teacher.exp() * (teacher - student)
        return terms.masked_fill(absent, 0).sum(1).mean()


@dataclass
class MarginMSE(ContrastiveObjective):
    """The squared error of the margins between the positive and each negative (Hofstätter et al., equation 5).

        loss_i = mean_k ( (s(a_i, p_i) - s(a_i, n_ik)) - (y_ip - y_ik) )^2        y: the teacher's scores

    Args:
        similarity: s. "dot" is the dot product, as in the paper, for the scores of a reranker, which may be of any size.
            "cosine" is for a teacher whose scores are cosine similarities.

    Raises:
        InputError: if the similarity is unknown.
    """

    equation: ClassVar[str] = "loss_i = mean_k ( (s(a_i, p_i) - s(a_i, n_ik)) - (y_ip - y_ik) )^2"
    paper: ClassVar[str] = (
        "Hofstätter et al.: Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation, "
        "https://arxiv.org/abs/2010.02666"
    )
    needs_scores: ClassVar[bool] = True

    similarity: Literal["dot", "cosine"] = field(default="dot", metadata={"help": "Similarity of the student: dot or cosine."})

    def __post_init__(self) -> None:
        if not is_one_of(self.similarity, ("dot", "cosine")):
            raise InputError(f"unknown similarity '{self.similarity}'; there are dot and cosine")

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse rows without negatives.

        Raises:
            InputError: if no row has a negative.
        """
        check_candidates(texts_per_row, "MarginMSE", name)

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar. Rows without a negative do not count. For `scores` see `TeacherKL`."""
        assert scores is not None  # the trainer checks that the rows have scores
        there = text_ids[:, 2:] != 0  # (B, V - 2)
        student = cosines(embeddings) if self.similarity == "cosine" else dots(embeddings)
        own = scores[first_row : first_row + len(embeddings)].to(student.dtype)
        errors = (student[:, :1] - student[:, 1:]) - (own[:, :1] - own[:, 1:])
        squares = errors.masked_fill(~there, 0).square().sum(1) / there.sum(1).clamp(min=1)
        return squares.mean()


def dots(rows: Tensor) -> Tensor:
    """Return the dot products of the anchors with the other texts of their rows, (B, V - 1), of embeddings (B, V, D)."""
    return torch.einsum("bd,bvd->bv", rows[:, 0], rows[:, 1:])


def cosines(rows: Tensor) -> Tensor:
    """Return the cosine similarities of the anchors with the other texts of their rows, (B, V - 1)."""
    return dots(F.normalize(rows, dim=-1))
