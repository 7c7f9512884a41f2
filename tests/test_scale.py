"""Many rows: nothing in the path of the training makes Python objects for all rows, and benchmarks/scale.py runs."""

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_embed.data import cache
from hf_embed.data.labelled import Layout, meanings_of
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler, generator
from hf_embed.data.tokenization import different_rows
from hf_embed.evaluation import held_out
from hf_embed.evaluation.held_out import seen_in_training

ROWS = 300_000


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def memory_of(function: Callable[[], object]) -> float:
    """Return the peak memory of the Python objects and numpy arrays that a function makes, in bytes per row."""
    function()  # imports and caches do not count
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / ROWS


def lengths(batch: dict[str, list]) -> dict[str, list]:
    return {"length": [len(text) for text in batch["text"]]}


def test_memory_counts_lists():
    assert memory_of(lambda: list(range(ROWS))) > 30


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("several", [False, True])
def test_samplers_make_no_object_for_each_row(several, ranks):
    settings = {"batch_size": 64, "rank": ranks - 1, "ranks": ranks, "seed": 1}
    sampler = SourceBatchSampler([ROWS // 2] * 2, [0.5] * 2, **settings) if several else GlobalBatchSampler(ROWS, **settings)
    assert memory_of(lambda: list(islice(sampler, 5))) < 2


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_follow_the_endless_sequence_of_a_source(rank):
    sampler = SourceBatchSampler([7, 3], [0.5, 0.5], batch_size=5, rank=rank, ranks=2, seed=4)
    sequences = [
        [int(row) for turn in range(20) for row in torch.randperm(size, generator=generator(4, source + 1, turn))]
        for source, size in enumerate(sampler.sizes)
    ]
    drawn = [0, 0]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for batch in sampler:
            source = batch[0][0]
            first = 10 * drawn[source] + 5 * rank
            assert batch == [(source, row) for row in sequences[source][first : first + 5]]
            drawn[source] += 1
    assert max(drawn) > 1  # some batches lie across two permutations


def test_rows_with_several_positives_are_counted():
    parts = [[0, 0, 1], [1, 3, 3], [4]]
    table = concatenate_datasets([Dataset.from_dict({"row": part}) for part in parts])
    assert len(table.data["row"].chunks) == 3 and different_rows(table) == 4
    many = Dataset.from_dict({"row": range(ROWS)})
    many = concatenate_datasets([many.select(range(start, start + 1000)) for start in range(0, ROWS, 1000)])
    assert memory_of(lambda: different_rows(many)) < 2


def test_held_out_rows_are_compared_in_batches(monkeypatch):
    def table(rows: range) -> Dataset:
        return Dataset.from_dict({"text_ids": [[i, i + 1] for i in rows]})

    training, own = table(range(ROWS)), table(range(ROWS - 3, ROWS + 2))
    monkeypatch.setattr(held_out, "ROWS_AT_ONCE", 1000)
    assert seen_in_training(own, [table(range(5)), training]) == 3
    assert seen_in_training(concatenate_datasets([own, own]), [training]) == 6
    assert memory_of(lambda: seen_in_training(own, [training])) < 2


def test_labels_are_read_in_batches():
    words = ["entailment", "neutral", "contradiction"] * (ROWS // 3)
    rows = Dataset.from_dict({"premise": words, "hypothesis": words, "label": words})
    layout = Layout("premise", "hypothesis", "label")
    assert len(meanings_of(rows, layout, "rows").of) == 3
    assert memory_of(lambda: meanings_of(rows, layout, "rows")) < 10


@pytest.mark.parametrize("rows, cached", [(9, False), (10, True)])
def test_the_tokens_of_many_rows_in_memory_are_on_disk(rows, cached, monkeypatch):
    monkeypatch.setattr(cache, "FEW_ROWS", 10)

    def lengths_of(text: str) -> Dataset:
        table = Dataset.from_dict({"text": [text] * rows})
        return cache.cached_map(table, lengths, batched=True, remove_columns=["text"])

    made = lengths_of("a")
    assert bool(made.cache_files) is cached
    written = [Path(file["filename"]).stat().st_ino for file in made.cache_files]
    again, other = lengths_of("a"), lengths_of("bc")
    assert [Path(file["filename"]).stat().st_ino for file in again.cache_files] == written  # it was not made again
    assert [table["length"][:] for table in (made, again, other)] == [[1] * rows, [1] * rows, [2] * rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind, sources", [("jsonl", 1), ("parquet", 3)])
def test_the_benchmark_runs(kind, sources):
    script = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    command = [sys.executable, script, "--rows", "1500", "--kind", kind, "--sources", str(sources), "--batch_sizes", "8", "16"]
    done = subprocess.run([*command, "--batches", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"MB private at the peak", done.stdout)) == 2
    assert len(re.findall(r"(?m)^ +(?:8|16) .* ms .* s +\d+x$", done.stdout)) == 2
