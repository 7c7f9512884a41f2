"""A row with several positives becomes one row per positive. The other positives are never negatives of that row, on any rank.

The reference uses sets of texts to decide which candidates are left out. It computes the formulas of the losses in loops, in
float64, with autograd.
"""

import itertools
import json
import random

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model, tokenize_rows
from datasets import Dataset
from test_gte import BOTH, DIRECTIONS, VANILLA, assert_same, formula

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.data.collator import RaggedCollator, used_columns
from hf_embed.data.mixture import Mixture, Source, has_several_positives, make_mixture
from hf_embed.data.sources import read_file, rows_by_positive
from hf_embed.data.stream import MOST_POSITIVES, Stream
from hf_embed.data.tokenization import RowTokenizer, text_id
from hf_embed.objectives import Objective, as_objective

# ---- the losses ----

Row = tuple[int, int, list[int], set[int]]  # anchor, positive, negatives, other positives


def rows_of_groups(seed: int, count: int = 7, negatives: int = 2) -> list[Row]:
    """Return rows that are made from groups of an anchor and its positives.

    There are so few different texts that the same text occurs in several roles.
    """
    draw = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        anchor, positives = draw.randint(1, 6), draw.sample(range(5, 16), draw.randint(1, 4))
        hard = [draw.randint(5, 16) for _ in range(draw.randint(0, negatives))]
        rows += [(anchor, positive, hard, set(positives) - {positive}) for positive in positives]
    draw.shuffle(rows)
    return rows[:count]


def tensors(rows: list[Row], negatives: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text ids (N, 2 + negatives) and the ids of the other positives (N, W) of rows."""
    texts = [[anchor, positive, *hard] + [0] * (negatives - len(hard)) for anchor, positive, hard, _ in rows]
    width = max(len(others) for *_, others in rows)
    return torch.tensor(texts), torch.tensor([[*sorted(others)] + [0] * (width - len(others)) for *_, others in rows])


def left_out(rows: list[Row], views: int = 4) -> set[tuple[int, str, int, int]]:
    """Return all (i, side, j, k): text k of row j is not a negative in the sums of row i's anchor ("q") or document ("d")."""
    dropped = set()
    for (i, row), (j, other), side in itertools.product(enumerate(rows), enumerate(rows), "qd"):
        known = {row[0], row[1]} | row[3]
        texts = [other[0], other[1], *other[2]]
        of_query = {other[1]} | other[3]
        of_document = {other[0]} | (other[3] if side == "d" else set())
        for k in range(views):
            partners = of_query if k == 0 else of_document if k == 1 else set()
            own_positive = i == j and (side, k) in {("q", 1), ("d", 0)}
            if not own_positive and (k >= len(texts) or texts[k] in known or partners & known):
                dropped.add((i, side, j, k))
    return dropped


def embeddings(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


FORMS = {
    "paper": {},
    "positive once": {"positive_once": True},
    "vanilla": {"directions": VANILLA},
    "bidirectional": {"directions": BOTH, "partition_mode": "per_direction"},
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("form", FORMS)
def test_the_improved_loss_equals_the_formula(form, seed):
    rows, settings = rows_of_groups(seed), FORMS[form]
    (text_ids, other_ids), z = tensors(rows), embeddings(len(rows), seed)
    directions, once = settings.get("directions", DIRECTIONS), settings.get("positive_once", False)
    for tile_rows in (None, 3):
        expected = formula(z, 0.2, directions, "partition_mode" in settings, once, left_out(rows))
        objective = ImprovedContrastive(0.2, tile_rows=tile_rows, **settings)
        assert_same(objective(z, text_ids, other_ids=other_ids), expected, z)
    assert (objective(z, text_ids) - expected).abs() > 1e-4  # control: without the other positives, the loss is different


@pytest.mark.parametrize("seed", range(8))
def test_simcse_equals_the_formula(seed):
    rows = rows_of_groups(seed)
    (text_ids, other_ids), z = tensors(rows), embeddings(len(rows), seed)
    expected = formula(z, 0.2, VANILLA, dropped=left_out(rows))
    assert_same(SimCSE(0.2)(z, text_ids, other_ids=other_ids), expected, z)
    assert (SimCSE(0.2)(z, text_ids) - expected).abs() > 1e-4
    paper = SimCSE(0.2, mask_other_positives=False)
    assert torch.equal(paper(z, text_ids, other_ids=other_ids), paper(z, text_ids))


@pytest.mark.parametrize("objective", [SimCSE(0.2), ImprovedContrastive(0.2)])
def test_matryoshka_and_halves_are_told_of_them(objective):
    rows = rows_of_groups(1, 8)
    (text_ids, other_ids), z = tensors(rows), embeddings(8, 1)
    whole = objective(z, text_ids, other_ids=other_ids)
    halves = [objective(z[i : i + 4], text_ids[i : i + 4], z, text_ids, i, other_ids=other_ids) for i in (0, 4)]
    assert_same(sum(halves) / 2, whole, z)
    prefixes = [objective(z[..., :dim], text_ids, other_ids=other_ids) for dim in (6, 3)]
    assert_same(Matryoshka(objective, (6, 3))(z, text_ids, other_ids=other_ids), sum(prefixes), z)


@pytest.mark.parametrize("objective", [SimCSE(0.2), ImprovedContrastive(0.2)])
@pytest.mark.parametrize("place", ["document", "hard negative"])
def test_another_positive_in_another_row_gets_no_gradient(objective, place):
    """Row 0 is (1, 2) with 3 as its other positive. Text 3 is also in row 1. Only `other_ids` links it to row 0."""
    text_ids = torch.tensor([[1, 2, 9, 0], [4, 3, 8, 0]] if place == "document" else [[1, 2, 9, 0], [4, 5, 3, 0]])
    other_ids = torch.tensor([[3], [0]])
    where = (1, 1) if place == "document" else (1, 2)
    for others, reached in ((other_ids, False), (None, True)):
        z = embeddings(2)
        objective(z[:1], text_ids[:1], z, text_ids, 0, other_ids=others).backward()
        assert z.grad[where].any() == reached


@pytest.mark.parametrize("objective", [SimCSE(0.2), ImprovedContrastive(0.2)])
def test_no_other_positives_change_nothing(objective):
    text_ids, z = torch.arange(1, 29).view(7, 4), embeddings(7)
    plain, gradient = objective(z, text_ids), torch.autograd.grad(objective(z, text_ids), z)[0]
    for width in (0, 3):
        others = torch.zeros(7, width, dtype=torch.int64)
        assert torch.equal(objective(z, text_ids, other_ids=others), plain)
        assert torch.equal(torch.autograd.grad(objective(z, text_ids, other_ids=others), z)[0], gradient)


# ---- objectives with and without the parameter `other_ids` ----


def plain_loss(z, text_ids, all_z=None, all_ids=None, first_row=0):
    return SimCSE(0.2)(z, text_ids, all_z, all_ids, first_row)


def told_loss(z, text_ids, all_z=None, all_ids=None, first_row=0, other_ids=None):
    return SimCSE(0.2)(z, text_ids, all_z, all_ids, first_row, other_ids=other_ids)


class OwnLoss(Objective):
    def __call__(self, z, text_ids, all_embeddings=None, all_text_ids=None, first_row=0, temperature=None):
        return plain_loss(z, text_ids, all_embeddings, all_text_ids, first_row)


SEVERAL = [
    {"query": f"where is cat {i}", "pos": [f"cat {i} is here", f"there is cat {i}"][: 1 + i % 2], "neg": [f"a dog {i}"]}
    for i in range(8)
]


def trainer(folder, objective, rows, **settings):
    defaults = {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True, "max_steps": 2}
    return ContrastiveTrainer(
        tiny_model(), ContrastiveTrainingArguments(str(folder), **(defaults | settings)), objective, rows,
        processing_class=small_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "called"), [(plain_loss, "plain_loss"), (OwnLoss(), "OwnLoss"), (Matryoshka(plain_loss, (8,)), "Matryoshka")]
)
def test_an_objective_that_is_not_told_is_refused_by_name(objective, called, tmp_path):
    rows = Dataset.from_list(SEVERAL)
    for data, name in ((rows, "train_dataset"), ([Source("several", rows)], "source 'several'")):
        message = error_of(trainer, tmp_path, objective, data)
        assert message.startswith(f"{name}: rows have several positives, but the objective {called} has no parameter")
    assert trainer(tmp_path, objective, Dataset.from_list([row | {"pos": row["pos"][:1]} for row in SEVERAL])).train()


@pytest.mark.parametrize("objective", [told_loss, lambda *args, **kwargs: told_loss(*args, **kwargs), SimCSE(0.2)])
def test_a_function_with_the_parameter_is_told(objective, tmp_path):
    seen = []

    def noted(*args, **kwargs):
        seen.append(kwargs)
        return objective(*args, **kwargs)

    assert as_objective(objective).takes_other_ids
    trainer(tmp_path, noted, Dataset.from_list(SEVERAL)).train()
    assert [given["other_ids"].shape[0] for given in seen] == [4, 4]


# ---- the rows ----


def ids(tokenizer, *texts):
    return [text_id(tokens) for tokens in tokenizer(list(texts))["input_ids"]]


def test_a_row_for_each_positive(tokenizer, caplog):
    cells = [["a", "b", "a"], ["c"], ["d", "e", "f"]]  # "a" occurs twice in one cell
    rows = Dataset.from_dict({"query": ["q", "r", "s"], "pos": cells, "neg": [["n", "m"], None, []]})
    tokens = tokenize_rows(rows, tokenizer, 16, "a.jsonl", prompts={"query": "find: ", "document": "text: "})
    expected = [["q", "a", "n", "m"], ["q", "b", "n", "m"], ["r", "c"], ["s", "d"], ["s", "e"], ["s", "f"]]
    assert tokens["text_ids"][:] == [ids(tokenizer, *row) for row in expected]
    others = [["b"], ["a"], [], ["e", "f"], ["d", "f"], ["d", "e"]]
    assert tokens["other_ids"][:] == [(ids(tokenizer, *row) if row else []) + [0] * (2 - len(row)) for row in others]
    assert caplog.messages == ["a.jsonl: 3 rows became 6, one per positive; a row's other positives are not its negatives"]
    batch = RaggedCollator([4])(tokens.select([2, 3]).to_list())
    assert batch["further"]["other_ids"].tolist() == tokens["other_ids"][2:4]
    assert used_columns(batch["further"]["other_ids"][:1]).shape == (1, 0)


@pytest.mark.parametrize("cells", [["a", "b"], [["a"], ["b"]]])
def test_one_positive_in_every_row_is_as_before(cells, tokenizer, caplog):
    rows = Dataset.from_dict({"query": ["q", "r"], "pos": cells})
    tokens = tokenize_rows(rows, tokenizer, 16)
    assert tokens.column_names == ["input_ids", "text_ids", "truncated"] and not caplog.messages
    plain = tokenize_rows(Dataset.from_dict({"anchor": ["q", "r"], "positive": ["a", "b"]}), tokenizer, 16)
    assert tokens.to_dict() == plain.to_dict()
    assert "other_ids" not in RaggedCollator([2])(tokens.to_list())


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [([], "there is no positive"), ([" "], "is empty"), (["a", None], "is missing"), (None, "is missing")],
)
def test_lists_without_a_positive_are_refused_or_dropped(cell, complaint, tokenizer, tmp_path, caplog):
    lines = [{"query": "q", "pos": ["a", "b"]}, {"query": "r", "pos": cell}, {"query": "s", "pos": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_file(str(tmp_path / "a.jsonl"))
    message = error_of(tokenize_rows, rows, tokenizer, 16, "a.jsonl")
    assert message.startswith("a.jsonl, row 2, column 'pos': ") and complaint in message and "--drop_empty_rows" in message
    tokens = tokenize_rows(rows, tokenizer, 16, "a.jsonl", drop_empty_rows=True)
    assert len(tokens) == 3 and "a.jsonl: 1 of 3 rows had an empty text and were dropped" in caplog.text


def test_rows_by_positive():
    row = {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
    assert rows_by_positive(row, list(row), "row 1") == [(["q", "a", "c"], ["b"]), (["q", "b", "c"], ["a"])]
    assert rows_by_positive({"text": "a"}, ["text"], "row 1") == [(["a"], [])]


# ---- streams and several sources ----


def streamed(path, tokenizer, **settings):
    rows = read_file(str(path), streaming=True)
    return Stream(Source("s", rows, size=8, **settings), RowTokenizer(tokenizer, 16), 0, 1, 0, 5, drop=False)


def test_a_stream_gives_the_rows_of_the_table(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEVERAL))
    rows = streamed(path, tokenizer, negatives=1).__getitems__(list(range(12)))  # the first pass over the stream
    table = tokenize_rows(read_file(str(path)), tokenizer, 16).to_list()

    def known(row):
        return tuple(row["text_ids"]), tuple(other for other in row["other_ids"] if other)

    assert sorted(map(known, rows)) == sorted(map(known, table))
    assert {len(row["other_ids"]) for row in rows} == {MOST_POSITIVES - 1}


def test_a_stream_says_what_it_cannot_have(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "q", "positive": ["a", "b"]}]))
    stream = streamed(path, tokenizer)
    message = error_of(stream.__getitems__, range(201))
    assert "has 2 positives, but a row of this stream may have one, as in its first 100 rows" in message
    many = {"query": "q", "positive": [f"a{i}" for i in range(MOST_POSITIVES + 1)]}
    path.write_text(json.dumps(many) + "\n")
    assert "has 65 positives, but a row of this stream may have at most 64" in error_of(streamed, path, tokenizer)


def test_sources_with_and_without_train_together_and_resume(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEVERAL))
    plain = Dataset.from_list([{"query": row["query"], "pos": row["pos"][0]} for row in SEVERAL])

    def weights(folder, resume=None):
        sources = [
            Source("plain", plain), Source("several", Dataset.from_list(SEVERAL)),
            Source("stream", read_file(str(tmp_path / "a.jsonl"), streaming=True), size=8, negatives=1),
        ]  # fmt: skip
        run = trainer(folder, ImprovedContrastive(0.2), sources, max_steps=8, save_steps=4)
        assert isinstance(run.train_dataset, Mixture) and any(map(has_several_positives, run.train_dataset.tables))
        run.train(resume_from_checkpoint=resume)
        return {name: parameter.detach().clone() for name, parameter in run.step.named_parameters()}

    whole = weights(tmp_path / "whole")
    resumed = weights(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_mixture_without_has_none(tmp_path):
    plain = Dataset.from_list([{"query": f"q {i}", "pos": f"p {i}"} for i in range(8)])
    args = ContrastiveTrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    assert not any(map(has_several_positives, make_mixture([Source("plain", plain)], tiny_encoder(), args, SimCSE()).tables))
