"""The interface of an objective, defaults for its optional parts, and a wrapper for plain functions.

A new objective is a dataclass that derives from `Objective` and defines `mean_loss`. It computes a loss from
embeddings and text ids. It does not gather, does not run a model and does not log. `FunctionObjective` turns a plain function
into an objective.

The loss is the mean over the rows of one rank, because DDP and FSDP average the gradients over the ranks. A term that depends
on all rows, and that every rank computes alike from `all_embeddings`, needs no correction: its average over the ranks is the
term itself.

Shapes: B rows of this rank ("own rows"), N rows of all ranks, V texts per row (an anchor, a positive and V - 2 negatives), D
numbers per embedding.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from hf_embed.errors import InputError

GUIDE_HELP = "With --teacher: ignore candidates that it scores above the positive minus this."  # of the flag --guide_margin
# Further arguments that an objective may need, for the N rows of all ranks. They are 0 where a text is absent.
NEEDS = {
    "scores": "(N, V - 1) scores of the texts after the anchor, from columns of the data or from a teacher model",
    "teacher": "(N, V, E) the vectors that the teacher model has for the texts, of its width E and of unit length",
    "target": "(N, V, D) the same vectors in the width of the model that is trained; see `hf_embed.training.teacher`",
}


class Batch(NamedTuple):
    """What the loss of a step is computed from: the arguments of an `Objective`, with their defaults filled in."""

    embeddings: Tensor  # (B, V, D) embeddings of the own rows
    text_ids: Tensor  # (B, V) hash of each text; 0 for an absent text
    all_embeddings: Tensor  # (N, V, D) the same of the rows of all ranks
    all_text_ids: Tensor  # (N, V)
    own: slice  # where the own rows are among the rows of all ranks
    temperature: Tensor | float  # the learned temperature, or the fixed one
    other_ids: Tensor | None  # (N, W) hashes of the other positives of each row; None if no row has any
    needed: dict[str, Tensor]  # the further arguments, by name: see `NEEDS`


class Objective:
    """The base class of objectives: what the trainer requires, with a default for every part except the loss.

    Example: two ranks with two rows each, and the call on the second rank. Row 3 has no negative.

        embeddings      (2, 3, D)   rows 2 and 3; the embedding in place of the absent text is 0
        text_ids        (2, 3)      [[31, 32, 33], [41, 42, 0]]: equal numbers are equal texts, 0 is an absent text
        all_embeddings  (4, 3, D)   rows 0 to 3; gradients flow through all of them
        all_text_ids    (4, 3)      [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 0]]
        first_row       2           so all_text_ids[2:4] equals text_ids

    Attributes:
        equation: a line of the model card, the formula of the loss.
        paper: a line of the model card, the paper that the loss comes from.
        temperature: the number that similarities are divided by. If the temperature is learned, this is its initial value.
        learn_temperature: whether the trainer learns the temperature and passes it to each call.
        mlm_weight: the weight of the masked-language-modeling loss, which the trainer computes and adds. 0 means no such loss.
        guide_margin: leave out candidates that a teacher scores above its score of the positive minus this number. None: no
            teacher guides the choice of negatives.
        mask_other_positives: whether other positives of the same anchor, in other rows, are no negatives. Checks of the rows
            read it.
    """

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    temperature: float = 1.0
    learn_temperature: bool = False
    mlm_weight: float = 0.0
    guide_margin: float | None = None
    mask_other_positives: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of further arguments that the call needs, each one of `NEEDS`."""
        return () if self.guide_margin is None else ("teacher",)

    @property
    def takes_other_ids(self) -> bool:
        """Whether the call accepts `other_ids`. Data whose rows have several positives requires it."""
        return has_parameter(self, "other_ids")

    def check_width(self, width: int) -> None:
        """Raise InputError if the objective does not accept embeddings of `width` numbers."""

    def check_rows(self, texts_per_row: int, name: str) -> None:
        """Raise InputError if the objective does not accept the rows of a dataset.

        Args:
            texts_per_row: the number of texts in the largest row.
            name: what error messages call the rows.
        """

    def __call__(
        self,
        embeddings: Tensor,
        text_ids: Tensor,
        all_embeddings: Tensor | None = None,
        all_text_ids: Tensor | None = None,
        first_row: int = 0,
        temperature: Tensor | None = None,
        other_ids: Tensor | None = None,
        **needed: Tensor,
    ) -> Tensor:
        """Return the mean loss of the own rows, a scalar.

        Args:
            embeddings: (B, V, D) embeddings of the own rows, in float32 or float64. Their lengths are those of the vectors that
                the saved model returns: 1 if its setting `normalize` is True, else any.
            text_ids: (B, V) hash of each text, or any number but 0 that only equal texts share; 0 where a row has fewer than
                V - 2 negatives.
            all_embeddings: (N, V, D) embeddings of the rows of all ranks, which include the own rows; default: the own rows.
            all_text_ids: (N, V) hashes of the texts of all ranks; default: those of the own rows.
            first_row: number of the first own row among the rows of all ranks.
            temperature: the learned temperature, a scalar; default: the fixed temperature.
            other_ids: (N, W) hashes of the other positives of each row of all ranks, filled up with 0. It is passed only if
                some rows of the data have several positives. These texts are not negatives of the row.
            **needed: the arguments that the objective `needs`, for the rows of all ranks: see `NEEDS`.
        """
        if all_embeddings is None or all_text_ids is None:
            all_embeddings, all_text_ids = embeddings, text_ids
        own, divisor = slice(first_row, first_row + len(embeddings)), self.temperature if temperature is None else temperature
        return self.mean_loss(Batch(embeddings, text_ids, all_embeddings, all_text_ids, own, divisor, other_ids, needed))

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the own rows, a scalar. The texts of `batch.other_ids` are not negatives of their row."""
        raise NotImplementedError


class FunctionObjective(Objective):
    """An objective that wraps any callable, for example a function.

    The callable receives the first five arguments of an objective. It also receives `temperature` if the temperature is
    learned, `other_ids` if rows have several positives, and those of `NEEDS` that are among its parameters. If the callable has
    an attribute `temperature`, `learn_temperature` or `mlm_weight`, the objective takes its value.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        for name in ("temperature", "learn_temperature", "mlm_weight"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the callable's parameters that are in `NEEDS`."""
        return tuple(name for name in NEEDS if name in parameters_of(self.function))

    @property
    def takes_other_ids(self) -> bool:
        """Whether the callable has a parameter `other_ids`."""
        return has_parameter(self.function, "other_ids")

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the loss that the callable computes.

        Raises:
            InputError: if it returns anything but a number with a gradient.
        """
        rows = batch.embeddings, batch.text_ids, batch.all_embeddings, batch.all_text_ids, batch.own.start
        learned = batch.temperature if isinstance(batch.temperature, Tensor) else None
        further = {"temperature": learned, "other_ids": batch.other_ids, **batch.needed}  # passed only if they are there
        loss = self.function(*rows, **{name: tensor for name, tensor in further.items() if tensor is not None})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or (batch.embeddings.requires_grad and not loss.requires_grad):
            shape = f" of shape {tuple(loss.shape)}, gradient {loss.requires_grad}" if isinstance(loss, Tensor) else ""
            raise InputError(
                f"the objective {loss_name(self)} returns a {type(loss).__name__}{shape}; return the mean loss of the rows, a "
                "tensor of one number that is computed from the embeddings"
            )
        return loss.view(())


def has_parameter(function: Callable[..., Tensor], name: str) -> bool:
    """Return whether a callable has a parameter of this name or takes arbitrary keyword arguments."""
    parameters = parameters_of(function)
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def parameters_of(function: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a callable by name. A compiled function has no signature, so it has none."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def loss_name(objective: Objective) -> str:
    """Return what error messages call an objective: the name of its class, or of the function that it wraps."""
    loss = objective.function if isinstance(objective, FunctionObjective) else objective
    return getattr(loss, "__name__", type(loss).__name__)


def check_other_positives(objective: Objective, name: str) -> None:
    """Refuse an objective that does not accept `other_ids`; `name` is what error messages call the rows.

    Raises:
        InputError: if the call of the objective has no parameter `other_ids`.
    """
    if not objective.takes_other_ids:
        raise InputError(
            f"{name}: rows have several positives, but the objective {loss_name(objective)} has no parameter other_ids, so a "
            "row's other positives would be its negatives; add other_ids=None (see hf_embed.objectives.base), or give each row "
            "one positive"
        )


def as_objective(loss: Callable[..., Tensor]) -> Objective:
    """Return `loss` itself if it is an objective; otherwise wrap the callable in a `FunctionObjective`.

    Raises:
        InputError: if it is a module with weights to train, because only the weights of the model are trained.
    """
    weights = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    if trained := [name for name, weight in weights if weight.requires_grad]:
        raise InputError(
            f"the objective {type(loss).__name__} has weights of its own ({trained[0]}), which would not be trained; freeze "
            "them with requires_grad_(False); to learn a temperature, set learn_temperature=True of a built-in objective"
        )
    return loss if isinstance(loss, Objective) else FunctionObjective(loss)
