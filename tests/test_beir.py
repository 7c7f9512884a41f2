"""Tests that BEIR folders are read as their authors write them, or are refused in one line."""

import gzip

import pytest
from conftest import error_of
from test_data_files import datasets_cache, written  # noqa: F401  (a fixture)

from hf_embed.evaluation.retrieval import read_retrieval


def beir(folder, corpus=None, queries=None, qrels="query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"):
    default = {"corpus": ('{"_id": "d1", "text": "one"}\n', '{"_id": "d2", "text": "two é"}\n'),
               "queries": ('{"_id": "q1", "text": "first"}\n', '{"_id": "q2", "text": "second"}\n')}  # fmt: skip
    written(folder / "corpus.jsonl", corpus or "".join(default["corpus"]))
    written(folder / "queries.jsonl", queries or "".join(default["queries"]))
    written(folder / "qrels" / "test.tsv", qrels)
    return str(folder)


CORPUS = '{"_id": "d1", "text": "one"}\n{"_id": "d2", "text": "two é"}\n'
READ_BEIR = {
    "marks": {"corpus": CORPUS.encode("utf-8-sig"), "qrels": b"\xef\xbb\xbfq1\td1\t1\nq2\td2\t1\n",
              "queries": b'\xef\xbb\xbf{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n'},
    "no header": {"qrels": "q1\td1\t1\nq2\td2\t1"},
    "grades with a point": {"qrels": "q1\td1\t1.0\nq2\td2\t1.0\n"},
    "blank lines": {"corpus": CORPUS + "\n  \n", "qrels": "\nquery-id\tcorpus-id\tscore\nq1\td1\t1\n\nq2\td2\t1\n\n"},
    "windows": {"corpus": CORPUS.replace("\n", "\r\n"), "qrels": "query-id\tcorpus-id\tscore\r\nq1\td1\t1\r\nq2\td2\t1\r\n"},
    "other order": {"qrels": "corpus-id\tscore\tquery-id\nd1\t1\tq1\nd2\t1\tq2\n"},
    "underscores": {"qrels": "corpus_id\tscore\tQuery_ID\nd1\t1\tq1\nd2\t1\tq2\n"},  # BUG: read by position
    "trec": {"qrels": "q1\t0\td1\t1\nq2\t0\td2\t1\nq2\t0\td1\t0\n"},
    "other names": {"qrels": "query\tdoc\trel\nq1\td1\t1\nq2\td2\t1\n"},
    "the same twice": {"corpus": CORPUS + '{"_id": "d1", "text": "one"}\n', "qrels": "q1\td1\t1\nq1\td1\t1\nq2\td2\t1\n"},
}  # fmt: skip


@pytest.mark.parametrize("case", READ_BEIR)
def test_beir_is_read(case, tmp_path):
    found = read_retrieval(beir(tmp_path, **READ_BEIR[case]))
    assert found.corpus == {"d1": "one", "d2": "two é"} and found.queries == {"q1": "first", "q2": "second"}
    assert found.qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}}


def test_packed_beir_is_read(tmp_path):
    expected = read_retrieval(beir(tmp_path))
    for path in (tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl"):
        written(path.with_name(f"{path.name}.gz"), gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_retrieval(str(tmp_path)) == expected


BAD_BEIR = {
    "half a character": ({"corpus": CORPUS + '{"_id": "d3", "text": "\\ud800"}\n'}, "corpus.jsonl", "line 3: "),
    "cp1252": ({"corpus": CORPUS.encode("cp1252")}, "corpus.jsonl", "byte 0xe9 in line 2"),
    "UTF-16": ({"corpus": CORPUS.encode("utf-16")}, "corpus.jsonl", "UTF-16"),
    "UTF-16 qrels": ({"qrels": "q1\td1\t1\n".encode("utf-16")}, "test.tsv", "UTF-16"),
    "NUL": ({"qrels": "q1\td1\t1\nq2\td2\0\t1\n"}, "test.tsv", "line 2 contains a NUL byte"),
    "id twice": (
        {"corpus": CORPUS + '\n{"_id": "d1", "text": "three"}\n'},
        "corpus: two rows have",
        "the same _id 'd1' but different texts",
    ),
    "query twice": (
        {"queries": '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n'},
        "queries: two rows have",
        "the same _id '1'",
    ),
    "no id": ({"corpus": CORPUS + '{"_id": null, "text": "x"}\n'}, "corpus.jsonl, line 3", "_id and text"),
    "four cells": ({"qrels": "q1\td1\t1\t5\nq2\td2\t1\t5\n"}, "test.tsv, line 1", "separated by tabs"),
    "three cells of trec": ({"qrels": "q1\t0\td1\t1\nq2\td2\t1\n"}, "test.tsv, line 2", "separated by tabs"),
    "blanks": ({"qrels": "q1 d1 1\nq2 d2 1\n"}, "test.tsv, line 1", "separated by tabs"),
    "half a grade": ({"qrels": "q1\td1\t1\nq2\td2\t0.5\n"}, "test.tsv, line 2", "a whole number"),
    "two grades": ({"qrels": "q1\td1\t1\nq2\td2\t1\nq1\td1\t2\n"}, "test.tsv, line 3", "judged twice, with different grades"),
}


@pytest.mark.parametrize("case", BAD_BEIR)
def test_beir_is_refused(case, tmp_path):
    parts, where, what = BAD_BEIR[case]
    message = error_of(read_retrieval, beir(tmp_path, **parts))
    assert where in message and what in message
