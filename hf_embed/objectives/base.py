"""What the trainer asks of an objective, the defaults of what is optional, and objectives made of plain functions.

A new objective is a dataclass that derives from `ContrastiveObjective` and computes a loss from embeddings and text ids: no
gathering, no model and no logging in it. `Objective` is the type that the trainer knows; a `FunctionObjective` is made of a
plain function.

The loss is a mean over the own rows, for ranks are averaged. A term of all rows, which every rank computes alike from
`all_embeddings`, is right as it is: the average of the ranks is the term.

Shapes: B own rows, N rows of all ranks, V texts a row (anchor, positive, then V - 2 negatives), D wide.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Objective(Protocol):
    """What the trainer asks of an objective.

    A batch of two rows on each of two ranks, the second rank's call; row 3 has no negative:

        embeddings      (2, 3, D)   rows 2 and 3; what stands in place of the absent text is 0
        text_ids        (2, 3)      [[31, 32, 33], [41, 42, 0]]: equal numbers are equal texts, 0 is an absent text
        all_embeddings  (4, 3, D)   rows 0 to 3, through which the gradients flow
        all_text_ids    (4, 3)      [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 0]]
        first_row       2           so all_text_ids[2:4] are text_ids
    """

    # The lines of a model card: the loss, and where it is from.
    equation: ClassVar[str]
    paper: ClassVar[str]

    @property
    def temperature(self) -> float:
        """The number that similarities are divided by, or the one that a learned temperature begins with."""
        ...

    @property
    def learn_temperature(self) -> bool:
        """Whether the trainer learns the temperature, and gives it to each call."""
        ...

    @property
    def mlm_weight(self) -> float:
        """The weight of the masked-language-modelling loss, which the trainer computes and adds; 0: none."""
        ...

    def check_width(self, width: int) -> None:
        """Check that embeddings of `width` numbers suit.

        Raises:
            InputError: they do not.
        """
        ...

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Check that the rows suit, the largest of which has `texts_per_row` texts; `name` is what messages call them.

        Raises:
            InputError: they do not.
        """
        ...

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        Args:
            embeddings: (B, V, D) of the own rows, not normalised.
            text_ids: (B, V) hash of each text; 0 where a row has fewer than V - 2 negatives.
            all_embeddings: (N, V, D), those of all ranks' rows, the own ones among them; default: the own.
            all_text_ids: (N, V), the hashes of all ranks' texts; default: the own.
            first_row: number of the first own row among all rows.
            temperature: a learned one, a scalar; default: the fixed one.
        """
        ...


class ContrastiveObjective:
    """The base of objectives, with a default for all that an `Objective` has beside its call."""

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    temperature: float = 1.0
    learn_temperature: bool = False
    mlm_weight: float = 0.0

    def check_width(self, width: int) -> None:
        """Accept embeddings of any width."""

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Accept rows of any number of texts."""


class FunctionObjective(ContrastiveObjective):
    """A loss that is any callable, a function for example, which is called with the first five arguments.

    Of the attributes that an objective has, those that the callable has are taken from it.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        for name in ("temperature", "learn_temperature", "mlm_weight"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the function's loss; it is given a temperature only where it learns one."""
        learned = {} if temperature is None else {"temperature": temperature}
        return self.function(embeddings, text_ids, all_embeddings, all_text_ids, first_row, **learned)


def as_objective(loss: Callable[..., Tensor]) -> Objective:
    """Return `loss` itself where it is an objective, and a `FunctionObjective` of any other callable."""
    return loss if isinstance(loss, Objective) else FunctionObjective(loss)
