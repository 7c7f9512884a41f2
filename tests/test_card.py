"""The model card: its snippets run, the Hub can read its metadata, and no name in it acts as Markdown, HTML or YAML."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import small_tokenizer, tiny_encoder, tiny_model
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig, get_peft_model

from hf_embed import Encoder
from hf_embed.checkpoint.card import is_generated, model_card, title_of, with_repository, write_card
from hf_embed.checkpoint.tables import comparison_table, escaped, seeds_table
from hf_embed.objectives import OBJECTIVES
from hf_embed.pooling import POOLINGS, Dense
from hf_embed.training.record import on_the_hub, publishable

TRAIN = {
    "model": "google-bert/bert-base-uncased", "base_model": "google-bert/bert-base-uncased",
    "data": "nli.csv", "rows": 1200, "datasets": ["owner/nli"], "language": ["en"],
    "license": "mit", "objective": {"name": "SimCSE", "temperature": 0.05}, "batch_size": 64, "steps": 30,
    "loss": 0.1, "seconds": 75.2, "seed": 1, "settings": {"learning_rate": 0.001}, "hardware": "2 CPU cores",
    "versions": {"torch": "2.13"}, "chosen_by": {"metric": "spearman", "score": 45.0, "greater_is_better": True},
}  # fmt: skip
SCORES = {"sts": {"dev": 40.0}, "alignment": 0.4, "uniformity": -1.0, "retrieval": {"faq": {"ndcg@10": 30.0, "mrr@10": 28.0}},
          "zero_shot": {"topics": {"accuracy": 50.0}}, "triplet": {"nli": {"triplet_accuracy": 80.0}},
          "pair_classification": {"quora": {"pair_ap": 70.0, "pair_accuracy": 75.0, "pair_accuracy_threshold": 0.8123,
                                            "pair_f1": None, "pair_f1_threshold": None}},
          "reranking": {"ask": {"rerank_map": 60.0, "rerank_mrr@10": 65.0, "rerank_ndcg@10": 66.0}}}  # fmt: skip
MTEB = [{"task": "STSBenchmark", "type": "STS", "split": "test", "metric": "cosine_spearman", "score": 82.03}]
RESULTS = {"before": SCORES, "after": SCORES, "train": TRAIN, "mteb": MTEB}
BAD = "a`b **c** <script>x</script>\n---\nlicense: [gpl\n# title | d: {e}"


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_every_snippet_gives_the_encoders_vectors(tmp_path, pooling, normalize):
    model = tiny_model()
    model.config.return_dict = not normalize  # BUG: with False, the first snippet read attributes of a tuple
    prompts = {"query": '\U0001f600 "`é:\n'}  # BUG: with an emoji, the first snippet raised an error
    encoder = Encoder(model, small_tokenizer(), pooling, None, normalize, prompts, default_prompt_name="query").eval()
    encoder.save_pretrained(tmp_path)
    expected = encoder.encode(["a cat", "a dog sleeping by the fire"])
    found = snippets((tmp_path / "README.md").read_text())
    assert len(found) == 3
    for loader, code in zip(("AutoModel", "SentenceTransformer", "Encoder"), found):
        assert loader in code
        names = {}
        exec(code.replace('"FOLDER"', repr(str(tmp_path))), names)
        np.testing.assert_allclose(np.asarray(names["vectors"]), expected, atol=1e-5 * np.abs(expected).max())


def test_what_it_says():
    card = model_card(tiny_encoder(prompts={"query": "look: "}), RESULTS, picture=True)
    for part in (
        "## Results", "dev (Spearman x 100)", "nli (triplet accuracy x 100)", "quora (average precision x 100)",
        "ask (MAP x 100)", "(geometry.png)", "## MTEB", "82.03  cosine_spearman", "nli.csv, 1,200 rows",
        "SimCSE: temperature 0.05", "-log e^(cos", "| learning_rate | 0.001 |", "1 min 15 s on 2 CPU cores", "torch 2.13",
        "query     'look: '", "slightly too optimistic", "arxiv.org/abs/2104.08821",
    ):  # fmt: skip
        assert part in card
    dense = Dense(torch.nn.Linear(32, 8), torch.nn.Tanh())
    tokens = LoraConfig(target_modules=["query"], trainable_token_indices=[5, 7])
    for encoder in (
        tiny_encoder(dense=[dense]),
        Encoder(get_peft_model(tiny_model(), tokens), small_tokenizer(), dense=[dense]),
    ):
        assert "| Parameters | 125,192 |" in model_card(encoder)  # with the dense layer, without the adapters
    bare = model_card(tiny_encoder())
    assert "This model was not evaluated" in bare
    assert "## Results" not in bare and "## Training" not in bare and "Prompts" not in bare


def test_metadata():
    data = ModelCard(model_card(tiny_encoder(), RESULTS)).data
    assert (data.base_model, data.datasets, data.language, data.license) == (
        "google-bert/bert-base-uncased", ["owner/nli"], ["en"], "mit",
    )  # fmt: skip
    assert data.library_name == "sentence-transformers" and "hf_embed" in data.tags
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert scores == {
        ("dev", "spearman_cosine"): 40.0, ("faq", "ndcg_at_10"): 30.0, ("faq", "mrr_at_10"): 28.0, ("topics", "accuracy"): 50.0,
        ("MTEB STSBenchmark", "cosine_spearman"): 82.03, ("nli", "cosine_accuracy"): 80.0,
        ("quora", "cosine_ap"): 70.0, ("quora", "cosine_accuracy"): 75.0, ("quora", "cosine_accuracy_threshold"): 0.8123,
        ("ask", "map"): 60.0, ("ask", "mrr_at_10"): 65.0, ("ask", "ndcg_at_10"): 66.0,
    }  # fmt: skip
    kinds = {result.dataset_name: (result.task_type, result.task_name) for result in data.eval_results}
    assert kinds["nli"] == ("triplet", "Triplet") and kinds["quora"] == ("binary-classification", "Binary Classification")
    assert kinds["ask"] == ("reranking", "Reranking")
    bare = ModelCard(model_card(tiny_encoder())).data
    assert bare.base_model is None and bare.eval_results is None


def test_what_is_on_the_hub_and_what_is_nobodys_business(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    assert on_the_hub("outputs/mine") is None and on_the_hub("data/x.jsonl") is None and on_the_hub(None) is None
    assert on_the_hub("owner/name") == "owner/name"
    assert [publishable(name) for name in ("/home/someone/model", "outputs/mine", "owner/name")] == [
        "model", "outputs/mine", "owner/name",
    ]  # fmt: skip
    assert publishable("https://user:SECRET@host:1/x.jsonl?Signature=S#f") == "https://host:1/x.jsonl"


def test_names_stay_text():
    train = TRAIN | {"model": BAD, "data": BAD, "settings": {BAD: BAD}}
    scores = {"sts": {BAD: 40.0}, "retrieval": {BAD: {"ndcg@10": 1.0}}}
    results = {"before": scores, "after": scores, "train": train, "mteb": [MTEB[0] | {"task": BAD}]}
    card = model_card(tiny_encoder(prompts={BAD: BAD}), results)
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert "license" not in {key for key, value in front.items() if value != "mit"}
    _, found = model_index_to_eval_results(front["model-index"])
    assert found[0].dataset_name == BAD
    body = card.split("\n---\n", 1)[1]
    for line in body.splitlines():
        if "script" in line and not line.startswith("    "):  # outside of code blocks, everything is escaped
            assert "\\<script\\>" in line and "a\\`b \\*\\*c\\*\\*" in line and not re.search(r"(?<!\\)[<`*]", line)
            assert line.startswith("| ") and len(re.findall(r"(?<!\\)\|", line)) == 3  # the row still has two cells
    assert "\n# title" not in body and "\nlicense:" not in body


@pytest.mark.parametrize(
    "results", [{"train": {"objective": "SimCSE"}}, {"train": {"chosen_by": "loss"}}, {"tempscale": {"temperature": 1}}]
)
def test_results_that_a_user_has_edited_are_left_out(tmp_path, caplog, results):
    """BUG: the model could not be saved, with a traceback."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_card(tiny_encoder(), tmp_path)
    assert "results.json is damaged" in caplog.text and (tmp_path / "results.json").read_text() == json.dumps(results)


def test_a_card_of_the_users_stays_unless_asked(tmp_path):
    encoder, path = tiny_encoder(), tmp_path / "README.md"
    write_card(encoder, tmp_path)
    assert is_generated(path.read_text())
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_card(encoder, tmp_path)  # generated again from the files of the folder
    made = path.read_text()
    assert "82.03" in made
    path.write_text(made.replace(f"# {escaped(tmp_path.name)}", "# My embeddings"))
    write_card(encoder, tmp_path)
    assert "# My embeddings" in path.read_text()
    path.write_text("mine")
    write_card(encoder, tmp_path)
    assert path.read_text() == "mine"
    write_card(encoder, tmp_path, overwrite=True)
    assert path.read_text() == made


@pytest.mark.parametrize("inner", ["SimCSE", "ImprovedContrastive"])
def test_the_objective_within_matryoshka_is_the_one_that_was_trained(inner):
    """BUG: The card always showed the equation and the paper of ImprovedContrastive, whatever the inner objective was."""
    objective = {"name": "Matryoshka", "objective": {"name": inner, "temperature": 0.05}, "dims": [16], "weights": [1.0]}
    card = model_card(tiny_encoder(), RESULTS | {"train": TRAIN | {"objective": objective}})
    for name in ("SimCSE", "ImprovedContrastive"):
        assert (OBJECTIVES[name].equation in card) == (OBJECTIVES[name].paper in card) == (name == inner)
    assert OBJECTIVES["Matryoshka"].paper in card
    assert f"| Matryoshka: objective ({inner}: temperature 0.05), dims [16]," in card.replace("\\", "")  # BUG: {'name': ...}


def test_a_table_shows_tasks_of_users_own():
    """BUG: A run whose evaluation sets were all custom tasks ended in a traceback, because the table had no lines."""
    scores = {"bitext": {"mine": {"bitext_accuracy": 30.0, "margin": 0.5}, "other": {"bitext_accuracy": None}}}
    lines = comparison_table({"before": scores, "after": scores})
    assert [line.split("  ")[0] for line in lines[1:]] == ["mine (bitext_accuracy)", "other (bitext_accuracy)"]


@pytest.mark.parametrize("scores", [(None, 40.0, 50.0), (40.0, None, 50.0), (40.0, 50.0, None)])
def test_the_table_of_seeds_has_no_number_over_a_collapsed_seed(scores):
    """BUG: whether the minimum and the maximum left out a collapsed seed, whose score is null, depended on its place."""
    seeds = {str(seed): {"sts": {"dev": score}} for seed, score in enumerate(scores)}
    kept = next(seed for seed, score in enumerate(scores) if score == 40.0)
    assert seeds_table({"seeds": seeds, "seed": kept})[1].split()[-4:] == ["nan", "nan", "nan", "40.00"]


# ---- the title ----


def test_the_title_is_the_folders_name_or_the_one_that_is_given(tmp_path):
    encoder, folder = tiny_encoder(), tmp_path / "my_model-v2"
    encoder.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "\n# my_model-v2\n" in card and ModelCard(card).data.model_name == "my_model-v2"
    encoder.save_pretrained(folder)  # a new folder replaces the old one; no card shows its temporary name
    assert (folder / "README.md").read_text() == card
    write_card(encoder, folder, title="Search in our FAQ")
    card = (folder / "README.md").read_text()
    assert "\n# Search in our FAQ\n" in card and "my_model" not in card


@pytest.mark.parametrize(
    "path",
    ["mine", "mine/", "mine/checkpoint-3", "mine/seed-1", "mine/seed-1/checkpoint-2", "mine/_pushing", ".mine.new",
     ".mine.new/seed-2", ".saving-mine-12-0", ".saving-.mine.new-12-0", "mine/.saving-checkpoint-3"],
)  # fmt: skip
def test_a_part_and_a_temporary_folder_have_the_title_of_the_model(tmp_path, path):
    assert title_of(tmp_path / path) == "mine"


@pytest.mark.parametrize("name", ["checkpoint", ".hidden", "a-1-2", "seeds-1", "v1.new"])
def test_other_names_of_folders_are_titles(tmp_path, name):
    assert title_of(tmp_path / name) == title_of(tmp_path / f".saving-{name}-12-0") == name


@pytest.mark.parametrize("results", [{}, RESULTS], ids=["no scores", "scores"])
@pytest.mark.parametrize("title", ["out", "Text embeddings", "a long name of a folder " * 4 + "\u200b", "<b>_*x*"])
def test_the_repositorys_name_replaces_a_default_title(title, results):
    card = model_card(tiny_encoder(), results, title=title)
    made = with_repository(card, "owner/123", title)
    assert is_generated(made) and "\n# 123\n" in made and "FOLDER" not in made and '"owner/123"' in made
    data, before = ModelCard(made).data, ModelCard(card).data
    assert data.model_name == "123" and before.model_name == title
    assert data.eval_results == before.eval_results and data.tags == before.tags
    kept = with_repository(card, "owner/123")  # no default title is given, so a user chose this title
    assert ModelCard(kept).data.model_name == title and "\n# 123\n" not in kept and '"owner/123"' in kept


def test_another_title_stays():
    made = with_repository(model_card(tiny_encoder(), {"card": {"title": "Ours"}}, title="out"), "owner/name", "out")
    assert "\n# Ours\n" in made and ModelCard(made).data.model_name == "Ours"


def test_settings_are_a_table():
    card = model_card(tiny_encoder(), RESULTS | {"train": TRAIN | {"settings": {"optim": "a|b", "lora_r": 8}}})
    rows = card.split("## Training\n\n")[1].split("\n\n")[0].splitlines()
    assert rows == [
        "| Setting | Value |", "|---|---|", "| Base model | google-bert/bert-base-uncased |",
        "| Training data | nli.csv, 1,200 rows |", "| Objective | SimCSE: temperature 0.05 |",
        "| Training steps | 30, with a batch size of 64 |", "| Mean training loss | 0.1 |", "| optim | a\\|b |",
        "| lora_r | 8 |", "| Seed | 1 |", "| Training time | 1 min 15 s on 2 CPU cores |", "| Software | torch 2.13 |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [("my_model", "my_model"), ("_a_", "\\_a\\_"), ("a__b", "a\\_\\_b"), ("a|b\n<c>", "a\\|b \\<c\\>"), ("a\\|", "a\\\\\\|")],
)
def test_text_of_users_in_markdown(text, shown):
    assert escaped(text) == shown
