"""Tests of the mining of hard negatives.

The rules are compared with simple loops. Other tests check that files are made only once, even after a kill,
and that two ranks give the same rows.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import error_of, tiny_encoder, tokenize_rows
from datasets import Dataset, DatasetDict
from test_retrieval import embed, vector
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE, mining
from hf_embed.data.sources import read_file
from hf_embed.mining import MiningArguments, mine_hard_negatives, write_hard_negatives

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "mine_hard_negatives.py"
PAIRS = [(f"query {i % 30}", f"document {i}") for i in range(40)]  # ten queries have two answers
CORPUS = [f"text {i}" for i in range(60)] + ["document 3", "query 5"]


def mined(path, args=None, pairs=PAIRS, corpus=CORPUS, identity="m", embed=embed):
    counts = write_hard_negatives(pairs, corpus, embed, path, args or MiningArguments(relative_margin=None), identity)
    return counts, [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def cosine(a, b):
    a, b = vector(a), vector(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def candidates(query):
    """Return all texts except the query and its answers, nearest first."""
    texts = set(CORPUS) | {document for _, document in PAIRS}
    texts -= {document for q, document in PAIRS if q == query} | {query}
    return sorted(texts, key=lambda text: -cosine(query, text))


RULES = {
    "nearest": ({}, lambda s, positive, rank: True),
    "rank range": ({"range_min": 4, "range_max": 20}, lambda s, positive, rank: 4 <= rank < 20),
    "95% of the positive": ({"relative_margin": 0.05}, lambda s, positive, rank: s <= positive - 0.05 * abs(positive)),
    "absolute margin": ({"absolute_margin": 0.1}, lambda s, positive, rank: s <= positive - 0.1),
    "score range": ({"max_score": 0.3, "min_score": 0.1}, lambda s, positive, rank: 0.1 <= s <= 0.3),
    "all": ({"range_min": 1, "relative_margin": 0.01, "absolute_margin": 0.05, "max_score": 0.5},
            lambda s, positive, rank: rank >= 1 and s <= min(positive - 0.01 * abs(positive), positive - 0.05, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl.gz", "out"])
def test_a_file_that_is_not_named_as_jsonl_is_refused(tmp_path, name):
    """BUG: the lines of JSON were written to a .csv or .gz file, which no recipe could read."""
    message = error_of(mined, tmp_path / name, MiningArguments())
    assert message == f"{tmp_path / name}: the rows are written as jsonl; give a name that ends in .jsonl"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", RULES)
def test_rules(tmp_path, case):
    settings, passes = RULES[case]
    args = MiningArguments(**({"relative_margin": None, "num_negatives": 4} | settings))
    counts, rows = mined(tmp_path / "out.jsonl", args)
    for (query, document), row in zip(PAIRS, rows, strict=True):
        near = candidates(query)[: args.range_max]
        positive = cosine(query, document)
        expected = [text for rank, text in enumerate(near) if passes(cosine(query, text), positive, rank)]
        assert row == {"query": query, "positive": document, "negatives": expected[:4]}
    assert counts["rows"] == 40 and counts["negatives"] == sum(len(row["negatives"]) for row in rows)
    assert counts["fewer"] == sum(len(row["negatives"]) < 4 for row in rows)
    assert {rule for rule in counts if counts[rule]} - {"rows", "negatives", "fewer"} == set(settings) - {
        "range_max"
    } or case == "all"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl"]


def test_random_choice_follows_the_rules_and_is_reproducible(tmp_path):
    args = MiningArguments(num_negatives=3, range_max=12, relative_margin=None, sampling_strategy="random")
    _, rows = mined(tmp_path / "a.jsonl", args)
    assert mined(tmp_path / "b.jsonl", args)[1] == rows
    for row in rows:
        assert len(set(row["negatives"])) == 3 and set(row["negatives"]) <= set(candidates(row["query"])[:12])
    assert rows != mined(tmp_path / "c.jsonl", MiningArguments(num_negatives=3, range_max=12, relative_margin=None))[1]
    args.seed += 1
    assert rows != mined(tmp_path / "d.jsonl", args)[1]


def test_faiss_finds_the_same(tmp_path):
    pytest.importorskip("faiss")
    _, plain = mined(tmp_path / "a.jsonl")
    _, faiss = mined(tmp_path / "b.jsonl", MiningArguments(relative_margin=None, use_faiss=True))
    assert plain == faiss


def test_missing_faiss_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = error_of(mined, tmp_path / "a.jsonl", MiningArguments(use_faiss=True))
    assert "requires the package faiss-cpu" in message and not os.listdir(tmp_path)


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    """Stop runs after each shard and each block in turn. No run encodes a text again."""
    monkeypatch.setattr(mining, "SHARD", 16)
    monkeypatch.setattr(mining, "BLOCK", 8)
    _, expected = mined(tmp_path / "whole.jsonl")
    texts_seen = Counter()

    class Stop(Exception):
        pass

    def counting(texts, prompt_name=None):
        if not allowed_left[0]:
            raise Stop
        allowed_left[0] -= 1
        texts_seen.update((prompt_name, text) for text in texts)
        return embed(texts)

    replace = mining.json.dumps

    def writing(content, **kwargs):
        if isinstance(content, dict) and "counts" in content:
            if not allowed_left[0]:
                raise Stop
            allowed_left[0] -= 1
        return replace(content, **kwargs)

    monkeypatch.setattr(mining.json, "dumps", writing)
    path, stops = tmp_path / "out.jsonl", 0
    while True:
        allowed_left = [1]  # each run makes one shard or block
        try:
            _, rows = mined(path, embed=counting)
            break
        except Stop:
            stops += 1
            assert not path.exists()
    shards = 2 + 7  # of the queries and of the documents
    blocks = 5
    assert stops == shards + blocks - 1
    assert rows == expected and set(texts_seen.values()) == {1}


def test_work_of_another_model_or_other_texts_is_not_reused(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    path = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mining.Rows, "write", stop)
        mined(path)
    for change in ({"identity": "another"}, {"pairs": PAIRS[:-1]}, {"corpus": CORPUS[1:]}):
        assert "belongs to a run with another model or other texts" in error_of(mined, path, **change)
    # A run with other rules reuses the vectors, but not the rows.
    _, rows = mined(path, MiningArguments(range_min=5, relative_margin=None))
    assert rows[0]["negatives"] == candidates("query 0")[5:8]
    # Nor does it reuse the output of a run that was killed before it could remove its work.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mining.shutil, "rmtree", stop)
        mined(tmp_path / "killed.jsonl")
    assert "already exists" in error_of(mined, tmp_path / "killed.jsonl", MiningArguments(num_negatives=5))
    assert mined(tmp_path / "killed.jsonl")[0]["rows"] == len(PAIRS)


def test_an_empty_text_is_no_negative(tmp_path):
    """BUG: an empty text was mined, and then the recipes refused the file."""
    _, plain = mined(tmp_path / "plain.jsonl")
    _, rows = mined(tmp_path / "out.jsonl", corpus=[*CORPUS, "", " ", None])
    assert rows == plain


def test_output_is_read_by_the_recipes(tmp_path, tokenizer):
    _, rows = mined(tmp_path / "out.jsonl", MiningArguments(max_score=0.45, range_max=6, relative_margin=None))
    assert len({len(row["negatives"]) for row in rows}) > 1  # rows may have fewer negatives than others
    tokens = tokenize_rows(read_file(str(tmp_path / "out.jsonl")), tokenizer, 16)
    assert [len(ids) for ids in tokens["text_ids"]] == [2 + len(row["negatives"]) for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": 0}, "at least 1"),
        ({"range_min": 8, "range_max": 10, "num_negatives": 3}, "ranks 8 to 10 have no room for 3 negatives"),
        ({"range_min": -1}, "no room"),
    ],
)
def test_bad_settings(settings, message):
    assert message in error_of(MiningArguments, **settings)


def test_nothing_to_choose_from(tmp_path):
    assert "there are 1 document(s), too few to choose" in error_of(mined, tmp_path / "a.jsonl", pairs=[("a", "b")], corpus=[])
    assert "test_mining.py' is a file, but each string" in error_of(
        mined, tmp_path / "a.jsonl", corpus=__file__
    )  # BUG: a negative
    (tmp_path / "a.jsonl").write_text("mine")
    assert "a.jsonl already exists" in error_of(mined, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


# ---- the recipe ----


@pytest.fixture
def files(tmp_path):
    tiny_encoder(normalize=True).save_pretrained(tmp_path / "model", verify=False)
    rng, words = random.Random(0), WORDS
    rows = [{"query": " ".join(rng.choices(words, k=3)), "positive": " ".join(rng.choices(words, k=6))} for _ in range(300)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(files, output, *more, launch=()):
    return [sys.executable, *launch, str(RECIPE), "--model_name_or_path", str(files / "model"), "--train_file",
            str(files / "pairs.jsonl"), "--output_file", str(files / output), *more]  # fmt: skip


def run(words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SMALL_FILES = "import runpy, sys; from hf_embed import mining; mining.SHARD, mining.BLOCK = 32, 8; del sys.argv[0]; sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501


def test_recipe_does_not_reuse_vectors_of_a_model_that_has_changed(files, monkeypatch):
    """BUG: the identity of the model was only the name of its folder."""
    monkeypatch.syspath_prepend(RECIPE.parent)
    recipe = __import__("mine_hard_negatives")
    monkeypatch.setattr(sys, "argv", command(files, "out.jsonl")[1:])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mining, "searcher", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        recipe.main()
    tiny_encoder(normalize=True, seed=1).save_pretrained(files / "model", verify=False)
    assert "belongs to a run with another model" in error_of(recipe.main)


@pytest.mark.slow
def test_recipe_on_one_and_two_ranks_and_after_a_kill(files):
    out = run(command(files, "one.jsonl"))
    assert "300 rows with" in out and "left out by relative_margin" in out
    expected = (files / "one.jsonl").read_text()
    assert expected.count("\n") == 300

    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu_2.yaml")]
    run(command(files, "two.jsonl", launch=launch))
    assert (files / "two.jsonl").read_text() == expected

    words = command(files, "killed.jsonl", launch=("-c", SMALL_FILES))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work, deadline = files / "killed.jsonl.work", time.time() + 120
    while not list(work.glob("rows-*/000002.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert work.exists() and not (files / "killed.jsonl").exists()
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    assert len(made) > 10
    run(words)
    assert (files / "killed.jsonl").read_text() == expected and not work.exists()


@pytest.mark.slow
def test_recipe_reads_a_retrieval_folder(files):
    folder = files / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = {"corpus": ["the cat", "a dog", "much rain", "one house"], "queries": ["cat", "dog"]}
    for name, lines in texts.items():
        rows = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(lines)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t1\nq1\tc1\t1\n")
    (files / "more.txt").write_text("the river\nsome bread\n")
    words = command(files, "out.jsonl", "--retrieval_dir", str(folder), "--corpus_file", str(files / "more.txt"),
                    "--relative_margin", "-9", "--num_negatives", "5", "--range_max", "5")  # fmt: skip
    at = words.index("--train_file")
    run(words[:at] + words[at + 2 :])
    rows = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert [(row["query"], row["positive"]) for row in rows] == [("cat", "the cat"), ("dog", "a dog")]
    assert set(rows[0]["negatives"]) == {"a dog", "much rain", "one house", "the river", "some bread"}


@pytest.mark.slow
def test_recipe_says_what_is_missing(files):
    words = command(files, "out.jsonl", "--retrieval_dir", "x")
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "needed; give either --train_file FILE or --retrieval_dir DIR" in done.stderr


def test_vectors_of_mined_texts_are_unit(tmp_path):
    paths = mining.encode_shards(["a", "b"], embed, "query", tmp_path)
    assert torch.allclose(mining.read_vectors(paths, [1, 0]).norm(dim=1), torch.ones(2))


# ---- the public function ----


def rows_of_words(count=40):
    rng = random.Random(0)
    return [{"query": " ".join(rng.choices(WORDS, k=3)), "positive": " ".join(rng.choices(WORDS, k=6))} for _ in range(count)]


def test_a_dataset_gets_negatives_and_trains(tmp_path):
    encoder, rows = tiny_encoder(prompts={"query": "search: "}), rows_of_words()
    table = mine_hard_negatives(Dataset.from_list(rows), encoder, num_negatives=5, relative_margin=None)
    assert table.column_names == ["query", "positive", "negatives"] and len(table) == 40
    queries, documents = encoder.encode_query(table["query"]), encoder.encode_document(table["positive"])
    cosines = encoder.similarity(queries, documents).numpy()
    for number, row in enumerate(table):
        others = [i for i in np.argsort(-cosines[number]) if rows[i]["query"] != row["query"]]  # one query occurs twice
        nearest = [rows[i]["positive"] for i in others]
        assert row["negatives"] == nearest[:5] and row["query"] == rows[number]["query"]
    settings = ContrastiveTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[]
    )
    trainer = ContrastiveTrainer(model=encoder, args=settings, objective=SimCSE(), train_dataset=table)
    assert trainer.train().training_loss > 0


def test_negatives_that_are_there_already_are_named(caplog):
    rows = [row | {"negative": "a wrong text"} for row in rows_of_words(9)]
    table = mine_hard_negatives(rows, tiny_encoder(), num_negatives=1, relative_margin=None)
    assert "a wrong text" not in sum(table["negatives"], [])
    assert "dataset: the negatives in negative are not used, only the pairs" in caplog.text


def test_rules_columns_corpus_and_file_of_the_public_function(tmp_path):
    encoder, rows = tiny_encoder(), rows_of_words()
    named = [{"id": 1, "ask": row["query"], "say": row["positive"]} for row in rows]
    columns = {"anchor_column_name": "ask", "positive_column_name": "say"}
    rules = {"num_negatives": 2, "sampling_strategy": "random", "relative_margin": 0.01, "range_max": 20}
    table = mine_hard_negatives(named, encoder, ["a text of its own"], tmp_path / "mined.jsonl", **columns, **rules)
    assert table.column_names == ["ask", "say", "negatives"]
    written = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["negatives"] for row in written] == list(table["negatives"])
    frame = pandas.DataFrame(named, index=range(9, 49))
    assert mine_hard_negatives(frame, encoder, ["a text of its own"], **columns, **rules)[:] == table[:]
    few = mine_hard_negatives(Dataset.from_list(rows[:2]), encoder, ["line\u2028separator"], relative_margin=None)
    assert sorted(few[0]["negatives"]) == sorted([rows[1]["positive"], "line\u2028separator"])  # two, not three


def test_what_the_public_function_refuses(tmp_path):
    encoder, rows = tiny_encoder(), rows_of_words(4)
    with pytest.raises(TypeError, match="no argument 'margin'; the rules are absolute_margin, "):
        mine_hard_negatives(rows, encoder, margin=0.1)
    assert "at least 1" in error_of(mine_hard_negatives, rows, encoder, num_negatives=0)
    assert "dataset, row 5, column 'query': the text is empty" in error_of(
        mine_hard_negatives, [*rows, {"query": " ", "positive": "a"}], encoder
    )
    assert "found the columns left, right" in error_of(mine_hard_negatives, [{"left": "a", "right": "b"}], encoder)
    splits = DatasetDict({"train": Dataset.from_list(rows)})
    assert "choose one of its splits, train" in error_of(mine_hard_negatives, splits, encoder)
    assert "pairs.csv: this file does not exist" in error_of(mine_hard_negatives, "pairs.csv", encoder)
    assert "give a datasets.Dataset, a pandas DataFrame" in error_of(mine_hard_negatives, 3, encoder)
    assert "there is no column 'ask'" in error_of(mine_hard_negatives, rows, encoder, anchor_column_name="ask")
