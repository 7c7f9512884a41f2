"""What `ContrastiveTrainer` accepts: names of models and tokenizers, many kinds of rows, and plain TrainingArguments.

It refuses everything else in one line that says what was given and what to give instead.
"""

import dataclasses
import logging

import numpy as np
import pandas
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from transformers import BertModel, DataCollatorWithPadding, Seq2SeqTrainingArguments, TrainingArguments
from worker import STS, WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, Matryoshka, SimCSE, Source
from hf_embed.data.python_rows import as_rows
from hf_embed.kit.plan import QUICKSTART
from hf_embed.training.resume import facts_of, same_settings

ROWS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}", "negative": f"no {b} here"}
        for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]  # fmt: skip
QUIET = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
         "save_strategy": "no"}  # fmt: skip


def make(folder, **given) -> ContrastiveTrainer:
    args = ContrastiveTrainingArguments(str(folder), **QUIET)
    defaults = {"model": tiny_encoder(), "args": args, "train_dataset": ROWS}
    return ContrastiveTrainer(**(defaults | given))


# ---- rows ----


def frame(**columns) -> pandas.DataFrame:
    rows = pandas.DataFrame(ROWS)[::-1][::-1].set_index(pandas.Index(range(5, 17), name="id"))  # the index is not a column
    return rows.assign(**columns)


KINDS = {
    "list of dicts": lambda: ROWS,
    "DataFrame": frame,
    "DataFrame of pandas' own texts": lambda: frame().astype("string"),
    "DataFrame of categories": lambda: frame().astype("category"),
    "list of tuples": lambda: [tuple(row.values()) for row in ROWS],
    "named tuples": lambda: list(frame()[["positive", "negative", "anchor"]].itertuples()),  # BUG: read by their positions
    "Dataset in another order": lambda: Dataset.from_list(ROWS[::-1]).select(range(len(ROWS) - 1, -1, -1)),
    "list of lists": lambda: [list(row.values()) for row in ROWS],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_trains_and_scores_as_a_dataset_does(tmp_path, kind):
    seen = []
    for rows in (Dataset.from_list(ROWS), KINDS[kind]()):
        run = make(tmp_path, train_dataset=rows, eval_dataset=rows)
        loss = run.evaluate()["eval_loss"]
        seen.append((run.train_dataset["text_ids"][:], loss, run.train().training_loss))
    assert seen[0] == seen[1] and len(seen[0][0][0]) == 3


def test_texts_files_and_named_sets(tmp_path):
    texts = [row["anchor"] for row in ROWS]
    assert [len(ids) for ids in make(tmp_path, train_dataset=texts).train_dataset["text_ids"]] == [1] * len(texts)
    pandas.DataFrame(ROWS).to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    assert len(make(tmp_path, train_dataset=str(tmp_path / "pairs.jsonl")).train_dataset) == len(ROWS)
    assert len(make(tmp_path, train_dataset=tmp_path / "pairs.jsonl").train_dataset) == len(ROWS)
    named = make(tmp_path, train_dataset={"frame": frame(), "list": ROWS, "file": tmp_path / "pairs.jsonl"})
    assert named.train_dataset.names == ["frame", "list", "file"] and named.train_dataset.sizes == [12, 12, 12]
    assert make(tmp_path, train_dataset=Source("one", Dataset.from_list(ROWS))).train_dataset.names == ["one"]
    named.train()


def test_a_key_that_the_first_row_lacks_counts():
    """`Dataset.from_list` uses only the keys of the first row; `as_rows` uses those of all rows."""
    rows = as_rows([{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d", "negative": "e"}], "rows")
    assert rows["negative"][:] == [None, "e"]
    rows = as_rows([("a", "b"), ("c", "d", "e", "f")], "rows")
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert rows["negative_2"][:] == [None, "f"]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT], ids=repr)
def test_a_missing_cell_is_missing_and_not_the_text_nan(tmp_path, missing, caplog):
    rows = [*ROWS, ROWS[0] | {"positive": missing}]
    for given in (rows, pandas.DataFrame(rows)):
        assert "row 13, column 'positive': the text is missing" in error_of(make, tmp_path, train_dataset=given)
        dropping = ContrastiveTrainingArguments(str(tmp_path), **QUIET, drop_empty_rows=True)
        assert len(make(tmp_path, train_dataset=given, args=dropping).train_dataset) == len(ROWS)
    optional = [*ROWS, ROWS[0] | {"negative": missing}]  # a row may have fewer negatives
    assert [len(ids) for ids in make(tmp_path, train_dataset=pandas.DataFrame(optional)).train_dataset["text_ids"]][-1] == 2


def generator():
    yield from ROWS


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([], ["the list is empty"]),
        ({}, ["the dict is empty"]),
        (pandas.DataFrame(), ["the DataFrame is empty"]),
        (pandas.DataFrame([["a", "b"]], columns=["anchor", "anchor"]), ["two columns are named 'anchor'"]),
        ([*ROWS, "a text"], ["row 13", "a str", "row 1 is a dict"]),
        ([1, 2], ["row 1 is 1, a int", "list of dicts"]),
        ([__file__, __file__], ["test_trainer_inputs.py' is a file, but each string of a list is a text"]),  # BUG: a text
        ([("a", "b"), ("c",)], ["row 2 is a tuple of length 1", "anchor and a positive"]),
        ([*ROWS, ROWS[0] | {"positive": 3}], ["row 13, column 'positive': 3 has the type int"]),
        (ROWS[0], ["'anchor' holds texts", "Dataset.from_dict"]),
        ({"anchor": ["a", "b"], "positive": ["c", "d"]}, ["'anchor' holds texts", "Dataset.from_dict"]),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), ["looks like a split"]),
        ("nowhere.jsonl", ["nowhere.jsonl: this file does not exist"]),
        (generator(), ["a generator cannot be used as rows", "from_generator"]),
        (generator, ["a function cannot be used as rows", "from_generator"]),
        (torch.utils.data.TensorDataset(torch.zeros(2)), ["a TensorDataset cannot be used as rows", "list of dicts"]),
        (Dataset.from_list(ROWS).data.table, ["a Table cannot be used as rows", "to_pandas()"]),
        # BUG: the message advised to stream its rows, because an evaluator can be called.
        (TripletEvaluator(["a"], ["b"], ["c"]), ["a TripletEvaluator cannot be used as rows", "Triplets, PairClassification"]),
        (3, ["a int cannot be used as rows"]),
        (Dataset, ["the class Dataset cannot be used as rows"]),
        ({"a": ROWS, "b": 3}, ["train_dataset['b']: a int cannot be used as rows"]),
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_refused(tmp_path, rows, parts):
    message = error_of(make, tmp_path / "out", train_dataset=rows)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


# ---- evaluation sets ----

TO_STS = "for an STS set, rename the columns to sentence1, sentence2 and score"


def test_a_table_is_an_sts_set_or_held_out_by_its_columns(tmp_path):
    sets = {"sts": STS, "loss": frame(), "more": [tuple(row.values()) for row in ROWS]}
    run = make(tmp_path, eval_dataset=sets)
    assert [(name, task.kind) for name, task in run.eval_dataset.items()] == [
        ("sts", "sts"), ("loss", "held_out"), ("more", "held_out")
    ]  # fmt: skip
    scores = run.evaluate()
    assert scores["eval_loss"] == pytest.approx(scores["eval_loss_loss"]) == pytest.approx(scores["eval_more_loss"])
    assert {"eval_sts_spearman", "eval_spearman"} <= scores.keys()
    assert list(make(tmp_path, eval_dataset=pandas.DataFrame(STS)).eval_dataset) == ["sts"]
    assert list(make(tmp_path, eval_dataset=ROWS).eval_dataset) == ["held_out"]
    assert "eval_held_out_loss" in make(tmp_path).evaluate(ROWS)
    assert "there is no evaluation set 'dev'; available: sts, loss, more" in error_of(run.evaluate, "dev")


@pytest.mark.parametrize(
    "sets, parts",
    [
        ([ROWS[0] | STS[0], ROWS[1] | STS[1]], ["the columns anchor and positive make it held-out rows", "an STS set"]),
        ([{"text": "a"}, {"text": "b"}], ["single text cannot be held out", "anchor, positive"]),
        (["a", "b"], ["single text cannot be held out"]),
        ([ROWS[0] | {"label": 1}, ROWS[1] | {"label": 0}], ["'label' judges the pairs"]),
        ([{"text1": "a", "text2": "b", "score": 1.5}] * 2, ["'score' judges the pairs", TO_STS]),
        ([{"question1": "a", "question2": "b", "score": 1}] * 2, ["'score' judges the pairs", TO_STS]),
        ([{"sentence1": "a", "sentence2": "b", "similarity": i} for i in range(2)], ["no column score", "rename the columns"]),
        ([{"sentence1": "a", "sentence2": f"b{i}", "label": i} for i in range(6)], ["'label' judges the pairs", TO_STS]),
        ([{"sentence1": "a", "sentence2": "b", "label": x} for x in (0.5, 1)], ["'label' judges the pairs", TO_STS]),
        ([{"sentence1": "a", "sentence2": "b", "label": x} for x in ("ja", "nein")], ["the labels are ja, nein; write"]),
        ([{"premise": "a", "hypothesis": "b", "label": x} for x in (0, 1)], ["entailment is 0 in some datasets"]),
        ([{"left": "a", "right": "b"}] * 2, ["found the columns left, right", "sentence1, sentence2 and score", "anchor"]),
        (IterableDataset.from_generator(generator), ["a streaming dataset cannot be an evaluation set"]),
        ({"dev": 3}, ["dev: a int cannot be used as rows"]),
        ({"anchor": ["a"], "positive": ["b"]}, ["holds texts"]),
        (Dataset, ["the class Dataset is not an evaluation set"]),
    ],
)
def test_what_is_no_evaluation_set_is_refused(tmp_path, sets, parts):
    message = error_of(make, tmp_path / "out", eval_dataset=sets)
    assert all(part in message for part in parts), message
    assert "--ignore_columns" not in message  # BUG: this advice turned graded pairs into positives


# ---- the model and its tokenizer ----


def test_a_model_by_name_has_the_settings_of_its_folder(tmp_path):
    encoder = tiny_encoder(pooling="cls", prompts={"query": "look for: "}, normalize=True, max_length=20)
    encoder.save_pretrained(tmp_path / "model")
    for name in (str(tmp_path / "model"), tmp_path / "model"):
        run = make(tmp_path / "out", model=name)
        assert run.encoder.settings == encoder.settings and run.encoder.settings != tiny_encoder().settings
    args = ContrastiveTrainingArguments(str(tmp_path / "out"), **QUIET, pooling="mean", max_length=16)
    changed = make(tmp_path / "out", model=str(tmp_path / "model"), args=args).encoder
    assert (changed.pooling, changed.max_length, changed.normalize) == ("mean", 16, True)
    run.train()
    run.save_model()
    assert Encoder.from_pretrained(str(tmp_path / "out")).settings == encoder.settings


def test_an_encoder_that_is_given_is_the_one_that_is_trained(tmp_path):
    """BUG: with a pooling in args, the script's object kept its own pooling, and so encoded and saved other vectors."""
    encoder = tiny_encoder(prompts={"other": "about: "})
    given = {"pooling": "cls", "max_length": 16, "normalize": True, "prompts": {"query": "look for: "}}
    run = make(tmp_path / "out", model=encoder, args=ContrastiveTrainingArguments(str(tmp_path / "out"), **QUIET, **given))
    run.train()
    expected = tiny_encoder(**given | {"prompts": {"other": "about: ", "query": "look for: "}})
    expected.load_state_dict(run.encoder.state_dict())
    assert (encoder.encode_query(["a cat"]) == expected.encode_query(["a cat"])).all()
    assert encoder.settings == run.encoder.settings == expected.settings


def test_an_encoder_that_cannot_be_trained_as_asked_stays_as_it_is(tmp_path):
    encoder = tiny_encoder()
    before = encoder.settings
    args = ContrastiveTrainingArguments(str(tmp_path / "out"), **QUIET, normalize=True, max_length=67)
    assert "max_length 67 is above the 66 positions" in error_of(make, tmp_path / "out", model=encoder, args=args)
    assert encoder.settings == before


@pytest.mark.parametrize("rows", [ROWS, [Source("a", Dataset.from_list(ROWS))], None], ids=["table", "sources", "none"])
def test_a_prompt_that_leaves_no_room_is_refused(tmp_path, rows):
    """BUG: with sources, or without rows, all texts of an evaluation had the same vector, and the score was NaN."""
    encoder = tiny_encoder(max_length=16, prompts={"sts": "word " * 40}, default_prompt_name="sts")
    assert "max_length 16 leaves no room for a text" in error_of(make, tmp_path, model=encoder, train_dataset=rows)


def test_a_model_by_name_is_trained_in_float32(tmp_path):
    encoder = tiny_encoder()
    encoder.backbone.half()
    encoder.save_pretrained(tmp_path / "half", verify=False)
    run = make(tmp_path / "out", model=str(tmp_path / "half"))
    assert {parameter.dtype for parameter in run.encoder.parameters()} == {torch.float32}
    own = Encoder.from_pretrained(str(tmp_path / "half"), dtype=torch.float16)  # the dtype that the user asks for
    assert {parameter.dtype for parameter in make(tmp_path / "out", model=own).encoder.parameters()} == {torch.float16}


def test_a_tokenizer_that_is_given_counts(tmp_path):
    tokenizer = small_tokenizer()
    assert make(tmp_path, model=tiny_encoder(), processing_class=tokenizer).encoder.tokenizer is tokenizer
    model = tiny_model(vocab_size=12_000)
    by_name = make(tmp_path, model=model, processing_class=str(QUICKSTART / "encoder")).encoder
    assert by_name.tokenizer("a cat")["input_ids"] == tokenizer("a cat")["input_ids"]


def saved(folder) -> SentenceTransformer:
    tiny_encoder().save_pretrained(str(folder / "st"))
    return SentenceTransformer(str(folder / "st"), device="cpu")


def plateau() -> tuple:
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


class OwnWeights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, embeddings, text_ids, all_embeddings, all_text_ids, first_row):
        return self.scale * embeddings.sum()


@pytest.mark.parametrize(
    "given, parts",
    [
        ({"model": "no/such/model"}, ["model 'no/such/model' cannot be loaded"]),
        ({"model": BertModel, "processing_class": small_tokenizer()}, ["the model is of the type type", "PreTrainedModel"]),
        ({"model": 3, "processing_class": small_tokenizer()}, ["the model is of the type int", "PreTrainedModel"]),
        ({"model": None}, ["model=", "name or folder"]),
        ({"model": torch.nn.Linear(2, 2), "processing_class": small_tokenizer()}, ["the type Linear", "PreTrainedModel"]),
        ({"model": tiny_model(), "processing_class": lambda text: text}, ["processing_class is a function"]),
        ({"model": tiny_model(), "processing_class": None}, ["processing_class="]),
        ({"processing_class": type(small_tokenizer())}, ["processing_class is the class"]),
        ({"tokenizer": small_tokenizer()}, ["no argument tokenizer", "processing_class="]),
        ({"loss": SimCSE()}, ["no argument loss", "objective="]),
        ({"evaluator": None}, ["no argument evaluator", "eval_dataset="]),
        ({"data_collator": None}, ["no argument data_collator"]),
        ({"compute_metrics": 3}, ["compute_metrics is a int; give a function"]),
        ({"args": {}}, ["args is a dict", "ContrastiveTrainingArguments"]),
        ({"args": "out"}, ["args is a str", "ContrastiveTrainingArguments(...)"]),
        ({"args": TrainingArguments}, ["args is the class TrainingArguments"]),
        ({"objective": "simcse"}, ["objective is a str", "SimCSE()"]),
        ({"objective": SimCSE}, ["the class SimCSE", "SimCSE()"]),
        ({"objective": 3}, ["objective is a int"]),
        ({"objective": torch.nn.CrossEntropyLoss()}, ["a CrossEntropyLoss, which cannot be called with (embeddings", "SimCSE"]),
        ({"objective": lambda embeddings: embeddings.sum()}, ["a function, which cannot be called with (embeddings"]),
        ({"objective": DataCollatorWithPadding(small_tokenizer())}, ["a DataCollatorWithPadding, which cannot be called"]),
        ({"optimizers": 3}, ["optimizers is a int", "(optimizer, schedule)"]),
        ({"optimizers": (None, None, None)}, ["optimizers is a tuple"]),
        # BUG: the logged learning rate was that of the schedule, and the optimizer never had it.
        ({"optimizers": (None, plateau()[1])}, ["the learning-rate schedule was made for another optimizer"]),
        ({"optimizers": (plateau()[0], plateau()[1])}, ["the learning-rate schedule was made for another optimizer"]),
        # BUG: these weights were not trained.
        ({"objective": OwnWeights()}, ["OwnWeights has weights of its own (scale), which would not be trained"]),
        ({"train_dataset": [Source("a", ROWS, objective=Matryoshka(OwnWeights().requires_grad_(False), [8])),
                            Source("b", ROWS, objective=OwnWeights())]}, ["OwnWeights has weights of its own"]),
        ({"optimizers": plateau()}, ["ReduceLROnPlateau reads the evaluation metric, but there is none; set eval_strategy"]),
    ],
    ids=lambda given: ",".join(f"{key}={value}"[:30] for key, value in given.items()) if isinstance(given, dict) else "",
)  # fmt: skip
def test_arguments_of_another_kind_are_refused(tmp_path, given, parts):
    message = error_of(make, tmp_path / "out", **given)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_a_sentence_transformer_is_refused_for_it_would_not_be_trained(tmp_path):
    assert "sentence-transformers, and training would not change that object" in error_of(make, tmp_path, model=saved(tmp_path))


def test_an_argument_that_no_trainer_has_is_pythons_error(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_datasets'"):
        make(tmp_path, train_datasets=ROWS)


# ---- plain TrainingArguments ----


def test_plain_arguments_keep_every_value(tmp_path):
    plain = TrainingArguments(
        str(tmp_path), **QUIET, learning_rate=3e-4, eval_strategy="steps", logging_steps=7, warmup_steps=0.1, optim="adafactor",
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6}, load_best_model_at_end=False, seed=5,
    )  # fmt: skip
    before = dict(vars(plain))
    run = make(tmp_path, args=plain, eval_dataset=ROWS)
    assert isinstance(run.args, ContrastiveTrainingArguments) and run.args is not plain and vars(plain) == before
    for field in dataclasses.fields(TrainingArguments):
        if field.name != "ddp_find_unused_parameters":  # always False here, because unused parameters are frozen
            assert getattr(run.args, field.name) == getattr(plain, field.name), field.name
    assert run.args.eval_steps == 7 and run.args.device == plain.device and run.args.chunk_tokens is None
    assert run.train().global_step == 2


def test_plain_arguments_are_checked_as_ours_are(tmp_path):
    for settings, part in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is 5"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is True"),
        ({"per_device_train_batch_size": 1}, "no negatives"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "set gradient_accumulation_steps"),
    ):  # fmt: skip
        assert part in error_of(make, tmp_path, args=TrainingArguments(str(tmp_path), **(QUIET | settings)))


def test_arguments_serve_several_trainers(tmp_path):
    """BUG: Trainer wrote to accelerate's settings in the caller's arguments, and a second trainer failed."""
    given = {"sync_each_batch": True}
    args = TrainingArguments(
        str(tmp_path),
        **QUIET,
        gradient_accumulation_steps=2,
        accelerator_config={"gradient_accumulation_kwargs": dict(given)},
    )
    for _ in range(2):
        assert make(tmp_path, args=args).args.gradient_accumulation_steps == 2
    assert args.accelerator_config.gradient_accumulation_kwargs == given


def test_the_best_model_of_plain_arguments(tmp_path):
    """transformers fills in the loss as the metric. It stays if rows are held out, else the evaluation sets determine it."""
    best = QUIET | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = best | {"load_best_model_at_end": True}
    held_out = make(tmp_path, args=TrainingArguments(str(tmp_path / "a"), **settings), eval_dataset={"s": STS, "h": ROWS[:6]})
    assert (held_out.args.metric_for_best_model, held_out.args.greater_is_better) == ("loss", False)
    held_out.train()
    losses = [entry["eval_loss"] for entry in held_out.state.log_history if "eval_loss" in entry]
    assert held_out.state.best_metric == min(losses) != max(losses)
    sts = make(tmp_path, args=TrainingArguments(str(tmp_path / "b"), **settings), eval_dataset=STS)
    assert (sts.args.metric_for_best_model, sts.args.greater_is_better) == ("spearman", True)
    ours = ContrastiveTrainingArguments(str(tmp_path / "c"), **settings)
    run = make(tmp_path, args=ours, eval_dataset=ROWS[:6])
    assert (run.args.metric_for_best_model, run.args.greater_is_better) == ("loss", False)
    run = make(tmp_path, args=ours, eval_dataset={"h": ROWS[:6], "s": STS})  # Spearman, in any order of the sets
    assert (run.args.metric_for_best_model, run.args.greater_is_better) == ("spearman", True)


@pytest.mark.parametrize("given_by", [TrainingArguments, ContrastiveTrainingArguments])
@pytest.mark.parametrize("sets, mode", [(ROWS[:6], "min"), (STS, "max")], ids=["loss", "spearman"])
def test_a_schedule_that_reads_the_metric_knows_its_direction(tmp_path, given_by, sets, mode):
    settings = QUIET | {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    run = make(tmp_path, args=given_by(str(tmp_path), **settings), eval_dataset=sets)
    run.train()
    assert run.lr_scheduler.mode == mode
    # BUG: with held-out rows alone, "min" was refused, and "max" was changed without a word
    right, wrong = (
        given_by(str(tmp_path), **settings, lr_scheduler_kwargs={"mode": m}) for m in (mode, *{"min", "max"} - {mode})
    )
    made = make(tmp_path, args=right, eval_dataset=sets)
    for args in (right, given_by(str(tmp_path), **settings)):  # `--seeds` recognizes its interrupted run by these
        assert same_settings(facts_of(made), ContrastiveTrainingArguments.of(args), made.main_objective)
    assert f"is best at its {mode}imum" in error_of(make, tmp_path, args=wrong, eval_dataset=sets)


def test_arguments_of_other_trainers_are_converted_or_refused_by_name(tmp_path, caplog):
    assert make(tmp_path, args=Seq2SeqTrainingArguments(str(tmp_path), **QUIET)).train().global_step == 2
    message = error_of(make, tmp_path, args=Seq2SeqTrainingArguments(str(tmp_path), **QUIET, predict_with_generate=True))
    assert "predict_with_generate is True, a setting of Seq2SeqTrainingArguments" in message
    of_st = SentenceTransformerTrainingArguments(str(tmp_path), **QUIET)
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path, args=of_st).train().global_step == 2
    for settings, part in (
        ({"prompts": "query: "}, "ContrastiveTrainingArguments(prompts="),
        ({"batch_sampler": "no_duplicates"}, "not used as a negative of itself"),
        ({"multi_dataset_batch_sampler": "round_robin"}, "source_alpha"),
        ({"learning_rate_mapping": {"x": 1.0}}, "learning_rate_mapping is"),
    ):
        message = error_of(make, tmp_path, args=SentenceTransformerTrainingArguments(str(tmp_path), **QUIET, **settings))
        assert part in message, message


@pytest.mark.parametrize(
    "name, part", [("batch_sampler", "negative of itself"), ("multi_dataset_batch_sampler", "source_alpha=0 draws all alike")]
)
def test_settings_of_sentence_transformers_are_refused_by_name(tmp_path, name, part):
    """BUG: where only the name of the class was changed, Python called them unexpected arguments, without the mend."""
    message = error_of(ContrastiveTrainingArguments, str(tmp_path), **{name: "round_robin"}, prompts={"query": "query: "})
    assert f"has no setting {name}; remove it" in message and part in message
