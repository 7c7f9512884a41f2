"""Test the improved contrastive loss against the paper's formula in plain loops, in float64.

Its gradient is compared with the gradient that autograd computes.
"""

import itertools
import math

import pytest
import torch
from conftest import error_of
from torch.nn import functional as F
from torch.testing import assert_close

from hf_embed import ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.objectives.gte import DIRECTIONS

ROWS, DIM = 7, 5
VANILLA, BOTH = ("query_to_doc",), ("query_to_doc", "doc_to_query")


def embeddings(negatives=1, rows=ROWS, seed=0):
    z = torch.randn(rows, 2 + negatives, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * z).requires_grad_()  # not unit vectors


def distinct(negatives=1, rows=ROWS):
    return torch.arange(1, rows * (2 + negatives) + 1).view(rows, 2 + negatives)


def formula(z, t=0.2, directions=DIRECTIONS, per_direction=False, once=False, dropped=()):
    """Compute the loss with Z_i term by term, as the paper prints it.

    `dropped` holds tuples (i, kind, j, k): row i leaves out text k of row j. The kind says in which sums: "q" means the sums
    of row i's query, "d" those of its document.
    """
    u = z / z.norm(dim=-1, keepdim=True)
    query, documents = u[:, 0], u[:, 1:]
    losses = []
    for i in range(len(z)):
        sums = {direction: [] for direction in DIRECTIONS}
        for j in range(len(z)):
            for k in range(documents.shape[1]):
                if (i, "q", j, k + 1) not in dropped:
                    sums["query_to_doc"].append(query[i] @ documents[j, k])
                if (j, k) != (i, 0) and (i, "d", j, k + 1) not in dropped:
                    sums["doc_to_doc"].append(documents[j, k] @ documents[i, 0])
            if j != i and (i, "q", j, 0) not in dropped:
                sums["query_to_query"].append(query[i] @ query[j])
            if not (j == i and once) and (i, "d", j, 0) not in dropped:
                sums["doc_to_query"].append(query[j] @ documents[i, 0])
        parts = [sum((s / t).exp() for s in sums[direction]) for direction in directions]
        log_z = sum(part.log() for part in parts) / len(parts) if per_direction else sum(parts).log()
        losses.append(log_z - query[i] @ documents[i, 0] / t)
    return sum(losses) / len(losses)


def assert_same(loss, expected, *wrt):
    """Check that two losses have the same value and the same gradients."""
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for got, wanted in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt)):
        assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max()


FORMS = {
    "paper": {},
    "positive once": {"positive_once": True},
    "vanilla": {"directions": VANILLA},
    "no documents among themselves": {"directions": DIRECTIONS[:3]},
    "bidirectional": {"directions": BOTH, "partition_mode": "per_direction"},
}


def reference(z, t, form):
    form = dict(form)
    return formula(
        z, t, form.get("directions", DIRECTIONS), "partition_mode" in form, form.get("positive_once", False)
    )  # fmt: skip


@pytest.mark.parametrize("tile_rows", [None, 1, 3])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formula(form, negatives, tile_rows):
    z, t = embeddings(negatives), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = ImprovedContrastive(0.9, tile_rows=tile_rows, **FORMS[form])(z, distinct(negatives), temperature=t)
    assert_same(loss, reference(z, t, FORMS[form]), z, t)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(FORMS, 2))
def test_control_forms_differ(one, other):
    z = embeddings()
    values = [ImprovedContrastive(0.2, **FORMS[form])(z, distinct()).item() for form in (one, other)]
    assert abs(values[0] - values[1]) > 1e-3


def test_control_a_wrong_gradient_is_noticed():
    """The value is right, but the gradient is that of a slightly scaled loss."""
    z = embeddings()
    loss = ImprovedContrastive(0.2)(z, distinct())
    with pytest.raises(AssertionError):
        assert_same(loss, formula(z) * (1 + 1e-6) - 1e-6 * formula(z).detach(), z)


@pytest.mark.parametrize("negatives", [0, 2])
def test_vanilla_is_simcse(negatives):
    z = embeddings(negatives)
    assert_same(ImprovedContrastive(0.3, VANILLA)(z, distinct(negatives)), SimCSE(0.3)(z, distinct(negatives)), z)


def test_perfect_loss_is_ln_2_or_0():
    """Each query equals its document, and different rows are orthogonal."""
    z = torch.eye(4, dtype=torch.float64).unsqueeze(1).repeat(1, 2, 1)
    assert_close(ImprovedContrastive(0.01)(z, distinct(0, 4)).item(), math.log(2))
    assert_close(ImprovedContrastive(0.01, positive_once=True)(z, distinct(0, 4)).item(), 0.0)


def pairs_of(*rows):
    """Return what to leave out so that for each (i, j) neither the query nor the document of row j is a candidate of row i."""
    return {(i, kind, j, view) for i, j in rows for kind in "qd" for view in (0, 1)}


MASKS = {
    # If one document answers two queries, or one query has two documents, the query and document of the other row are not
    # negatives.
    "two documents are equal": ([[1, 2], [3, 2], [5, 6]], pairs_of((0, 1), (1, 0))),
    "two queries are equal": ([[1, 2], [1, 4], [5, 6]], pairs_of((0, 1), (1, 0))),
    "a document is another row's query": ([[1, 2], [3, 1], [5, 6]], pairs_of((0, 1), (1, 0))),
    "but the other row's negatives are": ([[1, 2, 3], [1, 4, 5], [6, 7, 8]], pairs_of((0, 1), (1, 0))),
    "absent negatives": (
        [[1, 2, 0], [3, 4, 5], [6, 7, 0]],
        {(i, kind, j, 2) for i in range(3) for j in (0, 2) for kind in "qd"},
    ),
    "a negative is another row's document": ([[1, 2, 3], [4, 5, 2], [6, 7, 8]], {(0, "q", 1, 2), (0, "d", 1, 2)}),
}


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("case", MASKS)
def test_texts_that_are_no_negatives(case, tile_rows):
    ids, dropped = MASKS[case]
    ids = torch.tensor(ids)
    z = embeddings(ids.shape[1] - 2, len(ids))
    loss = ImprovedContrastive(0.5, tile_rows=tile_rows)(z, ids)
    assert_same(loss, formula(z, 0.5, dropped=dropped), z)
    assert abs(loss - formula(z, 0.5)) > 1e-3  # control: the mask matters


def test_absent_negatives_get_no_gradient():
    z, ids = embeddings(1), distinct(1)
    ids[1, 2] = 0
    with torch.no_grad():
        z[1, 2] = 0  # the trainer leaves zeros in place of absent negatives
    (gradient,) = torch.autograd.grad(ImprovedContrastive()(z, ids), z)
    assert gradient.isfinite().all() and not gradient[1, 2].any() and gradient[0, 2].any()


@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.3])
def test_margin_leaves_out_what_is_too_close(margin):
    z = embeddings(1)
    u = F.normalize(z.detach(), dim=-1)
    limit = (u[:, 0] * u[:, 1]).sum(-1) - margin
    dropped = set()
    for i, j, k in itertools.product(range(ROWS), range(ROWS), range(3)):
        for kind, text in (("q", u[i, 0]), ("d", u[i, 1])):
            own = (kind, j, k) in {("q", i, 1), ("d", i, 0)}  # the positive, seen from either side
            if not own and text @ u[j, k] > limit[i]:
                dropped.add((i, kind, j, k))
    loss = ImprovedContrastive(0.5, margin=margin, tile_rows=3)(z, distinct(1))
    assert_same(loss, formula(z, 0.5, dropped=dropped), z)
    assert abs(loss - formula(z, 0.5)) > 1e-3  # control
    assert len(dropped) < 6 * ROWS * ROWS - 4 * ROWS  # some candidates remain


def ranks(z, ids, count, first_rows=None, **settings):
    """Return the mean loss of `count` ranks. Each rank compares its own rows with all rows."""
    size = len(z) // count
    first_rows = first_rows or [r * size for r in range(count)]
    losses = [
        ImprovedContrastive(0.5, **settings)(part, part_ids, z, ids, first)
        for part, part_ids, first in zip(z.split(size), ids.split(size), first_rows)
    ]
    return sum(losses) / count


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_shares_average_to_the_whole(negatives, count, tile_rows):
    z, ids = embeddings(negatives, 6), distinct(negatives, 6)
    ids[-1, 1] = ids[0, 0]  # these two rows are masked for each other, and they are on different ranks
    assert_same(ranks(z, ids, count, tile_rows=tile_rows), ImprovedContrastive(0.5)(z, ids), z)


def test_control_shares_need_first_row():
    z, ids = embeddings(1, 6), distinct(1, 6)
    assert abs(ranks(z, ids, 2, first_rows=[0, 0]) - ImprovedContrastive(0.5)(z, ids)) > 1e-3


@pytest.mark.parametrize("objective", [ImprovedContrastive(0.3), SimCSE(0.3)])
def test_matryoshka_is_the_sum_over_prefixes(objective):
    z, ids = embeddings(1), distinct(1)
    expected = 0.5 * objective(z[..., :2], ids) + 2.0 * objective(z, ids)
    loss = Matryoshka(objective, (2, DIM), (0.5, 2.0))(z, ids)
    assert_close(loss, expected, rtol=1e-12, atol=0)
    got = torch.autograd.grad(loss, z)[0]
    expected = 0.5 * objective(z[..., :2], ids) + 2.0 * objective(z, ids)
    assert_close(got, torch.autograd.grad(expected, z)[0], rtol=1e-9, atol=1e-12)
    z, ids = embeddings(1, 6), distinct(1, 6)
    parts = [Matryoshka(objective, (2,))(z[i : i + 3], ids[i : i + 3], z, ids, i) for i in (0, 3)]
    assert_close(sum(parts) / 2, objective(z[..., :2], ids), rtol=1e-12, atol=0)


def test_no_gradient_is_taken_where_none_is_wanted():
    z = embeddings().detach()
    loss = ImprovedContrastive(0.2)(z, distinct())
    assert not loss.requires_grad
    assert_close(loss, formula(z, 0.2), rtol=1e-12, atol=0)


def test_the_gradient_is_taken_once():
    loss = ImprovedContrastive(0.2)(embeddings(), distinct())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_scaled_losses_scale_the_gradient():
    z = embeddings()
    (plain,) = torch.autograd.grad(ImprovedContrastive(0.2)(z, distinct()), z)
    (scaled,) = torch.autograd.grad(ImprovedContrastive(0.2)(z, distinct()) * 0.25, z)
    assert_close(scaled, plain * 0.25)


def test_autocast_does_not_round_the_scores():
    z = embeddings().detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ImprovedContrastive(0.02)(z, distinct())
    assert_close(loss, ImprovedContrastive(0.02)(z, distinct()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "must be above 0"),
        ({"temperature": float("nan")}, "must be above 0"),
        ({"directions": ("query_to_doc", "doc_to_queries")}, "unknown direction 'doc_to_queries'"),
        ({"directions": ("doc_to_query",)}, "need query_to_doc"),
        ({"partition_mode": "separate"}, "partition_mode is 'separate'; it must be one of joint, per_direction"),
        ({"partition_mode": "per_direction"}, "does not support query_to_query"),
        ({"partition_mode": "per_direction", "directions": BOTH, "positive_once": True}, "needs partition_mode joint"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    assert message in error_of(ImprovedContrastive, **settings)


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [((), None, "at least 1"), ((0, 4), None, "at least 1"), ((2, 4), (1.0,), "weight for each dim")],
)
def test_matryoshka_dims_are_checked(dims, weights, message):
    assert message in error_of(Matryoshka, SimCSE(), dims, weights)
