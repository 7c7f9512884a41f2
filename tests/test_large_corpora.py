"""The examples of docs/guides/large_corpora.md: the vectors of several processes are those of one `Encoder.encode`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import tiny_encoder
from datasets import Dataset, load_dataset
from doc_blocks import ELSEWHERE, FILE, ROOT, blocks_of

PAGE = "docs/guides/large_corpora.md"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Write the files of the page in the current folder. Return the vectors of one process, by id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    encoder = tiny_encoder(prompts={"query": "query: ", "document": "text: "})
    encoder.save_pretrained("out", verify=False)
    for block in blocks_of(PAGE):
        if block.kind == FILE:
            (tmp_path / block.about).write_text(block.code)
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    return dict(zip([row["id"] for row in rows], encoder.encode_document([row["text"] for row in rows])))


def example(test: str) -> str:
    """Return the code of the page's block that a test of this file runs."""
    (code,) = (block.code for block in blocks_of(PAGE) if block.kind == ELSEWHERE and block.about.endswith(f"::{test}"))
    return code


def run(command: list, **environment: str) -> None:
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def check_vectors(expected: dict[int, np.ndarray], files: int) -> None:
    """Compare the vectors of the parquet files with those of one process. Read them without Ray's types."""
    assert len(list(Path("vectors").glob("*.parquet"))) == files
    code = "import pyarrow.parquet as p, json; print(json.dumps(p.read_table('vectors').to_pylist()))"
    rows = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert sorted(row["id"] for row in rows) == sorted(expected)
    for row in rows:
        np.testing.assert_allclose(row["vector"], expected[row["id"]], atol=1e-6)
    spread = [np.abs(vector - expected[1]).max() for number, vector in expected.items() if number != 1]
    assert min(spread) > 1e-2  # control: different texts have different vectors


@pytest.mark.slow
def test_datasets_on_each_rank(corpus, tmp_path):
    words = example("test_datasets_on_each_rank").split()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    run([sys.executable, "-m", "accelerate.commands.launch", *words[2:]], HF_DATASETS_CACHE=str(tmp_path / "cache"))
    check_vectors(corpus, files=2)


@pytest.mark.slow
def test_ray_data(corpus, tmp_path):
    """Two workers of a local Ray."""
    pytest.importorskip("ray", reason="ray is not installed")
    start = "import ray\nray.init(num_cpus=4, include_dashboard=False)\n"  # the workers must leave CPUs for reading and writing
    (tmp_path / "ray_example.py").write_text(start + example("test_ray_data"))
    run([sys.executable, "ray_example.py"], RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    check_vectors(corpus, files=len(list((tmp_path / "vectors").glob("*.parquet"))))


def test_vector_database(corpus, tmp_path):
    """Qdrant within this process."""
    client = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    (tmp_path / "vectors").mkdir()
    Dataset.from_dict({"id": list(corpus), "vector": list(corpus.values())}).to_parquet("vectors/0.parquet")
    code = example("test_vector_database").replace('"http://localhost:6333"', '":memory:"')
    assert client and ":memory:" in code
    names: dict = {}
    exec(code, names)
    query = names["encoder"].encode_query("how long do cats sleep")
    cosines = {number: float(names["encoder"].similarity(query[None], vector[None])) for number, vector in corpus.items()}
    best = sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert [hit.id for hit in names["hits"]] == best
    np.testing.assert_allclose([hit.score for hit in names["hits"]], [cosines[number] for number in best], atol=1e-5)
    assert len(load_dataset("parquet", data_files="vectors/*.parquet", split="train")) == 4
