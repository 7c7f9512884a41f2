"""A resumed run is compared with the run that wrote the checkpoint.

Some differences are refused, and some are reported in a warning. With all other differences, the run resumes exactly.
"""

import json
import logging
import shutil

import pytest
import torch
import worker_resume
from conftest import error_of, small_tokenizer, tiny_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_distributed import HERE, launch
from test_distributed import run as launched
from test_trainer import NO_DROPOUT, ROWS, STS, arguments
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from worker import BATCH, WORDS

from hf_embed import ContrastiveTrainer, Encoder, ImprovedContrastive, SimCSE
from hf_embed.evaluation.tasks import EvaluationTask
from hf_embed.training import resume

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 3, "per_device_train_batch_size": 3}


def trainer(
    folder, model=None, rows=ROWS, objective=None, eval_dataset=None, callbacks=None, optimizers=(None, None), **settings
):
    return ContrastiveTrainer(
        model=model or tiny_model(), processing_class=small_tokenizer(), args=arguments(folder, **SAVING | settings),
        objective=objective, train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=eval_dataset, callbacks=callbacks, optimizers=optimizers,
    )  # fmt: skip


def weights(run) -> dict:
    return {name: parameter.detach().clone() for name, parameter in run.step.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a run of 4 steps that has checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Return a copy of that folder without the last checkpoint, as if the run had been killed after step 3."""
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


def lora(base_seed: int = 0, rank: int = 2, alpha: int = 8):
    model = tiny_model(seed=base_seed)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["query"]))


# ---- refused ----

OTHER_ROWS = [row | ({"positive": "something else"} if i == 5 else {}) for i, row in enumerate(ROWS)]
REFUSED = {
    "a row": ({"rows": OTHER_ROWS}, "the rows: their content differs"),
    "the order of the rows": ({"rows": ROWS[::-1]}, "the rows: their content differs"),
    "number of rows": ({"rows": ROWS[:-1]}, "number of rows was 12 and is 11"),
    "objective": ({"objective": ImprovedContrastive()}, "name was SimCSE and is ImprovedContrastive"),
    "temperature": ({"objective": SimCSE(temperature=0.1)}, "temperature was 0.05 and is 0.1"),
    "pooling": ({"pooling": "cls"}, "pooling was mean and is cls"),
    "max_length": ({"max_length": 4}, "max_length was 66 and is 4; restore"),
    "prompts": ({"prompts": {"query": "find: ", "document": ""}}, "prompts: query was absent and is find: "),
    "the model's config": ({"model": tiny_model(num_attention_heads=2)}, "num_attention_heads was 4 and is 2"),
    "temp_scale": ({"temp_scale": 0.7}, "temp_scale was absent and is given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused_by_name(folder, tmp_path, case):
    changed, message = REFUSED[case]
    found = error_of(trainer(tmp_path, **changed).train, str(folder / "checkpoint-2"))
    assert message in found and "allow_changed" in found and "checkpoint-2" in found


@pytest.mark.parametrize("case", ["a row", pytest.param("pooling", marks=pytest.mark.slow)])
def test_allow_changed_goes_on_and_says_so(folder, tmp_path, case, caplog):
    changed, message = REFUSED[case]
    run = trainer(tmp_path, **changed, allow_changed=True)
    run.train(str(folder / "checkpoint-2"))
    assert run.state.global_step == 4
    assert [
        line for line in caplog.messages if message.split(";")[0] in line and "resuming because allow_changed is set" in line
    ]


def test_rotary_positions_are_compared():
    """BUG: since version 5, transformers keeps rope_theta in a dict, which was left out."""
    then, now = tiny_model("modernbert"), tiny_model("modernbert")
    assert resume.config_facts(now) == resume.config_facts(then)
    now.config.rope_parameters["full_attention"]["rope_theta"] = 10
    changes = resume.changes_of(resume.config_facts(then), resume.config_facts(now))
    assert changes == ["rope_parameters: full_attention: rope_theta was 160000.0 and is 10"]


def test_functions_are_told_apart_by_their_names():
    def first(embeddings, *rest):
        return embeddings.sum()

    def second(embeddings, *rest):
        return embeddings.sum()

    from functools import partial

    from hf_embed.objectives.base import as_objective

    facts = [resume.objective_facts(as_objective(f)) for f in (first, second, partial(first, scale=2), partial(first, scale=3))]
    assert len({str(fact) for fact in facts}) == 4


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (lambda: lora(), lambda: lora(rank=3), "trained parameters differ"),
        (lambda: lora(), tiny_model, "trained parameters differ"),
        (tiny_model, lambda: lora(), "trained parameters differ"),
        (lambda: lora(), lambda: lora(base_seed=1), "another base model"),
        (tiny_model, lambda: tiny_model("distilbert"), "trained parameters differ"),
    ],
    ids=["rank", "lora to plain", "plain to lora", "base", "model"],
)
def test_another_model_is_always_refused(tmp_path, then, now, message):
    trainer(tmp_path / "then", then(), max_steps=2).train()
    found = error_of(trainer(tmp_path / "now", now(), allow_changed=True).train, str(tmp_path / "then" / "checkpoint-2"))
    assert message in found


@pytest.mark.slow
def test_another_scale_of_the_adapters_is_refused(tmp_path):
    trainer(tmp_path / "then", lora(), max_steps=2).train()
    found = error_of(trainer(tmp_path / "now", lora(alpha=16)).train, str(tmp_path / "then" / "checkpoint-2"))
    assert "lora_alpha was 8 and is 16" in found


def test_another_optimizer_is_always_refused(folder, tmp_path):
    found = error_of(trainer(tmp_path, optim="sgd", allow_changed=True).train, str(folder / "checkpoint-2"))
    assert "the optimizer was AdamW and is SGD" in found


# ---- reported in a warning ----

WARNED_SETTINGS = {
    "learning_rate": ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
    "schedule": ({"lr_scheduler_type": "constant"}, "lr_scheduler_type was linear and is constant"),
    "warmup": ({"warmup_steps": 1}, "warmup_steps was 0 and is 1"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
    "batch": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 3 and is 4"),
    "seed": ({"seed": 4}, "seed was 3 and is 4"),
    "precision": ({"bf16": True}, "mixed_precision was no and is bf16"),
    "weight_decay": ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1"),
    "dropout": ({"model": tiny_model(hidden_dropout_prob=0.3)}, "dropout: hidden_dropout_prob was 0.1 and is 0.3"),
    "two": ({"seed": 4, "learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001; seed was 3 and is 4"),
}


@pytest.mark.parametrize("case", WARNED_SETTINGS)
def test_other_settings_are_told_in_one_line(run, case, caplog):
    changed, message = WARNED_SETTINGS[case]
    caplog.set_level(logging.WARNING)
    made = trainer(run, **changed)
    made.run_facts = resume.facts_of(made)
    caplog.clear()
    made.find_checkpoint(True)
    assert [line for line in caplog.messages if "resuming with" in line] == [
        f"{run / 'checkpoint-2'}: resuming with other settings: {message}"
    ]


def test_more_steps_and_the_same_settings_go_on_silently(run, caplog):
    trainer(run, max_steps=6).train(True)
    assert caplog.messages == []


def test_the_present_settings_are_taken(run, folder):
    """A resumed run uses the learning rate and weight decay of its own flags, not those in the checkpoint."""
    made = trainer(run, learning_rate=1e-5, weight_decay=0.5, lr_scheduler_type="constant")
    made.train(True)
    assert made.lr_scheduler.get_last_lr() == [1e-5, 1e-5]
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.5, 0.0]
    assert {entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry and entry["step"] > 2} <= {
        1e-5
    }


class Scripted(EvaluationTask):
    """An evaluation set whose score never changes, so that a schedule that reads it lowers the learning rate."""

    kind, main, reported = "scripted", "score", ("score",)

    def score(self, embed):
        embed(["a"])
        return {"score": 1.0}


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_reads_a_metric_goes_on_exactly_or_is_refused(tmp_path, schedule):
    """The rate is halved after each evaluation but the first, for which "greedy" doubles it."""
    settings = {"eval_dataset": {"s": Scripted()}, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1,
                "lr_scheduler_type": schedule,
                "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "min_lr": 1e-9}}  # fmt: skip
    rates = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        made = trainer(tmp_path, **settings)
        made.train(checkpoint)
        rates.append([entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry])
    assert rates[0] == ([1e-3, 1e-3, 5e-4, 2.5e-4] if schedule == "reduce_lr_on_plateau" else [1e-3, 2e-3, 1e-3, 5e-4])
    assert rates[1] == rates[0]
    for changed, told in (
        ({"learning_rate": 4e-4}, "learning_rate was 0.001 and is 0.0004, but a schedule that reads the metric cannot be"),
        ({"lr_scheduler_kwargs": {"patience": 0, "factor": 0.1, "min_lr": 1e-9}}, "factor was 0.5 and is 0.1, but"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}, f"lr_scheduler_type was {schedule} and is constant"),
    ):
        assert told in error_of(trainer(tmp_path, **settings | changed).train, checkpoint)


def test_when_to_save_is_for_the_present_flags_to_say(run):
    trainer(run, save_steps=1, max_steps=5).train(True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 4, 5)]


# ---- resuming ----


def test_a_finished_run_trains_no_further_step(folder, tmp_path):
    """Resume at the last step, in the middle of the first epoch (step 2 of 4) and at its end (step 4)."""
    for steps in (2, 4):
        made = trainer(tmp_path, max_steps=steps)
        made.train(str(folder / f"checkpoint-{steps}"))
        saved = load_file(folder / f"checkpoint-{steps}" / "model.safetensors")
        assert made.state.global_step == steps
        assert all(torch.equal(parameter, saved[name]) for name, parameter in made.encoder.backbone.named_parameters())
    made = trainer(tmp_path, max_steps=3)
    assert made.train(str(folder / "checkpoint-4")).metrics["resumed_at_step"] == 4
    assert made.state.global_step == 4
    made.save_model()
    told = json.loads((tmp_path / "results.json").read_text())["train"]
    assert [told[key] for key in ("steps", "loss", "seconds")] == [4, None, None]  # BUG: 0.0 was written instead of null.
    card = (tmp_path / "README.md").read_text()
    assert "Mean training loss" not in card and "| Training time | unknown time on" in card


def test_the_figures_of_a_resumed_run_say_of_which_steps(folder, tmp_path):
    made = trainer(tmp_path, max_steps=4)
    made.train(str(folder / "checkpoint-2"))
    made.save_model()
    told = json.loads((tmp_path / "results.json").read_text())["train"]
    assert told["resumed_at_step"] == 2 and told["loss"] > 0
    assert (tmp_path / "README.md").read_text().count("(from step 3 on, because the training was resumed)") == 2


def test_a_resumed_run_reports_the_scores_before_it(tmp_path):
    """BUG: results.json and the card of a resumed run had no scores from before the training."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_dataset": {"s": Dataset.from_list(STS)}}
    first, resumed = trainer(tmp_path, **settings), trainer(tmp_path, **settings)
    first.train()
    resumed.train(str(tmp_path / "checkpoint-2"))
    resumed.save_model()
    before = json.loads((tmp_path / "results.json").read_text())["before"]["sts"]["s"]
    assert before == round(first.state.log_history[0]["eval_s_spearman"], 2)


@pytest.mark.slow
def test_a_run_that_has_stopped_early_stays_so(tmp_path):
    from hf_embed.kit.finetune import EarlyStopping

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "max_steps": 12,
                "learning_rate": 1e-9}  # fmt: skip
    sets = {"s": Dataset.from_list(STS)}
    first = trainer(tmp_path, eval_dataset=sets, callbacks=[EarlyStopping(2)], **settings)
    first.train()
    assert first.state.global_step < 12
    again = trainer(tmp_path, eval_dataset=sets, callbacks=[EarlyStopping(2)], **settings)
    again.train(True)
    assert again.state.global_step == first.state.global_step
    more = trainer(tmp_path, eval_dataset=sets, callbacks=[EarlyStopping(4)], **settings)
    more.train(True)
    assert more.state.global_step > first.state.global_step  # control


def test_early_stopping_of_a_resumed_run_starts_with_the_first_step(tmp_path):
    """BUG: a resumed run compared its evaluations with that of `eval_on_start`, unlike a run without an interruption."""
    from hf_embed.kit.finetune import EarlyStopping

    args = arguments(tmp_path, eval_strategy="steps", metric_for_best_model="s_spearman", greater_is_better=True,
                     eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)  # fmt: skip
    for scores, stops in (([90.0, 80.0], False), ([90.0, 80.0, 70.0], True)):
        control, history = TrainerControl(), [{"step": i, "eval_s_spearman": score} for i, score in enumerate(scores)]
        EarlyStopping(1).on_train_begin(args, TrainerState(log_history=history), control)
        assert control.should_training_stop == stops


def test_a_run_folder_that_was_moved_finds_its_best_checkpoint(tmp_path, caplog):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    sets = {"s": Dataset.from_list(STS)}
    trainer(tmp_path / "old", eval_dataset=sets, **settings).train()
    (tmp_path / "old").rename(tmp_path / "new")
    made = trainer(tmp_path / "new", eval_dataset=sets, **settings | {"max_steps": 5})
    caplog.clear()
    made.train(True)
    assert made.state.best_model_checkpoint.startswith(str(tmp_path / "new")) and caplog.messages == []


def test_a_model_alone_says_what_starts_anew(tmp_path, caplog):
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    trainer(tmp_path, max_steps=3).train(True)
    assert any("optimizer, learning-rate schedule and random states start again" in line for line in caplog.messages)


class Counter(TrainerCallback, ExportableState):
    """A callback with a state, which checkpoints store."""

    def __init__(self, start: int = 0):
        self.steps = start

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_a_callback_with_a_state_that_is_new_in_a_resumed_run(run):
    made = trainer(run, callbacks=[Counter()])
    made.train(True)
    assert made.state.stateful_callbacks["Counter"]["attributes"]["steps"] == 2
    several = trainer(run, callbacks=[Counter(), Counter(5)], max_steps=8, save_steps=1)
    several.train(True)
    assert [state["attributes"]["steps"] for state in several.state.stateful_callbacks["Counter"]] == [4, 9]


def test_arguments_alone_do_not_resume(run, caplog):
    """BUG: a script that set `resume_from_checkpoint` in the arguments only trained from the start, and nothing said so."""
    trainer(run, resume_from_checkpoint="latest").train()
    assert "this training does not resume: resume_from_checkpoint of the arguments is only for your script" in caplog.text


def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(tmp_path):
    """BUG: a resumed run lacked the evaluation and the log of the epoch, and its schedule did not see the metric."""
    never = {"patience": 0, "threshold": 1e6, "threshold_mode": "abs"}
    settings = {"max_steps": -1, "num_train_epochs": 3, "save_steps": 4, "eval_strategy": "epoch", "logging_strategy": "epoch",
                "learning_rate": 1e-3, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": never}  # fmt: skip
    whole = trainer(tmp_path, eval_dataset={"s": STS}, **settings)
    whole.train()
    resumed = trainer(tmp_path, eval_dataset={"s": STS}, **settings)
    resumed.train(str(tmp_path / "checkpoint-4"))
    assert same(weights(whole), weights(resumed))
    for key in ("loss", "eval_spearman", "learning_rate"):
        entries = [[entry[key] for entry in run.state.log_history if key in entry] for run in (whole, resumed)]
        assert entries[0] == entries[1] and len(entries[0]) == 3, key


def test_a_schedule_that_cycles_the_momentum_goes_on_exactly(tmp_path):
    """BUG: the first step of the resumed run had the momentum of the first step of all."""
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=4)
        made = trainer(tmp_path, model, optimizers=(optimizer, schedule))
        made.train(checkpoint)
        runs.append(weights(made))
    assert same(*runs)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: it trains other weights than it evaluates, and it counts its steps in its groups."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05, "k": 0, "training": False})

    def train(self):
        self.swap(True, 0.1)

    def eval(self):
        self.swap(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def swap(self, training, weight):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p] and group["training"] != training:
                    p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"]
            part = 1 / (group["k"] + 1)
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, part).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - part) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


def test_a_schedule_free_optimizer_evaluates_and_saves_its_final_weights_and_goes_on_exactly(tmp_path):
    """BUG: evaluations and checkpoints had the weights that are trained, and a resumed run counted from step 0."""
    runs, vectors = [], []

    class Vectors(EvaluationTask):
        kind, main, reported = "vectors", "first", ("first",)

        def score(self, embed):
            vectors.append(embed(["the cat"])[0])
            return {"first": 0.0}

    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = tiny_model()
        made = trainer(tmp_path, model, optimizers=(ScheduleFree(model.parameters()), None), eval_dataset={"s": Vectors()},
                       lr_scheduler_type="constant", eval_strategy="steps", eval_steps=2)  # fmt: skip
        made.train(checkpoint)
        assert [group["k"] for group in made.optimizer.param_groups] == [4]
        runs.append(weights(made))
    assert same(*runs)
    for step, found in zip((2, 4), vectors):
        saved = Encoder.from_pretrained(str(tmp_path / f"checkpoint-{step}")).encode(["the cat"], convert_to_tensor=True)[0]
        assert torch.allclose(saved, found, atol=1e-6)
    assert torch.allclose(made.encoder.encode(["the cat"], convert_to_tensor=True)[0], vectors[1], atol=1e-6)


def test_an_optimizer_of_a_subclass_resumes_in_the_same_process(folder, tmp_path):
    """BUG: a second training of the trainer was refused: "the optimizer was AdamW and is SGD"."""

    class Own(ContrastiveTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), 0.1)
            return self.optimizer

    made = Own(tiny_model(), arguments(tmp_path, **SAVING), None, ROWS, None, small_tokenizer())
    made.train()
    trained = weights(made)
    made.train(str(tmp_path / "checkpoint-2"))
    assert same(weights(made), trained)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_resume_bit_for_bit(tmp_path, persistent):
    """Resume within the first epoch, at its end and after it. Workers start once if they are persistent, else in each epoch."""
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent, "max_steps": 7, "save_steps": 2}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 4, 6):
        resumed = trainer(tmp_path / "resumed", **settings | {"save_strategy": "no"})
        resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(weights(whole), weights(resumed)), step
    without = trainer(tmp_path / "without", max_steps=7, save_strategy="no")
    without.train()
    assert same(weights(whole), weights(without))


# ---- the facts that are compared ----


def test_every_row_counts_and_of_large_tables_the_first_and_the_last(monkeypatch):
    rows = [{"input_ids": [[i, i + 1], [i]], "text_ids": [i, i]} for i in range(50)]
    assert resume.rows_hash(Dataset.from_list(rows)) == resume.rows_hash(
        Dataset.from_list(rows[::-1]).select(range(49, -1, -1))
    )
    plain = resume.rows_hash(Dataset.from_list(rows))
    for i in range(50):
        changed = [row | ({"input_ids": [[i, i], [i]]} if k == i else {}) for k, row in enumerate(rows)]
        assert resume.rows_hash(Dataset.from_list(changed)) != plain
    regrouped = [row | ({"input_ids": [[0], [1, 0]]} if k == 0 else {}) for k, row in enumerate(rows)]
    assert resume.rows_hash(Dataset.from_list(regrouped)) != plain
    monkeypatch.setattr(resume, "ALL_ROWS", 10)
    monkeypatch.setattr(resume, "SAMPLED_ROWS", 4)
    sampled = resume.rows_hash(Dataset.from_list(rows))
    for i in (0, 49):
        changed = [row | ({"input_ids": [[7], [i]]} if k == i else {}) for k, row in enumerate(rows)]
        assert resume.rows_hash(Dataset.from_list(changed)) != sampled


def test_sources_are_compared_by_name(tmp_path):
    def sources(**more):
        tables = {"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS[:6])} | more
        return trainer(tmp_path, rows=tables)

    then, now = (resume.facts_of(sources(**more)) for more in ({}, {"b": Dataset.from_list(ROWS[6:])}))
    assert "b: their content differs" in error_of(resume.compare, tmp_path, then, now, False)
    more = resume.facts_of(sources(c=Dataset.from_list(ROWS)))
    assert "c was absent and is given" in error_of(resume.compare, tmp_path, then, more, False)
    assert resume.compare(tmp_path, then, resume.facts_of(sources()), False) == []


def test_ranks_that_read_different_rows_are_named(tmp_path):
    facts = [resume.facts_of(trainer(tmp_path, rows=rows)) for rows in (ROWS, ROWS, ROWS[:8])]
    resume.check_ranks_alike(facts[:2])
    message = error_of(resume.check_ranks_alike, facts)
    differences = "data: the rows: their content differs; data: the rows: number of rows is 12 and on rank 2 8"
    assert f"rank 0 differs from rank 2: {differences}; give all ranks the same" in message


def ranks(facts, number: int, batch: int, **settings) -> dict:
    uses = resume.rows_of_epoch(Dataset.from_dict({"x": list(range(12))}), Arguments(batch, number))
    return facts | {"ranks": number, "rows_of_epoch": uses,
                    "settings": facts["settings"] | {"per_device_train_batch_size": batch} | settings}  # fmt: skip


class Arguments:
    def __init__(self, batch: int, number: int):
        self.per_device_train_batch_size, self.world_size, self.dataloader_drop_last = batch, number, False


def test_another_number_of_ranks_is_exact_or_refused(tmp_path):
    facts = resume.facts_of(trainer(tmp_path, model=tiny_model(**NO_DROPOUT)))
    one, two = ranks(facts, 1, 4), ranks(facts, 2, 2)
    assert resume.compare(tmp_path, one, two, False) == [] == resume.compare(tmp_path, two, one, False)
    message = error_of(resume.compare, tmp_path, one, ranks(facts, 2, 4), False)
    assert "number of ranks was 1 and is 2: --per_device_train_batch_size 2 --gradient_accumulation_steps 1 makes" in message
    assert "set it to 1, because 4 rows cannot be divided equally among 3" in error_of(
        resume.compare, tmp_path, one, ranks(facts, 3, 4), False
    )
    uneven = ranks(facts, 1, 10), ranks(facts, 5, 2)  # five ranks do not use the last two rows
    assert "an epoch used 12 rows and uses 10" in error_of(resume.compare, tmp_path, *uneven, False)
    dropout = resume.facts_of(trainer(tmp_path))
    (line,) = resume.compare(tmp_path, ranks(dropout, 1, 4), ranks(dropout, 2, 2), False)
    assert "dropout draws different numbers" in line


def test_a_stream_needs_the_same_number_of_ranks(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"anchor": row["anchor"], "positive": row["positive"]} for row in ROWS))
    facts, longer = (resume.facts_of(trainer(tmp_path, rows=stream, max_steps=steps)) for steps in (4, 8))
    assert resume.compare(tmp_path, facts, longer, False) == []
    message = error_of(resume.compare, tmp_path, facts, facts | {"ranks": 2}, False)
    assert "the rows of a stream are divided among the ranks: set it to 1" in message


# ---- two ranks ----


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Train in the folder `one` with one process, and then in the folder `two` with two ranks.

    Returns:
        the parent folder, the weights of the one process, and what rank 0 of the two ranks recorded.
    """
    folder = tmp_path_factory.mktemp("ranks")
    one = worker_resume.make_trainer(folder / "one", batch=BATCH)
    one.train()
    launched(launch(2, HERE / "worker_resume.py", folder))
    seen = torch.load(folder / "seen.pt")
    assert seen["ranks"] == 2
    return folder, weights(one), seen


@pytest.mark.slow
def test_from_one_rank_to_two_and_back(two_ranks):
    folder, one, seen = two_ranks
    assert largest_difference(seen["whole"], one) < 1e-9 and largest_difference(seen["resumed"], one) < 1e-9
    back = worker_resume.make_trainer(folder / "back", batch=BATCH)
    back.train(str(folder / "two" / "checkpoint-3"))
    assert largest_difference(weights(back), one) < 1e-9
    start = worker_resume.make_trainer(folder / "start", batch=BATCH)
    assert largest_difference(weights(start), one) > 1e-3  # control: the training changed the weights


@pytest.mark.slow
def test_two_ranks_write_one_whole_checkpoint(two_ranks):
    _, _, seen = two_ranks
    assert seen["damage"] is None and seen["kept"] == [3, 4, 5]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= set(seen["files"])


@pytest.mark.slow
def test_ranks_evaluate_one_model_before_the_training(two_ranks):
    """BUG: until the training began, each rank encoded its share of the texts with its own model."""
    folder, _, seen = two_ranks
    expected = worker_resume.make_trainer(folder / "alone", batch=BATCH).predict(Dataset.from_dict({"text": WORDS}))
    assert abs(seen["before training"].numpy() - expected.predictions).max() < 1e-6


@pytest.mark.slow
def test_every_rank_is_told_the_same(two_ranks):
    _, _, seen = two_ranks
    for case, message in (
        ("other rows", "rank 0 differs from rank 1: data: the rows: their content differs; give all ranks the same rows"),
        ("fewer rows", "number of rows is 24 and on rank 1 22"),
        ("other batch", "the number of ranks was 1 and is 2: --per_device_train_batch_size 6"),
        ("no checkpoint", "nowhere: there is no checkpoint (trainer_state.json does not exist)"),
        # BUG: each rank drew its rows, or updated its weights, in its own way.
        ("other seed", "rank 0 differs from rank 1: seed_of_rows is 0 and on rank 1 1"),
        ("other dropout", "done"),
        ("other rate", "rank 0 differs from rank 1: settings: learning_rate is 0.001 and on rank 1 0.002"),
        # BUG: each rank encoded its share of its own list of texts, so vectors were taken for those of other texts.
        ("other texts", "the texts of rank 1 differ from those of rank 0"),
        ("other held-out rows", "held: the rows of rank 1 differ from those of rank 0"),
        ("other corpus", "the texts, the model or the settings of rank 1 differ from those of rank 0"),
        ("other teacher", "the teacher or the training texts of rank 1 differ from those of rank 0"),
    ):
        assert len(set(seen[case])) == 1 and message in seen[case][0], case
