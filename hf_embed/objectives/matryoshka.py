"""Matryoshka Representation Learning (https://arxiv.org/abs/2205.13147): a prefix of an embedding is an embedding too.

Shapes: those of `hf_embed.objectives.base`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.objectives.base import Batch, Objective, as_objective
from hf_embed.ranges import COUNT, Range


@dataclass
class Matryoshka(Objective):
    """The weighted sum of an objective's losses on prefixes of the embeddings (equation 1 of the paper).

        loss = sum_{m in dims} c_m L(embeddings[..., :m])        c_m: weight of width m, 1 by default; L: the inner objective

    The code deviates from the paper in two points. L is the contrastive loss, where the paper has a classification loss with a
    classifier for each width; each prefix is compared by its own cosine similarity. And only the widths in `dims` count, where
    the paper always includes the full width.

    Args:
        objective: the inner objective, e.g. `ImprovedContrastive()`.
        dims: the widths, e.g. (384, 256, 128, 64). Include the full width if it is to count.
        weights: the weight of the loss at each width; default: 1.

    Raises:
        InputError: if a width is below 1 or given twice, or above the width of the embedding (found when the trainer is made);
            if the numbers of weights and widths differ; if a weight is below 0, or all weights are 0; if the inner objective
            is a class, or needs target vectors.
    """

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = "Kusupati et al.: Matryoshka Representation Learning, https://arxiv.org/abs/2205.13147"

    objective: Callable[..., Tensor]
    dims: Sequence[int]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(given, Sequence | None) and not isinstance(given, str) for given in (self.dims, self.weights)):
            raise InputError(f"Matryoshka dims are {self.dims!r} and its weights {self.weights!r}; give lists of numbers")
        if isinstance(self.objective, type) or not callable(self.objective):
            raise InputError(f"Matryoshka objective is {self.objective!r}; give an instance, for example SimCSE()")
        if "target" in self.inner.needs:
            raise InputError("Matryoshka cannot shorten the target vectors of a teacher; use the objective without Matryoshka")
        inner = self.inner
        self.temperature, self.learn_temperature, self.mlm_weight = inner.temperature, inner.learn_temperature, inner.mlm_weight
        self.mask_other_positives = inner.mask_other_positives
        self.dims = tuple(self.dims)
        self.weights = (1.0,) * len(self.dims) if self.weights is None else tuple(self.weights)
        if not self.dims or not all(dim in COUNT for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise InputError(f"Matryoshka dims are {list(self.dims)}; give distinct whole numbers of at least 1")
        if len(self.weights) != len(self.dims):
            raise InputError(
                f"Matryoshka has {len(self.dims)} dims and {len(self.weights)} weights; give one weight for each dim"
            )
        if not all(weight in Range(least=0) for weight in self.weights) or not any(self.weights):
            raise InputError(f"Matryoshka weights are {list(self.weights)}; give numbers of at least 0, not all of them 0")

    @property
    def inner(self) -> Objective:
        """The inner objective, whose losses are summed."""
        return as_objective(self.objective)

    @property
    def takes_other_ids(self) -> bool:
        """Whether the inner objective accepts `other_ids`."""
        return self.inner.takes_other_ids

    @property
    def needs(self) -> tuple[str, ...]:
        """What the inner objective needs."""
        return self.inner.needs

    def check_width(self, width: int) -> None:
        """Check that no width in `dims` is above the width of the embedding.

        Raises:
            InputError: if one is.
        """
        if max(self.dims) > width:
            raise InputError(f"Matryoshka dims contain {max(self.dims)}, but the embedding has {width} dimensions; remove it")

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Check the rows as the inner objective does."""
        self.inner.check_rows(texts_per_row, name)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar."""
        self.check_width(batch.embeddings.shape[-1])
        assert self.weights is not None  # __post_init__ has set them
        loss, inner = batch.embeddings.new_zeros(()), self.inner
        for dim, weight in zip(self.dims, self.weights):  # equation 1: the sum over widths m of c_m L
            own, everyone = batch.embeddings[..., :dim], batch.all_embeddings[..., :dim]
            loss = loss + weight * inner.mean_loss(batch._replace(embeddings=own, all_embeddings=everyone))
        return loss
