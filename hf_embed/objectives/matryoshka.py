"""Matryoshka Representation Learning (https://arxiv.org/abs/2205.13147): the first dimensions are an embedding themselves."""

from dataclasses import dataclass

from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.ranges import COUNT, Range


@dataclass
class Matryoshka:
    """The sum of an objective's losses on the first `dims` dimensions of every embedding (the paper's equation 1).

    Args:
        objective: e.g. `ImprovedContrastive()`; every prefix is compared by its own cosine.
        dims: widths, e.g. (384, 256, 128, 64). Name the full width too if it should count.
        weights: of each width's loss; default: 1.

    Raises:
        InputError: a width below 1, named twice or, when the trainer is made, above the embedding's; another number of weights
            than widths; weights below 0, or all 0.
    """

    objective: object
    dims: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        self.dims = tuple(self.dims)
        self.weights = (1.0,) * len(self.dims) if self.weights is None else tuple(self.weights)
        if not self.dims or not all(dim in COUNT for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise InputError(f"Matryoshka dims are {list(self.dims)}; give different whole widths of at least 1")
        if len(self.weights) != len(self.dims):
            raise InputError(f"Matryoshka has {len(self.dims)} dims and {len(self.weights)} weights; give one for each")
        if not all(weight in Range(least=0) for weight in self.weights) or not any(self.weights):
            raise InputError(f"Matryoshka weights are {list(self.weights)}; give numbers of at least 0, not all of them 0")

    # What the trainer asks of an objective besides its loss.
    @property
    def temperature(self) -> float:
        return self.objective.temperature

    @property
    def learn_temperature(self) -> bool:
        return getattr(self.objective, "learn_temperature", False)

    @property
    def mlm_weight(self) -> float:
        return getattr(self.objective, "mlm_weight", 0.0)

    def __call__(self, embeddings: Tensor, text_ids: Tensor, all_embeddings: Tensor | None = None, *args, **kwargs) -> Tensor:
        """As the objective's own call."""
        if max(self.dims) > embeddings.shape[-1]:
            raise InputError(f"Matryoshka dims {max(self.dims)}: the embedding is {embeddings.shape[-1]} wide")
        losses = (
            weight * self.objective(
                embeddings[..., :dim], text_ids, None if all_embeddings is None else all_embeddings[..., :dim], *args, **kwargs
            )
            for dim, weight in zip(self.dims, self.weights)
        )  # fmt: skip
        return sum(losses)
