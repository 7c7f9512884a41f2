"""Tests of the temperature search, compared with scores of one temperature at a time, and of the recipe tempscale.py."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, tiny_encoder
from datasets import Dataset
from test_collapse import TEXTS
from test_tempscale import SMALL
from transformers import AutoModel

from hf_embed import Encoder, InputError, Retrieval, ZeroShot
from hf_embed.checkpoint.tables import sweep_table
from hf_embed.evaluation.sts import STS
from hf_embed.kit.calibrate import halves, part_scores, plot_sweep, sweep
from hf_embed.kit.models import embed_with
from hf_embed.tempscale import tempscale

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden", "train", "letter"]


@pytest.fixture
def encoder():
    """Return an encoder whose attention is far from uniform, so that a temperature changes its scores."""
    encoder = tiny_encoder()
    torch.manual_seed(1)
    for layer in encoder.base.encoder.layer:
        torch.nn.init.normal_(layer.attention.self.query.weight)
        torch.nn.init.normal_(layer.attention.self.key.weight)
    return encoder


@pytest.fixture
def search():
    corpus = {
        f"d{i}": f"{a} and {b} or {WORDS[i % 7]}" + " or" * (i % 5)
        for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:4])
    }
    queries = {f"q{i}": f"{a} {WORDS[i]}" for i, a in enumerate(WORDS[::-1])}
    return Retrieval(queries, corpus, {f"q{i}": {f"d{3 * i}": 1, f"d{4 * i}": 1} for i in range(12)})


@pytest.fixture
def sts():
    pairs = zip(WORDS, WORDS[3:] + WORDS[:3])
    rows = [{"sentence1": f"the {a}", "sentence2": f"a {b} {a}", "score": i % 5} for i, (a, b) in enumerate(pairs)]
    return STS(Dataset.from_list(rows))


def test_scores_of_folds(encoder, search, sts):
    embed = embed_with(encoder)
    fold = np.random.default_rng(0).permutation(12) % 3
    got = part_scores(search, embed, 3)
    assert got[0] == pytest.approx(search.score(embed)["ndcg@10"])
    for f in range(3):
        for place, chosen in ((1 + f, fold != f), (4 + f, fold == f)):
            part = dataclasses.replace(search, qrels={q: d for c, (q, d) in zip(chosen, search.qrels.items()) if c})
            assert got[place] == pytest.approx(part.score(embed)["ndcg@10"])
    relevant = [sum(len(search.corpus[d].split()) for d in found) / len(found) for found in search.qrels.values()]
    for third, score in zip((slice(0, 4), slice(4, 8), slice(8, 12)), got[-3:]):
        queries = sorted(range(12), key=lambda i: relevant[i])[third]
        part = dataclasses.replace(search, qrels={q: d for i, (q, d) in enumerate(search.qrels.items()) if i in queries})
        assert score == pytest.approx(part.score(embed)["ndcg@10"])
    got = part_scores(sts, embed, 3)
    assert got[0] == pytest.approx(sts.score(embed)["spearman"])
    assert np.isnan(got[-3:]).all()
    assert got[4] == pytest.approx(STS(sts.rows.select(np.flatnonzero(fold == 0))).score(embed)["spearman"])
    with pytest.raises(InputError, match="12 queries are too few for 7 folds"):
        part_scores(search, embed, 7)
    with pytest.raises(InputError, match="not on zero_shot"):
        part_scores(ZeroShot(["a", "b"], [0, 1], ["a", "b"]), embed, 2)


def test_a_fold_of_equal_scores_is_refused(encoder):
    rows = [{"sentence1": f"the {a}", "sentence2": f"a {a}", "score": int(i == 3)} for i, a in enumerate(WORDS)]
    with pytest.raises(InputError, match="with 12 pairs and 3 folds, all pairs of one fold have the same score"):
        part_scores(STS(Dataset.from_list(rows)), embed_with(encoder), 3)


def test_sweep_against_one_temperature_at_a_time(encoder, search, sts, tmp_path):
    embed, tasks = embed_with(encoder), {"r": search, "s": sts}
    before = encoder.encode(TEXTS)
    grid, expected = [0.3, 0.6, 1.0, 1.5], {}
    result = sweep(encoder.backbone, embed, tasks, grid, parts=3)
    assert np.array_equal(encoder.encode(TEXTS), before)  # the search leaves the model unchanged
    curve = {row["temperature"]: row["mean"] for row in result["curve"]}
    for t in curve:
        with tempscale(encoder.backbone, t):
            expected[t] = np.mean([part_scores(task, embed, 3) for task in tasks.values()], axis=0)
    assert curve == pytest.approx({t: s[0] for t, s in expected.items()})
    best_of_grid = max(grid, key=lambda t: (expected[t][0], -abs(t - 1)))
    assert set(curve) == {*grid, round(best_of_grid - 0.05, 4), round(best_of_grid + 0.05, 4)}
    best = max(expected, key=lambda t: (expected[t][0], -abs(t - 1)))
    assert result["temperature"] == best and result["gain"] == pytest.approx(expected[best][0] - expected[1.0][0])
    held_out = []
    for f in range(3):
        chosen = max(expected, key=lambda t: (expected[t][1 + f], -abs(t - 1)))
        assert result["fold_temperatures"][f] == chosen
        held_out.append(expected[chosen][4 + f] - expected[1.0][4 + f])
    assert result["cross_validated_gain"] == pytest.approx(np.mean(held_out))
    assert result["gain"] != pytest.approx(result["cross_validated_gain"])  # otherwise the test could not tell them apart
    assert sum("*" in line for line in sweep_table(result)) == 1
    assert sweep_table(result)[0].startswith("nDCG@10 x 100 (of an STS set: Spearman x 100)")
    assert [row["words"] for row in result["by_length"]] == [[5, 6], [6, 8], [8, 8]]  # only the retrieval set has these rows
    for key, t in (("before", 1.0), ("after", best)):
        with tempscale(encoder.backbone, t):
            assert [row[key] for row in result["by_length"]] == pytest.approx(part_scores(search, embed, 3)[-3:])
    assert sweep_table({key: value for key, value in result.items() if key != "by_length"}) == sweep_table(result)[:-5]
    assert sweep_table(result)[-1].endswith(f"{result['by_length'][-1]['after'] - result['by_length'][-1]['before']:+.2f}")
    plot_sweep(result, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_halves():
    task = halves(["a b c d e", "one two three four", "one two three four", "short"], least=4)
    assert task.queries == {"q0": "a b", "q1": "one two"} and task.corpus == {"d0": "c d e", "d1": "three four"}
    assert task.qrels == {"q0": {"d0": 1}, "q1": {"d1": 1}}
    with pytest.raises(InputError, match=r"only 1 text\(s\) have 20 words or more"):
        halves(["word " * 30, "short"])


@pytest.fixture
def run(tmp_path, monkeypatch, encoder):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    monkeypatch.chdir(tmp_path)
    encoder.save_pretrained("model", verify=False)
    Path("texts.txt").write_text("\n".join(TEXTS * 2) + "\n")
    recipe = __import__("tempscale")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tempscale.py", *words])
        return recipe.main()

    return run


def test_recipe_searches_and_folds(run, capsys, encoder):
    run("model", "--texts", "texts.txt", "--grid", "0.3", "0.6", "--folds", "2")
    out = capsys.readouterr().out
    assert "halves" in out and "on queries that did not (2 folds)" in out and "saved to outputs/tempscale" in out
    folder = Path("outputs/tempscale")
    result = json.loads((folder / "results.json").read_text())["tempscale"]
    assert {0.3, 0.6, 1.0} < {row["temperature"] for row in result["curve"]}
    card = (folder / "README.md").read_text()
    assert "## Temperature search" in card
    for line in sweep_table(result):
        assert line in out and line in card
    assert (folder / "tempscale.png").exists()
    loaded = Encoder.from_pretrained(folder)
    with tempscale(encoder.backbone, result["temperature"]):
        expected = encoder.encode(TEXTS)
    assert np.abs(loaded.encode(TEXTS) - expected).max() < 1e-5 * np.abs(expected).max()
    assert "holds files" in error_of(run, "model", "--texts", "texts.txt")


def test_recipe_with_a_given_temperature(run, encoder):
    run("model", "--temperature", "0.5", "--output_dir", "out")
    assert AutoModel.from_pretrained("out").config.temp_scale["temperature"] == 0.5
    assert "Temperature search" not in Path("out", "README.md").read_text()
    train = {"model": "m", "data": "d", "rows": 3, "objective": {"name": "SimCSE"}, "batch_size": 2, "steps": 1, "seed": 1,
             "seconds": 1.0, "versions": {}}  # fmt: skip
    scores = {"sts": {"s": 77.77}}
    results = {"train": train, "before": scores, "after": scores, "mteb": []}
    Path("model", "results.json").write_text(json.dumps(results))
    Path("out", "results.json").write_text(json.dumps(results))
    run("model", "--temperature", "0.5", "--output_dir", "out", "--overwrite_output_dir")
    # Only the record of the training is kept, because the scores belong to the model without the temperature.
    assert json.loads(Path("out", "results.json").read_text()) == {"train": train}
    assert "77.77" not in Path("out", "README.md").read_text() and "## Training" in Path("out", "README.md").read_text()
    assert "the model's own folder" in error_of(run, "model", "--temperature", "0.5", "--output_dir", "model")
    assert "already" in error_of(run, "out", "--temperature", "0.9", "--output_dir", "twice")
    assert not Path("twice").exists()


def test_recipe_searches_on_pairs(run, capsys):
    rows = [{"anchor": text, "positive": f"{text} {text}"} for text in TEXTS[:8]] + [{"anchor": TEXTS[0], "positive": "again"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "--max_texts has no effect" in error_of(run, "model", "--pairs", "pairs.jsonl", "--max_texts", "5")
    run("model", "--pairs", "pairs.jsonl", "--grid", "0.5", "--folds", "2")
    found = Path("outputs/tempscale/results.json").read_text()
    curve = json.loads(found)["tempscale"]["curve"]
    assert [row["temperature"] for row in curve] == [0.5, 1.0] and 0 < curve[0]["pairs"] <= 100
    # BUG: messages about the columns of --pairs advised flags that the recipe did not have.
    other = [{"Frage": row["anchor"], "Antwort": row["positive"], "label": 1} for row in rows]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    named = ["--columns", "anchor=Frage", "positive=Antwort", "--ignore_columns", "label"]
    run("model", "--pairs", "other.jsonl", *named, "--grid", "0.5", "--folds", "2", "--overwrite_output_dir")
    assert json.loads(Path("outputs/tempscale/results.json").read_text())["tempscale"]["curve"] == curve
    assert "--columns has no effect without --pairs; give --pairs FILE" in error_of(run, "model", *named[:3])


def test_a_model_that_cannot_be_folded_is_refused_before_the_search(run):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.for_model("ernie", **SMALL | {"vocab_size": 12000})
    AutoModel.from_config(config).save_pretrained("ernie")
    AutoTokenizer.from_pretrained("model").save_pretrained("ernie")
    error = error_of(run, "ernie", "--texts", "texts.txt")
    assert "it is unknown which weights compute the queries of ErnieSelfAttention" in error and not Path("outputs").exists()


def test_recipe_says_what_is_wrong(run):
    for words, message in (
        (["--temperature", "0"], "temperature is 0"), (["--grid", "0.9", "nan"], "temperature is nan"),
        (["--folds", "1"], "at least 2"), (["--temperature", "0.9", "--texts", "texts.txt"], "is given; remove one of them"),
        (["--texts", "absent.txt"], "absent.txt: this file does not exist"),
        (["--temperature", "0.9", "--folds", "3"], "--folds has no effect with --temperature"),
        (["--temperature", "0.9", "--grid", "0.5"], "--grid has no effect with --temperature"),
        (["--temperature", "0.9", "--max_texts", "5"], "--max_texts has no effect without --texts"),
        (["--texts", "texts.txt", "--eval_code_search", "halves=json"], "--texts: two sets are named 'halves'"),
        (["--eval_code_search", "mean=json"], "evaluation set 'mean': another column of the results has this name"),
    ):  # fmt: skip
        assert message in error_of(run, "model", *words)
