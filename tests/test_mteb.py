"""Tests that mteb gives an `Encoder` the same scores as sentence-transformers, and the same scores as our own evaluation."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, tiny_encoder
from datasets import Dataset, DatasetDict
from worker import SEARCH, STS

from hf_embed import Encoder
from hf_embed.evaluation.mteb import model_meta
from hf_embed.evaluation.sts import STS as OurSTS
from hf_embed.kit.models import embed_with
from hf_embed.kit.mteb_runs import find_tasks, lines, remove_damaged, run_mteb

mteb = pytest.importorskip("mteb")
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402


def metadata(name: str, kind: str, metric: str):
    return mteb.TaskMetadata(
        name=name, description="local", dataset={"path": "local/none", "revision": "1"}, type=kind, eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score=metric, modalities=["text"], category="t2t", prompt=None, reference=None,
        date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
        sample_creation=None, bibtex_citation="",
    )  # fmt: skip


class LocalSTS(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, **kwargs):
        self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_list(STS)}), True


class LocalSearch(AbsTaskRetrieval):
    metadata = metadata("LocalSearch", "Retrieval", "ndcg_at_10")

    def load_data(self, **kwargs):
        corpus = Dataset.from_list([{"id": i, "text": text, "title": ""} for i, text in SEARCH.corpus.items()])
        queries = Dataset.from_list([{"id": i, "text": text} for i, text in SEARCH.queries.items()])
        split = {"corpus": corpus, "queries": queries, "relevant_docs": SEARCH.qrels, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


PROMPTS = {"query": "look for: ", "document": "this is: "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mteb") / "model"
    tiny_encoder(prompts=PROMPTS).save_pretrained(folder)
    return folder


def test_scores_are_those_of_sentence_transformers_and_our_own(folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.from_pretrained(folder)
    ours = run_mteb(encoder, [LocalSTS(), LocalSearch()], tmp_path / "ours")
    theirs = run_mteb(SentenceTransformer(str(folder)), [LocalSTS(), LocalSearch()], tmp_path / "theirs")
    assert ours == theirs
    sts, search = ours
    assert sts | {"score": 0} == {"task": "LocalSTS", "type": "STS", "split": "test", "metric": "cosine_spearman", "score": 0}
    assert sts["score"] == pytest.approx(OurSTS(Dataset.from_list(STS)).score(embed_with(encoder))["spearman"], abs=0.006)
    assert search["score"] == pytest.approx(SEARCH.score(embed_with(encoder))["ndcg@10"], abs=0.006)
    bare = Encoder(encoder.backbone, encoder.tokenizer)  # control: without prompts, only the search changes
    without = run_mteb(bare, [LocalSTS(), LocalSearch()], tmp_path / "bare")
    assert without[0] == sts and without[1]["score"] != search["score"]


def test_finished_tasks_are_not_run_again(folder, tmp_path, monkeypatch):
    encoder = Encoder.from_pretrained(folder)
    first = run_mteb(encoder, [LocalSTS()], tmp_path)
    monkeypatch.setattr(LocalSTS, "evaluate", lambda *a, **k: pytest.fail("run again"))
    assert run_mteb(encoder, [LocalSTS()], tmp_path) == first
    assert len(run_mteb(encoder, [LocalSTS(), LocalSearch()], tmp_path)) == 2


def test_another_model_in_the_same_folder_has_its_own_results(folder, tmp_path):
    def score(**settings):
        return run_mteb(Encoder.from_pretrained(folder, **settings), [LocalSTS()], tmp_path)[0]["score"]

    mean, cls, short = score(), score(pooling="cls"), score(max_length=3)
    assert len({mean, cls, short}) == 3 and score() == mean
    trained = Encoder.from_pretrained(folder)
    torch.nn.init.normal_(trained.backbone.embeddings.word_embeddings.weight)
    assert run_mteb(trained, [LocalSTS()], tmp_path)[0]["score"] not in (mean, cls, short)


def test_the_protocol(folder):
    from mteb.models.models_protocols import EncoderProtocol

    encoder = Encoder.from_pretrained(folder)
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.max_tokens, meta.embed_dim) == ("local/model", encoder.max_length, 32)
    encoder.config._name_or_path = "owner/name"
    assert model_meta(encoder).name == "owner/name"
    a, b = torch.randn(3, 8), np.random.default_rng(0).normal(size=(4, 8))
    expected = torch.nn.functional.cosine_similarity(a[:, None], torch.tensor(b)[None].float(), dim=-1)
    assert torch.allclose(encoder.similarity(a, b), expected, atol=1e-6)
    assert torch.allclose(encoder.similarity_pairwise(a, b[:3]), expected.diagonal(), atol=1e-6)
    with pytest.raises(TypeError, match="no argument 'batchsize'"):
        encoder.encode(["a"], batchsize=3)


def test_recipe(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    recipe = __import__("evaluate_mteb")
    monkeypatch.setattr(recipe, "find_tasks", lambda names, benchmarks: [{"LocalSTS": LocalSTS}[name]() for name in names])

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate_mteb.py", *map(str, words)])
        recipe.main()

    run(folder, "--tasks", "LocalSTS")
    (row,) = json.loads((folder / "results.json").read_text())["mteb"]
    assert all(line in capsys.readouterr().out for line in lines([row])[:1])
    card = (folder / "README.md").read_text()
    # The score is in the table and in the metadata of the card.
    assert f"{row['score']:.2f}  cosine_spearman" in card and f"value: {row['score']}" in card
    run(folder, "--tasks", "LocalSTS", "--output_dir", tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "results.json").read_text())["mteb"] == [row]
    assert "give a folder for the results with --output_dir FOLDER" in error_of(run, "owner/name", "--tasks", "LocalSTS")
    assert "--pooling, --max_length and --bf16 change the vectors" in error_of(
        run, folder, "--tasks", "LocalSTS", "--pooling", "cls"
    )
    assert "| Pooling | `mean`" in (folder / "README.md").read_text()


def test_scores_of_two_models_are_not_mixed(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    recipe = __import__("evaluate_mteb")
    tasks = {"LocalSTS": LocalSTS, "LocalSearch": LocalSearch}
    monkeypatch.setattr(recipe, "find_tasks", lambda names, benchmarks: [tasks[name]() for name in names])
    other = tiny_encoder(prompts=PROMPTS)
    torch.nn.init.normal_(other.backbone.embeddings.word_embeddings.weight)
    other.save_pretrained(tmp_path / "other")

    def run(model: Path, task: str, output: Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["evaluate_mteb.py", *map(str, (model, "--tasks", task, "--output_dir", output))])
        recipe.main()
        return [row["task"] for row in json.loads((output / "results.json").read_text())["mteb"]]

    out = tmp_path / "out"
    assert run(folder, "LocalSTS", out) == ["LocalSTS"]
    assert run(folder, "LocalSearch", out) == ["LocalSTS", "LocalSearch"]
    assert run(tmp_path / "other", "LocalSearch", out) == ["LocalSearch"]
    assert "the folder of another model" in error_of(run, folder, "LocalSTS", tmp_path / "other")
    (out / "results.json").write_text('{"of": "someone"}')
    assert "would be lost; give another folder" in error_of(run, folder, "LocalSTS", out)


def test_the_mean_is_over_tasks():
    rows = [{"task": task, "split": split, "score": score, "metric": "m"} for task, split, score in
            (("a", "dev", 10.0), ("a", "test", 20.0), ("b", "test", 45.0))]  # fmt: skip
    assert lines(rows)[-1].split() == ["mean", "30.00"]


def test_names_that_mteb_does_not_know():
    assert error_of(find_tasks, ["STSBenchmrk"], []).startswith("--tasks STSBenchmrk: ")
    assert "mteb has no such benchmark" in error_of(find_tasks, [], ["MTEB(nothing)"])
    assert "give --tasks NAME" in error_of(find_tasks, [], [])
    assert [task.metadata.name for task in find_tasks(["STSBenchmark"], [])] == ["STSBenchmark"]


def test_data_that_cannot_be_downloaded_is_one_line(folder, tmp_path):
    """The data of STSBenchmark is on the Hub, and no test uses the network."""
    message = error_of(run_mteb, Encoder.from_pretrained(folder), find_tasks(["STSBenchmark"], []), tmp_path / "mteb")
    assert message.startswith("the data of a task cannot be downloaded (") and "mteb/stsbenchmark-sts" in message


def test_an_incomplete_result_of_a_killed_run_is_measured_again(folder, tmp_path, caplog):
    encoder = Encoder.from_pretrained(folder)
    first = run_mteb(encoder, [LocalSTS()], tmp_path)
    for file in ("LocalSTS.json", "model_meta.json", "run_settings.jsonl"):
        (path,) = tmp_path.rglob(file)
        for part in (b"", bytes(300), path.read_bytes()[:100]):
            path.write_bytes(part)
            remove_damaged(tmp_path)
            assert path.exists() == (file == "run_settings.jsonl" and part == b"")  # a jsonl file may have no line
            assert path.exists() or f"{path}: the result file is incomplete" in caplog.text
            caplog.clear()
        path.write_bytes(part)
        assert run_mteb(encoder, [LocalSTS()], tmp_path) == first
