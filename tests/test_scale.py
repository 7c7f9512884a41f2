"""Many rows: nothing in the path of the training makes Python objects for all rows, and benchmarks/scale.py runs."""

import argparse
import os
import re
import runpy
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, concatenate_datasets

from hf_embed.data import cache
from hf_embed.data.labeled import Layout, grouped, meanings_of
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler, generator
from hf_embed.data.tokenization import different_rows
from hf_embed.evaluation import held_out
from hf_embed.evaluation.held_out import seen_in_training
from hf_embed.training.teacher import number_texts

ROOT = Path(__file__).parents[1]
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


def test_the_two_exceptions_need_what_the_page_says():
    """docs/scaling.md: bytes for each labeled pair, and for each different text of a teacher, with texts of 60 characters."""
    texts, count = [f"{i:060}" for i in range(40_000)], 20_000
    rows = Dataset.from_dict({"sentence1": texts[:count], "sentence2": texts[count:], "label": [1] * count})
    layout = Layout("sentence1", "sentence2", "label")
    meanings = meanings_of(rows, layout, "rows")
    assert 650 < memory_of(lambda: grouped(rows, layout, meanings, "rows", False).rows()) * ROWS / count < 850
    table = Dataset.from_dict({"texts": [list(pair) for pair in zip(texts[:count], texts[count:])]})
    assert 200 < memory_of(lambda: number_texts([table], "", "")) * ROWS / (2 * count) < 300


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
    script = ROOT / "benchmarks" / "scale.py"
    command = [sys.executable, script, "--rows", "1500", "--kind", kind, "--sources", str(sources), "--batch_sizes", "8", "16"]
    done = subprocess.run([*command, "--batches", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"MB private at the peak", done.stdout)) == 2
    assert len(re.findall(r"(?m)^ +(?:8|16) .* ms .* s +\d+x +[\d,]+ MB$", done.stdout)) == 2


# ---- docs/scaling.md, and the files for clusters ----


def test_the_table_is_the_one_of_the_script():
    """The tables of docs/scaling.md are what benchmarks/scaling.py prints, and the page's commands run."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    commands = [
        line.partition("#")[0].split()[1:] for line in page.splitlines() if line.startswith("python benchmarks/scaling")
    ]
    printed = [
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        for words in commands
    ]
    fast, slow, second = printed
    assert "\n".join(fast) in page
    assert "\n".join([*slow[:2], *slow[-3:]]) in page
    assert any(line.split("|")[1:3] == [" time of a step                       ", " 104 ms     "] for line in second)


@pytest.mark.parametrize("pairs, texts, ranks", [(16_384, 2, 8), (128, 9, 64)])
def test_bytes_of_a_ring(pairs, texts, ranks):
    """Count what a rank sends, round by round: in a ring that gathers, that sums a part for each rank, and in both together."""
    step_of = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))["Step"]
    found = step_of(ranks, argparse.Namespace(pairs=pairs, texts=texts)).sent()
    block = pairs * texts * 768 * 4 // ranks  # bytes of the embeddings of a rank
    rounds = ranks - 1
    assert found["gather of the embeddings"] == pytest.approx(rounds * block)
    assert found["sum of their gradients"] == pytest.approx(rounds * block)
    assert found["gradients of the weights (DDP)"] == pytest.approx(2 * rounds * 440e6 / ranks)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_keys_of_accelerate_files_are_known(path):
    """accelerate refuses unknown keys of the file itself, but not those of fsdp_config and deepspeed_config."""
    config = load_config_from_file(str(path))
    flags = {action.dest for action in launch_command_parser()._actions}
    for own in (config.fsdp_config, config.deepspeed_config):
        assert set(own or {}) <= flags


STUBS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$@" >>"$LOG.scontrol"; fi',
    "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; status=$?; done; exit $status',
    "hf-embed": 'printf "%s\\n" "$*" >>"$LOG"; exit "$STATUS"',
}


@pytest.mark.parametrize("status, checkpoint", [(0, False), (138, True), (1, False)])
def test_slurm_script(tmp_path, status, checkpoint):
    """Each node starts a launcher that knows its rank and the first node. A stopped job is queued again, and resumes."""
    for name, code in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "an out"
    (out / "checkpoint-5").mkdir(parents=True) if checkpoint else None
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "STATUS": str(status), "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    script = ["bash", ROOT / "recipes" / "accelerate" / "slurm_nodes.sbatch"]
    done = subprocess.run([*script, "gte-pretrain", "--output_dir", out], env=environment, cwd=ROOT)
    assert done.returncode == status
    lines = (tmp_path / "log").read_text().splitlines()
    resume = " --resume_from_checkpoint" if checkpoint else ""
    for node, line in enumerate(lines):
        assert line == (
            "launch --config_file recipes/accelerate/ddp_2nodes.yaml --num_machines 2 --num_processes 8 --machine_rank "
            f"{node} --main_process_ip node1 --main_process_port 29500 gte-pretrain --output_dir {out}{resume}"
        )
    queued = tmp_path / "log.scontrol"
    assert len(lines) == 2 and (queued.read_text() == "requeue 77\n" if status == 138 else not queued.exists())
    assert subprocess.run([*script, "gte-pretrain"], env=environment, cwd=ROOT, capture_output=True).returncode == 2


def test_slurm_directives_come_before_the_first_command():
    lines = (ROOT / "recipes" / "accelerate" / "slurm_nodes.sbatch").read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(directives) == 8 and all(line.startswith("#") for line in lines[: directives[-1]])
