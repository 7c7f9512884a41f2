"""Test the way of scores and of a teacher's vectors from the data to the objective, and sources with their own objective."""

import json
import logging
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset, IterableDataset, List, Value

import hf_embed.training.teacher
from hf_embed import (
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    CoSENT,
    Encoder,
    HeldOut,
    ImprovedContrastive,
    MarginMSE,
    SimCSE,
    Source,
    TeacherKL,
    VectorDistillation,
)
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.scores import row_scores, score_columns
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import read_file
from hf_embed.data.teacher_vectors import TeacherVectors
from hf_embed.data.tokenization import RowTokenizer, tokenize_table
from hf_embed.files.work_files import work_folder
from hf_embed.training.resume import facts_of
from hf_embed.training.teacher import OPTIONS, load_teacher, number_texts, vectors_of, with_teacher
from hf_embed.vector_files import identity_of

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden"]
PAIRS = [{"anchor": f"the {word}", "positive": f"a {word} there"} for word in WORDS]
GRADED = [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i % 6} for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1]))]
TRIPLETS = [row | {"negative_1": f"no {i}", "negative_2": f"not {i}"} for i, row in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_encoder(seed=5).save_pretrained(folder)
    return str(folder)


def trainer(tmp_path, objective, rows, evaluation=None, model=None, **settings) -> ContrastiveTrainer:
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "optim": "sgd", "use_cpu": True,
    }  # fmt: skip
    args = ContrastiveTrainingArguments(tmp_path / "out", **(defaults | settings))
    rows = Dataset.from_list(rows) if isinstance(rows, list) and isinstance(rows[0], dict) else rows
    model = model or tiny_model()
    return ContrastiveTrainer(model, args, objective, rows, processing_class=small_tokenizer(), eval_dataset=evaluation)


# ---- columns of scores ----


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sentence1", "sentence2", "score"], ["score"]),
        (["query", "positive", "negative", "scores"], ["scores"]),
        (["a", "b", "similarity_score"], ["similarity_score"]),
        (
            ["query", "positive", "negative_1", "negative_2", "negative_2_score", "positive_score", "negative_1_score"],
            ["positive_score", "negative_1_score", "negative_2_score"],
        ),
        (["anchor", "pos", "neg", "neg_scores", "pos_scores"], ["pos_scores", "neg_scores"]),
    ],
)
def test_columns_of_scores_are_found_in_the_order_of_the_texts(names, expected):
    assert score_columns(names, "rows") == expected


def test_numbered_columns_of_scores():
    names = ["negative_score_10", "negative_score_2", "positive_score", "negative_score_1"]
    assert score_columns(names, "rows") == ["positive_score", "negative_score_1", "negative_score_2", "negative_score_10"]


def test_columns_that_could_all_be_scores_are_refused():
    assert "the objective needs a score for each pair; found the columns a, b" in error_of(score_columns, ["a", "b"], "rows")
    message = error_of(score_columns, ["a", "b", "rating", "gold_similarity"], "rows")
    assert "rating or gold_similarity could be the scores; name the column with --columns score=COLUMN" in message


@pytest.mark.parametrize(
    ("names", "needed", "advice"),
    [
        (["question", "answer", "x"], "a score for each pair", "name the column with --columns score=COLUMN (or columns:"),
        (["a", "b", "x"], "a score for each pair",
         "name the column with --columns score=COLUMN anchor=COLUMN positive=COLUMN (or columns:"),
        (["anchor", "positive", "negative", "x"], "a score for each text after the anchor",
         "give the columns positive_score, negative_score ..., or a list of numbers in a column scores"),
    ],
)  # fmt: skip
def test_advice_for_scores_is_complete(names, needed, advice):
    """BUG: `--columns score=COLUMN` alone led to the next error, also for rows with negatives, which need several scores."""
    message = error_of(score_columns, names, "rows")
    assert message.startswith(f"rows: the objective needs {needed}; found the columns {', '.join(names)}; {advice}")


@pytest.mark.parametrize("value", [None, "high", float("nan"), float("inf"), "", [1.0, None]])
def test_a_cell_that_is_no_score_is_refused(value):
    assert "row 3, column 'score'" in error_of(row_scores, {"score": value}, 2, "rows, row 3")


def test_scores_of_a_row():
    assert row_scores({"score": "4.5"}, 2, "") == [4.5]
    assert row_scores({"pos_score": [1], "neg_score": [0.5, 0.25]}, 4, "") == [1, 0.5, 0.25]
    assert row_scores({"positive_score": 1, "negative_1_score": 0.5, "negative_2_score": None}, 3, "") == [1, 0.5]
    # BUG: without its own score, the positive got that of the first negative.
    cells = {"positive_score": None, "negative_1_score": 0.5, "negative_2_score": 0.25}
    assert "column 'positive_score': None is not a score" in error_of(row_scores, cells, 3, "row 1")
    assert "there are 2 scores (scores) for 3 texts after the anchor" in error_of(row_scores, {"scores": [1, 2]}, 4, "")
    assert "(for a margin m, the list [m, 0])" in error_of(row_scores, {"label": 3.5}, 3, "")  # as sentence-transformers has it


def test_scores_go_with_the_texts_of_their_row(tokenizer):
    rows = [row | {"scores": [0.9, 0.1 * i, 0.2]} for i, row in enumerate(TRIPLETS)]
    rows[1]["negative_2"], rows[1]["scores"] = None, [0.9, 0.7]
    tokens = tokenize_table(Dataset.from_list(rows), RowTokenizer(tokenizer, 16, scored=True), "rows")
    assert tokens["scores"][:2] == [[0.9, 0.0, 0.2], [0.9, 0.7]]
    first = tokenize_table(Dataset.from_list(rows), RowTokenizer(tokenizer, 16, scored=True), "rows", negatives=1)
    assert first["scores"][:2] == [[0.9, 0.0], [0.9, 0.7]] and len(first["input_ids"][0]) == 3
    batch = RaggedCollator([4])(tokens.__getitems__([0, 1]))
    assert batch["further"]["scores"].tolist() == torch.tensor([[0.9, 0.0, 0.2], [0.9, 0.7, 0.0]]).tolist()


@pytest.mark.parametrize(
    ("text", "score", "there"),
    [(None, None, ""), (None, 0.5, "negative_1_score"), ("a b", None, "negative_1")],
)
def test_a_text_and_its_score_are_both_there_or_absent(tokenizer, text, score, there):
    """BUG: with negative_1 and the score of negative_2 missing, negative_2 got the score of negative_1."""
    rows = [{"anchor": f"the {word}", "positive": word, "negative_1": "a", "negative_2": "b", "positive_score": 0.9,
             "negative_1_score": 0.3, "negative_2_score": 0.2} for word in WORDS]  # fmt: skip
    rows[1] |= {"negative_1": text, "negative_1_score": score}
    if there:
        rows[1] |= {"negative_2": "b" if text != "a b" else None, "negative_2_score": None if text != "a b" else 0.2}
        message = error_of(tokenize_table, Dataset.from_list(rows), RowTokenizer(tokenizer, 16, scored=True), "rows")
        assert message.startswith(f"rows, row 2: there is a value in column '{there}', but none in column '")
        return
    tokens = tokenize_table(Dataset.from_list(rows), RowTokenizer(tokenizer, 16, scored=True), "rows")
    assert tokens["scores"][:2] == [[0.9, 0.3, 0.2], [0.9, 0.2]]


@pytest.mark.parametrize("scores", [[], [0.3], None])
def test_a_mined_row_without_negatives_has_the_score_of_its_positive(tokenizer, scores):
    """BUG: `distill` refused a file of `mine-hard-negatives --write_scores` in which a row has no negatives."""
    row = {"query": "a", "positive": "b", "negatives": ["c"], "pos_scores": [0.9], "neg_scores": [0.2]}
    rows = Dataset.from_list([row, row | {"negatives": [], "neg_scores": scores}])
    if scores:
        message = error_of(tokenize_table, rows, RowTokenizer(tokenizer, 16, scored=True), "rows")
        assert message.startswith("rows, row 2: there is a value in column 'neg_scores', but none in column 'negatives'")
    else:
        tokens = tokenize_table(rows, RowTokenizer(tokenizer, 16, scored=True), "rows")
        assert tokens["scores"][:] == [[0.9, 0.2], [0.9]] and list(map(len, tokens["input_ids"])) == [3, 2]


def test_scores_stay_with_their_rows_when_rows_are_dropped(tokenizer):
    rows = [{"sentence1": f"the {word}", "sentence2": " " if i == 1 else "a b", "score": i} for i, word in enumerate(WORDS)]
    read = RowTokenizer(tokenizer, 16, scored=True)
    assert "row 2, column 'sentence2'" in error_of(tokenize_table, Dataset.from_list(rows), read, "rows")
    tokens = tokenize_table(Dataset.from_list(rows), read, "rows", drop_empty_rows=True)
    assert tokens["scores"][:] == [[i] for i in range(len(rows)) if i != 1]


def test_equal_scores_are_refused(tmp_path):
    rows = [row | {"score": 3} for row in GRADED]
    assert error_of(trainer, tmp_path, CoSENT(), rows).startswith(
        "train_dataset: all scores are 3, so there is nothing to learn"
    )
    rows = [row | {"scores": [0.5, 0.5, 0.5]} for row in TRIPLETS]
    assert "all scores are 0.5" in error_of(trainer, tmp_path, TeacherKL(), rows)


def test_lists_of_scores_in_a_jsonl_file(tmp_path):
    """BUG: lists of numbers in a jsonl file were read as JSON texts, which ended in an ArrowNotImplementedError."""
    rows = [row | {"scores": [3, 0.5, i]} for i, row in enumerate(TRIPLETS)]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = trainer(tmp_path, TeacherKL(), str(path))
    assert made.train_dataset["scores"][:2] == [[3, 0.5, 0], [3, 0.5, 1]]
    assert read_file(str(path)).features["scores"] == List(Value("float64"))


def test_a_list_of_scores_may_be_empty(tmp_path):
    """BUG: one row without negatives made the scores of all rows JSON texts."""
    some = [{"neg": ["c", "d"][:count], "neg_scores": [1, 0.5][:count]} for count in (0, 1, 2)]
    rows = [{"query": f"a {i}", "pos": [f"b {i}"], "pos_scores": [2]} | some[i % 3] for i in range(8)]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_file(str(path)).features["neg_scores"] == List(Value("float64"))
    made, same = (trainer(tmp_path, TeacherKL(), given) for given in (str(path), rows))
    assert made.train_dataset["scores"][:3] == same.train_dataset["scores"][:3] == [[2], [2, 1], [2, 1, 0.5]]


def test_a_label_is_a_score_and_no_conversion_takes_place(tokenizer):
    """With an objective that needs scores, sentence1, sentence2 and label are not grouped into positives and negatives."""
    rows = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"], "label": i % 2} for i, row in enumerate(GRADED)]
    tokens = tokenize_table(Dataset.from_list(rows), RowTokenizer(tokenizer, 16, scored=True), "rows")
    assert tokens["scores"][:] == [[i % 2] for i in range(len(rows))]


def test_several_positives_with_scores_are_refused(tokenizer):
    rows = Dataset.from_list([{"query": "q", "pos": ["a", "b"], "score": 1.0}] * 3)
    message = error_of(tokenize_table, rows, RowTokenizer(tokenizer, 16, scored=True), "rows")
    assert "rows, row 1: there are 2 positives, but scores need one positive per row" in message


# ---- the trainer ----


def test_cosent_learns_the_order_of_scores(tmp_path):
    made = trainer(tmp_path, CoSENT(), GRADED, Dataset.from_list(GRADED), max_steps=40, optim="adamw_torch", learning_rate=1e-3)
    before = made.evaluate()["eval_spearman"]
    made.train()
    assert made.evaluate()["eval_spearman"] > max(before, 0) + 20


def test_named_columns_of_scores(tmp_path):
    rows = Dataset.from_list([{"a": row["sentence1"], "b": row["sentence2"], "stars": row["score"]} for row in GRADED])
    source = Source("graded", rows, columns={"anchor": "a", "positive": "b", "score": "stars"})
    made = trainer(tmp_path, CoSENT(), [source])
    assert made.train_dataset.tables[0]["scores"][:3] == [[0], [1], [2]]


@pytest.mark.parametrize("objective", [SimCSE(), ImprovedContrastive()])
def test_without_need_a_column_of_scores_is_refused(tmp_path, objective):
    assert "the column 'score' judges the pairs" in error_of(trainer, tmp_path, objective, GRADED)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_that_of_the_encoded_rows(tmp_path, teacher, normalize):
    """The loss of a batch is the objective's value on embeddings and vectors that are computed separately.

    BUG: for a model that returns unit vectors, the loss was that of other vectors, whose lengths are lost when it is saved.
    """
    made = trainer(tmp_path, VectorDistillation("mse"), PAIRS, {"rows": PAIRS}, teacher=teacher, normalize=normalize)
    batch = made.data_collator(made.train_dataset.__getitems__(list(range(len(PAIRS)))))
    made.step.eval()
    loss = made.compute_loss(made.step, batch).item()
    texts = [text for row in PAIRS for text in (row["anchor"], row["positive"])]
    student = made.encoder.encode(texts)
    wanted = Encoder.from_pretrained(teacher).encode(texts, normalize=True)
    assert loss == pytest.approx(np.square(student - wanted).mean(), rel=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        SimCSE(guide_margin=0.0),
        ImprovedContrastive(guide_margin=0.1),
        TeacherKL(candidates="batch"),
        TeacherKL(teacher_temperature=0.05),
        MarginMSE("cosine"),
        VectorDistillation(),
    ],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.parametrize("workers", [0, 1])
def test_objectives_with_a_teacher_train(tmp_path, teacher, objective, workers):
    made = trainer(tmp_path, objective, TRIPLETS, teacher=teacher, dataloader_num_workers=workers)
    assert "texts" not in made.train_dataset.column_names
    assert np.isfinite(made.train().training_loss)


def test_scores_of_a_teacher_are_its_cosines(tmp_path, teacher):
    made = trainer(tmp_path, MarginMSE("cosine"), TRIPLETS, teacher=teacher)
    model = Encoder.from_pretrained(teacher)
    for row, scores in zip(TRIPLETS, made.train_dataset["scores"][:]):
        vectors = model.encode(list(row.values()), normalize=True)
        assert scores == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-5)


def test_columns_of_scores_come_before_the_teacher(tmp_path, teacher):
    """A source with scores uses them; the other source uses the teacher."""
    graded = Source("graded", Dataset.from_list(GRADED), objective=CoSENT())
    made = trainer(tmp_path, SimCSE(guide_margin=0.0), [Source("pairs", Dataset.from_list(PAIRS)), graded], teacher=teacher)
    assert "vectors" in made.train_dataset.tables[0].column_names
    assert made.train_dataset.tables[1]["scores"][:3] == [[0], [1], [2]]
    made.train()


@pytest.mark.parametrize("with_columns", [False, True])
def test_a_function_may_need_scores_and_vectors(tmp_path, teacher, with_columns):
    """The scores come from the columns, or else from the teacher. The vectors come from the teacher in both cases."""
    rows = [row | ({"scores": [0.9, 0.1 * i, 0.2]} if with_columns else {}) for i, row in enumerate(TRIPLETS)]
    seen = []

    def loss(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores, teacher):
        seen.append((scores, teacher))
        return embeddings.square().mean()

    trainer(tmp_path, loss, rows, teacher=teacher).train()
    for scores, vectors in seen:
        assert vectors.shape == (4, 4, 32)
        cosines = torch.einsum("nd,nvd->nv", vectors[:, 0], vectors[:, 1:])
        assert (scores - cosines).abs().max() < 1e-5 or with_columns
        assert torch.equal(scores[:, 0], torch.full((4,), 0.9)) == with_columns


def test_a_teacher_that_nothing_uses_is_refused(tmp_path, teacher):
    message = error_of(trainer, tmp_path, SimCSE(), PAIRS, teacher=teacher)
    assert f"teacher is {teacher}, but no objective uses it; remove it" in message
    assert "but no objective uses it" in error_of(trainer, tmp_path, CoSENT(), GRADED, teacher=teacher)


def test_a_missing_teacher_is_named(tmp_path):
    for objective in (SimCSE(guide_margin=0.0), VectorDistillation(), TeacherKL(candidates="batch")):
        message = error_of(trainer, tmp_path, objective, PAIRS)
        assert f"the objective {type(objective).__name__} needs the vectors of a teacher; set teacher to a model" in message
    assert "model './nowhere' cannot be loaded: this folder does not exist" in error_of(
        trainer, tmp_path, VectorDistillation(), PAIRS, teacher="./nowhere"
    )


def test_streams_have_neither_scores_nor_a_teacher(tmp_path, teacher):
    for objective, rows, named in ((CoSENT(), GRADED, None), (SimCSE(guide_margin=0.0), PAIRS, teacher)):
        stream = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        message = error_of(trainer, tmp_path, objective, [Source("web", stream, size=10)], teacher=named)
        assert "a streaming dataset cannot have scores or a teacher" in message


def test_rows_of_a_single_text(tmp_path, teacher):
    rows = [{"text": row["anchor"]} for row in PAIRS]
    for once in (False, True):
        made = trainer(tmp_path, VectorDistillation(), rows, teacher=teacher, same_dropout_mask=once)
        batch = made.data_collator(made.train_dataset.__getitems__([0, 1]))
        target = batch["further"]["target"]
        assert torch.equal(target[:, 0], target[:, 1]) and len(batch["lengths"]) == (2 if once else 4)
        made.train()


def test_held_out_rows_use_scores_and_the_teacher(tmp_path, teacher):
    for objective, rows, named in ((SimCSE(guide_margin=0.0), PAIRS, teacher), (TeacherKL(), None, None)):
        rows = rows or [row | {"scores": [1.0, 0.5, 0.0]} for row in TRIPLETS]
        held_out = HeldOut(Dataset.from_list(rows[:8]))
        made = trainer(tmp_path, objective, rows, held_out, teacher=named, per_device_eval_batch_size=8)
        loss = made.evaluate()["eval_loss"]
        batch = made.data_collator(made.train_dataset.__getitems__(list(range(8))))
        made.step.eval()
        assert loss == pytest.approx(made.compute_loss(made.step, batch).item(), rel=1e-4)


def test_held_out_rows_learn_the_directions_of_the_training(tmp_path, teacher):
    """BUG: with a wider teacher, held-out rows had the principal directions of their own texts, so their loss was wrong."""
    settings = {"teacher": teacher, "per_device_eval_batch_size": 8, "per_device_train_batch_size": 8}
    made = trainer(tmp_path, VectorDistillation(), PAIRS, PAIRS[:8], tiny_model(hidden_size=16), **settings)
    alone = error_of(trainer, tmp_path, VectorDistillation(), None, PAIRS[:8], tiny_model(hidden_size=16), **settings)
    assert "(32 and 16 numbers), so the loss of held-out rows needs the directions of the training rows" in alone
    batch = made.data_collator(made.train_dataset.__getitems__(list(range(8))))
    made.step.eval()
    expected = pytest.approx(made.compute_loss(made.step, batch).item(), rel=1e-4)
    assert made.evaluate()["eval_loss"] == expected and made.evaluate({"more": PAIRS[:8]})["eval_more_loss"] == expected


def test_a_function_that_names_scores_gets_them(tmp_path):
    def loss(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores):
        return CoSENT()(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores=scores)

    losses = [trainer(tmp_path, objective, GRADED).train().training_loss for objective in (loss, CoSENT())]
    assert losses[0] == losses[1]

    def other(embeddings, text_ids, all_embeddings, all_text_ids, first_row, marks):
        return embeddings.sum()

    assert "missing a required argument: 'marks'" in error_of(trainer, tmp_path, other, GRADED)


# ---- sources with their own objective ----


def test_each_source_has_its_objective(tmp_path):
    seen = []

    def noted(objective, name):
        def loss(*args, **kwargs):
            seen.append(name)
            return objective(*args, **kwargs)

        return loss

    def of_scores(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores):
        seen.append("graded")
        return CoSENT()(embeddings, text_ids, all_embeddings, all_text_ids, first_row, scores=scores)

    sources = [
        Source("graded", Dataset.from_list(GRADED), objective=of_scores),
        Source("pairs", Dataset.from_list(PAIRS)),
    ]
    made = trainer(tmp_path, noted(SimCSE(), "pairs"), sources, max_steps=12)
    made.train()
    log = made.state.log_history
    assert {"graded", "pairs"} == set(seen)
    assert {key for entry in log for key in entry if key.startswith("loss_")} <= {"loss_graded", "loss_pairs"}


def test_objectives_in_a_file_of_sources(tmp_path):
    Dataset.from_list(GRADED).to_json(tmp_path / "graded.jsonl")
    file = tmp_path / "sources.yaml"
    file.write_text("- {name: a, file: graded.jsonl, objective: CoSENT}\n"
                    "- {name: b, file: graded.jsonl, objective: {name: CoSENT, temperature: 0.1}}\n")  # fmt: skip
    assert [source.objective for source in read_sources(str(file))] == [CoSENT(), CoSENT(0.1)]
    for given, expected in (
        ("Cosent", "unknown objective 'Cosent'; use one of CoSENT, ImprovedContrastive"),
        ("{name: CoSENT, tau: 1}", "CoSENT has no setting 'tau'; it has temperature"),
        ("{name: CoSENT, temperature: 0}", "objective: temperature is 0"),
        ("[CoSENT]", "objective is ['CoSENT']; give a name such as CoSENT"),
    ):
        file.write_text(f"- {{name: a, file: graded.jsonl, objective: {given}}}")
        message = error_of(read_sources, str(file))
        assert expected in message and "source 'a'" in message


def test_objectives_of_sources_that_cannot_be(tmp_path):
    graded = Dataset.from_list(GRADED)
    assert "give an instance, for example CoSENT()" in error_of(Source, "graded", graded, objective=CoSENT)
    learned = [Source("pairs", Dataset.from_list(PAIRS), objective=ImprovedContrastive(learn_temperature=True))]
    assert "no temperature can be learned" in error_of(trainer, tmp_path, SimCSE(), learned)
    both = [Source("pairs", Dataset.from_list(PAIRS)), Source("graded", graded, objective=CoSENT())]
    assert "no temperature can be learned" in error_of(trainer, tmp_path, ImprovedContrastive(learn_temperature=True), both)
    pairs = [Source("pairs", Dataset.from_list([row | {"scores": [1.0]} for row in PAIRS]))]
    assert "source 'pairs': TeacherKL compares the candidates of a row" in error_of(trainer, tmp_path, TeacherKL(), pairs)


def test_a_changed_score_or_teacher_is_a_changed_run(tmp_path, teacher):
    """The description of a run, which a resumed run is compared with, includes scores, the teacher and sources' objectives."""
    first = facts_of(trainer(tmp_path, CoSENT(), GRADED))
    assert facts_of(trainer(tmp_path, CoSENT(), GRADED)) == first
    other = [*GRADED[:-1], GRADED[-1] | {"score": 5}]
    assert facts_of(trainer(tmp_path, CoSENT(), other))["data"] != first["data"]
    tiny_encoder(seed=6).save_pretrained(tmp_path / "other")
    teachers = teacher, str(tmp_path / "other")
    guided = [facts_of(trainer(tmp_path, SimCSE(guide_margin=0.0), PAIRS, teacher=name)) for name in teachers]
    assert guided[0]["objective"] != guided[1]["objective"]
    graded = [[Source("graded", Dataset.from_list(GRADED), objective=CoSENT(temperature))] for temperature in (0.1, 0.2)]
    mixed = [facts_of(trainer(tmp_path, SimCSE(), sources)) for sources in graded]
    assert mixed[0]["data"] != mixed[1]["data"]


# ---- the vectors of a teacher ----


def tables_of_texts(*tables) -> list[Dataset]:
    return [Dataset.from_dict({"texts": texts, "number": list(range(len(texts)))}) for texts in tables]


def test_texts_are_numbered_once():
    tables = tables_of_texts([["a", "b"], ["b", "a", "c"]], [["c"], ["d", "a"]])
    texts, numbers = number_texts(tables, "", "")
    assert texts == ["a", "b", "c", "d"] and numbers == [[[0, 1], [1, 0, 2]], [[2], [3, 0]]]
    texts, numbers = number_texts(tables[:1], "query: ", "")
    assert texts == ["query: a", "b", "query: b", "a", "c"] and numbers == [[[0, 1], [2, 3, 4]]]


def test_the_vectors_of_a_file_are_those_of_the_teacher(tmp_path, monkeypatch, caplog):
    """Queries and documents get the teacher's prompts, and its default prompt is left out. The second call reads the file."""
    model = tiny_encoder(seed=5, prompts={"query": "the query is ", "document": ""}, default_prompt_name="query")
    model.save_pretrained(tmp_path)
    tables = tables_of_texts([["cat", "dog"], ["dog", "rain"]])
    args = SimpleNamespace(teacher=str(tmp_path), device=torch.device("cpu"))
    (table,), found = with_teacher(tables, [SimCSE(guide_margin=0.0)], args, 8)
    batch = RaggedCollator([2], vectors=found).further(table.__getitems__([0, 1]), 2)
    expected = [["the query is cat", "dog"], ["the query is dog", "rain"]]
    model.default_prompt_name = None
    for row, texts in zip(batch["teacher"], expected):
        assert row.numpy() == pytest.approx(model.encode(texts, normalize=True), abs=1e-6)

    monkeypatch.setattr(hf_embed.training.teacher, "write_vectors", None)  # it would fail
    with caplog.at_level(logging.INFO):
        _, once_more = with_teacher(tables, [SimCSE(guide_margin=0.0)], args, 8)
    assert np.array_equal(once_more["teacher"][[0, 1]], found["teacher"][[0, 1]])


def test_two_runs_beside_each_other_share_the_vectors(tmp_path, monkeypatch):
    """A run waits while another process holds the lock of the same vectors, as when several seeds are started at once."""
    tiny_encoder(seed=5).save_pretrained(tmp_path / "model")
    teacher = load_teacher(str(tmp_path / "model"), torch.device("cpu"))
    monkeypatch.setattr(hf_embed.training.teacher, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(hf_embed.training.teacher, "WAIT", 0.1)
    texts = ["a cat", "a dog"]
    work = work_folder(tmp_path / "teachers" / f"{identity_of(teacher, texts, OPTIONS, '')}.npy")
    hold = (
        "import sys, time; from pathlib import Path; from hf_embed.files.safe_files import lock_folder; "
        "folder = Path(sys.argv[1]); "
    )
    hold += "folder.mkdir(parents=True); lock_folder(folder); print('held', flush=True); time.sleep(float(sys.argv[2]))"
    other = subprocess.Popen([sys.executable, "-c", hold, str(work), "1"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    start = time.perf_counter()
    file = vectors_of(teacher, texts)
    assert time.perf_counter() - start > 0.5 and other.wait() == 0
    assert np.load(file).shape == (2, 32)


def test_directions_keep_dot_products(tmp_path):
    """Narrower targets keep the leading directions, wider ones keep every dot product."""
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [9, 8, 7, 0.1, 0.1, 0.1]
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    numbers = list(range(50))
    plain = rows @ rows.T
    for width, error in ((3, 0.05), (6, 1e-4), (9, 1e-4)):
        target = TeacherVectors(tmp_path / "rows.npy", width)[numbers]
        assert target.shape == (50, width) and np.abs(target @ target.T - plain).max() < max(error * 4, 1e-4) * 10
    two = TeacherVectors(tmp_path / "rows.npy", 2)[numbers]  # negative control: a large direction is missing
    assert np.abs(two @ two.T - plain).max() > 10
