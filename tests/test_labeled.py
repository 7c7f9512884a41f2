"""Test pairs with a label: what they become, what the labels mean, and what is refused."""

import json

import pandas
import pytest
from conftest import error_of, tiny_encoder, tokenize_rows
from datasets import ClassLabel, Dataset, Features, Value
from test_data_files import datasets_cache, listed, written  # noqa: F401  (a fixture)
from test_mixture import arguments

from hf_embed import SimCSE, Source
from hf_embed.data.cache import content_of
from hf_embed.data.columns import take_columns
from hf_embed.data.labeled import as_pairs, read_pairs
from hf_embed.data.mixture import tokenize_source
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import read_file
from hf_embed.data.tokenization import RowTokenizer, tokenize_table

WORDS = ["entailment", "neutral", "contradiction"]
# (premise, hypothesis, label); p0 has two different positives and two negatives, p1 has no negative, p2 has no positive
SNLI = [
    ("p0", "e0", 0), ("p1", "e1", 0), ("p0", "n0", 1), ("p0", "c0", 2), ("p0", "e0 too", 0), ("p2", "c2", 2),
    ("p0", "c0 too", 2), ("p3", "c3", 2), ("p3", "e3", 0), ("p3", "no gold", -1), ("p0", "e0", 0),
]  # fmt: skip
TRIPLETS = [
    {"anchor": "p0", "positive": ["e0", "e0 too"], "negatives": ["c0"]},
    {"anchor": "p3", "positive": ["e3"], "negatives": ["c3"]},
]
COUNTED = (
    "snli: 11 pairs of premise and hypothesis became 3 triplets of 2 anchors; left out: 1 neutral, 1 without a label, "
    "1 repeated, 1 positive without a negative, 1 negative without a positive, 1 additional negative of an anchor; "
)


def snli(kind):
    """Return the SNLI pairs with their labels written in the way that `kind` names."""
    labels = {
        "numbers": lambda label: label, "words": lambda label: "-" if label < 0 else WORDS[label],
        "capitals": lambda label: "" if label < 0 else WORDS[label].upper(),
        "null": lambda label: None if label < 0 else WORDS[label],
        "floats": lambda label: float("nan") if label < 0 else float(label), "texts": lambda label: str(label),
    }  # fmt: skip
    return [{"premise": p, "hypothesis": h, "label": labels[kind](label)} for p, h, label in SNLI]


@pytest.mark.parametrize("kind", ["numbers", "words", "capitals", "null", "floats", "texts"])
def test_snli_becomes_triplets(kind, caplog):
    assert as_pairs(Dataset.from_list(snli(kind)), "snli").to_list() == TRIPLETS
    shown = WORDS if kind in ("words", "capitals", "null") else ["0 (entailment)", "", "2 (contradiction)"]
    means = f"positives have the label {shown[0]}; negatives have the label {shown[2]}"
    assert caplog.messages == [COUNTED + means]


@pytest.mark.parametrize("order", [WORDS, WORDS[::-1], ["neutral", "contradiction", "entailment"]])
def test_the_names_of_a_class_label_decide(order):
    """The order of the numbers does not matter."""
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=order)})
    labels = [-1 if label < 0 else order.index(WORDS[label]) for *_, label in SNLI]
    rows = Dataset.from_dict(
        {"premise": [row[0] for row in SNLI], "hypothesis": [row[1] for row in SNLI], "label": labels}, features
    )
    assert as_pairs(rows, "snli").to_list() == TRIPLETS


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "jsonl.gz"])
def test_labeled_files_are_trained_as_their_triplets(ending, tmp_path, tokenizer):
    """The rows have the same tokens as a table that lists the triplets, also if the file has another column."""
    table = pandas.DataFrame(snli("words")).rename(columns={"label": "gold_label", "premise": "Premise"})
    table["pairID"] = range(len(table))
    path = str(tmp_path / f"a.{ending}")
    if ending == "parquet":
        table.to_parquet(path)
    elif "jsonl" in ending:
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    tokens = tokenize_rows(read_file(path), tokenizer, 16, paired=True)
    expected = tokenize_rows(Dataset.from_list(TRIPLETS), tokenizer, 16)
    assert tokens.to_dict() == expected.to_dict() and len(tokens) == 3
    (source,) = read_sources(listed(tmp_path, {"name": "s", "file": f"a.{ending}", "negatives": 1}))
    assert len(source.rows) == 11


BINARY = [("a", "a one", 1), ("a", "a two", 0), ("a", "a three", 1), ("b", "b one", 0), ("c", "c one", 1), ("a", "a four", 0)]
MATCHED = [
    {"anchor": "a", "positive": ["a one", "a three"], "negatives": ["a two", "a four"]},
    {"anchor": "c", "positive": ["c one"], "negatives": []},
]
NAMES = [
    ("sentence1", "sentence2", "label", int), ("question1", "question2", "is_duplicate", int),
    ("text1", "text2", "Label", bool),
    ("sentence1", "sentence2", "label", float), ("sentence1", "sentence2", "label", str),
    ("sentence1", "sentence2", "label", lambda label: ["not_duplicate", "duplicate"][label]),
    ("sentence_A", "sentence_B", "gold_label", lambda label: ["not_equivalent", "equivalent"][label]),
    ("premise", "hypothesis", "label", lambda label: ["not_entailment", "entailment"][label]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "label", "kind"), NAMES)
def test_pairs_that_match_or_do_not(first, second, label, kind, caplog):
    rows = Dataset.from_list([{first: a, second: b, label: kind(c)} for a, b, c in BINARY])
    assert as_pairs(rows, "qqp").to_list() == MATCHED
    counted = (
        f"qqp: 6 pairs of {first} and {second} became 3 pairs with 2 hard negatives of 2 anchors; left out: 1 negative without"
    )
    assert caplog.messages[0].startswith(counted)


@pytest.mark.parametrize("kind", [int, float, str])
@pytest.mark.parametrize("missing", [False, True])
def test_minus_one_beside_one_alone_is_the_negative_label(kind, missing, caplog):
    """BUG: the pairs with the label -1 were left out."""
    rows = [{"sentence1": a, "sentence2": b, "label": kind(c or -1)} for a, b, c in BINARY]
    rows += [{"sentence1": "a", "sentence2": "a none", "label": None}] * missing
    assert as_pairs(Dataset.from_list(rows), "signed").to_list() == MATCHED
    assert "positives have the label 1; negatives have the label -1" in caplog.text
    assert ("1 without a label" in caplog.text) == missing


def test_minus_one_is_no_label_beside_zero_or_names():
    for labels in ([1, 0, -1], ["yes", "no", "-1"]):
        rows = [{"sentence1": "a", "sentence2": f"b{i}", "label": label} for i, label in enumerate(labels)]
        assert as_pairs(Dataset.from_list(rows), "qqp").to_list() == [{"anchor": "a", "positive": ["b0"], "negatives": ["b1"]}]
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["0", "1"])})
    rows = Dataset.from_dict({"sentence1": ["a", "a"], "sentence2": ["b", "c"], "label": [1, -1]}, features)
    assert as_pairs(rows, "classes").to_list() == [{"anchor": "a", "positive": ["b"], "negatives": []}]


def test_labels_are_shown_as_they_are_written(caplog):
    """BUG: messages showed not_entailment as notentailment."""
    as_pairs(pairs(["entailment", "not_entailment"], ("sentence1", "sentence2")), "rte")
    assert "positives have the label entailment; negatives have the label not_entailment" in caplog.text
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"),
                         "label": ClassLabel(names=["not_equivalent", "equivalent"])})  # fmt: skip
    as_pairs(Dataset.from_dict({"sentence1": ["a"] * 2, "sentence2": ["b", "c"], "label": [0, 1]}, features), "mrpc")
    assert "negatives have the label not_equivalent" in caplog.text
    message = error_of(as_pairs, pairs(["no_match", "Not sure"], ("sentence1", "sentence2")), "a.csv")
    assert "the labels are no_match, not sure; write" in message


def test_the_names_of_two_classes_decide():
    """RTE gives entailment the number 0."""
    kinds = {"rte": ["entailment", "not_entailment"], "mrpc": ["not_equivalent", "equivalent"], "paws": ["0", "1"]}
    for name, names in kinds.items():
        features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=names)})
        labels = [1 - label if name == "rte" else label for *_, label in BINARY]
        table = {"sentence1": [row[0] for row in BINARY], "sentence2": [row[1] for row in BINARY], "label": labels}
        assert as_pairs(Dataset.from_dict(table, features), name).to_list() == MATCHED


def pairs(labels, names=("premise", "hypothesis"), column="label"):
    return Dataset.from_list([{names[0]: "p", names[1]: f"h{i}", column: label} for i, label in enumerate(labels)])


ALIKE = ("sentence1", "sentence2")
REFUSED = [
    (pairs([0, 1]), "the labels are 0, 1; entailment is 0 in some datasets and 1 in others"),
    (pairs([0, 0]), "the labels are 0; entailment is 0 in some"),
    (pairs([0, 1, 2], ALIKE), "the labels are 0, 1, 2; write entailment, neutral and contradiction"),
    (pairs([0, 1, 2, 3]), "the labels are 0, 1, 2, 3; write entailment"),
    (
        pairs([0.5, 1.0], ALIKE),
        "0.5 is a score, which does not say if a pair is a positive or a negative; "
        "evaluate on these pairs with --eval_sts_file",
    ),
    (pairs([3.25, 1.0]), "3.25 is a score"),
    (pairs(["-", None]), "the labels are all missing"),
    (pairs([-1, -1], ALIKE), "the labels are all missing"),
    (pairs([1, -1]), "the labels are 1; entailment is 0 in some"),
    (pairs(["yes!", "no!"], ALIKE), "the labels are no!, yes!; write entailment"),
    (pairs(["entailment", "other"]), "the labels are entailment, other; write"),
    (pairs([0, 1, -2]), "the labels are -2, 0, 1; write"),  # BUG: the label -2 was read as 2, the contradiction
    (pairs([["entailment"], ["neutral"]]), "write entailment"),
    (pairs([f"l{i}" for i in range(9)]), "the labels are l0, l1, l2, l3, l4, ...; write"),
]


@pytest.mark.parametrize(("rows", "expected"), REFUSED)
def test_labels_that_are_not_known_are_refused(rows, expected):
    message = error_of(as_pairs, rows, "a.csv")
    assert message.startswith("a.csv, column 'label': ") and expected in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            pairs(["entailment", "neutral"]),
            "no premise has a positive and a negative: 2 pairs of premise and hypothesis became 0",
        ),
        (pairs([1, 2]), "no premise has a positive and a negative"),
        (pairs([0, 0], ALIKE), "no sentence1 has a positive: "),
    ],
)
def test_labels_of_which_nothing_can_be_made(rows, expected):
    message = error_of(as_pairs, rows, "a.csv")
    assert expected in message and "if every pair is a positive, give --ignore_columns label --columns anchor=" in message
    left = rows.remove_columns("label")
    assert as_pairs(left, "a.csv") is left


@pytest.mark.parametrize("labels", [[1, 2, 0], ["0", "2", "-1"], [2.0, 1.0, 2.0]])
def test_the_numbers_of_inference_labels_are_no_scores(labels, tokenizer):
    """BUG: the labels 0, 1 and 2 of NLI, for example 1 for entailment and 2 for neutral, were taken as similarities."""

    def scores(rows):
        return tokenize_table(rows, RowTokenizer(tokenizer, 16, scored=True), "a.csv", paired=True)["scores"][:]

    rows = pairs(labels, ALIKE)
    message = error_of(scores, rows)
    assert message.startswith("a.csv, column 'label': the labels 0, 1 and 2 may mean entailment, neutral and contradiction")
    assert "write scores in their place, or give --columns score=label (or columns:" in message
    assert scores(take_columns(rows, {"score": "label"})) == [[float(label)] for label in labels]
    assert scores(pairs([0, 1, 0], ALIKE)) == [[0], [1], [0]]  # matches, as in QQP
    assert scores(pairs([0, 1, 3], ALIKE)) == [[0], [1], [3]]  # grades


def test_two_columns_of_labels_are_refused():
    rows = pairs([0, 2]).add_column("gold_label", ["entailment", "contradiction"])
    assert "the columns label and gold_label all hold labels; remove one with --ignore_columns gold_label" in error_of(
        as_pairs, rows, "a.csv"
    )


@pytest.mark.parametrize(
    ("names", "paired"),
    [
        (["anchor", "positive", "label"], None), (["query", "answer", "label"], None),
        (["sentence1", "sentence2", "score"], None),
        (["sentence1", "sentence2", "negative", "label"], None), (["question", "answer", "is_duplicate"], True),
    ],
)  # fmt: skip
def test_judgements_of_other_pairs_stay_refused(names, paired, tokenizer):
    rows = Dataset.from_list([dict.fromkeys(names, "1")] * 2)
    assert f"the column '{names[-1]}' judges the pairs" in error_of(tokenize_rows, rows, tokenizer, 16, paired=paired)


def test_single_texts_have_no_pairs():
    rows = Dataset.from_list([{"text": "a", "label": 1}] * 2)
    assert as_pairs(rows, "a.csv") is rows
    assert as_pairs(pairs([0, 2]), "a.csv", paired=False).column_names == ["premise", "hypothesis", "label"]


def test_an_empty_text_is_found_or_dropped(caplog):
    rows = Dataset.from_list([*snli("words"), {"premise": "p0", "hypothesis": " ", "label": "entailment"}])
    message = error_of(as_pairs, rows, "snli")
    assert message.startswith("snli, row 12, column 'hypothesis': the text is empty") and "--drop_empty_rows" in message
    assert as_pairs(rows, "snli", drop_empty_rows=True).to_list() == TRIPLETS
    assert "1 with an empty text" in caplog.text


@pytest.mark.parametrize("drop", [False, True])
def test_a_number_is_not_an_empty_text(drop, tmp_path):
    pairs = [{"sentence1": "a", "sentence2": cell, "label": 1} for cell in ("b", "", 5)]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(pair) + "\n" for pair in (pairs if drop else pairs[::2])))
    message = error_of(as_pairs, read_file(path), "a", drop_empty_rows=drop)
    assert message.startswith(f"a, row {2 + drop}, column 'sentence2': the text is not a string (5)")
    assert "--drop_empty_rows" not in message


def test_a_stream_is_refused_by_name(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in snli("words"))
    written(tmp_path / "a.jsonl", lines)
    (source,) = read_sources(listed(tmp_path, {"name": "s", "file": "a.jsonl", "streaming": True, "rows": 11}))
    message = error_of(as_pairs, source.rows, source.label)
    assert "the labeled pairs of premise, hypothesis and label are grouped by premise, which is not supported" in message


def test_a_source_takes_as_many_negatives_as_it_says(tmp_path):
    rows = Dataset.from_list([{"sentence1": a, "sentence2": b, "label": c} for a, b, c in BINARY])
    for negatives, most in ((None, 4), (1, 3), (0, 2)):
        source = Source("qqp", rows, negatives=negatives)
        tokens = tokenize_source(source, tiny_encoder(), arguments(tmp_path), SimCSE())
        assert max(map(len, tokens["text_ids"])) == most


def test_a_file_is_made_once_and_in_its_own_order():
    """The same pairs give the same table, so the cache has its tokens. The order of the file decides the first negative."""
    rows = snli("words")
    first, second = (as_pairs(Dataset.from_list(rows), "snli") for _ in range(2))
    assert content_of(first) == content_of(second)
    backwards = as_pairs(Dataset.from_list(rows[::-1]), "snli").to_list()
    assert backwards[0] == {"anchor": "p0", "positive": ["e0", "e0 too"], "negatives": ["c0 too"]}


def test_pairs_to_mine_for(tmp_path):
    assert read_pairs(Dataset.from_list(snli("words")), "snli") == [("p0", "e0"), ("p0", "e0 too"), ("p3", "e3")]
    rows = Dataset.from_list([{"query": "q", "pos": ["a", "b"], "neg": ["c"]}, {"query": "r", "pos": ["d"], "neg": []}])
    assert read_pairs(rows, "bge") == [("q", "a"), ("q", "b"), ("r", "d")]
