"""Scores of collapsed models, and of queries that are also documents: they are right, or they are NaN.

A collapsed model gives all texts the same vector, except for rounding errors. Then no metric may depend on the rounding errors
or on the order of a file.
"""

import json
import logging
import math

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from test_retrieval import embed

from hf_embed import (
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    PairClassification,
    Reranking,
    Retrieval,
    SimCSE,
    Triplets,
    ZeroShot,
    mining,
)
from hf_embed.evaluation.geometry import alignment, ordered, uniformity, unit
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.metrics import SpearmanCosine
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import EvaluationTask, Task, metric_names, score_tasks
from hf_embed.kit.calibrate import part_scores
from hf_embed.kit.models import embed_with
from hf_embed.training.inputs import as_tasks

WORDS = ["river", "stone", "cloud", "lamp", "bread", "horse", "green", "seven", "night", "paper", "song", "wheel", "glass"]
ROWS = Dataset.from_dict(
    {
        "sentence1": [" ".join(WORDS[i % 13 : i % 13 + 1 + i % 5] or WORDS) for i in range(40)],
        "sentence2": [" ".join(WORDS[(3 * i) % 13 :] + WORDS[: i % 4]) for i in range(40)],
        "score": [float(i % 6) for i in range(40)],
    }
)


def found(count=60, queries=20):
    """Return a retrieval task in which the first document answers every query, so the order of the file would score 100."""
    texts = {f"d{i}": f"{WORDS[i % 13]} {i}" for i in range(count)}
    return Retrieval(
        {f"q{i}": f"query {WORDS[i % 11]} {i}" for i in range(queries)}, texts, {f"q{i}": {"d0": 1} for i in range(queries)}
    )


TASKS = {
    "sts": STS(ROWS),
    "retrieval": found(),
    "zero_shot": ZeroShot([f"text {i}" for i in range(30)], [0] * 20 + [1] * 10, ["one", "two"]),
    "triplet": Triplets(*([f"{side} {i}" for i in range(30)] for side in ("anchor", "positive", "negative"))),
    "pair_classification": PairClassification(ROWS["sentence1"], ROWS["sentence2"], [i % 3 == 0 for i in range(40)]),
    "reranking": Reranking(
        [{"query": f"query {i}", "positive": f"text {i}", "negative": [f"text {i + j}" for j in (1, 2)]} for i in range(20)]
    ),
}
METRICS = {"sts": ["spearman"]} | {kind: list(task.reported) for kind, task in TASKS.items() if kind != "sts"}


def collapsed_encoder(dtype=torch.float32):
    """Return an encoder that gives all texts almost the same vector.

    The last layer norm has tiny weights, so every hidden state is its bias plus a very small part of the normalized state.
    """
    encoder = tiny_encoder()
    norm = encoder.backbone.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight.fill_(1e-7)
        norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    return encoder.to(dtype)


def jitter(scale):
    """Return a function that gives all texts one vector plus noise of relative size `scale`, different for each text."""
    one = torch.randn(48, generator=torch.Generator().manual_seed(3))

    def noisy(texts, prompt_name=None):
        return one + scale * embed(texts).repeat(1, 3) / 10

    return noisy


COLLAPSED = {
    "one vector": lambda: jitter(0.0),
    "rounding": lambda: jitter(1e-6),
    "a model": lambda: embed_with(collapsed_encoder()),
    "a model in bfloat16": lambda: embed_with(collapsed_encoder(torch.bfloat16)),
    "zero": lambda: lambda texts, prompt_name=None: torch.zeros(len(texts), 8),
    "NaN": lambda: lambda texts, prompt_name=None: torch.full((len(texts), 8), math.nan),
    "infinite": lambda: lambda texts, prompt_name=None: embed(texts) * math.inf,
}


@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("kind", TASKS)
def test_a_collapsed_model_has_no_score(case, kind, caplog):
    with caplog.at_level(logging.WARNING):
        scores = score_tasks({"x": TASKS[kind]}, COLLAPSED[case]())
    for metric in METRICS[kind]:
        assert math.isnan(scores[f"x_{metric}"]) and math.isnan(scores[metric]), metric
    assert len(caplog.messages) == 1 and "all cosines are equal, or some are not finite; the model has collapsed" in caplog.text


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("make", [lambda: embed, lambda: jitter(0.01), lambda: embed_with(tiny_encoder())])
def test_control_other_models_have_a_score(kind, make, caplog):
    """Control: other models have a score.

    A nearly collapsed model has one too: the differences between its vectors are small, but larger than rounding errors.
    """
    with caplog.at_level(logging.WARNING):
        scores = score_tasks({"x": TASKS[kind]}, make())
    assert all(math.isfinite(value) for value in scores.values()) and not caplog.messages


def test_one_vector_of_nan_makes_the_score_nan(caplog):
    def one_bad(bad):
        def vectors(texts, prompt_name=None):
            found = embed(texts)
            found[[text in bad for text in texts]] = math.nan
            return found

        return vectors

    assert math.isnan(STS(ROWS).score(one_bad([ROWS[7]["sentence1"]]))["spearman"])
    assert math.isnan(found().score(one_bad(["river 0"]))["ndcg@10"])  # torch.topk treats NaN as the largest value
    assert math.isnan(found().score(one_bad(["query river 0"]))["ndcg@10"])
    assert math.isnan(TASKS["zero_shot"].score(one_bad(["text 3"]))["accuracy"])
    assert math.isnan(TASKS["triplet"].score(one_bad(["negative 7"]))["triplet_accuracy"])
    assert math.isnan(TASKS["pair_classification"].score(one_bad([ROWS[7]["sentence1"]]))["pair_ap"])
    assert math.isnan(TASKS["reranking"].score(one_bad(["text 3"]))["rerank_map"])


def test_an_empty_document_may_be_zero():
    def vectors(texts, prompt_name=None):
        return embed(texts) * torch.tensor([[float(text != "")] for text in texts])

    whole = found()
    texts = whole.corpus | {"empty": ""}
    scores = Retrieval(whole.queries, texts, whole.qrels).score(vectors)
    assert scores["ndcg@10"] == pytest.approx(whole.score(embed)["ndcg@10"], abs=8)  # one more document, with cosine 0
    assert math.isfinite(scores["ndcg@10"])


def test_geometry_of_vectors_without_a_direction():
    """BUG: A zero vector had the best possible uniformity and the best possible alignment."""
    x = np.random.default_rng(0).normal(size=(4, 3))
    bad = x.copy()
    bad[2] = 0
    assert math.isnan(alignment(bad, bad)) and math.isnan(uniformity(bad))
    bad[2] = math.inf
    assert math.isnan(alignment(x, bad)) and math.isnan(uniformity(bad))
    assert np.isnan(unit(np.zeros((1, 3)))).all() and np.linalg.norm(unit(x * 1e-30), axis=1) == pytest.approx(np.ones(4))
    assert (alignment(x, x), uniformity(np.ones((5, 3)))) == (0, pytest.approx(0, abs=1e-12))  # collapsed: uniformity 0
    assert (
        not ordered(np.ones((2, 3))) and ordered(np.array([[1.0, 1, 1], [1, 1, 0.9]])) and not ordered(np.array([[1, np.nan]]))
    )


def test_one_score_for_all_pairs_gives_no_correlation(caplog, recwarn):
    rows = ROWS.remove_columns("score").add_column("score", [3.0] * len(ROWS))
    assert math.isnan(STS(rows).score(embed)["spearman"]) and "all scores are 3" in caplog.text
    assert math.isnan(SpearmanCosine().compute(predictions=[0.5, 0.5], references=[1, 2])["spearman"])
    assert not [warning for warning in recwarn if "constant" in str(warning.message)]


def test_a_mean_leaves_out_what_has_no_score():
    tasks = {"good": STS(ROWS), "flat": STS(ROWS.remove_columns("score").add_column("score", [1.0] * len(ROWS)))}
    scores = score_tasks(tasks, embed)
    assert math.isnan(scores["flat_spearman"]) and scores["spearman"] == scores["good_spearman"]


def test_one_document_is_found():
    assert Retrieval({"q": "a"}, {"d": "b"}, {"q": {"d": 1}}).score(embed)["ndcg@10"] == 100


def test_a_temperature_is_not_chosen_by_a_collapsed_model():
    for kind in ("sts", "retrieval"):
        assert "a temperature cannot be chosen" in error_of(part_scores, TASKS[kind], jitter(1e-6), 2)


def test_mining_refuses_vectors_that_are_not_finite(tmp_path):
    def vectors(texts, prompt_name=None):
        return embed(texts) * torch.tensor([[math.nan if text == "b1" else 1.0] for text in texts])

    pairs = [(f"a{i}", f"b{i}") for i in range(4)]
    message = error_of(mining.write_hard_negatives, pairs, [], vectors, tmp_path / "out.jsonl", mining.MiningArguments(1))
    assert "1 of 4 vectors are not finite, for example that of 'b1'" in message and not (tmp_path / "out.jsonl").exists()


def test_no_score_is_never_the_best(tmp_path, monkeypatch):
    """A score of NaN is never the best one.

    If the first and the last evaluation score NaN, the best checkpoint is the one between. If all evaluations score NaN, there
    is no best checkpoint, and the model of the last step is kept.
    """
    scores = iter([math.nan, 40.0, math.nan])

    def run(folder):
        trainer = ContrastiveTrainer(
            model=tiny_model(), processing_class=small_tokenizer(), objective=SimCSE(),
            train_dataset=Dataset.from_dict({"text": [f"text {i}" for i in range(12)]}), eval_dataset=ROWS,
            args=ContrastiveTrainingArguments(
                str(folder), per_device_train_batch_size=4, max_steps=3, eval_strategy="steps", eval_steps=1,
                save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="spearman",
                greater_is_better=True, report_to=[], disable_tqdm=True, use_cpu=True,
            ),
        )  # fmt: skip
        trainer.train()
        return trainer.state

    monkeypatch.setattr(STS, "score", lambda self, embed: {"spearman": next(scores), "alignment": 1.0, "uniformity": -1.0})
    state = run(tmp_path / "a")
    assert state.best_metric == 40.0 and state.best_model_checkpoint.endswith("checkpoint-2")
    scores = iter([math.nan] * 3)
    assert run(tmp_path / "b").best_model_checkpoint is None


# ---- queries that are documents ----


def judged(queries, corpus, qrels):
    return Retrieval(queries, corpus, qrels).score(embed)


def test_a_judged_document_of_the_querys_id_counts(tmp_path):
    """Queries and documents have the same ids, and each query is answered by the document with its id."""
    texts = {str(i): f"{word} {i}" for i, word in enumerate(WORDS)}
    scores = judged(texts, texts, {i: {i: 1} for i in texts})
    assert scores["ndcg@10"] == scores["mrr@10"] == 100
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [json.dumps({"_id": i, "text": f"{name} {text}"}) for i, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in texts))

    def by_word(texts, prompt_name=None):
        return embed([text.split()[1] for text in texts])

    assert read_retrieval(str(folder)).score(by_word)["ndcg@10"] == 100


def test_another_document_of_the_querys_id_stays(caplog):
    """A document with the query's id that is not judged and has another text is found like any other document.

    Here it is the nearest document, so the relevant document has rank 2.
    """
    task = Retrieval({"1": "river"}, {"1": "stone", "2": "cloud", "3": "lamp"}, {"1": {"2": 1}})

    def vectors(texts, prompt_name=None):
        return torch.tensor(
            [{"river": [1.0, 0], "stone": [1.0, 0.1], "cloud": [1.0, 1], "lamp": [0.0, 1]}[text] for text in texts]
        )

    _, found = task.rank(vectors, 3)
    assert found == {"1": ["1", "2", "3"]} and task.score(vectors)["mrr@10"] == 50 and not caplog.messages


@pytest.mark.parametrize("title", ["", "on rivers ", "a  title\n"])
def test_a_query_that_is_a_document_is_not_found_for_itself(title, caplog):
    """As in ArguAna, a document with the query's id and text is left out, even if a title stands before the text."""
    texts = {"a": "the river", "b": "the stone", "c": "the cloud"}
    corpus = texts | {"a": f"{title}the river ", "d": "the river"}
    task = Retrieval({"a": "the river", "x": "the stone"}, corpus, {"a": {"b": 1}, "x": {"b": 1}})
    _, found = task.rank(embed, 4)
    assert "a" not in found["a"] and set(found["a"]) == {"b", "c", "d"} and "a" in found["x"]
    assert caplog.messages == [
        "1 of 2 queries are also documents with the same id and text; such a document is left out of the results of "
        "its own query"
    ]


def test_a_judged_query_that_is_a_document_counts(caplog):
    texts = {"a": "the river", "b": "the stone"}
    for grade in (1, 0):  # a grade of 0 is also a judgment
        task = Retrieval({"a": "the river"}, texts, {"a": {"a": grade, "b": 1}})
        assert task.rank(embed, 2)[1]["a"] == ["a", "b"]
    assert not caplog.messages


def test_a_text_that_only_ends_like_the_query_is_another():
    task = Retrieval({"a": "river"}, {"a": "upriver", "b": "stone"}, {"a": {"b": 1}})
    assert task.rank(embed, 2)[1]["a"] and set(task.rank(embed, 2)[1]["a"]) == {"a", "b"}


# ---- the interface of a task ----


class Plain:
    """The minimum that a user's own task must have."""

    kind, main, reported = "plain", "words", ("words",)

    def score(self, embed):
        return {"words": 1.0, "letters": 2.0}


class Derived(EvaluationTask):
    kind, main, reported = "derived", "words", ("words",)


class WithLogged(Derived):
    logged = ("words", "letters")


def test_tasks_of_users_own():
    assert all(isinstance(task, Task) for task in (Plain(), WithLogged(), Derived()))
    assert metric_names({"p": Plain()}) == {"words", "p_words"}
    assert metric_names({"f": WithLogged()}) == {"words", "letters", "f_words", "f_letters"}
    assert metric_names({"d": Derived()}) == {"words", "d_words"} and Derived().logged == ("words",)
    with pytest.raises(NotImplementedError, match="Derived.score"):
        Derived().score(None)


def test_evaluation_sets_by_name():
    sts = Dataset.from_list([{"sentence1": "a", "sentence2": "b", "score": i} for i in range(2)])
    plain = Plain()
    held = Dataset.from_list([{"anchor": "a", "positive": "b"}])
    assert as_tasks(None) == {} and as_tasks(plain) == {"plain": plain}
    assert list(as_tasks(sts)) == ["sts"] and isinstance(as_tasks(sts)["sts"], STS)
    assert [type(task) for task in as_tasks({"c": held, "a": sts, "b": plain}).values()] == [STS, Plain, HeldOut]
