"""The scripts of the papers' full runs, with a tiny model and a few rows. Local folders replace the datasets of the Hub."""

import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import error_of, tiny_encoder
from worker import STS, WORDS

from hf_embed.checkpoint.card import write_results
from hf_embed.evaluation.sts import SEVEN_TASKS
from hf_embed.files.read_files import read_json

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paper_runs.md"
TINY = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--logging_steps", "1",
        "--save_steps", "1", "--report_to", "none", "--disable_tqdm", "true"]  # fmt: skip
PAIRS = list(zip(WORDS, WORDS[1:] + WORDS[:1]))


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_row", ROOT / "benchmarks" / "paper_row.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paper_row = load_script()


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def place(tmp_path) -> Path:
    """Return a folder with a tiny model, folders named like the datasets in the scripts, and a table."""
    for hub in SEVEN_TASKS.values():
        write_jsonl(tmp_path / hub / "test.jsonl", STS)
    write_jsonl(tmp_path / "sentence-transformers" / "stsb" / "validation.jsonl", STS)
    tiny_encoder().save_pretrained(tmp_path / "model", verify=False)
    (tmp_path / "table.md").write_bytes(PAGE.read_bytes())
    return tmp_path


def script(place: Path, name: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    own = {"PYTHON": sys.executable, "TABLE": "table.md", "MODEL": "model", "OUTPUT": "out", "HF_HOME": str(place / "cache")}
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}}
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / name, *argv], cwd=place, env=inherited | own | environment, capture_output=True,
        text=True, timeout=1800,
    )  # fmt: skip


def succeeds(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode != 0 and message in done.stderr, done.stdout + done.stderr


def measured(place: Path) -> list[list[str]]:
    """Return the measured rows of the table, and check that all other lines of the file are unchanged."""
    lines = (place / "table.md").read_text().splitlines()
    new = [line for line in lines if "| measured |" in line]
    assert [line for line in lines if line not in new] == PAGE.read_text().splitlines()
    return [paper_row.cells(line) for line in new]


@pytest.mark.slow
def test_simcse(place):
    flags = [*TINY, "--eval_steps", "1"]
    texts = place / "sentences.txt"
    fails(script(place, "paper_simcse.sh", *flags, TRAIN_FILE=str(texts)), "sentences.txt: this file does not exist")
    assert measured(place) == []
    texts.write_text("".join(f"the {a} and the {b}\n" for a, b in PAIRS))
    (place / "mteb" / "sts16-sts").rename(place / "gone")  # makes the evaluation fail
    fails(script(place, "paper_simcse.sh", *flags, TRAIN_FILE=str(texts)), "mteb/sts16-sts")
    assert measured(place) == [] and (place / "out" / "results.json").is_file()
    weights = (place / "out" / "model.safetensors").stat().st_mtime_ns
    (place / "gone").rename(place / "mteb" / "sts16-sts")
    again = succeeds(script(place, "paper_simcse.sh", *flags, TRAIN_FILE=str(texts)))
    assert "out is already trained; skipping its training" in again and "appended to table.md" in again
    (row,) = measured(place)
    results = read_json(place / "out" / "results.json")
    scores = [results["evaluated"]["sts"][name] for name in SEVEN_TASKS]
    assert row[:10] == ["unsup bert_base", "measured", *(f"{score:.2f}" for score in [*scores, sum(scores) / 7])]
    assert "CPU core" in row[10] and re.fullmatch(r"\d{4}-\d\d-\d\d", row[11])
    assert re.fullmatch(r"hf_embed [\d.]+ \([0-9a-f]{7,}( with changes)?\), torch \S+, transformers \S+", row[12]) or (
        not (ROOT / ".git").exists()
    )
    assert "model, sentences.txt, batch 4, 2 steps, learning rate 0.001, 32 tokens, float32, seed 42, 1 process" in row[13]
    assert results["train"]["pooling"] == "cls_mlp_train" or results["train"]["settings"]["pooling"] == "cls_mlp_train"
    assert (place / "out" / "model.safetensors").stat().st_mtime_ns == weights
    other = script(place, "paper_simcse.sh", *flags, "--seed", "1", TRAIN_FILE=str(texts))
    fails(other, "out belongs to another command")
    assert measured(place) == [row]


@pytest.mark.slow
def test_a_stopped_training_goes_on_in_several_processes(place):
    rows = [{"sent0": f"the {a}", "sent1": f"a {a}, here", "hard_neg": f"no {b}"} for a, b in PAIRS]
    words = ["sup", "bert_base", *TINY, "--per_device_train_batch_size", "2", "--save_total_limit", "5", "--eval_steps", "1"]
    setting = {"TRAIN_FILE": str(write_jsonl(place / "nli.jsonl", rows)), "NUM_PROCESSES": "2", "OUTPUT": "runs/sup/"}
    succeeds(script(place, "paper_simcse.sh", *words, **setting))
    folder = place / "runs" / "sup"
    whole = (folder / "model.safetensors").read_bytes()
    for path in (folder / "results.json", folder / "model.safetensors"):
        path.unlink()
    (folder / "checkpoint-2").rename(place / "gone")  # as if the training had been stopped after the first step
    succeeds(script(place, "paper_simcse.sh", *words, **setting))
    train = read_json(folder / "results.json")["train"]
    assert train["resumed_at_step"] == 1 and train["processes"] == 2 and train["batch_size"] == 4
    assert (folder / "model.safetensors").read_bytes() == whole
    first, second = measured(place)
    assert first[0] == "sup bert_base" and first[:10] == second[:10] and "2 process(es)" in first[13]
    assert second[13].endswith("from step 1") and not first[13].endswith("from step 1")


@pytest.mark.slow
def test_gte(place):
    pytest.importorskip("mteb")
    flags = [*TINY, "--max_length", "32"]
    pairs = [{"query": f"the {a}", "positive": f"a {a} and a {b}"} for a, b in PAIRS]
    write_jsonl(place / "pairs.jsonl", pairs)
    (place / "sources.yaml").write_text("- name: pairs\n  file: pairs.jsonl\n")
    setting = {"SOURCES": "sources.yaml", "PAIRS": "pairs.jsonl", "MTEB_TASKS": "STSBenchmark"}
    out = place / "out"
    (out / "mined.jsonl").mkdir(parents=True)  # makes the mining fail
    fails(script(place, "paper_gte.sh", "small", *flags, **setting), "mined.jsonl")
    assert measured(place) == [] and not (out / "finetune").exists()
    (out / "mined.jsonl").rmdir()
    assert "out/pretrain is already trained" in succeeds(script(place, "paper_gte.sh", "small", *flags, **setting))
    (row,) = measured(place)
    score = read_json(out / "finetune" / "results.json")["mteb"][0]["score"]
    assert row[:11] == ["small", "measured", "1", "", "", "", "", "", f"{score:.2f}", "", f"{score:.2f}"]
    assert "model, sources.yaml, batch 4, 2 steps" in row[14] and ", then out/pretrain, out/mined.yaml, batch 4" in row[14]
    made = {path: path.stat().st_mtime_ns for path in [*out.rglob("*.safetensors"), out / "mined.jsonl"]}
    assert "already in table.md" in succeeds(script(place, "paper_gte.sh", "small", *flags, **setting))
    assert measured(place) == [row] and made == {path: path.stat().st_mtime_ns for path in made}
    other = script(place, "paper_gte.sh", "small", *flags, **setting | {"PAIRS": "others.jsonl"})
    fails(other, "out/mined.jsonl belongs to another command")


RESULTS = {
    "train": {
        "model": "owner/model", "data": "a|b.txt", "batch_size": 512, "steps": 1588, "learning_rate": 5e-5, "max_length": 32,
        "seed": 42, "settings": {"bf16": True}, "processes": 8, "seconds": 4000.0, "hardware": "8 x NVIDIA H100",
        "versions": {"hf_embed": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
    },
    "evaluated": {"sts": {name: 80.0 + i for i, name in enumerate(SEVEN_TASKS)}},
}  # fmt: skip


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """Return the current folder, which holds results.json and a table, as the scripts leave them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    write_results("out", RESULTS)
    (tmp_path / "out.started").write_text("flags\nabc1234\nabc1234\ndef5678 with changes\n")
    (tmp_path / "table.md").write_bytes(PAGE.read_bytes())
    return tmp_path


def append_row(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_row.py", *words, "--table", "table.md"])
    paper_row.main()


def test_a_row_says_what_the_run_was_and_stands_once(finished, monkeypatch, capsys):
    append_row(monkeypatch, "SimCSE", "sup bert_base", "out")
    (row,) = measured(finished)
    assert row[:10] == ["sup bert_base", "measured", "80.00", "81.00", "82.00", "83.00", "84.00", "85.00", "86.00", "83.00"]
    assert row[10] == "8 x NVIDIA H100" and row[11] == datetime.date.today().isoformat()
    assert row[12] == "hf_embed 0.1.0 (abc1234, then def5678 with changes), torch 2.13.0, transformers 5.23.0"
    assert row[13].replace("\0", "|") == (
        "owner/model, a|b.txt, batch 512, 1,588 steps, learning rate 5e-05, 32 tokens, bf16, seed 42, 8 process(es), 1 h 6 min"
    )
    lines = (finished / "table.md").read_text().splitlines()
    assert lines[lines.index("## GTE") - 2].startswith("| sup bert_base | measured |")  # at the end of its own table
    monkeypatch.setattr(paper_row, "datetime", SimpleNamespace(date=SimpleNamespace(today=lambda: datetime.date(2000, 1, 1))))
    append_row(monkeypatch, "SimCSE", "sup bert_base", "out")  # on another day
    assert "already in table.md" in capsys.readouterr().out and measured(finished) == [row]
    append_row(monkeypatch, "SimCSE", "sup bert_base, once more", "out")
    assert [row[0] for row in measured(finished)] == ["sup bert_base", "sup bert_base, once more"]


def test_a_row_of_gte_has_the_means_of_the_kinds(finished, monkeypatch):
    tasks = [("STS", "A", "test", 70.0), ("STS", "B", "test", 80.0), ("Retrieval", "C", "validation", 30.0),
             ("Retrieval", "C", "test", 40.0)]  # fmt: skip
    keys = ("type", "task", "split", "metric", "score")
    mteb = [dict(zip(keys, (kind, task, split, "a metric", score))) for kind, task, split, score in tasks]
    write_results("out", {"train": RESULTS["train"], "mteb": mteb})
    (finished / "first").mkdir()
    write_results("first", {"train": RESULTS["train"] | {"steps": 50_000, "hardware": "2 CPU cores", "resumed_at_step": 7}})
    monkeypatch.setattr(paper_row, "cpu_name", lambda: "A CPU")
    append_row(monkeypatch, "GTE", "base", "first", "out")
    (row,) = measured(finished)
    assert row[:11] == ["base", "measured", "3", "", "", "", "", "35.00", "75.00", "", "61.67"]
    assert row[11] == "2 CPU cores (A CPU), then 8 x NVIDIA H100"
    assert ", 50,000 steps, " in row[14] and "1 h 6 min from step 7, then owner/model" in row[14]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "out: results.json is missing or has no record of a training"),
        (
            RESULTS | {"evaluated": {"sts": {"STS12": 70.0, "STSB": None}}},
            "out: there is no score on STS13, STS14, STS15, STS16, STSB",
        ),
        ({"train": RESULTS["train"]}, "no score on STS12"),
    ],
)
def test_what_is_not_finished_gets_no_row(finished, monkeypatch, results, message):
    write_results("out", results)
    assert message in error_of(append_row, monkeypatch, "SimCSE", "sup", "out")
    assert measured(finished) == []
    assert "there are no scores on MTEB" in error_of(append_row, monkeypatch, "GTE", "base", "out") or not results
    (finished / "table.md").write_text("| SimCSE | figures |\n")
    write_results("out", RESULTS)
    assert "has 2 columns, but the row has 14" in error_of(append_row, monkeypatch, "SimCSE", "sup", "out")
    assert "no table that begins with | GTE |" in error_of(paper_row.append, Path("table.md"), "GTE", [])


def test_the_table_quotes_the_papers_as_the_other_page_does():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "| figures |" not in line]
    rows = [paper_row.cells(line) for line in lines]
    assert [row[0] for row in rows if row[1] == "the paper's"] == ["unsup bert_base", "sup bert_base", "small", "base", "large"]
    assert all(row[1] in ("the paper's", "measured") for row in rows)
    papers = (ROOT / "docs" / "papers.md").read_text()
    for kind, row in (("unsupervised", rows[0]), ("supervised", rows[1])):
        assert f"| {kind} | {' | '.join(row[2:10])} |" in papers
        assert float(row[9]) == pytest.approx(sum(map(float, row[2:9])) / 7, abs=0.006)
    averages = {row[0]: row[10] for row in rows if row[1] == "the paper's" and row[2] == "56"}
    assert ", ".join(f"{size} {score}" for size, score in averages.items()) in papers


@pytest.mark.parametrize(
    ("name", "words", "environment", "message"),
    [
        ("paper_simcse.sh", ["unsup", "bert_tiny"], {}, "there are no settings for 'bert_tiny'; give unsup or sup"),
        ("paper_simcse.sh", ["unsup", "quickstart"], {}, "there are no settings for 'quickstart'"),
        ("paper_simcse.sh", ["--output_dir", "x"], {}, "--output_dir is not supported here; set OUTPUT=FOLDER"),
        ("paper_simcse.sh", ["--config=x"], {}, "--config=x is not supported here; override single settings of the paper"),
        ("paper_simcse.sh", [], {"TABLE": "none.md"}, "TABLE=none.md: this is not a writable file with a table of SimCSE"),
        ("paper_gte.sh", ["huge"], {}, "there are no settings for 'huge'; give small, base or large"),
        ("paper_gte.sh", [], {"TABLE": "none.md"}, "TABLE=none.md: this is not a writable file with a table of GTE"),
    ],
)
def test_what_is_refused_at_once(tmp_path, name, words, environment, message):
    (tmp_path / "table.md").write_bytes(PAGE.read_bytes())
    done = script(tmp_path, name, *words, **environment)
    fails(done, f"error: {message}")
    assert done.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["table.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("paper_simcse.sh", {"NUM_PROCESSES": "3"}, "the paper's batch of 64 cannot be divided equally among 3 processes"),
        ("paper_simcse.sh", {"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two: give a whole number"),
        ("paper_gte.sh", {"PAIRS": "a.jsonl", "FINETUNE_SOURCES": "b.yaml"}, "PAIRS and FINETUNE_SOURCES are both given"),
    ],
)
def test_what_is_refused_before_the_training(tmp_path, name, environment, message):
    (tmp_path / "table.md").write_bytes(PAGE.read_bytes())
    fails(script(tmp_path, name, **environment), f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
