"""What the trainer asks of an objective, the defaults of what is optional, and objectives made of plain functions.

A new objective is a dataclass that derives from `ContrastiveObjective` and computes a loss from embeddings and text ids: no
gathering, no model and no logging in it. `Objective` is the type that the trainer knows; a `FunctionObjective` is made of a
plain function.

The loss is a mean over the own rows, for ranks are averaged. A term of all rows, which every rank computes alike from
`all_embeddings`, is right as it is: the average of the ranks is the term.

Shapes: B own rows, N rows of all ranks, V texts a row (anchor, positive, then V - 2 negatives), D wide.
"""

import inspect
from collections.abc import Callable
from typing import ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor

from hf_embed.errors import InputError


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

    @property
    def takes_other_ids(self) -> bool:
        """Whether its call takes `other_ids`; data whose rows have several positives needs that."""
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
        other_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        Args:
            embeddings: (B, V, D) of the own rows, not normalised.
            text_ids: (B, V) hash of each text; 0 where a row has fewer than V - 2 negatives.
            all_embeddings: (N, V, D), those of all ranks' rows, the own ones among them; default: the own.
            all_text_ids: (N, V), the hashes of all ranks' texts; default: the own.
            first_row: number of the first own row among all rows.
            temperature: a learned one, a scalar; default: the fixed one.
            other_ids: (N, W), given only where the data has rows with several positives: the hashes of the other positives of
                each of all ranks' rows, 0 for none. They are no negatives of the row.
        """
        ...


class ContrastiveObjective:
    """The base of objectives, with a default for all that an `Objective` has beside its call."""

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    temperature: float = 1.0
    learn_temperature: bool = False
    mlm_weight: float = 0.0

    @property
    def takes_other_ids(self) -> bool:
        """Whether the call has that parameter."""
        return has_parameter(cast(Callable[..., Tensor], self), "other_ids")

    def check_width(self, width: int) -> None:
        """Accept embeddings of any width."""

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Accept rows of any number of texts."""


class FunctionObjective(ContrastiveObjective):
    """A loss that is any callable, a function for example, which is called with the first five arguments.

    It is given `temperature` only where it learns one, and `other_ids` only where rows have several positives.

    Of the attributes that an objective has, those that the callable has are taken from it.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        for name in ("temperature", "learn_temperature", "mlm_weight"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    @property
    def takes_other_ids(self) -> bool:
        """Whether the callable has that parameter."""
        return has_parameter(self.function, "other_ids")

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
        other_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the callable's loss."""
        given = {"temperature": temperature, "other_ids": other_ids}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        return self.function(embeddings, text_ids, all_embeddings, all_text_ids, first_row, **given)


def has_parameter(function: Callable[..., Tensor], name: str) -> bool:
    """Return whether a callable has a parameter of that name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a compiled one, which has no signature
        return False
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def check_other_positives(objective: Objective, name: str) -> None:
    """Refuse an objective that cannot be told of a row's other positives; `name` is what messages call the rows.

    Raises:
        InputError: its call has no `other_ids`.
    """
    if not objective.takes_other_ids:
        loss = objective.function if isinstance(objective, FunctionObjective) else objective
        called = getattr(loss, "__name__", type(loss).__name__)
        raise InputError(
            f"{name}: rows have several positives, and the objective {called} has no parameter other_ids: a row's other "
            "positives would be its negatives; add other_ids=None (see hf_embed.objectives.base), or give each row one positive"
        )


def as_objective(loss: Callable[..., Tensor]) -> Objective:
    """Return `loss` itself where it is an objective, and a `FunctionObjective` of any other callable."""
    return loss if isinstance(loss, Objective) else FunctionObjective(loss)
