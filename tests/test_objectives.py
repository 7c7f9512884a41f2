"""Test SimCSE against the paper's definition in plain loops (float64)."""

import dataclasses
import importlib
import math
import pkgutil

import pytest
import torch
from conftest import error_of
from torch.testing import assert_close

from hf_embed import InputError, Matryoshka, SimCSE, objectives
from hf_embed.objectives import OBJECTIVES, Objective, as_objective

ROWS, DIM = 6, 5


def embeddings(views, rows=ROWS):
    z = torch.randn(rows, views, DIM, generator=torch.Generator().manual_seed(views), dtype=torch.float64)
    return 3 * z  # not unit vectors


def distinct(views, rows=ROWS):
    return torch.arange(1, rows * views + 1).view(rows, views)


def official(z, temperature=0.05, weight=0.0, masked=()):
    """Compute Equation 5 with the weight as a logit, as in `cl_forward` of SimCSE's models.py.

    `masked` holds tuples (i, j, view): the loss of row i leaves out text `view` of row j.
    """

    def logit(i, j, view):
        a, b = z[i, 0].tolist(), z[j, view].tolist()
        cosine = sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
        return cosine / temperature + (weight if view >= 2 and i == j else 0)

    rows, views, _ = z.shape
    losses = []
    for i in range(rows):
        texts = [(i, j, view) for j in range(rows) for view in range(1, views) if (i, j, view) not in masked]
        losses.append(-math.log(math.exp(logit(i, i, 1)) / sum(math.exp(logit(*text)) for text in texts)))
    return torch.tensor(sum(losses) / rows, dtype=torch.float64)


CASES = [(views, temperature, weight) for views in (2, 3, 5) for temperature in (0.05, 0.7) for weight in (0.0, 1.5)]


@pytest.mark.parametrize(("views", "temperature", "weight"), CASES)
def test_equals_definition(views, temperature, weight):
    z = embeddings(views)
    loss = SimCSE(temperature, weight)(z, distinct(views))
    assert_close(loss, official(z, temperature, weight), rtol=1e-12, atol=0)


def test_by_hand():
    """In each of two rows, anchor and positive are the same axis, so the loss compares e^(1/t) with e^0."""
    z = torch.eye(2, dtype=torch.float64).unsqueeze(1).repeat(1, 2, 1)
    assert_close(float(SimCSE(0.5)(z, distinct(2, 2))), math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("change", [{"temperature": 0.06}, {"weight": 1.0}, {"masked": {(0, 1, 2)}}])
def test_control_comparison_notices(change):
    z = embeddings(3)
    loss = SimCSE(0.05, 1.5)(z, distinct(3))
    assert abs(loss - official(z, **({"temperature": 0.05, "weight": 1.5} | change))) > 1e-3


MASKS = {
    "no two texts equal": ([[1, 2], [3, 4], [5, 6]], set()),
    "a positive is another row's anchor": ([[1, 2], [3, 1], [5, 6]], {(0, 1, 1), (1, 0, 1)}),
    "two positives are equal": ([[1, 2], [3, 2], [5, 6]], {(0, 1, 1), (1, 0, 1)}),
    "unsupervised duplicate": ([[1, 1], [2, 2], [1, 1]], {(0, 2, 1), (2, 0, 1)}),
    "two anchors are equal": ([[1, 2], [1, 3], [5, 6]], {(0, 1, 1), (1, 0, 1)}),
    "a row has no negative": ([[1, 2, 3], [4, 5, 0], [6, 7, 8]], {(i, 1, 2) for i in range(3)}),
    "no row has its second negative": ([[1, 2, 3, 0], [4, 5, 6, 0]], {(i, j, 3) for i in range(2) for j in range(2)}),
    "a negative is another row's anchor": ([[1, 2, 3], [4, 5, 1], [6, 7, 8]], {(0, 1, 2)}),
    "a negative is another row's positive": ([[1, 2, 3], [4, 5, 2], [6, 7, 8]], {(0, 1, 2)}),
    "the own negative is the own positive": ([[1, 2, 2], [4, 5, 6], [7, 8, 9]], {(0, 0, 2)}),
}


@pytest.mark.parametrize("case", MASKS)
def test_texts_that_are_no_negatives(case):
    ids, masked = MASKS[case]
    ids = torch.tensor(ids)
    z = embeddings(ids.shape[1], len(ids))
    loss = SimCSE(0.5, 0.7)(z, ids)
    assert_close(loss, official(z, 0.5, 0.7, masked), rtol=1e-12, atol=0)
    if masked:  # control: the mask matters
        assert abs(loss - official(z, 0.5, 0.7)) > 1e-3


def test_absent_negatives_get_no_gradient():
    z = embeddings(3)
    z[1, 2] = 0  # the trainer leaves zeros in place of absent negatives
    ids = distinct(3)
    ids[1, 2] = 0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(SimCSE()(z, ids), z)
    assert gradient.isfinite().all() and not gradient[1, 2].any() and gradient[0, 2].any()


def halves(z, ids, first_rows=(0, ROWS // 2)):
    """Return the mean loss of two ranks. Each rank compares its own rows with all rows."""
    loss = SimCSE(0.5, 0.7)
    parts = zip(z.chunk(2), ids.chunk(2), first_rows)
    return sum(loss(part, part_ids, z, ids, first_row) for part, part_ids, first_row in parts) / 2


@pytest.mark.parametrize("views", [2, 4])
def test_halves_average_to_the_whole(views):
    """Value and gradient agree, also with a masked pair across the halves."""
    z, ids = embeddings(views).requires_grad_(), distinct(views)
    ids[-1, 1] = ids[0, 0]
    whole = SimCSE(0.5, 0.7)(z, ids)
    assert_close(halves(z, ids), whole, rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(loss, z) for loss in (halves(z, ids), whole)), rtol=1e-9, atol=1e-12)


def test_control_halves_need_first_row():
    z, ids = embeddings(3), distinct(3)
    assert abs(halves(z, ids, first_rows=(0, 0)) - SimCSE(0.5, 0.7)(z, ids)) > 1e-3


def gradcheck(detach):
    ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 1]])
    loss = SimCSE(0.5, 0.7)

    def function(z):
        return loss(z, ids, z.detach() if detach else z, ids)

    return torch.autograd.gradcheck(function, embeddings(3, 3).requires_grad_(), raise_exception=False)


def test_gradient():
    assert gradcheck(detach=False)


def test_control_gradcheck_notices_candidates_without_gradient():
    assert not gradcheck(detach=True)


def test_a_plain_function_is_an_objective():
    """Optional attributes get their defaults, and the function is called with five arguments."""

    def loss(z, ids, all_z, all_ids, first_row):
        return SimCSE(0.5)(z, ids, all_z, all_ids, first_row)

    z, ids = embeddings(3), distinct(3)
    objective = as_objective(loss)
    assert isinstance(objective, Objective) and not isinstance(loss, Objective)
    assert (objective.learn_temperature, objective.mlm_weight) == (False, 0.0)
    objective.check_width(1)
    objective.check_rows(2, "rows")
    assert torch.equal(objective(z[:3], ids[:3], z, ids, 0), SimCSE(0.5)(z[:3], ids[:3], z, ids, 0))
    assert torch.equal(Matryoshka(loss, (2,))(z, ids, z, ids), SimCSE(0.5)(z[..., :2], ids))


@pytest.mark.parametrize(
    ("result", "what"),
    [(1.0, "a float"), (None, "a NoneType"), (torch.tensor(1.0), r"a Tensor of shape \(\), gradient False"),
     (torch.ones(3, requires_grad=True), r"a Tensor of shape \(3,\), gradient True")],
)  # fmt: skip
def test_a_function_that_returns_no_loss_is_refused(result, what):
    def loss(z, ids, all_z, all_ids, first_row):
        return result

    for objective in (as_objective(loss), Matryoshka(loss, (2,))):
        with pytest.raises(InputError, match=f"the objective loss returns {what}; return the mean loss of the rows"):
            objective(embeddings(3).requires_grad_(), distinct(3))


def test_a_loss_of_one_number_may_have_dimensions():
    """BUG: Trainer cannot add a loss of the shape (1,) to the sum of the losses."""
    z, ids = embeddings(3), distinct(3)
    for objective in (
        as_objective(lambda z, *others: z.sum().view(1, 1)),
        Matryoshka(lambda z, *others: z.sum().view(1), (2,)),
    ):
        assert objective(z, ids).shape == ()


def test_what_a_callable_says_of_itself_is_kept():
    class Loss:
        temperature, learn_temperature, mlm_weight = 0.3, True, 0.1

        def __call__(self, z, ids, all_z, all_ids, first_row, temperature):
            return z.sum() * temperature

    for objective in (as_objective(Loss()), Matryoshka(Loss(), (2,))):
        assert (objective.temperature, objective.learn_temperature, objective.mlm_weight) == (0.3, True, 0.1)
        assert objective(embeddings(2)[..., :2], distinct(2), temperature=torch.tensor(0.0)) == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registered_objectives_are_objectives(name):
    kind = OBJECTIVES[name]
    objective = kind(SimCSE(), (2,)) if kind is Matryoshka else kind()
    lacking = [attribute for attribute in dir(Objective) if not hasattr(objective, attribute)]
    assert not lacking, f"{name} lacks {', '.join(lacking)}; derive it from Objective"
    assert kind.__name__ == name and as_objective(objective) is objective
    assert dataclasses.is_dataclass(kind), f"{name} is no dataclass, so recipes could make no flags of it"
    assert kind.paper, f"{name} names no paper for the model card"
    assert kind.equation or kind is Matryoshka, f"{name} has no equation for the model card"


def test_every_objective_is_registered():
    """The model card would lack the equation and the paper of an objective that is not registered."""
    names = [module.name for module in pkgutil.iter_modules(objectives.__path__)]
    modules = [importlib.import_module(f"hf_embed.objectives.{name}") for name in names]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    found = {kind.__name__ for kind in kinds if issubclass(kind, Objective) and dataclasses.is_dataclass(kind)}
    assert found - set(OBJECTIVES) == set()


def test_rows_and_widths_that_do_not_suit_are_refused():
    message = "rows: hard_negative_weight is set, but no row has a negative; remove it"
    assert error_of(SimCSE(hard_negative_weight=1.0).check_rows, 2, "rows") == message
    SimCSE(hard_negative_weight=1.0).check_rows(3, "rows")
    SimCSE().check_rows(2, "rows")
    assert "<class 'hf_embed.objectives.simcse.SimCSE'>; give an instance" in error_of(Matryoshka, SimCSE, (2, 8))
    assert error_of(Matryoshka(SimCSE(), (2, 8)).check_width, 7) == (
        "Matryoshka dims contain 8, but the embedding has 7 dimensions; remove it"
    )
    Matryoshka(SimCSE(), (2, 8)).check_width(8)
