"""The path from files to batches: read, check, tokenize, sample and collate."""

import csv
import doctest
import gzip
import hashlib
import itertools
import json
import shutil
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
from conftest import error_of, tokenize_rows
from datasets import Dataset

from hf_embed.data import tokenization
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.columns import ACCEPTED, text_columns
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import read_file, row_texts
from hf_embed.data.tokenization import text_id, truncated_share, warn_of_truncation
from hf_embed.forward.chunking import move_back, move_tokens, pad_chunk, plan_chunks
from hf_embed.forward.packing import groups_to_pool


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


THINGS = [
    GlobalBatchSampler,
    RaggedCollator,
    SourceBatchSampler,
    groups_to_pool,
    move_back,
    move_tokens,
    pad_chunk,
    plan_chunks,
]


@pytest.mark.parametrize("thing", THINGS)
def test_docstring_examples(thing):
    (example,) = doctest.DocTestFinder(recurse=False).find(thing)
    report = []
    results = doctest.DocTestRunner().run(example, out=report.append)
    assert results.attempted > 0 and results.failed == 0, "".join(report)


# ---- files ----

COLUMNS = ["text", "positive"]
TEXTS = [["plain", "007"], ["NA", "1e5"], ['he said "hi"', "null"], ['"open', "comma, inside"], ["ünï 猫", "None"]]


def write_table(path, columns=tuple(COLUMNS), rows=TEXTS):
    """Write a file of the kind that its name says, gzipped if the name ends in .gz. A txt file has only the first column."""
    kind = path.name.split(".")[1].lower()
    plain = path.with_name(f"plain.{kind}")
    if kind == "parquet":
        pandas.DataFrame(rows, columns=list(columns)).to_parquet(plain)
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows([columns, *rows])
            elif kind == "tsv":
                file.writelines("\t".join(row) + "\n" for row in [columns, *rows])
            elif kind == "txt":
                file.writelines(f"{row[0]}\n" for row in rows)
            else:
                items = [dict(zip(columns, row)) for row in rows]
                file.write(json.dumps(items) if kind == "json" else "".join(json.dumps(i) + "\n" for i in items))
    if path.suffix.lower() == ".gz":
        with plain.open("rb") as source, gzip.open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    else:
        plain.rename(path)
    return str(path)


@pytest.mark.parametrize(
    "kind, gz", [*itertools.product(["txt", "csv", "tsv", "jsonl", "json"], ["", ".gz", ".GZ"]), ("parquet", "")]
)
def test_read_file_keeps_every_text(kind, gz, tmp_path):
    """Quotes, "NA" and "007" stay as they are."""
    rows = read_file(write_table(tmp_path / f"file.{kind.upper() if gz == '.GZ' else kind}{gz}"))
    assert rows.column_names == (["text"] if kind == "txt" else COLUMNS)
    assert [list(row.values()) for row in rows] == [row[: len(rows.column_names)] for row in TEXTS]


def test_read_file_without_header(tmp_path):
    rows = read_file(written(tmp_path / "a.tsv", "5\tx\n007\tNA\n"), header=False)
    assert rows.to_dict() == {"0": ["5", "007"], "1": ["x", "NA"]}
    # BUG: the numbers that pandas writes above columns without names were a row, for example a pair of an STS set.
    rows = read_file(written(tmp_path / "b.csv", "0,1\n5,x\n0,1\n"), header=False)
    assert rows.to_dict() == {"0": ["5", "0"], "1": ["x", "1"]}


GZIPPED = gzip.compress("".join(f"{i},{i * i}\n" for i in range(2000)).encode())
BAD_FILES = {
    "no file": ("absent.txt", None, "this file does not exist"),
    "empty": ("a.txt", "", "is empty"),
    "unknown kind": ("a.xml", "<a/>", "'.xml'"),
    "unknown kind in gz": ("a.doc.gz", "x", "'.doc'"),
    "no kind": ("a", "x", ".txt, .csv, .tsv, .jsonl, .json, .parquet"),
    "parquet": ("a.parquet", "x", "cannot be read as parquet"),
    "jsonl": ("a.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read as jsonl"),
    "json": ("a.json", '[{"text": "a"},', "cannot be read as json"),
    "quote not closed": ("a.csv", 'text,b\n"a,c\nd,e\n', "cannot be read as csv"),
    "a row with more cells than others": ("a.csv", "text,b\na,b\nc,d,e\n", "line 3"),
    "not UTF-8": ("a.txt", "caf\xe9\n".encode("latin-1"), "cannot be read as txt: 'utf-8'"),
    "only blank lines": ("a.csv", "\n\n", "cannot be read as csv"),
    "gz of txt": ("a.txt.gz", "not gzip", "cannot be read as txt"),
    "gz of csv": ("a.csv.gz", "not gzip", "cannot be read as csv"),
    "gz of jsonl": ("a.jsonl.gz", "not gzip", "cannot be read as jsonl"),
    # BUG: EOFError (from an incomplete download) and zlib.error are not subclasses of OSError, so the user saw a traceback.
    "gz cut off": ("a.csv.gz", GZIPPED[:-100], "cannot be read as csv"),
    "gz spoilt": ("a.csv.gz", GZIPPED[:500] + b"x" * 20 + GZIPPED[520:], "cannot be read as csv"),
    # BUG: The user saw 'Instruction "train" corresponds to no data!' instead of "no rows".
    "only a header": ("a.csv", "anchor,positive\n", "there are no rows"),
    # BUG: If every row has one cell more than the header, pandas uses the first column as the index, and all columns shift.
    "header too short": ("a.csv", "anchor,positive\na,b,c\nd,e,f\n", "header"),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_one_set_need_one_header(tmp_path, streaming):
    """BUG: The columns of the other files got the names of the first file's columns, by position."""
    for name, header in (("a", "query,positive"), ("b", "positive,query"), ("c", "query,positive,id")):
        (tmp_path / f"{name}.csv").write_text(f"{header}\n" + ",".join("xyz"[: header.count(",") + 1]) + "\n")
    paths = {name: str(tmp_path / f"{name}.csv") for name in "abc"}
    for other in "bc":
        message = error_of(read_file, [paths["a"], paths[other]], streaming=streaming)
        assert message.startswith(f"{paths[other]}: its columns are positive, query" if other == "b" else paths[other])
    assert list(read_file([paths["a"], paths["a"]], streaming=streaming)) == [{"query": "x", "positive": "y"}] * 2


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, tmp_path):
    name, content, expected = BAD_FILES[case]
    path = tmp_path / name
    if content is not None:
        written(path, content)
    message = error_of(read_file, str(path))
    assert message.startswith(f"{path}: ") and expected in message


def test_byte_order_mark_is_no_text(tmp_path):
    # BUG: The text reader of `datasets` keeps the byte order mark in the first text. The readers of csv and jsonl do not.
    assert read_file(written(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n"))["text"][:] == ["one", "two"]


def test_name_with_brackets_is_no_pattern(tmp_path):
    # BUG: `datasets` treats the name as a glob pattern. This one matches no file, and a*.txt would match other files as well.
    assert read_file(written(tmp_path / "a[1].txt", "one\ntwo\n"))["text"][:] == ["one", "two"]
    # BUG: In a sources file, this name meant a1.txt, if there was such a file.
    written(tmp_path / "a1.txt", "other\ntexts\n")
    (source,) = read_sources(written(tmp_path / "s.yaml", "- {name: a, file: 'a[1].txt'}"))
    assert source.rows["text"][:] == ["one", "two"]


# ---- columns ----


LAYOUTS = [
    # found columns, paired, columns that are used
    (["text"], None, ["text"]),
    (["Sentence", "id"], None, ["Sentence"]),
    (["id", " text"], None, [" text"]),
    (["whatever"], None, ["whatever"]),
    (["positive"], False, ["positive"]),
    (["sent0", "sent1"], None, ["sent0", "sent1"]),
    (["hard_neg", "sent1", "sent0"], None, ["sent0", "sent1", "hard_neg"]),
    (["anchor", "positive"], True, ["anchor", "positive"]),
    (["Positive", "NEGATIVE", "Anchor"], None, ["Anchor", "Positive", "NEGATIVE"]),
    (["query", "positive", "negatives"], None, ["query", "positive", "negatives"]),
    (
        ["negative_10", "negative_2", "anchor", "negative_1", "positive"],
        None,
        ["anchor", "positive", "negative_1", "negative_2", "negative_10"],
    ),
    (["anchor", "positive", "text"], None, ["anchor", "positive"]),
    (["anchor", "positive", "text"], False, ["text"]),
    (["query", "anchor", "positive"], None, ["anchor", "positive"]),
]


@pytest.mark.parametrize(("found", "paired", "taken"), LAYOUTS)
def test_columns(found, paired, taken, caplog):
    assert text_columns(found, "rows", paired) == taken
    unused = [c for c in found if c not in taken]
    alone = f"; each row is a single text, '{taken[0]}'" if paired is None and len(taken) == 1 else ""
    assert caplog.messages == ([f"rows: columns {', '.join(unused)} are not used{alone}"] if unused else [])


@pytest.mark.parametrize(
    ("found", "paired", "accepted"),
    [
        (["anchor", "label"], None, ACCEPTED),
        (["anchor", "positive"], False, "text and sentence"),
        (["text"], True, "anchor, positive[, negative...]"),
        (["positive"], None, "a pair needs two columns of texts"),  # BUG: the advice was to name it anchor and positive
        (["frage", "antwort", "negative"], True, "query, positive[, negative...]"),
    ],
)
def test_wrong_columns(found, paired, accepted):
    message = error_of(text_columns, found, "file.csv", paired)
    assert message.startswith(f"file.csv: found the columns {', '.join(found)}; ") and accepted in message


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [("", "is empty"), (" \t", "is empty"), ([None], "is missing"), (7, "is not a string (7)"), (["a", ""], "is empty")],
)
def test_bad_cell(cell, complaint):
    row = {"anchor": "a", "positive": "b", "negatives": cell}
    message = error_of(row_texts, row, list(row), "file, row 3")
    assert message.startswith("file, row 3, column 'negatives': the text " + complaint)


@pytest.mark.parametrize(
    ("name", "content", "row", "column"),
    [
        ("a.csv", "anchor,positive\na,b\nc, \n", 2, "positive"),
        ("b.csv", "anchor,positive\na,b\nc\n", 2, "positive"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"positive": "c"}\n', 2, "anchor"),
        ("a.txt", "line\n" * 1200 + "\n" + "line\n" * 300, 1201, "text"),  # after the first batch of `datasets`
    ],
)
def test_bad_row_of_a_file_is_found(name, content, row, column, tmp_path, tokenizer):
    path = written(tmp_path / name, content)
    message = error_of(tokenize_rows, read_file(path), tokenizer, 16, path)
    assert message.startswith(f"{path}, row {row}, column '{column}': the text is ")


@pytest.mark.parametrize("column", ["anchor"])
def test_an_anchor_is_no_list(column, tokenizer):
    # BUG: In a list of two anchors, the second became the positive. In a list of two positives, it became a hard negative.
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]} | {column: [["e", "f"], ["g", "h"]]})
    assert f"column '{column}'" in error_of(tokenize_rows, rows, tokenizer, 16)


# ---- tokens ----


def test_text_id():
    """A text id is the same on every machine and in every run. It is never 0, because 0 means that a text is absent."""
    little_endian = (7).to_bytes(8, "little") + (258).to_bytes(8, "little")
    expected = int.from_bytes(hashlib.blake2b(little_endian, digest_size=8).digest(), "big", signed=True)
    assert text_id([7, 258]) == expected
    ids = {text_id([i]) for i in range(1000)}
    assert len(ids) == 1000 and all(-(2**63) <= i < 2**63 for i in ids)


def test_text_id_is_never_zero(monkeypatch):
    zeros = SimpleNamespace(digest=lambda: bytes(8))
    monkeypatch.setattr(tokenization.hashlib, "blake2b", lambda *args, **kwargs: zeros)
    assert text_id([7]) != 0


def test_tokens_and_ids(tokenizer):
    texts = {"positive": ["a kitten", "a puppy"], "negatives": [["a tree", "a house"], []], "anchor": ["a cat", "dogs"]}
    rows = tokenize_rows(Dataset.from_dict(texts), tokenizer, 16)
    expected = [["a cat", "a kitten", "a tree", "a house"], ["dogs", "a puppy"]]
    assert rows["input_ids"][:] == [tokenizer(row)["input_ids"] for row in expected]
    assert rows["text_ids"][:] == [[text_id(ids) for ids in tokenizer(row)["input_ids"]] for row in expected]
    assert rows["truncated"][:] == [0, 0]


def test_prompts_are_tokenized_but_not_hashed(tokenizer):
    texts = {"anchor": ["a", "b"], "positive": ["c", "d"], "negative": ["e", "f"]}
    rows = tokenize_rows(Dataset.from_dict(texts), tokenizer, 16, prompts={"query": "find: ", "document": "text: "})
    assert rows["input_ids"][0] == tokenizer(["find: a", "text: c", "text: e"])["input_ids"]
    assert rows["text_ids"][0] == [text_id(ids) for ids in tokenizer(["a", "c", "e"])["input_ids"]]


def test_long_texts_are_cut_where_the_tokenizer_cuts(tokenizer):
    texts = ["one two three four five six seven", "one two three four"]
    rows = tokenize_rows(Dataset.from_dict({"text": texts}), tokenizer, 6)
    expected = tokenizer(texts, truncation=True, max_length=6)["input_ids"]
    assert [ids for row in rows["input_ids"] for ids in row] == expected
    assert [len(ids) for ids in expected] == [6, 6] and rows["truncated"][:] == [1, 0]


@pytest.mark.parametrize(("long", "warned"), [(5, False), (6, True)])
def test_truncation_warning_above_five_percent(long, warned, tokenizer, caplog):
    texts = ["one two three four five six"] * long + ["short"] * (100 - long)
    tokens = tokenize_rows(Dataset.from_dict({"text": texts}), tokenizer, 4, "file.txt")
    warn_of_truncation({"file.txt": truncated_share(tokens), "other.txt": 0.01})
    assert caplog.messages == ["texts truncated to max_length tokens: 6% in file.txt"] * warned


def test_truncation_of_many_sets_is_one_line(caplog):
    warn_of_truncation({f"s{i}": i / 100 for i in range(20)})
    assert caplog.messages == [
        "texts truncated to max_length tokens: 19% in s19, 18% in s18, 17% in s17, 16% in s16, 15% in s15 and less in 9 more"
    ]


def test_drop_empty_rows_counts_them(tokenizer, caplog):
    rows = Dataset.from_dict({"anchor": ["a", "", "c", "d"], "positive": ["e", "f", None, "h"]})
    tokens = tokenize_rows(rows, tokenizer, 16, "file.csv", drop_empty_rows=True)
    assert tokens["input_ids"][:] == [tokenizer(["a", "e"])["input_ids"], tokenizer(["d", "h"])["input_ids"]]
    assert caplog.messages == ["file.csv: 2 of 4 rows had an empty text and were dropped"]


@pytest.mark.parametrize(
    ("column", "number"),
    [("query", 0), ("query", {"a": "b"}), ("query", ["a", 1]), ("positive", False), ("positive", 7), ("negative", 0.0),
     ("negative", ["a", 1])],
)  # fmt: skip
def test_drop_empty_rows_drops_no_cell_that_is_not_a_text(column, number, tmp_path, tokenizer):
    """BUG: such rows were dropped, and called empty."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(3)] + [{"query": "", "positive": "p"}]
    rows[2][column] = number
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shown = "1" if number == ["a", 1] and column != "query" else number
    for drop in (False, True):
        message = error_of(tokenize_rows, read_file(path), tokenizer, 16, path, drop_empty_rows=drop)
        assert message == (
            f"{path}, row 3, column '{column}': the text is not a string ({shown}); convert it to a string or delete the row"
        )


@pytest.mark.parametrize("texts", [["a"], ["a", ""], ["", " "]])
def test_fewer_than_two_rows(texts, tokenizer):
    rows = Dataset.from_dict({"text": texts})
    message = error_of(tokenize_rows, rows, tokenizer, 16, "file.txt", drop_empty_rows=True)
    kept = sum(bool(text.strip()) for text in texts)
    assert message.startswith(f"file.txt: there are {kept} row(s), ") and "at least 2" in message


def test_no_row_of_several_positives_is_left(tokenizer):
    """BUG: it was a KeyError."""
    rows = Dataset.from_dict({"query": ["a", ""], "pos": [["b", ""], ["c", "d"]]})
    message = error_of(tokenize_rows, rows, tokenizer, 16, "a.jsonl", drop_empty_rows=True)
    assert message.startswith("a.jsonl: there are 0 row(s), ")


# ---- batches ----


def test_collator_puts_every_text_into_its_slot():
    rows = [
        {"input_ids": [[1, 2], [3], [4, 5, 6]], "text_ids": [10, 20, 30]},
        {"input_ids": [[7], [8, 9]], "text_ids": [40, 50]},
        {"input_ids": [[11, 12]], "text_ids": [60]},  # a single text is its own positive
    ]
    batch = RaggedCollator(texts_per_row=[4])(rows)
    texts = [t.tolist() for t in batch["input_ids"].split(batch["lengths"])]
    grid = dict(zip(batch["slots"].tolist(), texts))
    assert grid == {0: [1, 2], 1: [3], 2: [4, 5, 6], 4: [7], 5: [8, 9], 8: [11, 12], 9: [11, 12]}
    assert batch["text_ids"].tolist() == [[10, 20, 30, 0], [40, 50, 0, 0], [60, 60, 0, 0]]
    assert batch["text_ids"].dtype == batch["input_ids"].dtype == torch.int64


def epoch_of(rows, batch_size, ranks, seed=0, epoch=0, drop_last=False):
    """Return, for each rank, the list of its batches."""
    samplers = [GlobalBatchSampler(rows, batch_size, rank, ranks, seed, drop_last) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def global_batches(*args, **kwargs):
    return [sum(parts, []) for parts in zip(*epoch_of(*args, **kwargs))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_global_batches_on_any_number_of_ranks(ranks):
    """Joined in the order of the ranks, the shares give the rows in order. A batch has 8 rows; the last one has 4."""
    assert global_batches(36, 8 // ranks, ranks) == global_batches(36, 8, 1)


def test_an_epoch_is_a_permutation():
    batches = global_batches(36, 8, 1)
    assert sorted(sum(batches, [])) == list(range(36)) != sum(batches, [])


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"seed": 1, "epoch": 2}])
def test_order_is_a_function_of_seed_and_epoch(other):
    changed = global_batches(36, 4, 2, **other)
    assert changed == global_batches(36, 4, 2, **other)
    assert changed != global_batches(36, 4, 2, seed=2, epoch=1)
    assert changed != global_batches(36, 4, 2)


@pytest.mark.parametrize(
    ("rows", "batch_size", "ranks", "drop_last", "sizes"),
    [
        (6, 2, 1, False, [2, 2, 2]),
        (5, 2, 1, False, [2, 2]),  # a batch of one row has no negatives
        (7, 4, 1, False, [4, 3]),
        (7, 4, 1, True, [4]),
        (21, 2, 4, False, [2, 2, 1]),  # one row cannot be shared among four ranks
        (21, 2, 4, True, [2, 2]),
        (17, 2, 4, False, [2, 2]),
        (3, 4, 1, False, [3]),  # fewer rows than a batch
    ],
)
def test_tail(rows, batch_size, ranks, drop_last, sizes):
    """All ranks have batches of the same sizes, no row comes twice, and `left_out` and `len` are correct."""
    epoch = epoch_of(rows, batch_size, ranks, drop_last=drop_last)
    assert [[len(batch) for batch in batches] for batches in epoch] == [sizes] * ranks
    used = [row for batches in epoch for batch in batches for row in batch]
    sampler = GlobalBatchSampler(rows, batch_size, 0, ranks, 0, drop_last)
    assert len(used) == len(set(used)) == rows - sampler.left_out
    assert len(sampler) == len(sizes)


def test_left_out_rows_change_with_the_epoch():
    left = {frozenset(range(5)) - set(sum(global_batches(5, 2, 1, epoch=epoch), [])) for epoch in range(20)}
    assert len(left) > 1
