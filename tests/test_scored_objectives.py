"""Compare objectives that use scores or a teacher with plain loops in float64, and with sentence-transformers."""

import math
import re

import pytest
import torch
from conftest import error_of
from doc_blocks import ROOT, blocks_of
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import pairwise_cos_sim

from hf_embed import CoSENT, ImprovedContrastive, MarginMSE, Matryoshka, SimCSE, TeacherKL, VectorDistillation
from hf_embed.objectives.base import as_objective
from hf_embed.objectives.gte import DIRECTIONS

torch.manual_seed(0)
ROWS = torch.randn(5, 4, 6, dtype=torch.float64)
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13], [14, 15, 16, 17]])
SCORES = torch.randn(5, 3, dtype=torch.float64) * 3
TEACHER = torch.nn.functional.normalize(torch.randn(5, 4, 7, dtype=torch.float64), dim=-1)  # wider than the student
TARGET = torch.randn(5, 4, 6, dtype=torch.float64)
NEEDED = {"scores": SCORES, "teacher": TEACHER, "target": TARGET}


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


def plain_kl_of_the_batch(rows, temperature, teacher_temperature):
    documents = [(j, v) for j in range(len(rows)) for v in range(1, rows.shape[1]) if IDS[j, v]]
    losses = []
    for i in range(len(rows)):
        student = torch.stack([cosine(rows[i, 0], rows[place]) / temperature for place in documents]).exp()
        teacher = torch.stack([TEACHER[i, 0] @ TEACHER[place] / teacher_temperature for place in documents]).exp()
        student, teacher = student / student.sum(), teacher / teacher.sum()
        losses.append(sum(p * (p / q).log() for p, q in zip(teacher, student)))
    return sum(losses) / len(losses)


def plain_distillation(rows, distance):
    losses = []
    for i in range(len(rows)):
        there = [v for v in range(rows.shape[1]) if IDS[i, v]]
        losses.append(sum(distance(rows[i, v], TARGET[i, v]) for v in there) / len(there))
    return sum(losses) / len(losses)


def plain_guided_simcse(rows, temperature, margin):
    """GISTEmbed's rule: a candidate that the teacher scores above the positive, minus the margin, is no negative."""
    losses = []
    for i in range(len(rows)):
        limit = TEACHER[i, 0] @ TEACHER[i, 1] - margin
        places = [(j, v) for j in range(len(rows)) for v in range(1, rows.shape[1]) if IDS[j, v]]
        kept = [place for place in places if place == (i, 1) or TEACHER[i, 0] @ TEACHER[place] <= limit]
        terms = torch.stack([cosine(rows[i, 0], rows[place]) / temperature for place in kept]).exp()
        losses.append(terms.sum().log() - cosine(rows[i, 0], rows[i, 1]) / temperature)
    return sum(losses) / len(losses)


def plain_guided_gte(rows, temperature, margin):
    """The improved contrastive loss, where the teacher judges every candidate of every direction."""
    losses = []
    for i in range(len(rows)):
        limit = TEACHER[i, 0] @ TEACHER[i, 1] - margin
        queries = [(j, 0) for j in range(len(rows))]
        documents = [(j, v) for j in range(len(rows)) for v in range(1, rows.shape[1]) if IDS[j, v]]
        terms = []
        for left, candidates in (((i, 0), documents), ((i, 0), queries), ((i, 1), queries), ((i, 1), documents)):
            for place in candidates:
                own = {left, place} == {(i, 0), (i, 1)}
                if own or (place not in ((i, 0), (i, 1)) and TEACHER[left] @ TEACHER[place] <= limit):
                    terms.append(cosine(rows[left], rows[place]) / temperature)
        losses.append(torch.stack(terms).exp().sum().log() - cosine(rows[i, 0], rows[i, 1]) / temperature)
    return sum(losses) / len(losses)


CASES = {
    "CoSENT": (CoSENT(0.1), lambda rows: plain_cosent(rows, SCORES[:, 0], 0.1)),
    "TeacherKL": (TeacherKL(0.1, 2.0), lambda rows: plain_kl(rows, IDS, SCORES, 0.1, 2.0)),
    "TeacherKL, default": (TeacherKL(), lambda rows: plain_kl(rows, IDS, SCORES, 0.05, 1.0)),
    "TeacherKL, batch": (TeacherKL(0.1, 0.3, "batch"), lambda rows: plain_kl_of_the_batch(rows, 0.1, 0.3)),
    "TeacherKL, batch, default": (TeacherKL(0.1, candidates="batch"), lambda rows: plain_kl_of_the_batch(rows, 0.1, 0.1)),
    "VectorDistillation": (VectorDistillation(), lambda rows: plain_distillation(rows, lambda x, y: 1 - cosine(x, y))),
    "VectorDistillation, mse": (
        VectorDistillation("mse"),
        lambda rows: plain_distillation(rows, lambda x, y: (x - y).square().mean()),
    ),
    "SimCSE, guided": (SimCSE(0.1, guide_margin=0.0), lambda rows: plain_guided_simcse(rows, 0.1, 0.0)),
    "SimCSE, guide with a margin": (SimCSE(0.1, guide_margin=-0.3), lambda rows: plain_guided_simcse(rows, 0.1, -0.3)),
    "GTE, guided": (ImprovedContrastive(0.1, guide_margin=0.0), lambda rows: plain_guided_gte(rows, 0.1, 0.0)),
    "GTE, guided, in tiles": (
        ImprovedContrastive(0.1, guide_margin=-0.2, tile_rows=2),
        lambda rows: plain_guided_gte(rows, 0.1, -0.2),
    ),
    "MarginMSE": (MarginMSE(), lambda rows: plain_margin(rows, IDS, SCORES, lambda a, b: a @ b)),
    "MarginMSE, cosine": (MarginMSE("cosine"), lambda rows: plain_margin(rows, IDS, SCORES, cosine)),
}


def needed(objective, rows=slice(None)):
    return {name: NEEDED[name][rows] for name in objective.needs}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_plain_loops(name):
    objective, plain = CASES[name]
    fast, slow = ROWS.clone().requires_grad_(), ROWS.clone().requires_grad_()
    loss, expected = objective(fast, IDS, **needed(objective)), plain(slow)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (fast.grad - slow.grad).abs().max() < 1e-12
    other = {key: values.flip(0) for key, values in needed(objective).items()}  # negative control: the values of other rows
    assert abs(objective(ROWS, IDS, **other).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_a_batch(name):
    """The average over two ranks is the loss and the gradient of the whole batch."""
    objective, _ = CASES[name]
    rows, ids, given = ROWS[:4], IDS[:4], needed(objective, slice(4))
    whole = rows.clone().requires_grad_()
    objective(whole, ids, **given).backward()
    shared = rows.clone().requires_grad_()
    parts = [objective(shared[i : i + 2], ids[i : i + 2], shared, ids, i, **given) for i in (0, 2)]
    (sum(parts) / 2).backward()
    assert (shared.grad - whole.grad).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_matryoshka_passes_on_what_is_needed(name):
    objective, _ = CASES[name]
    if "target" in objective.needs:
        assert "Matryoshka cannot shorten the target vectors" in error_of(Matryoshka, objective, (6, 3))
        return
    given, wrapped = needed(objective), Matryoshka(objective, (6, 3))
    assert wrapped.needs == objective.needs
    expected = sum(objective(ROWS[..., :dim], IDS, **given) for dim in (6, 3))
    assert wrapped(ROWS, IDS, **given).item() == pytest.approx(expected.item(), rel=1e-12)


def test_without_a_margin_no_teacher_is_needed():
    assert SimCSE().needs == ImprovedContrastive().needs == ()
    assert SimCSE(guide_margin=0).needs == ImprovedContrastive(guide_margin=0).needs == ("teacher",)
    assert len(DIRECTIONS) == 4  # the plain loop above has these


def test_a_function_names_what_it_needs():
    def loss(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores):
        return embeddings.sum() * scores.sum()

    from hf_embed.objectives import as_objective

    objective = as_objective(loss)
    assert objective.needs == ("scores",)
    assert objective(ROWS, IDS, scores=SCORES) == ROWS.sum() * SCORES.sum()


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


GUIDE = (ROOT / "docs" / "guides" / "from_sentence_transformers.md").read_text(encoding="utf-8")
# What the losses of sentence-transformers take as labels: the number of texts in a row, and the labels.
LABELS = {
    "MultipleNegativesRankingLoss": (4, None),
    "MatryoshkaLoss": (4, None),
    "CoSENTLoss": (2, SCORES[:, 0]),
    "MarginMSELoss": (4, SCORES[:, :1] - SCORES[:, 1:]),
    "DistillKLDivLoss": (4, SCORES),
    "MSELoss": (4, TARGET),
    "EmbedDistillLoss": (4, TARGET),
}
FUNCTIONS = {  # functions of the guide: the loss that they replace, the number of texts, the labels, and what they need
    "cosine_similarity_loss": ("CosineSimilarityLoss", 2, SCORES[:, 0], {"scores": SCORES[:, :1]}),
    "contrastive_loss": ("ContrastiveLoss", 2, (SCORES[:, 0] > 0).double(), {"scores": (SCORES[:, :1] > 0).double()}),
    "angle_loss": ("AnglELoss", 2, SCORES[:, 0], {"scores": SCORES[:, :1]}),
    "triplet_loss": ("TripletLoss", 3, None, {}),
    "translation_loss": ("MSELoss", 2, TARGET[:, 0], {"target": TARGET[:, :2]}),
}


class Embeddings(torch.nn.Module):
    """A model of sentence-transformers whose features are already embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["rows"]}

    def get_embedding_dimension(self):
        return ROWS.shape[-1]


def theirs(loss, texts, labels):
    return loss([{"rows": ROWS[:, i]} for i in range(texts)], labels).item()


@pytest.mark.parametrize("row", re.findall(r"(?m)^\| `(.*Loss\(.*\))`(, for pairs)? \| `(.*)` \|$", GUIDE))
def test_losses_of_the_guide_equal_those_of_sentence_transformers(row):
    loss, for_pairs, objective = row
    names = vars(losses) | {"model": Embeddings(), "pairwise_cos_sim": pairwise_cos_sim}
    texts, labels = LABELS[loss.partition("(")[0]]
    texts = 2 if for_pairs else texts
    needed = {name: tensor[:, : texts - (name == "scores")] for name, tensor in NEEDED.items()}
    found = eval(objective)(ROWS[:, :texts], torch.arange(1, 5 * texts + 1).view(5, texts), **needed)
    assert found.item() == pytest.approx(theirs(eval(loss, names), texts, labels), rel=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_guide_equal_the_losses_of_sentence_transformers(name):
    code = next(block.code for block in blocks_of("docs/guides/from_sentence_transformers.md") if name in block.code)
    exec(code, names := {})
    loss, texts, labels, needed = FUNCTIONS[name]
    expected = theirs(getattr(losses, loss)(Embeddings()), texts, labels)
    assert as_objective(names[name])(ROWS[:, :texts], IDS[:, :texts], **needed).item() == pytest.approx(expected, rel=1e-6)


def test_rows_and_settings_that_do_not_fit():
    assert "CoSENT trains on pairs with one score each" in error_of(CoSENT().check_rows, 3, "rows")
    for objective in (TeacherKL(), MarginMSE()):
        assert "no row has a negative; add columns of negatives" in error_of(objective.check_rows, 2, "rows")
    assert "similarity is 'l2'; it must be one of dot, cosine" in error_of(MarginMSE, "l2")
    for make in (CoSENT, TeacherKL):
        assert "temperature is 0" in error_of(make, 0)
    TeacherKL(candidates="batch").check_rows(2, "rows")  # the other rows are candidates too
    assert "candidates is 'all'; it must be one of row, batch" in error_of(TeacherKL, candidates="all")
    assert "loss is 'l1'; it must be one of cosine, mse" in error_of(VectorDistillation, "l1")
    assert "margin and guide_margin are both set" in error_of(ImprovedContrastive, margin=0.1, guide_margin=0.1)
    assert math.isfinite(TeacherKL()(ROWS, IDS, scores=SCORES).item())


def with_cosines(*cosines: float) -> torch.Tensor:
    """Return one row: an anchor and texts with these cosines to it."""
    texts = [torch.tensor([c, math.sqrt(1 - c**2)], dtype=torch.float64) for c in cosines]
    return torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), *texts]).unsqueeze(0)


def test_the_worked_examples_of_the_docstrings():
    pairs = torch.cat([with_cosines(c) for c in (0.8, 0.9, 0.2)])
    ids = torch.arange(1, 7).view(3, 2)
    assert CoSENT()(pairs, ids, scores=torch.tensor([[5.0], [1.0], [1.0]])).item() == pytest.approx(2.127, abs=1e-3)
    row, ids = with_cosines(0.6, 0.5), torch.tensor([[1, 2, 3]])
    assert TeacherKL()(row, ids, scores=torch.tensor([[4.0, 1.0]])).item() == pytest.approx(0.031, abs=1e-3)
    dots = torch.tensor([[[1.0, 0.0], [7.0, 2.0], [6.0, 3.0]]])
    assert MarginMSE()(dots, ids, scores=torch.tensor([[9.0, 5.0]])).item() == 9
    student, target = torch.tensor([[[3.0, 4.0]] * 2]), torch.tensor([[[1.0, 0.0]] * 2])
    assert VectorDistillation()(student, torch.tensor([[1, 1]]), target=target).item() == pytest.approx(0.4)
