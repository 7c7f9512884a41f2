"""Learn from a teacher: from its scores of candidates, or from its vectors.

Shapes: B rows of this rank ("own rows"), N rows of all ranks, V texts per row (an anchor, a positive and V - 2 negatives), D
numbers per embedding.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_embed.entry import recipe_command
from hf_embed.errors import InputError
from hf_embed.objectives.base import Batch, Objective
from hf_embed.objectives.tiles import by_tiles
from hf_embed.ranges import ABOVE_ZERO, check_ranges, setting


def check_candidates(texts_per_row: int, loss: str, name: str) -> None:
    """Raise InputError if the rows have no negatives: a teacher's opinion on a single candidate says nothing."""
    if texts_per_row < 3:
        raise InputError(
            f"{name}: {loss} compares the candidates of a row, and no row has a negative; add columns of negatives (for "
            f"example with {recipe_command('mine_hard_negatives')})"
        )


@dataclass
class TeacherKL(Objective):
    """The Kullback-Leibler divergence between a teacher's and the student's distribution over candidates.

        loss_i = sum_c P_ic log (P_ic / Q_ic)        P_i = softmax_c(y_ic / t'),  Q_i = softmax_c(cos(a_i, c) / t)

    y_ic is the teacher's score of anchor i and candidate c. There are two kinds of candidates:

    - "row": the positive and the negatives of row i, with the scores of a reranker from columns of the data, or with the cosine
      similarities of a teacher model. This is the listwise loss of RocketQAv2 (Ren et al.).
    - "batch": the positives and negatives of all rows, with the cosine similarities of a teacher model. No text is a false
      negative here, because the teacher says how close it is.

    Example: a row with a positive and one negative, which a reranker scores 4 and 1. The student's cosines are 0.6 and 0.5.

        P = softmax(4, 1) = (0.953, 0.047)        Q = softmax(0.6 / 0.05, 0.5 / 0.05) = (0.881, 0.119)
        loss = 0.953 log (0.953 / 0.881) + 0.047 log (0.047 / 0.119) = 0.031

    Args:
        temperature: t, for the student's cosine similarities.
        teacher_temperature: t', for the teacher's scores. Default: 1 for "row", which suits the logits of a reranker, and t for
            "batch". For the cosine similarities of a teacher model in "row", set it to about t.
        candidates: "row" or "batch".

    Raises:
        InputError: if a temperature is not above 0, or the kind of candidates is unknown.
    """

    equation: ClassVar[str] = "loss_i = KL( softmax_c(y_ic / t') || softmax_c(cos(a_i, c) / t) )"
    paper: ClassVar[str] = "Ren et al.: RocketQAv2, https://arxiv.org/abs/2110.07367"

    temperature: float = setting(0.05, "Temperature of the student's similarities.")
    teacher_temperature: float | None = setting(
        None, "Temperature of the teacher's scores. Default: 1 for row, temperature for batch."
    )
    candidates: Literal["row", "batch"] = setting(
        "row", "What the teacher scores: the texts of a row, or all texts of the batch."
    )

    def __post_init__(self) -> None:
        check_ranges(self, {"temperature": ABOVE_ZERO, "teacher_temperature": ABOVE_ZERO})

    @property
    def needs(self) -> tuple[str, ...]:
        """Scores for the candidates of a row, the teacher's vectors for those of a batch."""
        return ("scores",) if self.candidates == "row" else ("teacher",)

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse rows without negatives, unless the candidates are those of the batch.

        Raises:
            InputError: if no row has a negative.
        """
        if self.candidates == "row":
            check_candidates(texts_per_row, "TeacherKL", name)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar."""
        if self.candidates == "row":
            student = cosines(batch.embeddings) / batch.temperature
            return self.divergence(batch.needed["scores"][batch.own], student, batch.text_ids[:, 1:] == 0).mean()
        teacher = batch.needed["teacher"]
        queries = F.normalize(batch.embeddings[:, 0], dim=-1)  # (B, D)
        documents = F.normalize(batch.all_embeddings[:, 1:].flatten(0, 1), dim=-1)  # (N * (V - 1), D)
        judges, judged = teacher[batch.own, 0], teacher[:, 1:].flatten(0, 1)  # (B, E) and (N * (V - 1), E)
        absent = (batch.all_text_ids[:, 1:] == 0).flatten()

        def losses(rows: slice) -> Tensor:
            """Return the losses of the T rows of a tile, (T,)."""
            student = queries[rows] @ documents.T / batch.temperature  # (T, N * (V - 1))
            return self.divergence(judges[rows] @ judged.T, student, absent.expand_as(student))

        return by_tiles(losses, len(queries), len(documents)).mean()

    def divergence(self, teacher: Tensor, student: Tensor, absent: Tensor) -> Tensor:
        """Return KL(softmax(teacher / t') || softmax(student)) of each row, (B,).

        Args:
            teacher: similarities (B, C).
            student: logits (B, C).
            absent: (B, C) True for candidates that do not exist.
        """
        temperature = self.teacher_temperature or (1.0 if self.candidates == "row" else self.temperature)
        teacher = teacher.to(student.dtype) / temperature
        expected = teacher.masked_fill(absent, float("-inf")).log_softmax(1)
        found = student.masked_fill(absent, float("-inf")).log_softmax(1)
        terms = expected.exp() * (expected - found)
        return terms.masked_fill(absent, 0).sum(1)


@dataclass
class MarginMSE(Objective):
    """The squared error of the margins between the positive and each negative (Hofstätter et al.).

        loss_i = mean_k ( (s(a_i, p_i) - s(a_i, n_ik)) - (y_ip - y_ik) )^2        y: the teacher's scores

    Example: a reranker scores the positive 9 and the negative 5, so its margin is 4. The student's dot products are 7 and 6, so
    its margin is 1, and the loss is (1 - 4)^2 = 9.

    Args:
        similarity: s. "dot" is the dot product, as in the paper, for the scores of a reranker, which may be of any size. It
            needs a model that does not return unit vectors, whose dot products are cosines: set `normalize=False` in the
            arguments. "cosine" is for a teacher whose scores are cosine similarities.

    Raises:
        InputError: if the similarity is unknown.
    """

    equation: ClassVar[str] = "loss_i = mean_k ( (s(a_i, p_i) - s(a_i, n_ik)) - (y_ip - y_ik) )^2"
    paper: ClassVar[str] = (
        "Hofstätter et al.: Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation, "
        "https://arxiv.org/abs/2010.02666"
    )
    needs = ("scores",)  # of the positive and the negatives of each row

    similarity: Literal["dot", "cosine"] = setting("dot", "Similarity of the student: dot or cosine.")

    def __post_init__(self) -> None:
        check_ranges(self, {})

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Refuse rows without negatives.

        Raises:
            InputError: if no row has a negative.
        """
        check_candidates(texts_per_row, "MarginMSE", name)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        The loss of a row without negatives is 0.
        """
        there = batch.text_ids[:, 2:] != 0  # (B, V - 2)
        student = cosines(batch.embeddings) if self.similarity == "cosine" else dots(batch.embeddings)
        own = batch.needed["scores"][batch.own].to(student.dtype)
        errors = (student[:, :1] - student[:, 1:]) - (own[:, :1] - own[:, 1:])
        squares = errors.masked_fill(~there, 0).square().sum(1) / there.sum(1).clamp(min=1)
        return squares.mean()


@dataclass
class VectorDistillation(Objective):
    """Learn the vectors of a teacher model (Reimers and Gurevych, https://arxiv.org/abs/2004.09813).

        loss_i = mean_v ( 1 - cos(f(x_iv), y_iv) )        v: the texts of row i, y: the teacher's vector

    Example: a row of one text, for which the student has the vector (3, 4) and the teacher (1, 0). The cosine is 0.6, and the
    loss is 0.4.

    If the teacher's vectors are wider than the student's, y is their projection on the leading principal directions; if they
    are narrower, y is filled up with zeros. Rows may have one text or several. No text is a negative of another, so batches can
    be small. For rows of a single text, `same_dropout_mask` saves encoding the text a second time.

    Args:
        loss: "cosine", as above, or "mse": the mean squared difference of the D numbers, as in the paper. The teacher's vectors
            have unit length, so "mse" suits a student whose vectors are used without normalization.

    Raises:
        InputError: if the loss is unknown.
    """

    equation: ClassVar[str] = "loss_i = 1 - cos(f(x_i), y_i), y_i: the vector of the teacher"
    paper: ClassVar[str] = (
        "Reimers, Gurevych: Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation, "
        "https://arxiv.org/abs/2004.09813"
    )
    needs = ("target",)  # the teacher's vectors in the width of the model that is trained

    loss: Literal["cosine", "mse"] = setting("cosine", "Distance to the teacher's vectors.")

    def __post_init__(self) -> None:
        check_ranges(self, {})

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar."""
        embeddings = batch.embeddings
        own = batch.needed["target"][batch.own].to(embeddings.dtype)
        there = batch.text_ids != 0  # (B, V)
        if self.loss == "cosine":
            distances = 1 - F.cosine_similarity(embeddings, own, dim=-1)  # (B, V)
        else:
            distances = (embeddings - own).square().mean(-1)
        return (distances.masked_fill(~there, 0).sum(1) / there.sum(1)).mean()


def dots(rows: Tensor) -> Tensor:
    """Return the dot products of the anchors with the other texts of their rows, (B, V - 1), of embeddings (B, V, D)."""
    return torch.einsum("bd,bvd->bv", rows[:, 0], rows[:, 1:])


def cosines(rows: Tensor) -> Tensor:
    """Return the cosine similarities of the anchors with the other texts of their rows, (B, V - 1)."""
    return dots(F.normalize(rows, dim=-1))
