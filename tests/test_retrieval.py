"""Retrieval is compared with pytrec_eval, and zero-shot classification with scikit-learn.

Also exact search, the files of evaluation sets, and the error messages for wrong files and flags.
"""

import dataclasses
import gzip
import inspect
import itertools
import json
import logging
import math
import random
import zlib

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import error_of
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score, f1_score

from hf_embed import Retrieval, ZeroShot
from hf_embed.distributed import gather_objects
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.evaluation.tasks import main_metric, score_tasks
from hf_embed.evaluation.zero_shot import read_zero_shot
from hf_embed.kit.code_search import read_code_search
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.search import exact_search


def vector(text):
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=16)


def embed(texts, prompt_name=None):
    """Return a random vector for each text, always the same for the same text.

    The vectors have different lengths, so only cosine similarities give the right answer.
    """
    return torch.tensor(np.stack([vector(text) * (1 + len(text)) for text in texts]), dtype=torch.float32)


def task(queries=20, documents=300, grades=(0, 1, 2, 3), seed=0):
    rng = random.Random(seed)
    qrels = {
        f"q{i}": {f"d{d}": rng.choice(grades) for d in rng.sample(range(documents), rng.randint(1, 9))} for i in range(queries)
    }
    for judged in qrels.values():
        judged[next(iter(judged))] = 2
    corpus = {f"d{i}": f"document {i}" for i in range(documents)}
    return Retrieval({q: f"query {q}" for q in qrels}, corpus, qrels)


def trec_metrics(retrieval, cutoffs):
    run = {}
    for q in retrieval.qrels:
        a = vector(retrieval.queries[q])
        cosines = {
            d: a @ vector(text) / np.linalg.norm(a) / np.linalg.norm(vector(text)) for d, text in retrieval.corpus.items()
        }
        run[q] = {d: float(c) for d, c in cosines.items() if d != q}
    names = [f"{name}.{','.join(map(str, cutoffs))}" for name in ("ndcg_cut", "map_cut", "recall")]
    scores = pytrec_eval.RelevanceEvaluator(retrieval.qrels, {*names}).evaluate(run)
    mean = {
        f"{ours}@{k}": 100 * np.mean([s[f"{theirs}_{k}"] for s in scores.values()])
        for ours, theirs in (("ndcg", "ndcg_cut"), ("map", "map_cut"), ("recall", "recall"))
        for k in cutoffs
    }
    for k in cutoffs:
        first = {q: dict(sorted(r.items(), key=lambda x: -x[1])[:k]) for q, r in run.items()}
        reciprocal = pytrec_eval.RelevanceEvaluator(retrieval.qrels, {"recip_rank"}).evaluate(first)
        mean[f"mrr@{k}"] = 100 * np.mean([s["recip_rank"] for s in reciprocal.values()])
    return mean


@pytest.mark.parametrize("grades", [(0, 1), (0, 1, 2, 3)])
def test_metrics_are_those_of_trec_eval(grades):
    retrieval = task(grades=grades)
    scores = retrieval.score(embed)
    expected = trec_metrics(retrieval, (10, 100))
    assert scores.keys() == expected.keys()
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-6), key
    assert scores["ndcg@10"] != pytest.approx(task(seed=1).score(embed)["ndcg@10"], abs=0.1)  # control


def test_fewer_documents_than_the_cutoff():
    retrieval = task(documents=9)
    scores = retrieval.score(embed)
    assert scores["recall@10"] == scores["recall@100"] == 100
    assert scores["ndcg@10"] == pytest.approx(trec_metrics(retrieval, (10,))["ndcg@10"], abs=1e-6)


def test_a_perfect_order_scores_100():
    same = Retrieval({"q": "a text"}, {"d1": "another", "d2": "a text", "d3": "more"}, {"q": {"d2": 1}})
    assert set(same.score(embed).values()) == {100.0}


def test_queries_without_an_answer_do_not_count():
    texts = {"a": "text 1", "b": "text 2"}
    whole = Retrieval(texts, texts | {"c": "text 1"}, {"a": {"c": 1}, "b": {"c": 0}})
    assert whole.score(embed) == Retrieval(texts, whole.corpus, {"a": {"c": 1}}).score(embed)
    assert "no query has a relevant document" in error_of(Retrieval, texts, texts, {"b": {"a": 0}})


def test_relevant_documents_outside_the_corpus_are_counted(caplog):
    scores = Retrieval({"q": "a text"}, {"1": "a text", "2": "more"}, {"q": {"1": 1, 7: 1}}).score(embed)
    assert scores["recall@10"] == 50 and "1 of 2 relevant documents are not in the corpus, for example 7" in caplog.text


def test_a_query_does_not_find_itself():
    """If queries are also documents, as in ArguAna, the document with the query's own id does not count."""
    corpus = {"a": "a text", "b": "something", "c": "else"}
    scores = Retrieval({"a": "a text"}, corpus, {"a": {"b": 1, "c": 1}}).score(embed)
    assert scores["ndcg@10"] == 100.0


def test_prompts_are_for_queries_and_documents():
    asked = []

    def noting(texts, prompt_name=None):
        asked.append((prompt_name, texts[0].split()[0]))
        return embed(texts)

    task().score(noting)
    assert set(asked) == {("query", "query"), ("document", "document")}


@pytest.mark.parametrize("block", [1, 7, 40, 100])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_search_is_exact(block, k):
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (9, 53))
    scores, numbers = exact_search(queries, rows.split(block), k)
    expected = (queries @ rows.T).sort(dim=1, descending=True)
    assert torch.equal(numbers, expected.indices[:, :k])
    assert torch.allclose(scores, expected.values[:, :k])


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("k", [1, 4, 9, 20])
def test_of_equal_scores_the_first_rows_are_found(block, k):
    """BUG: `topk` takes any of them, and which one depended on the number of rows."""
    queries, rows = torch.ones(2, 1), torch.tensor([1.0, 2, 1, 1, 3, 1, 2, 0, 1, 1, 1, 1]).unsqueeze(1)
    queries[1] = -1
    scores, numbers = exact_search(queries, rows.split(block), k)
    expected = (queries @ rows.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(numbers, expected.indices[:, :k]) and torch.equal(scores, expected.values[:, :k])


def test_nan_is_found_first_beside_equal_scores():
    rows = torch.tensor([1.0, 1, float("nan"), 1, 1, float("nan"), 1, 0]).unsqueeze(1)
    assert exact_search(torch.ones(1, 1), [rows], 4)[1].tolist() == [[2, 5, 0, 1]]


VECTORS = {"same": [1.0, 0, 0], "question": [1.0, 0, 0], "other": [0, 1.0, 0.5], "far": [0, 0, 1.0]}


def three_numbers(texts, prompt_name=None):
    return torch.tensor([VECTORS[text] for text in texts])


@pytest.mark.parametrize("documents", [9, 11, 12, 50, 2000])
def test_equal_cosines_are_ranked_by_the_id_at_the_cut_too(documents):
    """BUG: of more equal documents than are searched for, any were taken. trec_eval puts the largest id first."""
    ids = [f"d{i:04}" for i in range(documents)]
    task = Retrieval(
        queries={"q": "question", "p": "other"},
        corpus=dict.fromkeys(ids, "same") | {"x": "other", "y": "far"},
        qrels={"q": {ids[-1]: 1}, "p": {"x": 1}},
        cutoffs=(10,),
    )
    assert [found["ndcg@10"] for found in task.per_query(three_numbers)] == [1.0, 1.0]
    smallest = dataclasses.replace(task, qrels={"q": {ids[0]: 1}})
    assert smallest.per_query(three_numbers)[0]["recall@10"] == (1.0 if documents <= 10 else 0.0)


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_equal_documents_are_ranked_by_the_id_however_their_vectors_are_rounded(block, monkeypatch):
    """BUG: each copy of a document was encoded, so rounding errors, which depend on the batches, decided between the copies."""
    monkeypatch.setattr("hf_embed.evaluation.tasks.BATCH", block)
    task = Retrieval({"q": "question"}, {f"d{i}": "same" for i in range(7)} | {"y": "far"}, {"q": {"d3": 1}}, cutoffs=(10,))
    calls = itertools.count()

    def rounded(texts, prompt_name=None):  # another direction in each call, and in each place of a call
        return three_numbers(texts) + 1e-2 * torch.rand(len(texts), 3, generator=torch.Generator().manual_seed(next(calls)))

    assert task.rank(rounded, 10)[1] == {"q": ["d6", "d5", "d4", "d3", "d2", "d1", "d0", "y"]}


def test_equal_nearest_documents_are_no_collapse_if_others_are_farther():
    """BUG: the scores were NaN if the nearest documents of every query had equal cosines."""
    task = Retrieval({"q": "question"}, {f"d{i}": "same" for i in range(40)} | {"y": "far"}, {"q": {"d9": 1}}, cutoffs=(10,))
    assert task.per_query(three_numbers)[0]["mrr@10"] == 1.0
    collapsed = dataclasses.replace(task, corpus={f"d{i}": "same" for i in range(40)})
    assert math.isnan(collapsed.per_query(three_numbers)[0]["mrr@10"])


# ---- files ----


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    write_jsonl(folder / "corpus.jsonl", [
        {"_id": "1", "title": "A title", "text": "and a text", "metadata": {"x": 1}},
        {"_id": 2, "title": "", "text": "no title", "metadata": {"x": "one"}},
        {"_id": "3", "text": "nothing\u2028else"},
    ])  # fmt: skip
    write_jsonl(
        folder / "queries.jsonl", [{"_id": "a", "text": "first"}, {"_id": "b", "text": "second"}, {"_id": "c", "text": "3rd"}]
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\na\t1\t1\n")
    (folder / "qrels" / "dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\na\t1\t2\na\t2\t0\nb\t2\t1\nb\t9\t1\nz\t1\t1\nc\t3\t0\n\n"
    )
    return folder


def test_beir_folder(beir, caplog):
    with caplog.at_level(logging.WARNING):
        retrieval = read_retrieval(str(beir))
    assert retrieval.corpus == {"1": "A title and a text", "2": "no title", "3": "nothing\u2028else"}
    assert retrieval.qrels == {"a": {"1": 2}, "b": {"2": 1}}  # dev comes before train; a query without an answer is not scored
    assert "1 documents that do not exist, for example 9" in caplog.text
    assert "1 queries that do not exist, for example z" in caplog.text
    assert read_retrieval(f"{beir}:train").qrels == {"a": {"1": 1}}


def test_hub_layout(beir, tmp_path, monkeypatch):
    """Datasets of mteb on the Hub have three configurations. Here, tables in memory replace the Hub."""
    from hf_embed.evaluation import retrieval

    parts = {
        ("corpus", "corpus"): [{"_id": "1", "title": "A", "text": "b"}, {"_id": "2", "title": None, "text": "c"}],
        ("queries", "queries"): [{"_id": "a", "text": "first"}],
        ("default", "dev"): [{"query-id": "a", "corpus-id": "1", "score": 1.0}],
    }
    monkeypatch.setattr(retrieval, "read_hub", lambda name, config, split: Dataset.from_list(parts[config, split]))
    loaded = read_retrieval("someone/some-dataset:dev")
    assert loaded == Retrieval({"a": "first"}, {"1": "A b", "2": "c"}, {"a": {"1": 1}})
    for grade in (0.5, None):
        parts["default", "dev"][0]["score"] = grade
        message = f"query a and document 1 have the grade {grade}, not a whole number"
        assert message in error_of(read_retrieval, "someone/some-dataset:dev")
    # BUG: A dataset whose judgments have other columns ended in a KeyError.
    parts["default", "dev"] = [{"query_id": "a", "corpus_id": "1", "score": 1.0}]
    message = error_of(read_retrieval, "someone/some-dataset:dev")
    assert message == (
        "someone/some-dataset, default: found the columns query_id, corpus_id, score; expected query-id, corpus-id and score"
    )


BAD_BEIR = {
    "no folder": ("absent", None, "absent: this folder does not exist; a BEIR folder has corpus.jsonl"),
    "a file": ("beir/corpus.jsonl", None, "corpus.jsonl: this is not a folder; a BEIR folder has corpus.jsonl"),
    "no corpus": ("beir", "corpus.jsonl", "corpus.jsonl: this file does not exist"),
    "no queries": ("beir", "queries.jsonl", "queries.jsonl: this file does not exist"),
    "no split": ("beir:test", None, "test.tsv: this file does not exist; the splits in this folder are: dev, train"),
    "not JSON": (
        "beir",
        ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id"\n'),
        "corpus.jsonl: cannot be read as jsonl: line 2: Expecting ':' delimiter",
    ),
    "no id": ("beir", ("queries.jsonl", '{"text": "a"}\n'), "queries.jsonl, line 1: expected a JSON object with _id"),
    "text missing": (
        "beir",
        ("corpus.jsonl", '{"_id": "1", "text": null}\n'),
        "line 1: expected a JSON object with _id and text",
    ),
    "bad qrels": ("beir", ("qrels/dev.tsv", "query-id\tcorpus-id\tscore\na\t1\n"), "dev.tsv, line 2: expected query-id"),
    "other ids": ("beir", ("qrels/dev.tsv", "query-id\tcorpus-id\tscore\na\tx\t1\n"), "no query has a relevant document"),
}


@pytest.mark.parametrize("case", BAD_BEIR)
def test_bad_beir(beir, case):
    name, change, expected = BAD_BEIR[case]
    if isinstance(change, tuple):
        (beir / change[0]).write_text(change[1])
    elif change:
        (beir / change).unlink()
    assert expected in error_of(read_retrieval, str(beir.parent / name))


def test_code_search_of_a_file(tmp_path):
    rows = [
        {"docstring": "adds", "code": "a + b"},
        {"docstring": "subtracts", "code": "a - b"},
        {"docstring": "adds", "code": "sum"},
    ]
    write_jsonl(tmp_path / "code.jsonl", rows)
    retrieval = read_code_search(str(tmp_path / "code.jsonl"))
    relevant = {retrieval.queries[q]: {retrieval.corpus[d] for d in found} for q, found in retrieval.qrels.items()}
    assert relevant == {"adds": {"a + b", "sum"}, "subtracts": {"a - b"}}


def test_code_search_of_a_package():
    retrieval = read_code_search("hf_embed")
    codes = {retrieval.queries[q]: retrieval.corpus[d] for q, found in retrieval.qrels.items() for d in found}
    key = inspect.getdoc(gather_objects).split("\n\n")[0]
    assert codes[key].startswith("def gather_objects(thing") and key not in codes[key]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file, folder or installed package"),
        ('{"doc": "a", "code": "b"}\n', "found the columns doc, code; expected docstring and code"),
        ('{"docstring": "a", "code": "b"}\n{"docstring": "c", "code": null}\n', "row 2, column 'code': the text is missing"),
    ],
)
def test_bad_code_search(tmp_path, content, expected):
    path = tmp_path / "code.jsonl"
    if content:
        path.write_text(content)
    assert expected in error_of(read_code_search, str(path))


# ---- zero-shot classification ----


def test_zero_shot_is_the_nearest_label():
    texts, labels, names = [f"text {i}" for i in range(60)], [i % 4 for i in range(60)], ["one", "two", "three", "four"]
    scores = ZeroShot(texts, labels, names).score(embed)
    cosines = torch.nn.functional.cosine_similarity(embed(texts).unsqueeze(1), embed(names), dim=-1)
    predicted = cosines.argmax(1).tolist()
    assert scores["accuracy"] == pytest.approx(100 * accuracy_score(labels, predicted))
    assert scores["f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro", labels=range(4), zero_division=0))
    assert set(predicted) != {0}
    # BUG: the F1 of a label that no text has and that is not predicted, which is undefined, counted as 0.
    some = [i for i in range(60) if labels[i] != 3 and predicted[i] != 3]
    without = ZeroShot([texts[i] for i in some], [labels[i] for i in some], names).score(embed)
    expected = f1_score([labels[i] for i in some], [predicted[i] for i in some], average="macro")
    assert without["f1"] == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "card_arrival\tWhere is my card?\nlost_card\tIt is gone.\n"),
        ("a.tsv", "text\tlabel\nWhere is my card?\tcard_arrival\nIt is gone.\tlost_card\n"),
        ("a.tsv.gz", "card_arrival\tWhere is my card?\nlost_card\tIt is gone.\n"),
        ("a.jsonl", '{"label": "card_arrival", "text": "Where is my card?"}\n{"label": "lost_card", "text": "It is gone."}\n'),
    ],
)
def test_zero_shot_files(tmp_path, name, content, caplog):
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(packed)
    read = read_zero_shot(str(tmp_path / name), "this is about {label}.")
    assert read == ZeroShot(
        ["Where is my card?", "It is gone."], [0, 1], ["this is about card arrival.", "this is about lost card."]
    )  # fmt: skip
    assert not caplog.messages
    (tmp_path / "names.json").write_text('{"card_arrival": "a card on its way", "lost_card": "a card that is lost"}')
    read = read_zero_shot(str(tmp_path / name), "{label}", str(tmp_path / "names.json"))
    assert read.label_texts == ["a card on its way", "a card that is lost"]


def test_zero_shot_labels_have_their_names(tmp_path, caplog):
    kind = Features({"label": ClassLabel(names=["lost_card", "late"]), "text": Value("string")})
    Dataset.from_dict({"label": [1, 0, 1], "text": ["a", "b", "c"]}, kind).to_parquet(tmp_path / "a.parquet")
    read = read_zero_shot(str(tmp_path / "a.parquet"), "{label}")
    assert read.label_texts == ["late", "lost card"] and read.labels == [0, 1, 0]
    (tmp_path / "a.csv").write_text("intent,utterance\nlate,a\nlost,b\nlate,c\nlost,d\n")
    read_zero_shot(str(tmp_path / "a.csv"), "{label}")
    assert "the label 'intent' of the first row occurs only there; if this row is a header" in caplog.text


def test_numbers_as_labels_are_warned_of(tmp_path, caplog):
    """BUG: the datasets of mteb have numbers as labels; "this is an example of 7" was scored without a word."""
    (tmp_path / "a.tsv").write_text("7\ta\n11\tb\n7\tc\n")
    assert read_zero_shot(str(tmp_path / "a.tsv"), "{label} stars").label_texts == ["11 stars", "7 stars"]
    assert "a.tsv: the labels are numbers, such as 11, and tell a model nothing unless the template explains" in caplog.text
    caplog.clear()
    (tmp_path / "names.json").write_text('{"7": "lost", "11": "late"}')
    read_zero_shot(str(tmp_path / "a.tsv"), "{label}", str(tmp_path / "names.json"))
    assert not caplog.messages


def test_zero_shot_of_arrays():
    texts, labels, names = [f"text {i}" for i in range(9)], [0, 1, 2] * 3, ["one", "two", "three"]
    assert ZeroShot(*map(np.array, (texts, labels, names))).score(embed) == ZeroShot(texts, labels, names).score(embed)
    assert "one number for each text, and at least one" in error_of(ZeroShot, [], [], names)


@pytest.mark.parametrize(
    ("content", "template", "names", "expected"),
    [
        ("a\tx\nb\ty\n", "a text", None, "it must contain {label}"),
        ("a\tx\na\ty\n", "{label}", None, "all labels are a"),
        ("a\tx\t1\nb\ty\t2\n", "{label}", None, "found the columns a, x, 1; expected label and text"),
        ("a\tx\nb\ty\n", "{label}", '{"a": "one"}', "there is no text for the label 'b'"),
        ("a\tx\nb\ty\n", "{label}", "[", "is not JSON"),
        ("a\tx\nb\ty\n", "{label}", '["a", "b"]', "does not hold a dict"),
        ("text\tcategory\nx\ta\ny\tb\n", "{label}", None, "found the columns text, category; expected label and text"),
        ("".join(f"text {i}\ta\n" for i in range(30)), "{label}", None, "few labels occur twice"),
        ("label\ttext\na\tx\nb\t\n", "{label}", None, "row 2, column 'text': the text is empty"),
        ("a_b\tx\na b \ty\n", "is {label}", None, "two labels have the text 'is a b'"),  # BUG: the second was never predicted
        ("a\tx\nb\ty\n", "{label}", '{"a": "one", "b": "one"}', "two labels have the text 'one'"),
    ],
)
def test_bad_zero_shot(tmp_path, content, template, names, expected):
    (tmp_path / "a.tsv").write_text(content)
    (tmp_path / "names.json").write_text(names or "")
    args = (str(tmp_path / "a.tsv"), template, str(tmp_path / "names.json") if names else None)
    assert expected in error_of(read_zero_shot, *args)


# ---- all kinds of tasks together ----


def test_flags_to_scores(beir, tmp_path):
    (tmp_path / "sts.tsv").write_text("1\ta b\tc d\n2\te f\tg h\n5\ti j\tk l\n")
    (tmp_path / "z.tsv").write_text("x\ta\ny\tb\n")
    write_jsonl(tmp_path / "code.jsonl", [{"docstring": "adds", "code": "a + b"}])
    args = EvalArguments(
        eval_sts_file=[f"s={tmp_path}/sts.tsv"], eval_retrieval_dir=[f"r={beir}", f"t={beir}:train"],
        eval_zero_shot=[f"z={tmp_path}/z.tsv"], eval_code_search=[f"c={tmp_path}/code.jsonl"],
    )  # fmt: skip
    tasks = read_tasks(args)
    scores = score_tasks(tasks, embed)
    assert main_metric(tasks) == "spearman"
    assert main_metric({name: task for name, task in tasks.items() if name != "s"}) == "ndcg@10"
    assert scores["ndcg@10"] == pytest.approx(np.mean([scores[f"{name}_ndcg@10"] for name in "rtc"]))
    assert scores["accuracy"] == scores["z_accuracy"] and scores["c_mrr@10"] == 100
    assert all(set(task.reported) <= {key.removeprefix(f"{n}_") for key in scores} for n, task in tasks.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_retrieval_dir": ["r=BEIR"], "eval_code_search": ["r=hf_embed"]}, "two sets are named 'r'"),
        ({"eval_retrieval_dir": ["BEIR"]}, "give NAME=PATH"),
        ({"zero_shot_labels": ["z=names.json"]}, "no --eval_zero_shot set has this name"),
    ],
)
def test_bad_flags(beir, settings, expected):
    settings = {flag: [item.replace("BEIR", str(beir)) for item in items] for flag, items in settings.items()}
    assert expected in error_of(read_tasks, EvalArguments(**settings))


def test_a_template_without_a_set():
    wrong = EvalArguments(zero_shot_template="about {label}")
    assert "--zero_shot_template has no effect without --eval_zero_shot" in error_of(read_tasks, wrong)
