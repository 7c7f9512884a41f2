"""The model card and results.json that `save_model` writes in a user's own script: the training and the scores."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset, DatasetInfo
from torch import nn
from transformers import AutoModel, AutoTokenizer, TrainerCallback, TrainingArguments
from worker import STS, WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, Matryoshka, Retrieval, SimCSE
from hf_embed.checkpoint.card import is_generated, served_otherwise, write_card
from hf_embed.checkpoint.save import warn_of_servers
from hf_embed.checkpoint.tables import escaped, training_rows
from hf_embed.pooling import POOLINGS, Dense

ROWS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]
SEARCH = Retrieval({"q": "the cat"}, {f"d{i}": f"a {word}" for i, word in enumerate(WORDS)}, {"q": {"d0": 1}})
SETS = {"dev": Dataset.from_list(STS), "faq": SEARCH, "loss": ROWS[:6]}
QUIET = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
         "save_strategy": "no", "learning_rate": 1e-3}  # fmt: skip
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def make(folder, sets=None, rows=ROWS, objective=None, **settings) -> ContrastiveTrainer:
    args = ContrastiveTrainingArguments(str(folder), **(QUIET | settings))
    return ContrastiveTrainer(tiny_encoder(), args, objective, rows, sets)


def stored(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def card(folder: Path) -> str:
    text = (folder / "README.md").read_text()
    assert is_generated(text)
    return text


def test_a_second_training_has_no_scores_from_before_the_first(tmp_path):
    """BUG: the card showed the scores of the untrained model as those from before the second training."""
    run = make(tmp_path, SETS)
    run.evaluate()
    for expected in (True, False):
        run.train()
        run.evaluate()
        run.save_model()
        assert bool(stored(tmp_path)["before"]) == expected and stored(tmp_path)["after"]


def test_a_script_that_trains_evaluates_and_saves(tmp_path):
    run = make(tmp_path, SETS, seed=7, gradient_accumulation_steps=2)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    run.save_model(str(tmp_path / "checkpoint-final"))  # BUG: such a folder had no results, and was not compared
    run.save_model()
    assert stored(tmp_path) == stored(tmp_path / "checkpoint-final")
    text, results = card(tmp_path), stored(tmp_path)
    for scores, found in ((before, results["before"]), (after, results["after"])):
        assert found["sts"] == {"dev": round(scores["eval_dev_spearman"], 2)}
        assert found["retrieval"]["faq"]["ndcg@10"] == round(scores["eval_faq_ndcg@10"], 2)
        assert found["held_out"] == {"loss": {"loss": round(scores["eval_loss_loss"], 4)}}
        assert found["alignment"] == round(scores["eval_dev_alignment"], 4)
    train = results["train"]
    assert (train["steps"], train["batch_size"], train["seed"], train["rows"]) == (3, 8, 7, 12)
    assert train["objective"]["name"] == "SimCSE" and train["settings"]["gradient_accumulation_steps"] == 2
    assert train["loss"] == run.state.log_history[-2]["train_loss"] and train["seconds"] > 0 and train["chosen_by"] is None
    for part in (
        "## Results", f"{after['eval_dev_spearman']:.2f}", f"{after['eval_loss_loss']:.3f}", "## Training", "12 rows",
        "SimCSE: temperature 0.05", "| Training steps | 3, with a batch size of 8 |", "| learning_rate | 0.001 |",
        "| Seed | 7 |", "CPU cores", "torch ", f"| Mean training loss | {train['loss']:.4g} |", "arxiv.org/abs/2104.08821",
    ):  # fmt: skip
        assert part in text, part
    assert "not evaluated" not in text


def test_settings_that_a_given_optimizer_replaces_are_not_in_the_card(tmp_path):
    """BUG: the card showed the learning rate of the arguments (5e-5 by default), with which nothing was trained."""
    run = make(tmp_path, weight_decay=0.1, warmup_steps=2)
    given = torch.optim.SGD([{"params": list(run.model.parameters()), "lr": 0.3}])
    for schedule, kept in ((None, {"warmup_steps": 2}), (torch.optim.lr_scheduler.LambdaLR(given, lambda step: 1.0), {})):
        args, named = run.args, "SGD" if schedule is None else "SGD, LambdaLR"
        run = ContrastiveTrainer(run.model, args, None, ROWS, optimizers=(given, schedule))
        run.train()
        run.save_model()
        train = stored(tmp_path)["train"]
        assert train["learning_rate"] is None and train["settings"] == {"max_steps": 3, "optimizers": named} | kept
        assert "learning_rate" not in card(tmp_path) and f"| optimizers | {named} |" in card(tmp_path)


def test_without_an_evaluation_the_training_is_there_all_the_same(tmp_path):
    run = make(tmp_path)
    run.train()
    run.save_model()
    text = card(tmp_path)
    assert "## Training" in text and "This model was not evaluated" in text and "## Results" not in text
    assert stored(tmp_path).keys() == {"train"}


def test_before_any_training_there_is_nothing_to_say(tmp_path):
    run = make(tmp_path, SETS)
    run.save_model()
    assert "## Training" not in card(tmp_path) and not (tmp_path / "results.json").exists()
    run.evaluate()  # now the model is evaluated, but still not trained
    run.save_model()
    assert "## Training" not in card(tmp_path) and stored(tmp_path)["after"]["sts"].keys() == {"dev"}
    assert stored(tmp_path)["before"] == {}
    assert "before" not in card(tmp_path).split("## Results")[1].split("## ")[0]


def test_the_title_without_any_name(tmp_path):
    run = make(tmp_path / "faq-search", save_strategy="steps", save_steps=3)
    run.train()
    run.save_model()
    assert "\n# faq-search\n" in card(tmp_path / "faq-search")
    assert "\n# faq-search\n" in card(tmp_path / "faq-search" / "checkpoint-3")
    run.save_model(str(tmp_path / "elsewhere"))
    assert "\n# elsewhere\n" in card(tmp_path / "elsewhere")


def test_the_scores_are_of_the_model_that_is_saved(tmp_path):
    """With `load_best_model_at_end`, the saved model is that of the best step (here: the lowest score), not the last."""
    run = make(tmp_path, {"dev": SETS["dev"]}, max_steps=6, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
               metric_for_best_model="spearman", greater_is_better=False,
               learning_rate=2e-2, seed=1, **EACH_STEP)  # fmt: skip
    run.train()
    run.save_model()
    scores = {entry["step"]: entry["eval_spearman"] for entry in run.state.log_history if "eval_spearman" in entry}
    assert run.state.best_global_step != 6 and scores[6] != min(scores.values())  # else this test proves nothing
    assert stored(tmp_path)["after"]["sts"]["dev"] == round(min(scores.values()), 2)
    best = min(scores, key=lambda step: scores[step])
    told = f"| Training steps | 6, with a batch size of 4; the weights are those of step {best}, the best checkpoint |"
    assert stored(tmp_path)["train"]["step_of_weights"] == best and told in card(tmp_path)
    chosen = stored(tmp_path)["train"]["chosen_by"]
    assert chosen == {"metric": "spearman", "score": round(min(scores.values()), 4), "greater_is_better": False}
    assert "slightly too optimistic" in card(tmp_path)
    saved = Encoder.from_pretrained(str(tmp_path))
    assert ContrastiveTrainer(saved, ContrastiveTrainingArguments(str(tmp_path / "x"), **QUIET)).evaluate(SETS["dev"])[
        "eval_spearman"
    ] == pytest.approx(min(scores.values()), abs=1e-3)  # fmt: skip


@pytest.mark.parametrize("best", [{}, {"step_of_weights": None}, {"step_of_weights": 3}])
def test_the_step_of_the_weights_may_be_unknown(tmp_path, best):
    """Results of an earlier version do not have it, and it is None if the folder of the best checkpoint was renamed."""
    run = make(tmp_path)
    run.train()
    run.save_model()
    train = {key: value for key, value in stored(tmp_path)["train"].items() if key != "step_of_weights"}
    assert dict(training_rows(train | best))["Training steps"] == "3, with a batch size of 4"


def test_scores_of_an_earlier_step_say_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = make(tmp_path, {"dev": SETS["dev"]}, max_steps=8, eval_strategy="steps", eval_steps=2)
    run.add_callback(Stop)
    run.train()
    run.save_model()
    assert stored(tmp_path)["train"]["scored_step"] == 2
    assert "The scores were measured at step 2, before the end of the training." in card(tmp_path)
    run.evaluate()
    run.save_model()
    assert "scored_step" not in stored(tmp_path)["train"] and "before the end of the training" not in card(tmp_path)


def test_sets_that_are_given_to_evaluate_are_in_the_card(tmp_path):
    run = make(tmp_path)
    run.train()
    run.evaluate({"later": SETS["dev"]})
    run.evaluate({"faq": SEARCH}, metric_key_prefix="test")  # another prefix: not in the card
    run.save_model()
    assert stored(tmp_path)["after"].keys() == {"sts", "alignment", "uniformity"}
    assert "later (Spearman x 100)" in card(tmp_path)


def test_other_rows_under_the_name_of_an_own_set_are_not_mixed_up_with_it(tmp_path, caplog):
    """BUG: "before" had the scores of the own set, and "after" those of the other rows."""
    run = make(tmp_path, {"dev": SETS["dev"]})
    before = run.evaluate()["eval_dev_spearman"]
    run.train()
    after = run.evaluate({"dev": list(SETS["dev"])})["eval_dev_spearman"]  # the same rows
    assert not caplog.records
    test = run.evaluate({"dev": STS[:5]})["eval_dev_spearman"]
    assert "evaluate: 'dev' is the name of the trainer's own evaluation set" in caplog.text
    run.save_model()
    found = [stored(tmp_path)[part]["sts"]["dev"] for part in ("before", "after")]
    assert found == [round(before, 2), round(after, 2)] and found[1] != round(test, 2)


def test_the_score_is_that_of_all_own_sets(tmp_path):
    """BUG: after an evaluation of one set, or of other sets, the mean of these was the score that had chosen the model."""
    run = make(tmp_path, {"a": SETS["dev"], "b": STS[:5]}, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
               **EACH_STEP)  # fmt: skip
    run.train()
    best = run.evaluate()["eval_spearman"]
    assert run.evaluate("b")["eval_spearman"] != best != run.evaluate({"test": STS[3:]})["eval_spearman"]
    run.save_model()
    assert stored(tmp_path)["train"]["chosen_by"]["score"] == stored(tmp_path)["train"]["score"]["score"] == round(best, 4)


def test_a_second_training_in_the_folder_replaces_what_the_first_said(tmp_path):
    for steps in (3, 2):
        run = make(tmp_path, SETS, max_steps=steps)
        run.train()
        run.save_model()
        assert stored(tmp_path)["train"]["steps"] == steps
        (tmp_path / "results.json").write_text(json.dumps(stored(tmp_path) | {"mteb": []}))
    make(tmp_path, max_steps=2).train()  # without save_model
    assert "mteb" in stored(tmp_path)
    assert "| Training steps | 2, with a batch size of 4 |" in card(tmp_path)


def test_a_users_own_files_stay(tmp_path, caplog):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "results.json").write_text('[{"accuracy": 1}]')
    run = make(tmp_path, SETS)
    run.train()
    with caplog.at_level(logging.WARNING):
        run.save_model()
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "results.json").read_text() == '[{"accuracy": 1}]'
    assert "results.json was not written by hf_embed and is left unchanged" in caplog.text
    (tmp_path / "README.md").unlink()
    run.save_model()
    assert "## Training" in card(tmp_path)


def test_elsewhere_and_in_checkpoints(tmp_path):
    run = make(tmp_path / "out", SETS, save_strategy="steps", save_steps=3, **EACH_STEP)
    run.train()
    run.save_model(str(tmp_path / "elsewhere"))
    assert "## Training" in card(tmp_path / "elsewhere") and stored(tmp_path / "elsewhere")["train"]["steps"] == 3
    assert not (tmp_path / "out" / "checkpoint-3" / "results.json").exists()


def test_names_for_the_card(tmp_path):
    run = make(tmp_path, {"dev": SETS["dev"]}, **EACH_STEP)
    run.create_model_card(model_name="Search in our FAQ")  # before the folder has a card
    run.train()
    run.save_model()
    assert "# Search in our FAQ\n" in card(tmp_path) and "## Training" in card(tmp_path)
    run.create_model_card(language="en", license="mit", tags="faq", finetuned_from="owner/base", dataset="our FAQ",
                          dataset_tags=["owner/faq"])  # fmt: skip
    text = card(tmp_path)
    for part in ("# Search in our FAQ\n", "language: en", "license: mit", "- faq", "base_model: owner/base", "- owner/faq",
                 "- name: Search in our FAQ", "| Training data | our FAQ, 12 rows |"):  # fmt: skip
        assert part in text, part
    assert "create_model_card has no argument modelname" in error_of(run.create_model_card, modelname="x")
    run.create_model_card(model_name="<b>*x*\n# y")
    assert "# \\<b\\>\\*x\\* \\# y\n" in card(tmp_path)


def test_names_given_to_write_card_are_kept(tmp_path):
    encoder = tiny_encoder()
    encoder.save_pretrained(str(tmp_path))
    write_card(encoder, tmp_path, title="Ours", language=["en", "de"], license="mit")
    assert stored(tmp_path) == {"card": {"title": "Ours", "language": ["en", "de"], "license": "mit"}}
    write_card(encoder, tmp_path)
    encoder.save_pretrained(str(tmp_path))
    assert "# Ours\n" in card(tmp_path) and "license: mit" in card(tmp_path)


@pytest.mark.parametrize(
    "objective, name",
    [(Matryoshka(SimCSE(), (16, 8)), "Matryoshka"), (lambda *a, **k: SimCSE()(*a, **k), "<lambda>"), (None, "SimCSE")],
    ids=["matryoshka", "function", "default"],
)
def test_every_kind_of_objective_has_a_name(tmp_path, objective, name):
    run = make(tmp_path, objective=objective)
    run.train()
    run.save_model()
    assert stored(tmp_path)["train"]["objective"]["name"] == name
    assert f"| Objective | {escaped(name)}" in card(tmp_path)


@pytest.mark.slow
def test_where_the_rows_are_from(tmp_path):
    rows = Dataset.from_list(ROWS)
    files = {"hf://datasets/owner/nli@0123/pairs/train.parquet": {"num_bytes": 1, "checksum": None}}
    of_hub = Dataset(rows.data, info=DatasetInfo(features=rows.features, download_checksums=files))
    rows.to_json(tmp_path / "pairs.jsonl")
    for given, name, datasets in (
        (of_hub, "owner/nli", ["owner/nli"]),
        (str(tmp_path / "pairs.jsonl"), "pairs.jsonl", []),
        ({"a": of_hub, "b": rows}, "a, b", ["owner/nli"]),
        (ROWS, "data given in a script", []),
    ):
        run = make(tmp_path / "out", rows=given)
        run.train()
        run.save_model()
        train = stored(tmp_path / "out")["train"]
        assert (train["data"], train["datasets"]) == (name, datasets)
        assert str(tmp_path) not in card(tmp_path / "out")


def test_plain_arguments_and_a_model_by_name(tmp_path):
    tiny_encoder().save_pretrained(str(tmp_path / "base"))
    plain = TrainingArguments(str(tmp_path / "out"), **(QUIET | {"num_train_epochs": 2, "max_steps": -1}))
    run = ContrastiveTrainer(str(tmp_path / "base"), plain, train_dataset=ROWS, eval_dataset=SETS)
    run.train()
    run.save_model()
    train = stored(tmp_path / "out")["train"]
    assert train["model"] == "base" and train["settings"] == {"num_train_epochs": 2, "learning_rate": 0.001}


# ---- what servers return ----


def served(folder: Path, texts: list[str]) -> torch.Tensor:
    """Return the embeddings of a server that reads 1_Pooling/config.json and ignores all other modules."""
    config = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (flag,) = [key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value]
    pooling = next(entry for entry in POOLINGS.values() if entry.flag == flag and entry.layers is None)
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    return pooling.function(states, batch["attention_mask"])


def dense_layer() -> Dense:
    torch.manual_seed(3)
    return Dense(nn.Linear(32, 16), nn.Tanh())


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "dense"])
@pytest.mark.parametrize("normalize", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "normalize"])
@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_who_is_served_other_vectors_is_told(tmp_path, caplog, pooling, normalize, dense):
    encoder = Encoder(
        tiny_model(), small_tokenizer(), pooling, normalize=normalize, dense=[dense_layer()] if dense else []
    ).eval()
    warn_of_servers.cache_clear()
    with caplog.at_level(logging.WARNING):
        encoder.save_pretrained(str(tmp_path))
        encoder.save_pretrained(str(tmp_path))
    told = [message for message in caplog.messages if "Servers that read only 1_Pooling" in message]
    texts = ["a cat", "the dog in the garden, by the river", "no bread at all"]
    own = torch.as_tensor(Encoder.from_pretrained(str(tmp_path)).encode(texts))
    got = served(tmp_path, texts)
    same = got.shape == own.shape and bool((torch.cosine_similarity(got, own) > 0.9999).all())
    assert len(told) == (0 if same else 1)  # one warning for two saves
    assert ("Servers that read only 1_Pooling" in card(tmp_path)) is not same
    if not same:
        assert f"(pooling {POOLINGS[pooling].saved_as or pooling})" in told[0] and "load the model as its card shows" in told[0]


def test_the_mend_is_the_pooling_that_servers_know():
    note = served_otherwise(tiny_encoder(pooling="first_last"))
    # BUG: this named text-embeddings-inference, which reads dense layers.
    assert note.startswith("Servers that read only 1_Pooling/config.json use the pooling mean and ignore 1_LayerPooling, so")
    assert "train with the pooling mean" in served_otherwise(tiny_encoder(pooling="top2"))
    assert "train with the pooling cls" in served_otherwise(tiny_encoder(pooling="cls_mlp"))
    assert served_otherwise(tiny_encoder(pooling="cls_mlp_train")) == served_otherwise(tiny_encoder()) == ""


def test_checkpoints_do_not_warn(tmp_path, caplog):
    warn_of_servers.cache_clear()
    args = ContrastiveTrainingArguments(str(tmp_path), **(QUIET | {"save_strategy": "steps", "save_steps": 3}), pooling="top2")
    run = ContrastiveTrainer(tiny_encoder(), args, train_dataset=ROWS)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "1_Pooling" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run.save_model()
    assert "1_Pooling" in caplog.text
