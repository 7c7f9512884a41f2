"""Objectives that learn from scores: beside plain loops in float64, and beside sentence-transformers."""

import math

import pytest
import torch
from conftest import error_of

from hf_embed.objectives.cosent import CoSENT
from hf_embed.objectives.teacher import MarginMSE, TeacherKL

torch.manual_seed(0)
ROWS = torch.randn(5, 4, 6, dtype=torch.float64)
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13], [14, 15, 16, 17]])
SCORES = torch.randn(5, 3, dtype=torch.float64) * 3


def cosine(first, second) -> torch.Tensor:
    return first @ second / first.norm() / second.norm()


def plain_cosent(rows, scores, temperature):
    total = rows.new_ones(())
    for i in range(len(rows)):
        for j in range(len(rows)):
            if scores[i] > scores[j]:
                total = total + ((cosine(*rows[j, :2]) - cosine(*rows[i, :2])) / temperature).exp()
    return total.log()


def plain_kl(rows, ids, scores, temperature, teacher_temperature):
    losses = []
    for row, own_ids, own in zip(rows, ids, scores):
        there = [v for v in range(1, len(row)) if own_ids[v]]
        student = torch.stack([cosine(row[0], row[v]) / temperature for v in there]).exp()
        teacher = torch.stack([own[v - 1] / teacher_temperature for v in there]).exp()
        student, teacher = student / student.sum(), teacher / teacher.sum()
        losses.append(sum(p * (p / q).log() for p, q in zip(teacher, student)))
    return sum(losses) / len(losses)


def plain_margin(rows, ids, scores, similarity):
    losses = []
    for row, own_ids, own in zip(rows, ids, scores):
        there = [v for v in range(2, len(row)) if own_ids[v]]
        margins = [(similarity(row[0], row[1]) - similarity(row[0], row[v])) - (own[0] - own[v - 1]) for v in there]
        losses.append(sum(margin**2 for margin in margins) / max(1, len(margins)) if margins else rows.new_zeros(()))
    return sum(losses) / len(losses)


CASES = {
    "CoSENT": (CoSENT(0.1), lambda rows: plain_cosent(rows, SCORES[:, 0], 0.1)),
    "TeacherKL": (TeacherKL(0.1, 2.0), lambda rows: plain_kl(rows, IDS, SCORES, 0.1, 2.0)),
    "MarginMSE": (MarginMSE(), lambda rows: plain_margin(rows, IDS, SCORES, lambda a, b: a @ b)),
    "MarginMSE, cosine": (MarginMSE("cosine"), lambda rows: plain_margin(rows, IDS, SCORES, cosine)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_plain_loops(name):
    objective, plain = CASES[name]
    fast, slow = ROWS.clone().requires_grad_(), ROWS.clone().requires_grad_()
    loss, expected = objective(fast, IDS, scores=SCORES), plain(slow)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (fast.grad - slow.grad).abs().max() < 1e-12
    assert abs(objective(ROWS, IDS, scores=SCORES.flip(0)).item() - loss.item()) > 1e-3  # negative control: others' scores


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_a_batch(name):
    """The average over two ranks of unequal rows is the loss and the gradient of the whole batch."""
    objective, _ = CASES[name]
    rows, ids, scores = ROWS[:4], IDS[:4], SCORES[:4]
    whole = rows.clone().requires_grad_()
    objective(whole, ids, scores=scores).backward()
    shared = rows.clone().requires_grad_()
    parts = [objective(shared[i : i + 2], ids[i : i + 2], shared, ids, i, scores=scores) for i in (0, 2)]
    (sum(parts) / 2).backward()
    assert (shared.grad - whole.grad).abs().max() < 1e-12


def test_equal_scores_teach_nothing():
    rows = ROWS[:, :2].clone().requires_grad_()
    loss = CoSENT()(rows, IDS[:, :2], scores=torch.ones(5, 1, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0 and rows.grad.abs().max() == 0


def test_a_perfect_student_has_no_loss():
    rows = torch.nn.functional.normalize(ROWS, dim=-1)
    scores = torch.einsum("bd,bvd->bv", rows[:, 0], rows[:, 1:])
    full = torch.ones_like(IDS)
    assert abs(TeacherKL(0.05, 0.05)(rows, full, scores=scores)) < 1e-12
    assert MarginMSE()(rows, full, scores=scores) < 1e-12


def test_cosent_beside_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    class Embeddings(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["rows"]}

    theirs = losses.CoSENTLoss(Embeddings())
    expected = theirs([{"rows": ROWS[:, 0]}, {"rows": ROWS[:, 1]}], SCORES[:, 0])
    assert CoSENT()(ROWS[:, :2], IDS[:, :2], scores=SCORES[:, :1]).item() == pytest.approx(expected.item(), rel=1e-9)


def test_rows_and_settings_that_do_not_fit():
    assert "CoSENT trains on pairs with one score each" in error_of(CoSENT().check_rows, 3, "rows")
    for objective in (TeacherKL(), MarginMSE()):
        assert "no row has a negative; add columns of negatives" in error_of(objective.check_rows, 2, "rows")
    assert "unknown similarity 'l2'; there are dot and cosine" in error_of(MarginMSE, "l2")
    for make in (CoSENT, TeacherKL):
        assert "temperature is 0" in error_of(make, 0)
    assert math.isfinite(TeacherKL()(ROWS, IDS, scores=SCORES).item())
