"""Tests of recipes with held-out rows, early stopping and a title.

They also check the preview of training rows, which every run shows as the model reads them.
"""

import json
import logging
import math
import subprocess

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset, IterableDataset
from test_distributed import HERE, launch
from test_recipes import QUIET, UNSUP, files, flags, load_recipe, recipe, sup  # noqa: F401 (files is a fixture)
from transformers import TrainerState
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, SimCSE, Source, VectorDistillation
from hf_embed.kit import cli
from hf_embed.kit.finetune import EarlyStopping
from hf_embed.kit.plan import DataArguments, read_held_out, read_train_rows
from hf_embed.training.preview import preview

EACH_STEP = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1,
             "--load_best_model_at_end"]  # fmt: skip


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.jsonl"
    rows = [{"sent0": f"some {a}", "sent1": f"{a} and {b}"} for a, b in zip(WORDS, WORDS[::-1])]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_loss_before_and_after_is_in_the_results_and_the_card(tmp_path, files, held_out, capsys):  # noqa: F811
    out = tmp_path / "out"
    results = sup(*flags(files, "--eval_file", held_out, "--max_steps", 3, "--output_dir", out, "--title", "FAQ",
                         "--per_device_eval_batch_size", 6, "--learning_rate", 1e-3))  # fmt: skip
    before, after = (results[when]["held_out"]["held_out"]["loss"] for when in ("before", "after"))
    assert before > 0 and after > 0 and before != after and results == json.loads((out / "results.json").read_text())
    text = (out / "README.md").read_text()
    assert "held_out (loss, lower is better)" in text and f"{after:.3f}" in text and "# FAQ\n" in text
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    args = ContrastiveTrainingArguments(str(tmp_path / "x"), use_cpu=True, report_to=[], per_device_eval_batch_size=6)
    again = ContrastiveTrainer(Encoder.from_pretrained(str(out)), args).evaluate(Dataset.from_list(rows))
    assert again["eval_loss"] == pytest.approx(after, abs=1e-4)
    assert "held_out (loss, lower is better)" in capsys.readouterr().out


def test_held_out_rows_alone_choose_the_model(tmp_path, files, held_out):  # noqa: F811
    given = flags(files, "--eval_file", held_out, "--max_steps", 3, "--output_dir", tmp_path / "out", *EACH_STEP)
    del given[given.index("--eval_sts_file") : given.index("--eval_sts_file") + 2]
    seeds = sup(*given, "--metric_for_best_model", "eval_loss", "--seeds", "1,2")
    assert seeds["train"]["score"]["metric"] == "loss" and seeds["train"]["score"]["greater_is_better"] is False
    losses = {seed: scores["held_out"]["held_out"]["loss"] for seed, scores in seeds["seeds"].items()}
    assert seeds["seed"] == int(min(losses, key=losses.get))  # the seed with the lowest loss
    assert losses["1"] != losses["2"]


def test_seeds_keep_the_lowest_loss_if_no_metric_is_named(tmp_path, files, held_out):  # noqa: F811
    given = flags(files, "--eval_file", held_out, "--max_steps", 2, "--output_dir", tmp_path / "out")
    del given[given.index("--eval_sts_file") : given.index("--eval_sts_file") + 2]
    seeds = sup(*given, "--seeds", "1,2")
    losses = {seed: scores["held_out"]["held_out"]["loss"] for seed, scores in seeds["seeds"].items()}
    assert seeds["seed"] == int(min(losses, key=losses.get))


def test_the_loss_after_training_uses_the_learned_temperature(tmp_path, files, held_out):  # noqa: F811
    """A saved model holds no temperature. Its loss after the training is computed with the learned temperature."""
    results = load_recipe("gte_finetune").main([*map(str, [
        *QUIET, *flags(files, "--eval_file", held_out, "--max_steps", 4, "--output_dir", tmp_path / "out",
        "--learn_temperature", "--learning_rate", 3e-2, "--eval_strategy", "steps", "--eval_steps", 4, "--max_length", 32)
    ])])  # fmt: skip
    state = TrainerState.load_from_json(str(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))))
    logged = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry][-1]
    assert results["after"]["held_out"]["held_out"]["loss"] == pytest.approx(logged, abs=1e-3)


def jsonl(path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def plan_rows(*words) -> tuple[Dataset, Dataset]:
    """Return the training rows and the held-out rows that the flags name."""
    (data,) = cli.parse([DataArguments], argv=list(map(str, words)))
    return read_train_rows(data)[0], read_held_out(data).rows


def test_columns_of_both_files(tmp_path):
    """A column to ignore may be in only one of the two files.

    BUG: with --columns, a label in the held-out rows was refused although it was to be ignored. If the training rows had no
    label, --ignore_columns was refused.
    """
    names = ("premise", "hypothesis", "label")
    labeled = jsonl(tmp_path / "a.jsonl", [dict(zip(names, (f"a {word}", word, 1))) for word in WORDS])
    named = jsonl(tmp_path / "b.jsonl", [dict(zip(names, (f"a {word}", word))) for word in WORDS])
    columns = ["--columns", "anchor=premise", "positive=hypothesis", "--ignore_columns", "label"]
    for train, held in [(labeled, labeled), (named, labeled), (labeled, named)]:
        rows = plan_rows("--train_file", train, "--eval_file", held, *columns)
        assert [part.column_names for part in rows] == [["anchor", "positive"]] * 2
        assert [part["positive"][:] for part in rows] == [WORDS] * 2
    given = ("--train_file", named, "--eval_file", named, *columns)
    assert "there is no column 'label' to ignore; found premise, hypothesis" in error_of(plan_rows, *given)


def test_columns_of_held_out_rows_alone(tmp_path):
    """BUG: with --sources, held-out rows were refused for a column that the user had no way to ignore."""
    labeled = jsonl(tmp_path / "a.jsonl", [{"frage": f"a {word}", "antwort": word, "label": 1} for word in WORDS])
    singles = jsonl(tmp_path / "b.jsonl", [{"body": word} for word in WORDS])
    pairs = jsonl(tmp_path / "c.jsonl", [{"anchor": f"a {word}", "positive": word} for word in WORDS])
    (tmp_path / "sources.yaml").write_text("- name: a\n  file: c.jsonl\n")
    columns = ["--columns", "anchor=frage", "positive=antwort", "--ignore_columns", "label"]
    (source,), rows = plan_rows("--sources", tmp_path / "sources.yaml", "--eval_file", labeled, *columns)
    assert source.rows.column_names == rows.column_names == ["anchor", "positive"] and rows["positive"][:] == WORDS
    trained, rows = plan_rows("--train_file", singles, "--eval_file", pairs, "--columns", "text=body")
    assert trained.column_names == ["text"] and rows.column_names == ["anchor", "positive"]


@pytest.mark.parametrize(
    "more, parts",
    [
        (["--eval_file", "nowhere.csv"], ["nowhere.csv: this file does not exist"]),
        (["--early_stopping_patience", 0], ["early_stopping_patience is 0"]),
        (["--early_stopping_patience", 2], ["--early_stopping_patience 2 needs evaluations", "--eval_strategy steps"]),
        (["--eval_file", "{single}"], ["rows of a single text cannot be held out", "give pairs"]),
        (["--eval_file", "{held_out}", "--per_device_eval_batch_size", 1], ["per_device_eval_batch_size is 1"]),
        (["--eval_file", "{held_out}", "--eval_sts_file", "held_out={sts}"], ["--eval_file: two sets are named 'held_out'"]),
        (["--eval_file", "{named}"], ["the columns are those of an STS set", "--eval_sts_file NAME=PATH"]),
    ],
)
def test_impossible_flags_are_refused_by_name(tmp_path, files, held_out, more, parts):  # noqa: F811
    single, named = tmp_path / "single.txt", tmp_path / "named.csv"
    single.write_text("a cat\na dog\n")
    named.write_text("sentence1,sentence2,score\na cat,a dog,1\na house,a home,4\n")
    names = files | {"held_out": held_out, "single": single, "named": named}
    given = [str(word).format(**names) for word in more]
    message = error_of(sup, *flags(files, *given, "--output_dir", tmp_path / "out"))
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_one_warning_without_an_evaluation_set(tmp_path, files, caplog):  # noqa: F811
    """BUG: further warnings said that do_eval and eval_steps, which the preset sets, have no effect."""
    given = flags(files, *EACH_STEP, "--output_dir", tmp_path / "out")
    del given[given.index("--eval_sts_file") : given.index("--eval_sts_file") + 2]
    with caplog.at_level(logging.WARNING):
        sup(*given)
    assert "nothing is evaluated" in caplog.text and "has no effect" not in caplog.text


def test_patience_without_an_evaluation_set(tmp_path, files):  # noqa: F811
    given = flags(files, "--early_stopping_patience", 2, "--output_dir", tmp_path / "out")
    del given[given.index("--eval_sts_file") : given.index("--eval_sts_file") + 2]
    assert "needs an evaluation set; give --eval_file FILE" in error_of(sup, *given)


# ---- early stopping ----


def worsening(files, held_out, out, *more) -> list:  # noqa: F811
    """Return the flags of a run with a learning rate of 0, so that no evaluation is better than the first."""
    return flags(files, "--eval_file", held_out, "--metric_for_best_model", "eval_loss", "--learning_rate", 0,
                 "--num_train_epochs", 20, "--output_dir", out, *EACH_STEP, *more)  # fmt: skip


def test_a_run_stops_after_so_many_evaluations_without_a_better_one(tmp_path, files, held_out):  # noqa: F811
    seeds = sup(*worsening(files, held_out, tmp_path / "s", "--early_stopping_patience", 2, "--seeds", "1,2"))
    steps = [json.loads((tmp_path / "s" / f"seed-{seed}" / "results.json").read_text())["train"]["steps"] for seed in (1, 2)]
    # The first evaluation is the best, and the next two are no better. Each seed has a count of its own.
    assert steps == [3, 3] and seeds["seed"] in (1, 2)


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path, files, held_out):  # noqa: F811
    out = tmp_path / "out"
    sup(*worsening(files, held_out, out, "--max_steps", 3))
    results = sup(*worsening(files, held_out, out, "--early_stopping_patience", 4, "--resume_from_checkpoint"))
    assert results["train"]["steps"] == 5


COUNTS = [
    ([3, 2, 1], False, 0), ([3, 1, 2, 2], False, 2), ([1, 2, 3], False, 2), ([1, 2, 3], True, 0), ([], True, 0),
    ([math.nan, 2, math.nan], False, 1),
]  # fmt: skip


@pytest.mark.parametrize("losses, greater, count", COUNTS)
def test_the_patience_count_is_restored_from_the_log(losses, greater, count):
    args = ContrastiveTrainingArguments("x", use_cpu=True, report_to=[], eval_strategy="steps", eval_steps=1, save_steps=1,
                                        load_best_model_at_end=True, metric_for_best_model="eval_loss",
                                        greater_is_better=greater)  # fmt: skip
    stopping = EarlyStopping(9)
    log = [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
    at_start = {"eval_loss": 0, "step": 0}  # Trainer does not compare with it
    stopping.on_train_begin(args, TrainerState(log_history=[at_start, *log, {"loss": 9, "step": 9}]), None)
    assert stopping.early_stopping_patience_counter == count


# ---- the rows as the model reads them ----


def make(folder, rows, encoder=None, **settings) -> ContrastiveTrainer:
    args = ContrastiveTrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, **settings)
    return ContrastiveTrainer(encoder or tiny_encoder(), args, train_dataset=rows, train_name="pairs.jsonl")


PAIRS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[::-1])]


def test_the_preview_shows_prompts_and_truncated_texts(tmp_path):
    encoder = tiny_encoder(prompts={"query": "look for: ", "document": "text: "}, max_length=8)
    rows = [row | {"negatives": ["no music", "no rain and no snow and nothing at all", "x"]} for row in PAIRS]
    run = make(tmp_path, rows, encoder)
    lines = run.preview()
    cut = sum(run.train_dataset["truncated"][:])
    assert cut >= 12 and lines[0] == f"as the model reads pairs.jsonl: 12 rows, {cut} of 60 texts truncated to 8 tokens"
    assert len(lines) == 7
    assert lines[1].split() == ["row", "1", "anchor", "7", "tokens", "look", "for", ":", "the", "cat"]
    assert lines[2].split()[:3] == ["positive", "8", "tokens"] and lines[2].endswith("a cat by the")  # "letter" is truncated
    assert lines[3].split()[:3] == ["negative", "6", "tokens"] and lines[3].endswith("text : no music  (and 2 more)")
    ids = run.train_dataset[0]["input_ids"][1]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) in lines[2]


@pytest.mark.parametrize("same, words", [(False, "under two dropout masks"), (True, "under one dropout mask")])
def test_a_single_text_is_its_own_positive(tmp_path, same, words):
    lines = make(tmp_path, [row["anchor"] for row in PAIRS], same_dropout_mask=same).preview()
    assert len(lines) == 4 and "text" in lines[1] and lines[-1].strip() == f"the positive is the same text, {words}"
    assert not any("dropout" in line for line in make(tmp_path, PAIRS).preview())


def test_the_preview_names_two_dropout_masks_only_where_there_are_two(tmp_path):
    """BUG: it named them for a model without dropout, and for texts that only learn a teacher's vectors."""
    still = Encoder(tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), small_tokenizer(), "mean")
    texts = [row["anchor"] for row in PAIRS]
    run = make(tmp_path, texts, still)
    assert run.preview()[-1].strip() == "the positive is the same text, with the same vector: the model has no dropout"
    run.objectives = [VectorDistillation()]
    assert len(run.preview()) == 3 and "positive" not in "".join(run.preview())


def test_the_preview_shows_the_first_of_several_sources(tmp_path):
    sources = dict.fromkeys(("faq", "forum", "nli", "d", "e", "f", "g", "h"), PAIRS)
    lines = make(tmp_path, sources).preview()
    assert lines[0].startswith("as the model reads faq, the first of 8 sources (faq, forum, nli, d, e, f and 2 more): 12 rows")
    assert len(lines) == 5


def test_the_preview_skips_no_rows_of_a_stream(tmp_path):
    def steps(look: bool) -> list:
        rows = IterableDataset.from_generator(lambda: iter(PAIRS))
        run = make(tmp_path, [Source("web", rows, size=12)], per_device_train_batch_size=4)
        lines = run.preview() if look else []
        assert not look or (lines[0].startswith("as the model reads web: about 0% of the texts") and "the cat" in lines[1])
        return [batch["input_ids"].tolist() for batch in run.get_train_dataloader()]

    assert steps(True) == steps(False)


def test_long_and_odd_texts_are_a_short_line(tmp_path):
    rows = [{"anchor": "word " * 60, "positive": "line\nbreak\tand tab"}] * 2
    lines = preview(make(tmp_path, rows).train_dataset, Encoder(tiny_model(), small_tokenizer()), "rows", False, SimCSE())
    assert max(map(len, lines)) < 110 and not any("\n" in line or "\t" in line for line in lines)


@pytest.mark.slow
def test_scripts_log_the_preview_and_recipes_print_it(tmp_path, files, caplog, capsys):  # noqa: F811
    with caplog.at_level(logging.INFO, "hf_embed.trainer"):
        make(tmp_path / "x", PAIRS)
    assert "as the model reads pairs.jsonl" in caplog.text
    caplog.clear()
    make(tmp_path / "x", PAIRS)
    assert "as the model reads" not in caplog.text
    sup(*flags(files, "--max_steps", 1, "--output_dir", tmp_path / "out", "--seeds", "1,2"))
    shown = capsys.readouterr().out
    assert shown.count("as the model reads") == 1 and "anchor" in shown  # only for the first seed
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["anchor"] for row in PAIRS))
    UNSUP.main([*QUIET, *map(str, flags(files, "--train_file", texts, "--max_steps", 1, "--output_dir", tmp_path / "unsup"))])
    assert "the positive is the same text, under two dropout masks" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_print_the_preview_once(tmp_path, files, held_out):  # noqa: F811
    """The loss of the held-out rows is the same as with one process."""
    given = flags(files, "--eval_file", held_out, "--max_steps", 2, "--learning_rate", 0, "--per_device_train_batch_size", 2)
    losses = {}
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        size = 6 // ranks
        command = launch(ranks, HERE.parent / "recipes" / "sup_simcse.py", *QUIET, *given, "--output_dir", out,
                         "--per_device_eval_batch_size", size)  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("as the model reads") == 1
        losses[ranks] = json.loads((out / "results.json").read_text())["after"]["held_out"]["held_out"]["loss"]
    assert losses[1] == pytest.approx(losses[2], abs=1e-4) and torch.isfinite(torch.tensor(losses[1]))
