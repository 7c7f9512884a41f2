"""Tests that a file of a user is read correctly, or is refused in one line that says where the mistake is and how to mend it.

The files have unusual separators, quotes, lists and labels in tables; other encodings and odd lines; jsonl columns that begin
late or change their type; and texts of many megabytes.
"""

import csv
import gzip
import json
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pandas
import pyarrow.parquet
import pytest
import yaml
from conftest import error_of, tokenize_rows
from datasets import Dataset

from hf_embed.data import text_files
from hf_embed.data.cache import content_of
from hf_embed.data.labeled import read_pairs
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import is_list, read_file, read_hub, read_texts, row_texts, text_columns
from hf_embed.data.stream import Stream
from hf_embed.data.tokenization import RowTokenizer
from hf_embed.encoding import beginning
from hf_embed.evaluation.reranking import read_reranking
from hf_embed.evaluation.sts import read_sts
from hf_embed.evaluation.triplets import Triplets, read_triplets
from hf_embed.evaluation.zero_shot import read_zero_shot
from hf_embed.kit import cli
from hf_embed.kit.plan import DataArguments, read_train_rows
from hf_embed.kit.row_hashes import batches


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path, rows):
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def listed(folder, *entries):
    return written(folder / "sources.yaml", yaml.safe_dump(list(entries)))


def streamed(source, tokenizer):
    return Stream(source, RowTokenizer(tokenizer, 16), rank=0, ranks=1, seed=0, buffer_size=5, drop=False)


def both_ways(path, **settings):
    """Return the rows of a file, after checking that they are the same in memory and as a stream."""
    table = read_file(path, **settings).to_list()
    assert list(read_file(path, streaming=True, **settings)) == table
    return table


# ---- separators ----


@pytest.mark.parametrize(
    ("name", "separator", "mend"),
    [
        ("a.csv", ";", "seems to be ';', but csv files need a comma; save it with a comma"),
        ("a.csv", "|", "seems to be '|', but csv files need a comma; save it with a comma"),
        ("a.csv", "\t", "seems to be a tab, but csv files need a comma; give the file the ending .tsv"),
        ("a.tsv", ",", "seems to be a comma, but tsv files need a tab; give the file the ending .csv"),
        ("a.tsv", ";", "seems to be ';', but tsv files need a tab; save it with a tab"),
        ("a.csv.gz", ";", "seems to be ';'"),
    ],
)
def test_another_separator_is_named_by_every_reader(name, separator, mend, tmp_path):
    def table(*rows):
        content = "".join(separator.join(row) + "\n" for row in rows).encode()
        return written(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)

    path = table(("anchor", "positive"), ("a cat", "a kitten"), ("a dog", "a puppy"))
    yaml_file = listed(tmp_path, {"name": "s", "file": name})
    streamed = listed(tmp_path / "more", {"name": "s", "file": f"../{name}", "streaming": True, "rows": 2, "negatives": 2})
    for read in (read_file, read_texts, read_pairs_of, lambda path: read_file(path, streaming=True)):
        message = error_of(read, path)
        assert (
            message.startswith(f"{path}: there is only one column, '{' '.join(f'anchor{separator}positive'.split())}'; ")
            and mend in message
        )
    for file in (yaml_file, streamed):
        assert "source 's': " in error_of(read_sources, file) and mend in error_of(read_sources, file)
    assert mend in error_of(read_sts, table(("score", "sentence1", "sentence2"), ("1", "a", "b"), ("2", "c", "d")))
    assert mend in error_of(read_sts, table(("1", "a", "b"), ("2", "c", "d")))
    assert mend in error_of(read_zero_shot, table(("label", "text"), ("1", "a"), ("2", "c")), "{label}")
    assert mend in error_of(read_zero_shot, table(("1", "a"), ("2", "c")), "{label}")


def test_a_datasets_only_column_with_a_separator_in_its_name():
    """A csv file on the Hub whose separator is a semicolon arrives as a dataset with such a column."""
    message = error_of(text_columns, ["anchor;positive"], "org/pairs")
    assert "org/pairs: there is only one column, 'anchor;positive', and its name contains ';'" in message
    assert text_columns(["whatever it is"], "rows") == ["whatever it is"]
    # BUG: the first text of a file without a header was lost in silence.
    assert "if this is a text, add a header above it" in error_of(text_columns, ["a text of five words"], "a.csv", False)


def test_separators_within_texts_are_texts(tmp_path):
    path = written(tmp_path / "a.csv", 'text\na; b | c\n"d, e"\n')
    assert both_ways(path) == [{"text": "a; b | c"}, {"text": "d, e"}]


# ---- quotes ----


def forty_rows(folder):
    """Write 40 rows with one stray quote in line 11 and one in line 25, counting the header.

    Everything between the two quotes becomes one cell, so pandas reads only 26 rows.
    """
    rows = [[f"anchor {i}", f"positive {i}"] for i in range(1, 41)]
    rows[9][1] = '"positive 10'
    rows[23][1] = 'positive 24"'
    return written(folder / "a.csv", "anchor,positive\n" + "".join(",".join(row) + "\n" for row in rows))


def test_rows_inside_a_quote_are_reported_and_no_quoting_restores_them(tmp_path, caplog):
    path = forty_rows(tmp_path)
    rows = read_file(path)
    assert len(rows) == 26 and rows[9]["positive"].count("\n") == 14
    assert (
        "1 of 26 rows have line breaks in a quoted cell, the first in lines 11 to 25; 14 of the file's 41 lines" in caplog.text
    )
    assert "--no_quoting" in caplog.text and "quoting: false" in caplog.text
    caplog.clear()
    for rows in (read_file(path, quoting=False), read_train_rows(DataArguments(train_file=path, quoting=False))[0]):
        assert len(rows) == 40 and rows[9]["positive"] == '"positive 10' and rows[23]["positive"] == 'positive 24"'
    (source,) = read_sources(listed(tmp_path, {"name": "s", "file": "a.csv", "quoting": False}))
    assert len(source.rows) == 40 and not caplog.messages
    (parsed,) = cli.parse([DataArguments], argv=["--train_file", path, "--no_quoting"])
    assert parsed.quoting is False and cli.parse([DataArguments], argv=[])[0].quoting is True


def test_quoted_cells_of_a_tsv_file_are_warned_of(tmp_path, caplog):
    """BUG: pandas quotes cells of a tsv file too, and the added quotes were trained on without a word."""
    table = pandas.DataFrame({"anchor": ['He said "hi".', "a", '"b"', "d"], "positive": ["x", 'y ""', "z", "w"]})
    path = str(tmp_path / "a.tsv")
    table.to_csv(path, sep="\t", index=False)
    assert read_file(path)["anchor"][:] == ['"He said ""hi""."', "a", '"""b"""', "d"]
    assert f"{path}: 3 of 4 rows have a cell that is quoted as in a csv file; the quotes in a" in caplog.text
    caplog.clear()
    for plain in ('"a" and "b"', '""', '"a"', '""a"" b', '"a "" b" c"', '"'):  # texts with quotes of their own
        assert read_file(written(tmp_path / "b.tsv", f"anchor\tpositive\n{plain}\tx\n"))["anchor"][:] == [plain]
    assert not caplog.messages


def test_quotes_are_as_pandas_reads_them(tmp_path, caplog):
    rows = [["a", 'he said "hi"'], ["b, c", "two\nlines"], ["", 'x"'], ['5" disk', "'single'"], ["é", "\u2028"]]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["anchor", "positive"], *rows])
    expected = pandas.read_csv(tmp_path / "a.csv", keep_default_na=False).to_dict("records")
    assert both_ways(str(tmp_path / "a.csv")) == expected == [dict(zip(("anchor", "positive"), row)) for row in rows]
    assert "the first in lines 3 to 4" in caplog.text


def test_a_quote_that_is_never_closed(tmp_path):
    path = written(tmp_path / "a.csv", 'anchor,positive\na,b\nc,"d\ne,f\n')
    for streaming in (False, True):
        message = error_of(lambda s: list(read_file(path, streaming=s)), streaming)
        assert (
            message.startswith(f"{path}: cannot be read as csv: a quote in line 3 is not closed") and "--no_quoting" in message
        )


@pytest.mark.parametrize(("lines", "number"), [('"he said \\"hi\\"",a\n', 2), ('a,"b\nc,"d"\n', 3)])
def test_a_quote_that_ends_a_cell_too_early(tmp_path, lines, number):
    """BUG: a text with quotes after backslashes lost one of them, and cells around an open quote were joined."""
    message = error_of(read_file, written(tmp_path / "a.csv", f"anchor,positive\n{lines}"))
    assert f"line {number}: ',' expected after '\"'; write a quote within a quoted cell twice" in message


def test_columns_of_a_table(tmp_path):
    # pandas writes the index of a DataFrame as a column without a name.
    assert read_file(written(tmp_path / "a.csv", ",text\n0,a\n1,b\n")).column_names == ["Unnamed: 0", "text"]
    assert "two columns are named 'b'" in error_of(read_file, written(tmp_path / "b.csv", "a,b,b\nx,y,z\n"))
    path = written(tmp_path / "c.csv", "anchor,positive\na,b\n\nc,d,e\n")
    for streaming in (False, True):
        message = error_of(lambda s: list(read_file(path, streaming=s)), streaming)
        assert "line 4 has 3 cells, but the header has 2" in message and message.endswith("quote a cell that contains a comma")
    message = error_of(read_file, written(tmp_path / "c.tsv", "anchor\tpositive\na\tb\tc\n"))
    assert message.endswith("remove a tab from a cell that contains one")  # BUG: in a tsv file, quotes enclose nothing
    assert both_ways(written(tmp_path / "d.csv", "anchor,negative\na,b\nc\n"))[1] == {"anchor": "c", "negative": None}


# ---- lists in cells ----

LISTS = {
    "pandas": str(["a bird", "a fish"]),
    "quotes within": str(["it's", 'a "fish"']),
    "numpy": "['a bird' 'a fish']",
    "numpy's repr": "array(['a bird', 'a fish'], dtype=object)",
    "json": json.dumps(["a bird", "a fish"]),
    "empty": "[]",
    "several lines": "['a bird'\n 'a fish']",
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_in_a_cell_is_no_negative(case, tmp_path, tokenizer):
    table = pandas.DataFrame(
        {"anchor": ["a cat", "a dog"], "positive": ["a kitten", "a puppy"], "neg": ["a tree", LISTS[case]]}
    )
    table.to_csv(tmp_path / "a.csv", index=False)
    rows = read_file(str(tmp_path / "a.csv"))
    assert row_texts(rows[0], rows.column_names, "row 1") == ["a cat", "a kitten", "a tree"]
    message = error_of(row_texts, rows[1], rows.column_names, "row 2")
    assert message.startswith("row 2, column 'neg': the text looks like a list, ") and "jsonl or parquet" in message
    entry = {"name": "s", "file": "a.csv", "streaming": True, "rows": 2, "negatives": 1}
    assert "column 'neg': the text looks like a list" in error_of(streamed, *read_sources(listed(tmp_path, entry)), tokenizer)


@pytest.mark.parametrize("column", ["anchor", "positive"])
def test_columns_of_lists_are_no_anchors_and_no_positives(column, tmp_path, tokenizer):
    table = pandas.DataFrame(
        {"anchor": ["a", "b", "c"], "positive": ["d", "e", "f"]} | {column: [["x", "y"], ["z"], ["u", "v"]]}
    )
    table.to_csv(tmp_path / "a.csv", index=False)
    expected = f"column '{column}': every text looks like a list, ['x', 'y']; write one text per row"
    assert expected in error_of(tokenize_rows, read_file(str(tmp_path / "a.csv")), tokenizer, 16)
    entry = {"name": "s", "file": "a.csv", "streaming": True, "rows": 3}
    assert expected in error_of(streamed, *read_sources(listed(tmp_path, entry)), tokenizer)
    table.loc[1, column] = "a text"  # one plain text in the column: all cells count as texts
    table.to_csv(tmp_path / "b.csv", index=False)
    assert len(tokenize_rows(read_file(str(tmp_path / "b.csv")), tokenizer, 16)) == 3


@pytest.mark.parametrize(
    "text", ["[citation needed]", "a['x']", "[1] Smith, 'On lists'", "(laughs)", "['", "'a', 'b'", "[a, b]"]
)
def test_brackets_in_texts_are_texts(text):
    assert not is_list(text)


def test_lists_of_jsonl_and_parquet_are_several_negatives(tmp_path, tokenizer):
    rows = [{"anchor": f"a{i}", "positive": f"p{i}", "negatives": ["['x']", "y"][:i]} for i in range(3)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in (jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        tokens = tokenize_rows(read_file(path), tokenizer, 16)
        assert [len(ids) for ids in tokens["text_ids"]] == [2, 3, 4]  # an item of a list is a text, whatever it looks like


def passage(title, text):
    return {"docid": text, "title": title, "text": text}


PASSAGES = {
    "Tevatron": ("query", "positive_passages", "negative_passages"),
    "DPR": ("question", "positive_ctxs", "hard_negative_ctxs"),
    "named": ("query", "positives", "neg"),
}


@pytest.mark.parametrize("kind", PASSAGES)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "list", "stream"])
def test_passages_are_read_with_their_titles(kind, ending, tmp_path, tokenizer):
    query, positives, negatives = PASSAGES[kind]
    rows = [
        {
            query: "who",
            positives: [passage("T", "one"), passage("", "two")],
            negatives: [passage("U", "x"), passage(None, "y")],
        },
        {query: "why", positives: [passage("T", "three")], negatives: []},
    ]
    texts = [["who", "T one", "U x", "y"], ["who", "two", "U x", "y"], ["why", "T three"]]
    expected = tokenize_rows(
        [dict(zip(("anchor", "positive", "negative"), [*row[:2], row[2:]])) for row in texts], tokenizer, 16
    )
    path = jsonl(tmp_path / "a.jsonl", rows)
    if ending == "parquet":
        Dataset.from_list(rows).to_parquet(path := str(tmp_path / "a.parquet"))
    if ending == "stream":
        (source,) = read_sources(
            listed(tmp_path, {"name": "s", "file": "a.jsonl", "streaming": True, "rows": 2, "negatives": 2})
        )
        found = streamed(source, tokenizer).__getitems__([0, 1, 2])
        assert sorted(row["input_ids"] for row in found) == sorted(expected["input_ids"][:])
        return
    found = tokenize_rows(rows if ending == "list" else read_file(path), tokenizer, 16)
    assert found["input_ids"][:] == expected["input_ids"][:]
    if ending != "list":
        assert read_pairs(read_file(path), path) == [tuple(row[:2]) for row in texts]
        assert read_reranking(path).judged == [("who", ["T one", "two"], ["U x", "y"])]
        (batch,) = batches(read_file(path), [query, positives, negatives], path)
        assert batch.positives == [row[1] for row in texts] and batch.negatives == ["U x", "y"] * 2


def test_an_object_without_a_text_is_no_passage(tokenizer):
    rows = [
        {"query": "q", "positive": {"title": "T", "contents": "x"}},
        {"query": "r", "positive": {"title": "T", "contents": "y"}},
    ]
    assert "row 1, column 'positive': the text is not a string ({'title': 'T'" in error_of(tokenize_rows, rows, tokenizer, 16)


# ---- labels beside pairs ----


def read_pairs_of(path):
    return read_pairs(read_file(path), path)


JUDGED = ["label", "Score", "gold_label", "is_duplicate", "isDuplicate", "relevance", "similarity_score", "entailment_label",
          "label_text", "relatedness_score", "score1"]  # fmt: skip


@pytest.mark.parametrize("column", JUDGED)
def test_a_judgement_beside_a_pair_is_refused(column, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": f"b{i}", column: i} for i in (0, 1)])
    message = error_of(text_columns, read_file(path).column_names, path)
    assert message.startswith(f"{path}: the column '{column}' judges the pairs") and f"--ignore_columns {column} " in message
    assert f"'{column}' judges the pairs" in error_of(read_pairs_of, path)
    mapped = {"name": "s", "file": "a.jsonl", "columns": {"query": "anchor", "positive": "positive"}}
    for more in ({}, {"streaming": True, "rows": 2, "negatives": 2}):
        assert f"'{column}' judges the pairs" in error_of(read_sources, listed(tmp_path, mapped | more))
        (source,) = read_sources(listed(tmp_path, mapped | more | {"ignore_columns": column}))
        assert list(source.rows)[1] == {"anchor": "a", "positive": "b1"}
    rows, _ = read_train_rows(DataArguments(train_file=path, ignore_columns=[column]))
    assert text_columns(rows.column_names, path) == ["anchor", "positive"]


def test_columns_that_judge_no_pair_are_left_unused(caplog):
    unused = ["id", "genre", "title", "underscore", "labeled_by", "yes", "language", "simple"]
    assert text_columns(["anchor", "positive", *unused], "rows") == ["anchor", "positive"]
    assert text_columns(["text", "label"], "rows") == ["text"]  # a label is no judgment of a single text
    assert caplog.messages == [
        f"rows: columns {', '.join(unused)} are not used",
        "rows: columns label are not used; each row is a single text, 'text'",
    ]


def test_ignored_columns_must_be_there(tmp_path):
    path = written(tmp_path / "a.csv", "anchor,positive\na,b\n")
    expected = "there is no column 'label' to ignore; found anchor, positive"
    assert expected in error_of(read_train_rows, DataArguments(train_file=path, ignore_columns=["label"]))
    assert expected in error_of(read_sources, listed(tmp_path, {"name": "s", "file": "a.csv", "ignore_columns": ["label"]}))
    given = DataArguments(sources=listed(tmp_path, {"name": "s", "file": "a.csv"}), ignore_columns=["label"])
    assert "do not apply to --sources; set them in the sources file" in error_of(read_train_rows, given)
    (parsed,) = cli.parse([DataArguments], argv=["--ignore_columns", "label", "score"])
    assert parsed.ignore_columns == ["label", "score"]


# ---- jsonl ----

FILLER = "word " * 600


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Write a file for each way in which a column may begin, or change its type, only after 10.5 MB. Return their folder.

    `datasets` alone would guess the columns from the first 10 MB.
    """
    folder = tmp_path_factory.mktemp("late")
    early = {"null": {"negatives": None}, "empty": {"negatives": []}, "absent": {}}
    for name, part in early.items():
        rows = [{"query": f"q{i}", "positive": f"p{i}", "note": FILLER} | part for i in range(3500)]
        rows += [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}", "m"]} for i in (3500, 3501)]
        jsonl(folder / f"{name}.jsonl", rows)
    rows = [{"id": i if i < 3500 else f"x{i}", "query": f"q{i}", "positive": f"p{i}", "note": FILLER} for i in range(3502)]
    jsonl(folder / "id.jsonl", rows)
    assert all(path.stat().st_size > 10 << 20 for path in folder.iterdir())
    return folder


@pytest.mark.parametrize("case", ["null", "empty", "absent"])
def test_negatives_that_begin_late_are_read(late, case, tokenizer):
    rows = read_file(str(late / f"{case}.jsonl"))
    assert rows[3501]["negatives"] == ["n3501", "m"] and not rows[0]["negatives"] and len(rows) == 3502
    tokens = tokenize_rows(rows.select([0, 3500, 3501]), tokenizer, 8)
    assert [len(ids) for ids in tokens["text_ids"]] == [2, 4, 4]


@pytest.mark.parametrize("case", ["null", "empty"])
@pytest.mark.parametrize("mapped", [False, True])
def test_negatives_that_begin_late_are_streamed(late, case, mapped, tmp_path, tokenizer):
    entry = {"name": "s", "file": str(late / f"{case}.jsonl"), "streaming": True, "rows": 3502, "negatives": 1}
    if mapped:
        entry["columns"] = {"query": "query", "positive": "positive", "negatives": "negatives"}
    (source,) = read_sources(listed(tmp_path, entry))
    name = "negative" if mapped else "negatives"
    assert [len(row[name] or []) for row in source.rows.skip(3499)] == [0, 2, 2]
    stream = streamed(source, tokenizer)
    texts = [len(row["text_ids"]) for row in stream.__getitems__(list(range(3502)))]
    assert sorted(texts) == [2] * 3500 + [3] * 2


def test_a_column_of_negatives_that_begins_late_in_a_stream_is_refused(late, tmp_path, tokenizer):
    entry = {"name": "s", "file": str(late / "absent.jsonl"), "streaming": True, "rows": 3502}
    (source,) = read_sources(listed(tmp_path, entry))
    message = error_of(streamed(source, tokenizer).__getitems__, list(range(3502)))
    assert "column negatives begins after the first rows; give it in each row, maybe as null, or set negatives: 0" in message
    (source,) = read_sources(listed(tmp_path, entry | {"negatives": 0}))
    assert {len(row["text_ids"]) for row in streamed(source, tokenizer).__getitems__(list(range(3502)))} == {2}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_an_empty_cell_of_a_table_is_no_negative(ending, tmp_path, tokenizer):
    """BUG: pandas writes a missing negative as an empty cell, for which the row was refused, or dropped with its positive."""
    table = pandas.DataFrame(
        {"query": ["a", "b"], "positive": ["c", "d"], "negative_1": ["e", None], "negative_2": [None, "f"]}
    )
    table.to_csv(path := str(tmp_path / f"a.{ending}"), index=False, sep="," if ending == "csv" else "\t")
    expected = tokenize_rows(table, tokenizer, 16)["input_ids"][:]
    assert tokenize_rows(read_file(path), tokenizer, 16)["input_ids"][:] == expected
    assert expected[1] == tokenizer(["b", "d", "f"])["input_ids"]
    assert read_triplets(path) == Triplets(["a", "b"], ["c", "d"], ["e", "f"])
    text = (tmp_path / f"a.{ending}").read_text()
    for old, new in (("b", ""), ("d", ""), ("f", " ")):  # an empty query or positive is an error, and so is a blank
        message = error_of(tokenize_rows, read_file(written(tmp_path / f"b.{ending}", text.replace(old, new))), tokenizer, 16)
        assert "row 2, column" in message and "the text is empty" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_negatives_that_are_there_from_the_start(name, tmp_path, caplog, tokenizer):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "hard_neg": f"n{i}"} for i in range(1100)]
    if name == "a.csv":
        pandas.DataFrame(rows).to_csv(tmp_path / name, index=False)
    else:
        rows[1099]["hard_neg_2"] = "m"
        jsonl(tmp_path / name, rows)
    (source,) = read_sources(listed(tmp_path, {"name": "s", "file": name, "streaming": True, "rows": 1100, "negatives": 2}))
    stream = streamed(source, tokenizer)
    assert stream.columns == ["query", "positive", "hard_neg"] and not caplog.messages
    if name == "a.jsonl":  # the stream has no column for a second negative
        assert "column hard_neg_2 begins after" in error_of(stream.__getitems__, list(range(1100)))
    else:
        assert {len(row["text_ids"]) for row in stream.__getitems__(list(range(1100)))} == {3}


NO_LIST = {"negatives": [[], []]}  # of no type


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({}, {"negatives": ["x", "y"]}, True),
        ({"negatives": [None, None]}, {"negatives": ["x", "y"]}, True),
        (NO_LIST, {"negatives": [["x"], []]}, True),
        ({"negatives": [["x"], []]}, NO_LIST, False),
        (NO_LIST, NO_LIST, False),
        ({"negatives": ["x", "y"]}, {}, False),
    ],
)
def test_columns_of_several_parquet_files(first, second, refused, tmp_path):
    """BUG: the message named the first file only, and no column; a stream ended in a traceback."""
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    for path, more in zip(paths, (first, second)):
        pyarrow.parquet.write_table(pyarrow.table({"anchor": ["a", "b"], "positive": ["c", "d"]} | more), path)
    for streaming in (False, True):
        if refused:
            message = error_of(read_file, paths, streaming=streaming)
            assert message.startswith(f"{paths[1]}: the column 'negatives' has no values in {paths[0]}; give files with the")
        else:
            assert [bool(row["negatives"]) for row in read_file(paths, streaming=streaming)] == [
                bool(cell) for more in (first, second) for cell in more.get("negatives", [None, None])
            ]


def test_an_unused_column_may_change_its_type(late, tokenizer):
    rows = read_file(str(late / "id.jsonl"))
    assert rows[0]["id"] == 0 and rows[3501]["id"] == "x3501" and rows[3501]["positive"] == "p3501"
    streamed = read_file(str(late / "id.jsonl"), streaming=True)
    assert [row["id"] for row in streamed.skip(3499)] == [3499, "x3500", "x3501"]


VALUES = {
    "whole numbers": [1, None, -5],
    "numbers": [1, 2.5, None],
    "true and false": [True, None, False],
    "texts and numbers": ["7", 7, None, "a"],
    "objects": [{"a": 1}, {"b": ["x"]}, None],
    "lists of numbers": [[1, 2], [], [2.5]],
    "lists of texts": [["a"], [], None, ["b", None]],
    "text and true": ["x", True],
}


@pytest.mark.parametrize("case", VALUES)
def test_json_values_keep_their_types(case, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t", "value": value} for value in VALUES[case]])
    assert [row["value"] for row in both_ways(path)] == VALUES[case]
    assert read_file(path)["value"][:] == VALUES[case]


def test_one_negative_or_a_list_of_them(tmp_path, tokenizer):
    cells = ["n", ["m", "o"], None, []]
    path = jsonl(tmp_path / "a.jsonl", [{"anchor": f"a{i}", "positive": f"p{i}", "negatives": c} for i, c in enumerate(cells)])
    assert [len(ids) for ids in tokenize_rows(read_file(path), tokenizer, 16)["text_ids"]] == [3, 4, 2, 2]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("cells", "row", "shown"), [([7, 8, 9], 1, "7"), (["a", "b", 2.5], 3, "2.5"), ([True, False, True], 1, "True")]
)
def test_numbers_are_no_texts(ending, cells, row, shown, tmp_path, tokenizer):
    if ending == "parquet" and row > 1:
        pytest.skip("a column of parquet has one type")
    rows = [{"anchor": f"a{i}", "positive": cell} for i, cell in enumerate(cells)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    if ending == "parquet":
        pandas.DataFrame(rows).to_parquet(path := str(tmp_path / "a.parquet"))
    message = error_of(tokenize_rows, read_file(path), tokenizer, 16, path)
    assert message.startswith(f"{path}, row {row}, column 'positive': the text is not a string ({shown})")
    path = jsonl(tmp_path / "b.jsonl", [{"text": cell} for cell in cells])
    assert f"row {row}, column 'text': the text is not a string ({shown})" in error_of(read_texts, path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "jsonl"])
def test_a_file_of_another_kind_than_its_name_says(ending, tmp_path):
    """BUG: the message was about a NUL byte and UTF-16."""
    path = written(tmp_path / f"a.{ending}", gzip.compress(b"question,answer\na,b\n"))
    assert error_of(read_file, path) == (
        f"{path}: cannot be read as {ending}: the file is compressed by gzip; decompress it, or add .gz to its name"
    )
    path = written(tmp_path / f"plain.{ending}.gz", b"question,answer\na,b\n")
    assert error_of(read_file, path) == (
        f"{path}: cannot be read as {ending}: the file is not compressed by gzip; remove .gz from its name"
    )
    pandas.DataFrame({"question": ["a"], "answer": ["b"]}).to_parquet(tmp_path / "b.parquet")
    path = written(tmp_path / f"b.{ending}", (tmp_path / "b.parquet").read_bytes())
    assert error_of(read_file, path).endswith("the file is a parquet file; give it the ending .parquet")


def test_missing_values_of_pandas_are_no_negatives(tmp_path, tokenizer):
    rows = [{"anchor": "a", "positive": "b", "negative": float("nan")}, {"anchor": "c", "positive": "d", "negative": "e"}]
    path = jsonl(tmp_path / "a.jsonl", rows)  # json.dumps writes the missing value as NaN
    assert [len(ids) for ids in tokenize_rows(read_file(path), tokenizer, 16)["text_ids"]] == [2, 3]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', "line 3: "),
        ("a.jsonl", '{"text": "a"}\n7\n', "line 2: expected a JSON object"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2: expected a JSON object"),
        ("a.jsonl", '\n["a", "b"]\n["c", "d"]\n', "line 2 is a list; expected a JSON object in each line, such as"),
        ("a.json", '[{"text": "a"}, ["b", "c"]]', 'row 2: expected a JSON object, such as {"anchor": '),
        ("a.json", '{\n  "text": "a"\n}', "expected a list of JSON objects, or one object per line"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2: "),
    ],
)
def test_bad_json(name, content, expected, tmp_path):
    path = written(tmp_path / name, content)
    for streaming in (False, True):
        message = error_of(lambda s: list(read_file(path, streaming=s)), streaming)
        assert message.startswith(f"{path}: cannot be read as {name[2:]}: {expected}")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_list_of_objects_or_of_texts(name, tmp_path):
    assert both_ways(written(tmp_path / name, '\n[\n{"text": "a"},\n{"text": "b", "id": 1}]')) == [
        {"text": "a", "id": None}, {"text": "b", "id": 1}
    ]  # fmt: skip
    assert both_ways(written(tmp_path / f"b{name}", '["a", "b"]')) == [{"text": "a"}, {"text": "b"}]


def test_a_file_that_has_changed_is_read_again(tmp_path):
    """BUG: the cached rows were those of the earlier file if the new one had its size and its time of change."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    assert read_file(path)["text"][:] == ["old"]
    before = os.stat(path).st_mtime_ns
    jsonl(tmp_path / "a.jsonl", [{"text": "new"}])
    os.utime(path, ns=(before, before))
    assert read_file(path)["text"][:] == ["new"]
    jsonl(tmp_path / "a.jsonl", [{"text": "newer"}])
    assert read_file(path)["text"][:] == ["newer"]
    first = read_file(path)
    assert content_of(first) == content_of(read_file(path))  # so cached tokens are found


@pytest.mark.parametrize("read", [read_file, lambda path: read_hub(os.path.dirname(path))], ids=["file", "folder"])
def test_a_parquet_file_that_has_changed_is_read_again(read, tmp_path):
    """BUG: a file that another one with the same time of change had replaced was not read."""
    path = str(tmp_path / "data" / "a.parquet")
    os.mkdir(os.path.dirname(path))
    for texts in (["old"], ["new"], ["new", "newer"]):
        pandas.DataFrame({"text": texts}).to_parquet(path)
        os.utime(path, (1, 1))
        assert read(path)["text"][:] == texts


# ---- encodings and odd bytes ----

SAMPLES = {"txt": "one é\ntwo\n", "csv": "text,id\none é,1\ntwo,2\n", "tsv": "text\tid\none é\t1\ntwo\t2\n",
           "jsonl": '{"text": "one é"}\n{"text": "two"}\n', "json": '[{"text": "one é"},\n{"text": "two"}]'}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLES)
def test_encodings(kind, tmp_path):
    def read(content, name):
        path = written(tmp_path / f"{name}.{kind}", content)
        return path, lambda: [row["text"] for row in both_ways(path)]

    text = SAMPLES[kind]
    for name, content in (("bom", text.encode("utf-8-sig")), ("windows", text.replace("\n", "\r\n").encode())):
        assert read(content, name)[1]() == ["one é", "two"]
    line = "1" if kind in ("txt", "jsonl", "json") else "2"
    path, reading = read(text.encode("cp1252"), "cp1252")
    assert error_of(reading).startswith(
        f"{path}: cannot be read as {kind}: 'utf-8' codec can't decode byte 0xe9 in line {line}; "
    )
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        path, reading = read(text.encode(encoding), encoding)
        assert error_of(reading).startswith(f"{path}: cannot be read as {kind}: ") and "UTF-16" in error_of(reading)
    path, reading = read(text.replace("two", "t\0wo").encode(), "nul")
    assert f"line {int(line) + 1} contains a NUL byte" in error_of(reading)


def test_a_table_in_a_txt_file_is_warned_of(tmp_path, caplog):
    """BUG: the numbers of the lines, as the Leipzig corpora have them, were trained on as a part of the sentences."""
    rows = read_file(written(tmp_path / "a.txt", "1\tone\n2\ttwo\n\n3\tthree\n"))
    assert rows["text"][:2] == ["1\tone", "2\ttwo"]
    assert "a.txt: each line has 1 tab(s), which are read as part of its text" in caplog.text
    assert "if they separate columns, give the file the ending .tsv" in caplog.text
    caplog.clear()
    read_file(written(tmp_path / "b.txt", "one\ttab\nnone\n"))
    assert not caplog.messages


def test_text_lines_end_in_any_way(tmp_path):
    path = written(tmp_path / "a.txt", b"one\r\ntwo\rthree\n\nfour\x0c\xe2\x80\xa8five")
    assert [row["text"] for row in both_ways(path)] == ["one", "two", "three", "", "four\x0c\u2028five"]
    assert "carriage returns alone" in error_of(read_file, written(tmp_path / "a.tsv", b"text\tid\rone\t1\r"))
    message = error_of(read_file, written(tmp_path / "a.csv", b"text,id\rone,1\r"))
    assert message.endswith("line 1 has a carriage return outside of quotes; save the file with line feeds")


@pytest.mark.parametrize("half", [r"\ud800", r"\uDFFF x", r"\ud83d\ud83d"])
def test_half_a_character_is_refused_with_its_line(half, tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\u00e9"}\n{"text": "' + half + '"}\n')
    for streaming in (False, True):
        message = error_of(lambda s: list(read_file(path, streaming=s)), streaming)
        assert message.startswith(f"{path}: cannot be read as jsonl: line 2: ") and "half of a character" in message
    whole = written(tmp_path / "b.jsonl", '{"text": "\\ud83d\\ude00 \\u00e9"}\n{"text": "\\\\ud800"}\n')
    assert [row["text"] for row in both_ways(whole)] == ["😀 é", "\\ud800"]


def test_an_error_late_in_a_stream_names_the_file(tmp_path, tokenizer):
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1500))
    entry = {"name": "s", "file": "a.jsonl", "streaming": True, "rows": 1500}
    path = written(tmp_path / "a.jsonl", rows.encode() + b'{"text": "\xe9"}\n')
    stream = streamed(*read_sources(listed(tmp_path, entry)), tokenizer)
    assert f"{path}: cannot be read as jsonl: 'utf-8' codec" in error_of(stream.__getitems__, list(range(1501)))


def test_addresses_are_read_by_their_path(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    content = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/a.jsonl.gz?version=1"
        assert both_ways(address) == [{"text": "one"}, {"text": "two"}]
    finally:
        server.shutdown()
        text_files.DOWNLOADED.clear()


@pytest.mark.parametrize("reader", [read_file, read_sts])
def test_the_message_about_an_address_says_why_it_cannot_be_read(reader, monkeypatch):
    """BUG: the reason was the address again, or "[Errno %s not found. The URL contains glob characters"."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    message = error_of(reader, "http://127.0.0.1:1/a.csv?version=1")
    assert message.startswith("http://127.0.0.1:1/a.csv: cannot be read as csv: ") and "Connect call failed" in message


# ---- numbers where texts belong, in mining ----


def test_corpus_file_of_numbers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("recipes")
    recipe = __import__("mine_hard_negatives")
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b", "label": 1}])
    corpus = jsonl(tmp_path / "corpus.jsonl", [{"text": 1}, {"text": 2}])
    args = recipe.Arguments("model", "out.jsonl", train_file=pairs, corpus_file=corpus, ignore_columns=["label"])
    assert f"{corpus}, row 1, column 'text': the text is not a string (1)" in error_of(recipe.read_pairs, args)
    args.corpus_file = written(tmp_path / "corpus.csv", "text;id\na;1\n")
    assert "the separator seems to be ';'" in error_of(recipe.read_pairs, args)
    # BUG: the message advised --columns, which is not for this file.
    args.corpus_file = written(tmp_path / "other.csv", "nr,body\n1,a\n")
    assert error_of(recipe.read_pairs, args).endswith("found the columns nr, body; rename the column of the texts to text")
    args.corpus_file, args.ignore_columns = None, []
    assert "'label' judges the pairs" in error_of(recipe.read_pairs, args)


def test_judged_pairs_with_an_empty_text_are_left_out(tmp_path, monkeypatch, caplog):
    """BUG: a pair with an empty query was written, and the training refused the file."""
    monkeypatch.syspath_prepend("recipes")
    recipe = __import__("mine_hard_negatives")
    jsonl(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": " "}])
    jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "two"}, {"_id": "r", "text": " "}])
    written(tmp_path / "qrels" / "test.tsv", "q\ta\t1\nq\tb\t1\nr\ta\t1\n")
    args = recipe.Arguments("model", "out.jsonl", retrieval_dir=str(tmp_path))
    assert recipe.read_pairs(args)[0] == [("two", "one")]
    assert caplog.messages == [f"{tmp_path}: 2 of 3 judged pairs have an empty text; they are left out"]


def test_reading_parquet_shows_no_bar_in_a_log_file(tmp_path, capsys, monkeypatch):
    """BUG: the bars of `datasets` were written into log files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pandas.DataFrame({"question": ["a", "b"], "answer": ["c", "d"]}).to_parquet(path := str(tmp_path / "a.parquet"))
    assert len(read_file(path)) == 2
    assert capsys.readouterr().err == "" and not datasets.utils.are_progress_bars_disabled()


@pytest.mark.parametrize("numbers", [[2**60, 1.5], [1.5, 2**53 + 1, 3], [2**60, 7], [7, 1.5]])
def test_large_whole_numbers_beside_others_are_read(numbers, tmp_path):
    """BUG: a whole number that is no float, beside a float, ended in a traceback, even in a column that is not used."""
    rows = [{"anchor": "a", "positive": f"b{i}", "size": number} for i, number in enumerate(numbers)]
    rows = read_file(jsonl(tmp_path / "a.jsonl", rows))
    assert rows["positive"][:] == [f"b{i}" for i in range(len(numbers))] and rows["size"][:] == numbers


# ---- long texts ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_gets_the_same_tokens_from_its_beginning(side, tokenizer, monkeypatch):
    """With truncation on the right, only the beginning of a long text is tokenized. The token ids stay the same."""
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    words = [f"word{i % 997}," * (1 + i % 3) + "\n" * (i % 2) for i in range(5000)]
    texts = [" ".join(words), "   " + "\t".join(words), "x" * 30_000 + " " + " ".join(words), "我们" * 20_000, "x" * 50_000]
    texts.append("1\x1f" * 500)  # BUG: this tokenizer removes \x1f, so this is one word, and an unknown one, as it is so long
    for text in texts:
        expected = tokenizer(text, truncation=True, max_length=12)["input_ids"]
        found = RowTokenizer(tokenizer, 12)([[text]])
        assert found["input_ids"] == [[expected]] and found["truncated"] == [int(len(tokenizer(text)["input_ids"]) > 12)]
    assert (len(beginning(texts[0], 12, tokenizer)) < 1000) == (side == "right")


def test_training_refuses_a_prompt_that_leaves_no_room(tokenizer):
    """BUG: a prompt longer than max_length ended in the OverflowError of the tokenizer."""
    for length in (3, 6, 8):
        message = error_of(RowTokenizer, tokenizer, length, "", "find the text that says: ")
        assert f"has 6 tokens, so max_length {length} leaves no room" in message
    assert RowTokenizer(tokenizer, 9, "", "find the text that says: ").text_length == 3


@pytest.mark.parametrize("words_without_tokens", [100, 700, 20_000])
@pytest.mark.parametrize("word", ["\u200b", "\u00ad", "\x01"])
def test_words_without_tokens_do_not_hide_the_text_after_them(word, words_without_tokens, tokenizer):
    """BUG: the text was cut after so many words, as if each had a token, and only the special tokens were left."""
    text = f"{word} " * words_without_tokens + "the cat sat on the mat"
    expected = tokenizer("the cat sat on the mat")["input_ids"]
    assert RowTokenizer(tokenizer, 16)([[text]]) == RowTokenizer(tokenizer, 16)([["the cat sat on the mat"]])
    assert RowTokenizer(tokenizer, 16)([[text]])["input_ids"] == [[expected]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_long_lines_take_linear_time(kind, tmp_path, tokenizer):
    """A line of four times the length takes at most eight times as long, and less than a second per megabyte."""

    def seconds(megabytes):
        text = "the quick brown fox jumps over it " * (megabytes * 10**6 // 34)
        rows = {"txt": f"{text}\nshort\n", "csv": f"text,id\n{text},1\nshort,2\n", "tsv": f"text\tid\n{text}\t1\nshort\t2\n",
                "jsonl": "".join(json.dumps({"text": t}) + "\n" for t in (text, "short"))}  # fmt: skip
        path = written(tmp_path / f"{megabytes}.{kind}", rows[kind])
        start = time.process_time()
        rows = read_file(path)
        assert (
            len(list(read_file(path, streaming=True))) == len(tokenize_rows(rows.select_columns(["text"]), tokenizer, 32)) == 2
        )
        return time.process_time() - start

    seconds(1)
    short, long = seconds(4), seconds(16)
    assert long < 16 and long < 8 * max(short, 0.2)


def test_logging_is_quiet_for_clean_files(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for kind, content in SAMPLES.items():
            both_ways(written(tmp_path / f"a.{kind}", content))
    assert not caplog.messages and isinstance(read_file(str(tmp_path / "a.csv")), Dataset)


def test_several_splits_in_one_file_are_warned_of(tmp_path, caplog):
    """BUG: the files stsbenchmark.tsv.gz and AllNLI.tsv.gz of sentence-transformers hold all splits, which were read as one."""
    lines = [f"{split}\t{i}\ta {i}\tb" for i, split in enumerate(["train", "dev", "test", "dev"])]
    path = written(tmp_path / "a.tsv", "\n".join(["split\tscore\tsentence1\tsentence2", *lines]))
    assert len(read_sts(path)) == 4
    assert caplog.messages == [
        f"{path}: the column 'split' names the splits dev, test, train, and the rows of all of them are used; keep those of "
        "one in the file"
    ]
    caplog.clear()
    read_sts(written(tmp_path / "b.tsv", "\n".join(["split\tscore\tsentence1\tsentence2", lines[1], lines[3]])))
    assert not caplog.messages


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    assert error_of(read_file, str(tmp_path / "a.csv")).endswith(
        "a.csv: this is a folder; name a file in it (several files, or a pattern, can only be given in --sources)"
    )
    assert "b.csv: this file does not exist; check the path" in error_of(read_file, str(tmp_path / "b.csv"))
