"""Tests that YAML files, of sources and of settings, are read, or are refused in one line that says where the mistake is."""

import pytest
from conftest import error_of
from test_data_files import datasets_cache, listed, written  # noqa: F401  (a fixture)

from hf_embed.data.source_files import read_sources
from hf_embed.kit import cli
from hf_embed.kit.plan import DataArguments


def test_duplicate_keys_are_refused(tmp_path):
    written(tmp_path / "a.csv", "anchor,positive\na,b\nc,d\n")
    path = written(tmp_path / "s.yaml", "- name: a\n  file: a.csv\n  weight: 2\n  weight: 3\n")
    assert error_of(read_sources, path) == f"{path}, line 4: the key 'weight' occurs twice; keep one of them"
    path = written(tmp_path / "t.yaml", "- name: a\n  file: a.csv\n  columns: {query: anchor, positive: positive, query: x}\n")
    assert "line 3: the key 'query' occurs twice" in error_of(read_sources, path)
    path = written(tmp_path / "c.yaml", "train_file: a.csv\nquoting: false\ntrain_file: b.csv\n")
    message = error_of(cli.parse, [DataArguments], argv=["--config", path])
    assert message == f"--config {path}, line 3: the key 'train_file' occurs twice; keep one of them"
    shared = "- &a\n  name: a\n  file: a.csv\n  weight: 2\n- <<: *a\n  name: b\n  weight: 3\n"
    first, second = read_sources(written(tmp_path / "m.yaml", shared))  # merged keys may be overridden
    assert (first.weight, second.weight, second.name) == (2, 3, "b")


MISTYPED = [
    ("streaming: 'no'", "streaming is 'no'; give true or false"),
    ("streaming: 1", "streaming is 1; give true or false"),
    ("streaming:", "streaming is None; give true or false"),
    ("quoting: 'false'", "quoting is 'false'; give true or false"),
    ("weight: true", "the weight is True"),
    ("weight: '2'", "the weight is 2; it must be a number"),
    ("max_length: 12.5", "max_length is 12.5"),
    ("max_length: true", "max_length is True"),
    ("negatives: '1'", "negatives is '1'"),
    ("query_prompt: 5", "query_prompt is 5; it must be a text"),
    ("document_prompt: [a]", "document_prompt is ['a']"),
    ("columns: [anchor, positive]", "columns is ['anchor', 'positive']; give a mapping"),
    ("columns: {query: 1, positive: positive}", "columns: query is 1; give the name of a column"),
    ("columns: {query: , positive: positive}", "columns: query is None"),
    ("ignore_columns: 3", "ignore_columns is 3; give a name, or a list of names"),
    ("ignore_columns: [1]", "ignore_columns is [1]"),
    ("streaming: true\n  rows: many", "rows is 'many'"),
    ("streaming: true\n  rows: 1e6", "rows is '1e6'"),
]


@pytest.mark.parametrize(("line", "expected"), MISTYPED)
def test_mistyped_values_of_a_source(line, expected, tmp_path):
    written(tmp_path / "a.csv", "anchor,positive\na,b\nc,d\n")
    message = error_of(read_sources, written(tmp_path / "s.yaml", f"- name: a\n  file: a.csv\n  {line}\n"))
    assert "source 'a'" in message and expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- name: 7\n  file: a.csv", "source 1 has the name 7; give it a text as its name"),
        ("- name: a\n  file: [a.csv, 3]", "file is ['a.csv', 3]"),
        ("- name: a\n  file: {a: b}", "file is {'a': 'b'}"),
        (
            "- name: a\n  file: a-*.csv",
            "a-*.csv: no file matches this pattern; check the path",
        ),  # BUG: "patterns are not supported"
        # BUG: its rows were read twice.
        (
            "- name: a\n  file: ['*.yaml', s.yaml]",
            "s.yaml: this file is named twice under file:, so its rows would count twice; name it once",
        ),
        ("- name: a\n  dataset: 3", "dataset is 3; give a name"),
        ("- name: a\n  dataset: x/y\n  config: 1.0", "config is 1.0; give a name"),
        ("- name: a\n  dataset: x/y\n  split: [train]", "split is ['train']; give a name"),
        ("- name: a\n  dataset: x/y\n  quoting: false", "quoting applies only to csv files"),
    ],
)
def test_mistyped_files_and_datasets(content, expected, tmp_path):
    assert expected in error_of(read_sources, written(tmp_path / "s.yaml", content))


def test_paths_of_a_source_begin_at_the_file_or_at_home(tmp_path, monkeypatch):
    """BUG: "~" was a folder beside the file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path, tmp_path / "lists"):
        written(folder / "a[1].csv", f"anchor,positive\na,{folder.name}\nc,d\n")
    names = ["a[1].csv", "~/a[1].csv", "../a*.csv"]
    sources = read_sources(listed(tmp_path / "lists", *({"name": name, "file": name} for name in names)))
    assert [source.rows["positive"][0] for source in sources] == ["lists", tmp_path.name, tmp_path.name]
