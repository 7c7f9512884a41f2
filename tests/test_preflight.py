"""The preflight: each number is compared with a plain loop. Also the recipe, and `--preflight` of the training recipes."""

import csv
import itertools
import json
import math
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from conftest import error_of, tokenize_rows
from datasets import Dataset, IterableDataset
from test_recipes import QUIET, RECIPES, load_recipe

from hf_embed import ContrastiveTrainingArguments, CoSENT, Encoder, ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.data.columns import text_columns
from hf_embed.data.mixture import Source, make_mixture
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import rows_by_positive
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.pair_classification import PairClassification
from hf_embed.evaluation.reranking import Reranking
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.triplets import Triplets
from hf_embed.evaluation.zero_shot import ZeroShot
from hf_embed.kit.content import content_hash
from hf_embed.kit.false_negatives import guessing
from hf_embed.kit.plan import QUICKSTART
from hf_embed.kit.preflight_report import lines, preflight
from hf_embed.kit.preflight_source import Settings
from hf_embed.kit.similar import jaccard, similar_pairs

RECIPE = load_recipe("preflight")


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(str(QUICKSTART / "encoder"), max_length=8)


def report_of(rows: list[dict] | Dataset, encoder: Encoder, tasks: dict | None = None, paired=None, **settings) -> dict:
    """Return the report of a single source named 'mine'."""
    table = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return preflight([(Source("mine", table), "mine", paired)], encoder, Settings(**settings), tasks or {})


def test_dates_that_python_cannot_represent_are_not_read(encoder):
    """BUG: an unused column with a date before the year 1 ended a training and its preflight in a traceback."""
    days = pyarrow.array([-(10**7), 0], pyarrow.int32()).cast(pyarrow.date32())
    more = [{"day": day} for day in days]
    rows = Dataset(pyarrow.table({"anchor": ["a", "b"], "positive": ["c", "d"], "day": days, "more": more}))
    assert len(tokenize_rows(rows, encoder.tokenizer, 8)) == 2
    assert report_of(rows, encoder)["sources"]["mine"]["rows"] == 2
    assert content_hash(rows) != content_hash(rows.select([0]))


# ---- the plain loops that the preflight is compared with ----


def plain(text: str) -> str:
    """Return the words of a text in lower case. If the text has no words, return it stripped and in lower case."""
    lower = unicodedata.normalize("NFKC", text).lower()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in lower)
    return " ".join(words.split()) or lower.strip()


def flattened(rows: list[dict], columns: list[str]) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """Make the training rows of a table.

    Returns:
        (number of the table row, texts) for each training row, and the numbers of the table rows that have an empty text.
    """
    made, empty = [], []
    for number, row in enumerate(rows):
        try:
            made += [(number, texts) for texts, _ in rows_by_positive(row, columns, "x")]
        except InputError:
            empty.append(number)
    return made, empty


def counted(rows: list[tuple[int, list[str]]]) -> dict[str, list[int]]:
    """Find the rows with each kind of problem. A table row is listed once for each of its training rows that has the problem.

    Returns:
        the numbers of the table rows, from 1, for each kind of problem.
    """
    found: dict[str, list[int]] = {name: [] for name in (
        "duplicates", "near_duplicates", "positive_is_anchor", "negative_is_positive", "negative_is_anchor"
    )}  # fmt: skip
    seen, seen_plain = set(), set()
    for number, texts in rows:
        whole = (*texts[:2], tuple(sorted(texts[2:])))
        words = [plain(text) for text in texts]
        whole_plain = (*words[:2], tuple(sorted(words[2:])))
        if whole in seen:
            found["duplicates"].append(number + 1)
        elif whole_plain in seen_plain:
            found["near_duplicates"].append(number + 1)
        seen.add(whole)
        seen_plain.add(whole_plain)
        if len(texts) > 1 and words[0] == words[1]:
            found["positive_is_anchor"].append(number + 1)
        if len(texts) > 1 and words[1] in words[2:]:
            found["negative_is_positive"].append(number + 1)
        if len(texts) > 1 and words[0] in words[2:]:
            found["negative_is_anchor"].append(number + 1)
    return found


def pairs_in_all_rows(rows: list[list[str]], same) -> tuple[int, int]:
    """Count the pairs of a row and a candidate of another row that is a false negative of the row.

    Args:
        rows: the texts of each training row.
        same: a function that returns True if two texts are equal.

    Returns:
        Two counts. In the first, the candidate equals the row's anchor or positive. In the second, the candidate is another
        text, and its anchor equals the row's anchor or positive.
    """
    equal = answers = 0
    for i, j in itertools.permutations(range(len(rows)), 2):
        own = rows[i][:2]
        other = rows[j] if len(rows[j]) > 1 else rows[j] * 2
        equal += sum(any(same(text, mine) for mine in own) for text in other[1:])
        is_own = any(same(other[1], mine) for mine in own)
        answers += not is_own and any(same(other[0], mine) for mine in own)
    return equal, answers


WORDS = [
    "a cat",
    "A cat",
    "a cat!",
    "the dog",
    "The  dog",
    "caf\u00e9",
    "cafe\u0301",
    "one bird",
    "!!!",
    "two",
    "ａ cat",
    "???",
]


def table_of(shape: str, seed: int) -> list[dict]:
    """Return rows of random texts. Some of the texts are similar or equal, and some are empty."""
    draw = random.Random(seed)

    def text(empty: float = 0.03):
        return draw.choice(["", "  ", None]) if draw.random() < empty else draw.choice(WORDS)

    rows = []
    for _ in range(60):
        row = {"text": text()} if shape == "single" else {"anchor": text(), "positive": text()}
        if shape == "triplets":
            row |= {"negative": draw.choice([text(0), None]), "negative_2": text(0)}
        if shape == "positives":
            row |= {"positive": [text(0.01) for _ in range(draw.randint(0, 3) or 1)]}
            row |= {"negatives": [text(0.01) for _ in range(draw.randint(0, 3))]}
        if shape == "lists":
            row |= {"neg": draw.choice([None, [], [text(0)], [text(0), text(0.1)]])}
        rows.append(row)
    rows[7]["text" if shape == "single" else "anchor"] = " \u3000"
    if shape == "positives":
        rows[3]["positive"] = []
    return rows


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", ["single", "pairs", "triplets", "positives", "lists"])
def test_counts_are_those_of_a_loop(encoder, shape, seed):
    rows = table_of(shape, seed)
    columns = text_columns(list(rows[0]), "x")
    made, empty = flattened(rows, columns)
    report = report_of(rows, encoder, batches=(5, 100))
    source, total = report["sources"]["mine"], report["total"]
    assert source["rows"] == len(rows) == total["rows"]
    assert source["training_rows"] == len(made)
    assert source["texts"] == sum(len(texts) for _, texts in made) == total["texts"]
    assert source["empty"] == {"count": len(empty), "rows": [number + 1 for number in empty[:5]]} and empty
    assert source["repeated_anchors"] == len(made) - len({texts[0] for _, texts in made})
    assert math.isclose(source["negatives_per_row"], sum(len(t) - 2 for _, t in made if len(t) > 1) / len(made), abs_tol=1e-4)
    for name, numbers in counted(made).items():
        if len(columns) > 1 or name.endswith("duplicates"):
            assert source[name] == {"count": len(numbers), "rows": numbers[:5]}, name
            assert total[name] == len(numbers)
            assert numbers or (shape != "triplets" and "negative" in name) or name == "duplicates", (
                name
            )  # the table has this problem
    # The false negatives in a batch: texts with equal tokens and words (`equal`), and with equal words only (`near`).
    tokenizer = encoder.tokenizer
    ids = {text: tuple(tokenizer(text, truncation=True, max_length=8)["input_ids"]) for text in WORDS}
    texts = [own for _, own in made]
    equal, answers = pairs_in_all_rows(texts, lambda a, b: ids[a] == ids[b] and plain(a) == plain(b))
    alike, _ = pairs_in_all_rows(texts, lambda a, b: plain(a) == plain(b))
    for batch, found in zip((5, 100), source["batches"], strict=True):
        size = min(batch, len(texts))
        factor = size * (size - 1) / (len(texts) * (len(texts) - 1))
        assert found["batch"] == batch
        assert found["equal"] == pytest.approx(equal * factor, abs=1e-6)
        assert found["answers"] == pytest.approx(answers * factor, abs=1e-6)
        assert found["near"] == pytest.approx((alike - equal) * factor, abs=1e-6)
        assert alike > equal > 0


def test_the_mean_over_all_batches(encoder):
    """The expected numbers of a random batch are the means over all possible batches."""
    rows = [{"anchor": a, "positive": p} for a, p in [("a", "b"), ("a", "c"), ("d", "b"), ("e", "f"), ("b", "g")]]
    found = report_of(rows, encoder, batches=(3,))["sources"]["mine"]["batches"][0]
    texts = [list(row.values()) for row in rows]
    batches = [pairs_in_all_rows(list(batch), str.__eq__) for batch in itertools.combinations(texts, 3)]
    assert found["equal"] == pytest.approx(np.mean([equal for equal, _ in batches]), abs=1e-6) and found["equal"] > 0
    assert found["answers"] == pytest.approx(np.mean([answers for _, answers in batches]), abs=1e-6) and found["answers"] > 0


def test_what_the_model_takes_for_equal(encoder):
    """An uncased tokenizer gives the same tokens to texts that differ in case and spaces, and the loss masks such texts.

    Texts that differ in punctuation have different tokens, so they stay false negatives.
    """
    rows = [
        {"anchor": "q one", "positive": "A Cat"},
        {"anchor": "q two", "positive": "a  cat"},
        {"anchor": "q 3", "positive": "dog"},
    ]
    found = report_of(rows, encoder, batches=(3,))["sources"]["mine"]["batches"][0]
    assert (found["equal"], found["near"]) == (2, 0)
    rows[1]["positive"] = "a cat!"
    report = report_of(rows, encoder, batches=(3,))
    found = report["sources"]["mine"]["batches"][0]
    assert (found["equal"], found["near"]) == (0, 2)
    (finding,) = [each for each in report["findings"] if each["code"] == "false_negatives"]
    assert finding["count"] == 2 and finding["text"] == "right answers that are trained on as negatives in a batch of 3: 2.00"


def test_other_answers_count_where_the_loss_keeps_them(encoder):
    rows = [{"anchor": "q", "positive": "one"}, {"anchor": "q", "positive": "two"}, {"anchor": "r", "positive": "three"}]
    for masks, codes in ((True, []), (False, ["false_negatives"])):
        report = report_of(rows, encoder, batches=(3,), masks_answers=masks)
        assert report["sources"]["mine"]["batches"][0]["answers"] == 2
        assert [each["code"] for each in report["findings"]] == codes


@pytest.mark.parametrize("batch", [2, 64, 1000])
def test_the_loss_of_guessing(batch):
    """The loss of guessing is the logarithm of the number of candidates."""
    improved, query_to_doc = ImprovedContrastive(), ImprovedContrastive(directions=("query_to_doc",))
    both = ImprovedContrastive(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    for objective, negatives, candidates in (
        (SimCSE(), 0, batch), (SimCSE(), 1, 2 * batch), (SimCSE(temperature=1.0), 3, 4 * batch),
        (improved, 0, batch + (batch - 1) + batch + (batch - 1)),
        (improved, 1, 2 * batch + (batch - 1) + batch + (2 * batch - 1)),
        (ImprovedContrastive(margin=0.1), 0, 4 * batch - 2), (query_to_doc, 1, 2 * batch), (both, 0, batch),
    ):  # fmt: skip
        assert guessing(objective, batch, negatives) == pytest.approx(math.log(candidates), abs=1e-5), objective
    assert guessing(SimCSE(), batch, 0.5) == pytest.approx(math.log(batch + round(batch / 2)), abs=1e-5)
    twice = Matryoshka(SimCSE(), (768, 64), (1.0, 0.5))
    assert guessing(twice, batch, 0) == pytest.approx(1.5 * math.log(batch), abs=1e-5)
    weighted = math.log(batch + batch - 1 + math.e)  # a row's own negative has the weight e
    assert guessing(SimCSE(hard_negative_weight=1.0), batch, 1) == pytest.approx(weighted, abs=1e-5)


# ---- the sample ----


def test_lengths_are_those_of_the_tokenizer():
    plain_encoder = Encoder.from_pretrained(str(QUICKSTART / "encoder"))
    prompts = {"query": "query: ", "document": "text "}
    encoder = Encoder(plain_encoder.backbone, plain_encoder.tokenizer, max_length=8, prompts=prompts)
    rows = [
        {"anchor": "cat " * n, "positive": "a dog " * (n % 4 + 1), "negative": "x" if n % 2 else None} for n in range(1, 21)
    ]
    sample = report_of(rows, encoder, sample=0)["sources"]["mine"]["sample"]
    sides = {
        "anchor": ["query: " + row["anchor"] for row in rows], "positive": ["text " + row["positive"] for row in rows],
        "negative": ["text " + row["negative"] for row in rows if row["negative"]],
    }  # fmt: skip
    sides["all"] = [text for side in sides.values() for text in side]
    assert sample["rows"] == 20 and sample["texts"] == 50 and sample["max_length"] == 8
    for side, texts in sides.items():
        lengths = sorted(len(encoder.tokenizer(text)["input_ids"]) for text in texts)
        wanted = {f"{level:.0%}": lengths[math.ceil(level * len(lengths)) - 1] for level in (0.5, 0.9, 0.95, 0.99)}
        wanted |= {"texts": len(lengths), "mean": round(sum(lengths) / len(lengths), 2), "longest": lengths[-1]}
        assert sample["tokens"][side] == wanted
        assert sample["truncated"][side] == round(sum(length > 8 for length in lengths) / len(lengths), 6)
    histogram = sample["histogram"]
    for start, stop, count in zip(histogram["edges"], histogram["edges"][1:], histogram["counts"], strict=False):
        assert count == sum(start <= length < stop for length in lengths)
    assert sum(histogram["counts"]) == 50


def test_only_the_sample_is_tokenized_and_all_rows_are_counted(encoder):
    rows = [{"text": f"the number {i}" if i else " ".join(["long"] * 5000)} for i in range(500)]
    for size, texts in ((50, 50), (0, 500), (1000, 500)):
        source = report_of(rows, encoder, sample=size)["sources"]["mine"]
        assert source["sample"]["texts"] == source["sample"]["rows"] == texts
        assert source["texts"] == 500
    assert source["sample"]["tokens"]["all"]["longest"] == source["sample"]["told_apart_up_to"] + 1  # lengths are capped here


def test_a_sample_of_long_texts_is_smaller(encoder, monkeypatch):
    rows = [{"anchor": "a cat " * 10, "positive": f"number {i:03}"} for i in range(100)]  # 70 characters in each row
    for characters, size in ((10**6, 100), (1400, 21), (0, 1)):
        monkeypatch.setattr("hf_embed.kit.preflight_source.CHARACTERS", characters)
        assert report_of(rows, encoder)["sources"]["mine"]["sample"]["rows"] == size
        assert report_of(rows, encoder, sample=50)["sources"]["mine"]["sample"]["rows"] == 50  # a given size is kept


def test_similar_texts_are_those_of_a_loop():
    draw = random.Random(0)
    texts = []
    for _ in range(80):
        words = draw.choices(
            ["alpha", "beta", "gamma", "delta", "eta", "zeta", "theta", "iota", "kappa", "la"], k=draw.randint(1, 12)
        )
        texts += [" ".join(words), " ".join([*words[:-1], "omega"]), " ".join(words) + "s"]
    texts = list(dict.fromkeys([*texts, "", "\u4e2d\u6587", "\u4e2d\u6587\u7684", "abc", "abcde"]))
    has, pairs = similar_pairs(texts)
    wanted = [any(jaccard(a, b) >= 0.8 for j, b in enumerate(texts) if i != j) for i, a in enumerate(texts)]
    assert has.tolist() == wanted and 25 < sum(wanted) < len(texts) - 25
    assert all(jaccard(texts[i], texts[j]) >= 0.8 for i, j in pairs)
    assert similar_pairs([])[0].tolist() == [] and similar_pairs(["a"])[0].tolist() == [False]


def test_jaccard():
    def loop(a: str, b: str) -> float:
        left, right = ({t.encode()[i : i + 5] for i in range(max(1, len(t.encode()) - 4))} for t in (a, b))
        return sum(piece in right for piece in left) / len(left | right)

    assert jaccard("abcdef", "bcdefg") == loop("abcdef", "bcdefg") == 1 / 3
    assert jaccard("abc", "abc") == 1 and jaccard("abc", "abd") == 0


# ---- encodings, columns, labels ----


def test_texts_that_were_decoded_wrongly(encoder):
    rows = [
        {"anchor": "caf\u00c3\u00a9", "positive": "S\u00c3O PAULO, \u00c2ngela"},  # café read as Latin-1; ordinary Portuguese
        {"anchor": "fine", "positive": "don\u00e2\u20ac\u2122t"},
        {"anchor": "a\ufffdb", "positive": "\ufffd\ufffd"},
        {"anchor": "bell\x07", "positive": "tab\tand\nline are none"},
        {"anchor": "na\u00efve \u0627\u200c\u0644", "positive": "\U0001f600 \u4e2d"},
    ]
    report = report_of(rows, encoder)
    assert report["sources"]["mine"]["odd"] == {
        "mojibake": {"count": 2, "rows": [1]}, "replacement characters": {"count": 2, "rows": [3]},
        "control characters": {"count": 1, "rows": [4]},
    }  # fmt: skip
    assert sorted(each["text"] for each in report["findings"] if each["code"] == "odd") == [
        "texts that contain control characters: 1 (first in row 4)", "texts that contain mojibake: 2 (first in row 1)",
        "texts that contain replacement characters: 2 (first in row 3)",
    ]  # fmt: skip


def write(path: Path, rows: list[list], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return path


def run(*argv) -> dict:
    return RECIPE.main([str(word) for word in argv])


def test_columns_of_a_file(tmp_path, capsys):
    path = write(
        tmp_path / "mine.csv", [["id", "sent0", "sent1", "hard_neg"], [1, "a", "b", "c"], [2, "d", "e", "f"]], "utf-8-sig"
    )
    source = run(path, "--batch_size", 2)["sources"]["mine.csv"]
    assert source["columns"] == {"sent0": "anchor", "sent1": "positive", "hard_neg": "negative"}
    assert source["unused"] == ["id"] and source["from"] == str(path)
    shown = capsys.readouterr().out
    assert "mine.csv: sent0 as anchor, sent1 as positive, hard_neg as negative; not used: id" in shown
    source = run(path, "--columns", "anchor=sent1", "positive=hard_neg")["sources"]["mine.csv"]
    assert source["columns"] == {"anchor": "anchor", "positive": "positive"}


def test_labeled_pairs(encoder):
    pairs = [("p", "yes", "entailment"), ("p", "no", "contradiction"), ("p", "may", "neutral"), ("q", "so", "entailment"),
             ("q", "not", "contradiction"), ("q", "", "entailment"), ("r", "", "-"), ("q", " ", "neutral")]  # fmt: skip
    rows = [{"premise": a, "hypothesis": b, "gold_label": c} for a, b, c in pairs]
    source = report_of(rows, encoder)["sources"]["mine"]
    assert source["labels"] == dict(Counter(label for *_, label in pairs)) and source["rows"] == source["labeled_pairs"] == 8
    assert (source["training_rows"], source["texts"]) == (2, 6)
    assert source["empty"] == {"count": 1, "rows": [6]}  # BUG: empty texts of pairs that the training does not use counted
    assert source["columns"] == {"premise": "anchor", "hypothesis": "positive", "gold_label": "label"}


def test_what_the_training_refuses_is_refused(tmp_path, encoder):
    rows = [{"anchor": None, "positive": "a"}, {"anchor": 5, "positive": "a"}]
    assert error_of(report_of, rows, encoder).startswith("mine, row 2, column 'anchor': the text is not a string (5)")
    assert "judges the pairs" in error_of(report_of, [{"anchor": "a", "positive": "b", "label": 1}], encoder)
    message = error_of(report_of, [{"a": "x", "b": "y"}], encoder)
    assert message.startswith("mine: found the columns a, b; name the columns with")
    assert "every text looks like a list" in error_of(report_of, [{"anchor": "['a']", "positive": "b"}] * 2, encoder)
    # BUG: the preflight accepted negatives that the training refuses.
    written = [{"anchor": "a", "positive": "b", "negative": "['c', 'd']"}] * 2
    assert error_of(report_of, written, encoder).startswith("mine, row 1, column 'negative': the text looks like a list")
    (tmp_path / "latin.csv").write_bytes("anchor,positive\ncaf\u00e9,b\n".encode("latin-1"))
    assert "can't decode byte 0xe9 in line 2" in error_of(run, tmp_path / "latin.csv")
    assert error_of(run, tmp_path / "none.csv").endswith("(several files, or a pattern, can only be given in --sources)")
    assert error_of(run).startswith(
        "there is nothing to check; give FILE ..., --train_file FILE, --dataset_name NAME or --sources FILE"
    )
    good = write(tmp_path / "good.csv", [["anchor", "positive"], ["a", "b"], ["c", "d"]])
    assert "no does not exist; create it first" in error_of(run, good, "--output_file", tmp_path / "no" / "report.json")
    assert "a picture's name must end in .png" in error_of(run, good, "--picture", tmp_path / "lengths")
    assert error_of(run, good, good) == f"two sources have the name '{good}'; give each file once"
    assert "sample is -1" in error_of(run, good, "--sample", "-1")
    assert "batch_size is 1; it must be at least 2" in error_of(run, good, "--batch_size", "1")
    one = write(tmp_path / "one.csv", [["anchor", "positive"], ["a", "b"]])
    assert error_of(run, one) == f"{one}: there are 1 row(s), but in-batch negatives need at least 2; give more rows"
    before = good.read_text()
    assert "has other content than a report, which would be lost" in error_of(run, good, "--output_file", good)
    assert good.read_text() == before


ROWS = {
    "pairs": [{"anchor": f"a{i}", "positive": f"p{i}"} for i in range(9)],
    "triplets": [{"anchor": f"a{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(9)],
    "many": [{"anchor": f"a{i}", "positive": [f"p{i} {j}" for j in range(65)]} for i in range(9)],
    "labels": [{"sentence1": f"a{i // 2}", "sentence2": f"p{i}", "label": i % 2} for i in range(9)],
    "scores": [{"sentence1": f"a{i}", "sentence2": f"p{i}", "score": i / 9} for i in range(9)],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        *((name, {}) for name in ROWS),
        *((name, {"objective": CoSENT()}) for name in ("pairs", "scores")),
        *((name, {"negatives": 1}) for name in ("pairs", "triplets")),
    ],
)
def test_sources_are_refused_as_in_training(rows, settings, streaming, tmp_path, encoder):
    """BUG: the preflight of a stream accepted labels and negatives that its training refuses, and refused pairs with scores."""
    table = Dataset.from_list(ROWS[rows])
    source = Source("mine", table.to_iterable_dataset() if streaming else table, size=9, **settings)
    args = ContrastiveTrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    found = []
    for examine in (
        lambda: make_mixture([source], encoder, args, SimCSE()),
        lambda: found.append(preflight([(source, None, None)], encoder, Settings(batches=(4,)), {})),
    ):
        try:
            examine()
        except InputError as error:
            found.append(str(error))
    if isinstance(found[0], dict):
        columns = found[0]["sources"]["mine"]["columns"]
        assert len(found) == 1 and (columns.get("score") == "score") == ("objective" in settings)
        assert bool(found[0]["sources"]["mine"]["batches"]) == ("objective" not in settings)
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("place", "cell"), [
    ("positive", 0), ("positive", True), ("positive", {"a": "b"}), ("positive", ["a", 5]), ("positive", [["a"]]),
    ("query", 5), ("query", ["a", 5]), ("negative", 7),
])  # fmt: skip
@pytest.mark.parametrize("others", ["text", "texts", "same"])
def test_cells_that_are_no_texts_are_refused_as_in_training(place, cell, others, streaming, tmp_path, encoder):
    """BUG: a column that mixes texts with other values ended in an error of Arrow."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(4)] + [{"query": "q", "positive": ""}]
    for i, row in enumerate(rows):
        row[place] = cell if i == 2 or others == "same" else [f"x{i}"] if others == "texts" and place != "query" else f"x{i}"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"name": "a", "file": "a.jsonl", "negatives": 1} | ({"streaming": True, "rows": 5} if streaming else {})
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump([entry]))
    (source,) = read_sources(str(tmp_path / "sources.yaml"))
    message = error_of(preflight, [(source, None, None)], encoder, Settings(), {})
    number = 1 if others == "same" else 3
    wrong = [item for item in cell if not isinstance(item, str)][0] if isinstance(cell, list) and place != "query" else cell
    assert message.startswith(f"{source.label}, row {number}, column '{place}': the text is not a string ({wrong}); ")
    assert "drop_empty_rows" not in message


def test_a_stream_that_mixes_texts_and_lists(tmp_path, encoder):
    rows = [{"query": "a", "positive": "b", "when": date(2020, 1, 1)}, {"query": "c", "positive": ["d", "e"], "when": None}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    report = preflight([(Source("s", stream, size=2), None, None)], encoder, Settings(), {})
    assert report["sources"]["s"]["training_rows"] == 3 and report["sources"]["s"]["unused"] == ["when"]


def test_an_unused_column_whose_values_may_judge_pairs(encoder):
    rows = [{"question": f"q {i}", "answer": f"a {i}", "x": i % 2, "page": i} for i in range(12)]
    report = report_of(rows, encoder)
    assert report["sources"]["mine"]["judged"] == {"x": ["0", "1"]}
    (finding,) = [each for each in report["findings"] if each["code"] == "judged"]
    assert "--columns score=x" in finding["text"] and "--ignore_columns x" in finding["text"]
    assert "judged" not in [each["code"] for each in report_of([{"text": row["question"], "x": row["x"]} for row in rows],
                                                               encoder)["findings"]]  # fmt: skip


@pytest.mark.parametrize(("answers", "share"), [(1, 1.0), (2, 5 / 11), (12, 0)])
def test_positives_that_repeat_leave_few_negatives(answers, share, encoder):
    rows = [{"anchor": f"q {i}", "positive": f"answer {i % answers}"} for i in range(12)]
    report = report_of(rows, encoder, batches=(4, 64))
    found = [each for each in report["findings"] if each["code"] == "few_negatives"]
    assert [each["count"] for each in found] == ([pytest.approx(share)] if share > 0.5 else [])
    table = [line for line in lines(report) if line.startswith("mine  ") and "64 (only 12 rows)" in line]
    assert len(table) == 1 and f"{12 * 11 * share:.3f}" in table[0]  # the batch has all 12 rows, and no more


@pytest.mark.parametrize("word", ["nan", "NaN", "NULL", "None", "N/A", "<NA>"])
@pytest.mark.parametrize("column", ["anchor", "positive", "negative"])
def test_words_for_missing_values(word, column, encoder):
    rows = [{"anchor": f"a nan {i}", "positive": f"None of {i}", "negative": f"n {i}"} for i in range(5)]
    assert "missing_word" not in [each["code"] for each in report_of(rows, encoder)["findings"]]
    rows[2][column] = rows[4][column] = word
    (finding,) = [each for each in report_of(rows, encoder)["findings"] if each["code"] == "missing_word"]
    assert finding["count"] == 2 and "(rows 3, 5)" in finding["text"]


# ---- several sources ----


def test_sources_of_different_shapes(tmp_path, encoder, caplog):
    pairs = [{"query": f"q {i}", "pos": [f"p {i}", f"P {i}."], "neg": [f"n {i}", f"m {i}"]} for i in range(6)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    write(tmp_path / "pairs.csv", [["title", "body"], ["Q 0", "p 0"], ["x", "y"], ["Q 0", "p 0"], ["q 1", "p 1"]])
    (tmp_path / "stream.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30)))
    entries = [
        {"name": "lists", "file": "lists.jsonl", "negatives": 1, "query_prompt": "find: ", "max_length": 6},
        {"name": "pairs", "file": "pairs.csv", "columns": {"query": "title", "positive": "body"}},
        {"name": "stream", "file": "stream.jsonl", "streaming": True, "rows": 30},
    ]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(entries))
    argv = ["--sources", tmp_path / "sources.yaml", "--max_length", 10, "--sample", 20, "--batch_size", 4]
    report = run(*argv)
    lists, pairs, stream = (report["sources"][name] for name in ("lists", "pairs", "stream"))
    assert (lists["rows"], lists["training_rows"], lists["texts"]) == (6, 12, 36)  # one of the two negatives is used
    assert lists["sample"]["max_length"] == 6 and pairs["sample"]["max_length"] == 10
    find = len(encoder.tokenizer("find: q 1")["input_ids"])
    assert lists["sample"]["tokens"]["anchor"]["50%"] == find
    assert (pairs["duplicates"]["count"], pairs["duplicates"]["rows"]) == (1, [3])
    assert stream["first_rows_of_a_stream"] == stream["rows"] == 20 and stream["columns"] == {"text": "text"}
    assert report["total"]["rows"] == 6 + 4 + 20 and report["total"]["texts"] == 36 + 8 + 20
    # No row is in two sources: rows with the same anchor and positive differ in their negatives.
    assert (lists["shared"], pairs["shared"], report["total"]["duplicates"]) == (0, 0, 1)
    assert [each["code"] for each in report["findings"] if each["of"] == "pairs"] == ["duplicates"]
    assert f"{'total':21}" not in lines(report)[0] and any(line.startswith("total ") for line in lines(report))


@pytest.mark.parametrize("sample, rows", [(1, 1), (5, 5), (0, 30), (None, 20)])
def test_how_many_rows_of_a_stream_are_read(sample, rows, encoder, monkeypatch):
    """BUG: With a sample of 0, only the first rows of a stream were read, although 0 means all rows."""
    monkeypatch.setattr("hf_embed.kit.preflight_source.SAMPLE", 20)
    stream = Dataset.from_list([{"text": f"line {i}"} for i in range(30)]).to_iterable_dataset()
    source = Source("mine", stream, size=30)
    report = preflight([(source, "mine", False)], encoder, Settings(sample=sample), {})["sources"]["mine"]
    assert report["rows"] == report["sample"]["rows"] == rows
    assert report.get("first_rows_of_a_stream") == (rows if rows < 30 else None)


def test_rows_that_stand_in_two_files(tmp_path, capsys):
    first = write(tmp_path / "a.csv", [["anchor", "positive"], ["one", "two"], ["three", "four"], ["one", "two"]])
    second = write(tmp_path / "b.csv", [["anchor", "positive"], ["One!", "two"], ["one", "two"], ["five", "six"]])
    report = run(first, second, "--batch_size", 2)
    assert [source["shared"] for source in report["sources"].values()] == [1, 1]
    assert (report["total"]["duplicates"], report["total"]["near_duplicates"]) == (2, 1)
    assert report["sources"]["b.csv"]["near_duplicates"] == {"count": 1, "rows": [2]}
    shown = capsys.readouterr().out
    assert "  a.csv: different rows that also occur in another source: 1 [shared]" in shown
    (tmp_path / "sub").mkdir()
    twin = write(tmp_path / "sub" / "a.csv", [["anchor", "positive"], ["seven", "eight"], ["nine", "ten"]])
    assert list(run(first, twin)["sources"]) == [str(first), str(twin)]


# ---- evaluation sets ----


def test_texts_of_evaluation_sets_that_are_trained_on(encoder):
    rows = [{"anchor": f"a {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(10)]
    score = [0.0, 2.5, 5.0]
    sts = Dataset.from_dict({"sentence1": ["A 1!", "new", "x"], "sentence2": ["p 2", "n 3", "a 1"], "score": score})
    tasks = {
        "sts": STS(sts),
        "search": Retrieval({"q": "a 4", "r": "unjudged a 5"}, {"d": "P 6", "e": "else"}, {"q": {"d": 1}}),
        "triplets": Triplets(["a 7", "z"], ["p 7", "y"], ["n 7", "w"]),
        "pairs": PairClassification(["a 8", "u"], ["v", "t"], [1, 0]),
        "rerank": Reranking([{"query": "a 9", "positive": ["p 9"], "negative": ["s"]}]),
        "intents": ZeroShot(["p 0", "r"], [0, 1], ["p 1", "l"]),
        "held_out": HeldOut(Dataset.from_list([{"anchor": "a 1", "positive": "new"}, {"anchor": "b", "positive": "p 3"}])),
        "clean": STS(Dataset.from_dict({"sentence1": ["g", "h"], "sentence2": ["i", "j"], "score": [0.0, 1.0]})),
    }
    report = report_of(rows, encoder, tasks)
    trained = {plain(text) for row in rows for text in row.values()}
    wanted = {
        "sts": {"sentences": ["A 1!", "new", "x", "p 2", "n 3", "a 1"]},
        "search": {"queries": ["a 4"], "documents": ["P 6", "else"]},
        "triplets": {"anchors": ["a 7", "z"], "positives": ["p 7", "y"]}, "pairs": {"sentences": ["a 8", "u", "v", "t"]},
        "rerank": {"queries": ["a 9"], "documents": ["p 9", "s"]}, "intents": {"texts": ["p 0", "r"]},
        "held_out": {"anchors": ["a 1", "b"], "positives": ["new", "p 3"]}, "clean": {"sentences": ["g", "h", "i", "j"]},
    }  # fmt: skip
    for name, parts in wanted.items():
        words = {part: {plain(text) for text in texts} for part, texts in parts.items()}
        found = report["evaluation"][name]
        assert found["texts"] == {part: {"different": len(own), "seen": len(own & trained)} for part, own in words.items()}, (
            name
        )
        asked = set().union(*(own for part, own in words.items() if part != "documents"))
        numbers = [i for i, row in enumerate(rows, 1) if {plain(row["anchor"]), plain(row["positive"])} & asked]
        assert found["training_rows"] == ({"mine": {"count": len(numbers), "rows": numbers[:5]}} if numbers else {}), name
    assert report["evaluation"]["sts"]["range"] == [0.0, 5.0] and report["evaluation"]["sts"]["pairs"] == 3
    assert report["evaluation"]["pairs"]["matches"] == 1
    seen = {each["of"]: each["text"] for each in report["findings"] if each["code"] == "seen"}
    assert set(seen) == set(wanted) - {"clean"}
    ignored = "if case, spaces and punctuation are ignored"
    assert seen["search"] == f"texts that are also in the training rows {ignored}: 1 (in mine row 5)"


def test_files_of_evaluation_sets(tmp_path):
    """A FILE with the columns of an STS dataset is an evaluation set. Flags also name evaluation sets and held-out rows."""
    train = write(tmp_path / "train.csv", [["anchor", "positive"], ["a", "b"], ["c", "d"]])
    held = write(tmp_path / "held.csv", [["anchor", "positive"], ["A", "new"], ["e", "f"]])
    sts = write(tmp_path / "sts.csv", [["sentence1", "sentence2", "score"], ["x", "b", 0.2], ["y", "z", 0.9]])
    report = run(train, sts, "--eval_file", held, "--eval_sts_file", f"again={sts}")
    assert list(report["sources"]) == ["train.csv"]
    assert report["evaluation"]["sts.csv"] == report["evaluation"]["again"] | {}
    assert report["evaluation"]["sts.csv"]["range"] == [0.2, 0.9]
    assert report["evaluation"]["held_out"]["texts"]["anchors"] == {"different": 2, "seen": 1}
    alone = run(sts)
    assert (
        alone["sources"] == {} and alone["evaluation"]["sts.csv"]["texts"]["sentences"]["seen"] == 0 and not alone["findings"]
    )


# ---- the recipes ----


def test_strict_and_the_files(tmp_path, capsys):
    train = write(tmp_path / "train.csv", [["anchor", "positive"], ["a", "b"], ["a", "b"], ["c", ""], ["d", "D"]])
    report, picture = tmp_path / "report.json", tmp_path / "lengths.png"
    with pytest.raises(SystemExit) as end:
        run(train, "--strict", "--batch_size", 2, "--output_file", report, "--picture", picture)
    assert end.value.code == 1
    found = json.loads(report.read_text())
    assert [each["code"] for each in found["findings"]] == ["empty", "duplicates", "positive_is_anchor"]
    assert picture.read_bytes().startswith(b"\x89PNG") and f"wrote {report}" in capsys.readouterr().out
    clean = write(tmp_path / "clean.csv", [["anchor", "positive"], ["a", "b"], ["c", "d"]])
    assert run(clean, "--strict", "--batch_size", 2)["findings"] == []
    assert "no findings" in capsys.readouterr().out


def test_several_processes_are_refused(tmp_path, monkeypatch):
    clean = write(tmp_path / "clean.csv", [["anchor", "positive"], ["a", "b"], ["c", "d"]])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert error_of(run, clean) == "this recipe runs in a single process, but 2 were started; start it without a launcher"


@pytest.mark.parametrize("name", ["sup_simcse", "unsup_simcse", "gte_pretrain", "gte_finetune", "simcse_ablation"])
def test_preflight_of_a_recipe_ends_before_the_training(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    single = name in ("unsup_simcse", "simcse_ablation")
    rows = (
        [["text"], *([f"line {i}"] for i in range(12))] if single else [["q", "a"], *([f"q {i}", f"a {i}"] for i in range(12))]
    )
    rows.append(rows[-1])
    columns = ["--columns", "text=text"] if single else ["--columns", "anchor=q", "positive=a"]
    sts = write(tmp_path / "sts.csv", [["sentence1", "sentence2", "score"], ["line 1", "q 2", 0], ["x", "y", 1]])
    argv = ["--train_file", write(tmp_path / "train.csv", rows), *columns, "--eval_sts_file", f"dev={sts}", "--max_length", 4,
            "--per_device_train_batch_size", 5, "--preflight", "--preflight_file", tmp_path / "report.json"]  # fmt: skip
    recipe = load_recipe(name)
    model = ["--model_name_or_path", QUICKSTART / "encoder"]
    report = recipe.main([*QUIET, *map(str, [*argv, *model])])
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    (source,) = report["sources"].values()
    assert source["training_rows"] == 13 and source["duplicates"]["rows"] == [13] and source["sample"]["max_length"] == 4
    (batch,) = source["batches"]
    loss = math.log(5) if "simcse" in name else math.log(4 * 5 - 2)
    assert batch["batch"] == 5 and list(batch["guessing"].values()) == [pytest.approx(loss, abs=1e-4)]
    assert report["evaluation"]["dev"]["texts"]["sentences"]["seen"] == 1
    assert not (tmp_path / "outputs").exists() and "no findings" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        recipe.main([*QUIET, *map(str, [*argv, *model, "--strict"])])
    assert end.value.code == 1


def test_flags_that_do_not_suit_a_preflight_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in (["--strict"], ["--preflight_sample", "5"], ["--preflight_file", "x.json"]):
        message = error_of(load_recipe("sup_simcse").main, [*QUIET, *flag])
        assert message.startswith(f"{flag[0]} has no effect without --preflight")
    single = error_of(load_recipe("sup_simcse").main, [*QUIET, "--preflight", "--per_device_train_batch_size", "1"])
    assert single.startswith("per_device_train_batch_size is 1, but a batch of one row has no negatives")


def test_preflight_takes_the_positives_that_are_made(tmp_path, monkeypatch):
    """The preflight reads the training rows: single sentences or, with --positive, sentences and their changed copies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("".join(f"this is the line of number {i}\n" for i in range(20)))
    argv = [*QUIET, "--train_file", "lines.txt", "--model_name_or_path", str(QUICKSTART / "encoder"), "--preflight"]
    (plain_rows,) = load_recipe("unsup_simcse").main(argv)["sources"].values()
    assert plain_rows["columns"] == {"text": "text"}
    (made,) = load_recipe("unsup_simcse").main([*argv, "--positive", "delete_one_word"])["sources"].values()
    assert made["columns"] == {"anchor": "anchor", "positive": "positive"} and made["texts"] == 40


@pytest.mark.slow
def test_two_processes_print_one_report(tmp_path):
    write(tmp_path / "train.csv", [["anchor", "positive"], *([f"q {i}", f"a {i}"] for i in range(12)), ["q 1", "a 1"]])
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", RECIPES / "sup_simcse.py", *QUIET]
    more = ["--train_file", tmp_path / "train.csv", "--model_name_or_path", QUICKSTART / "encoder", "--preflight", "--strict"]
    more += ["--per_device_train_batch_size", "3"]
    done = subprocess.run(list(map(str, [*start, *more])), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.count("rows that equal an earlier row: 1 (row 13) [duplicates]") == 1
    # A batch has 3 rows on each of the two processes.
    assert any(line.split()[:2] == [str(tmp_path / "train.csv"), "6"] for line in done.stdout.splitlines())
    assert not (tmp_path / "outputs").exists()
