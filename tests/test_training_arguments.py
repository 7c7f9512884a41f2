"""Every field of `transformers.TrainingArguments` has the same effect as in a plain Trainer.

Fields that cannot have this effect are refused by name, or a warning names them.
"""

import ast
import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from conftest import SINCE_5_15, WITHOUT_DEEPSPEED, error_of, small_tokenizer, tiny_model
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available
from transformers.utils.logging import get_verbosity, set_verbosity
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE
from hf_embed.kit.plan import ModelArguments, Plan, RunArguments, without_evaluation
from hf_embed.kit.report import changed
from hf_embed.library_internals import CHECKPOINTING
from hf_embed.training.settings import IGNORED, REFUSED, warn_of_ignored

ROWS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]  # 12 rows
SCORES = [50.0, 70.0, 60.0, 65.0, 40.0, 30.0, 20.0]


class Scripted:
    """An evaluation set with fixed scores."""

    kind, main, reported = "scripted", "spearman", ("spearman", "falling")

    def __init__(self):
        self.scores = iter(SCORES)

    def score(self, embed=None) -> dict[str, float]:
        score = next(self.scores)
        return {"spearman": score, "falling": -score}


class Recorder(TrainerCallback):
    """Record the substeps of a run, the norms of its gradients, and the arguments that callbacks receive."""

    def __init__(self):
        self.substeps, self.norms, self.args = 0, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.args = args

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(round(torch.cat(gradients).norm().item(), 5))


DEFAULTS = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
            "save_strategy": "no", "logging_steps": 1}  # fmt: skip


def ours(folder, callbacks=(), evaluate=True, model=None, **settings) -> ContrastiveTrainer:
    return ContrastiveTrainer(
        model=model or tiny_model(), processing_class=small_tokenizer(), train_dataset=Dataset.from_list(ROWS),
        args=ContrastiveTrainingArguments(str(folder), **(DEFAULTS | settings)), callbacks=list(callbacks),
        eval_dataset={"s": Scripted()} if evaluate else None,
    )  # fmt: skip


def plain(folder, callbacks=(), evaluate=True, **settings) -> Trainer:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8
    )
    rows = Dataset.from_list([{"input_ids": [i, i + 1], "labels": i % 2} for i in range(len(ROWS))])
    task = Scripted()
    return Trainer(
        model=BertForSequenceClassification(config), train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda prediction: task.score(), callbacks=list(callbacks),
        args=TrainingArguments(str(folder), **({"metric_for_best_model": "spearman"} | DEFAULTS | settings)),
    )  # fmt: skip


# ---- what the tests observe; each function takes a trainer of either kind before its training ----


def trained(run):
    run.train()
    return run


def logged(run):
    """Return the steps and kinds of the logs of the training and of the evaluation."""
    history = trained(run).state.log_history
    return [(entry["step"], kind) for entry in history for kind in ("loss", "eval_spearman", "train_runtime") if kind in entry]


def rates(run):
    return [entry["learning_rate"] for entry in trained(run).state.log_history if "learning_rate" in entry]


def optimizer(run):
    made = run.create_optimizer()
    return type(made).__name__, [{k: v for k, v in group.items() if k != "params"} for group in made.param_groups]


def folders(run):
    folder = Path(trained(run).args.output_dir)
    return {path.name: (path / "optimizer.pt").exists() for path in folder.glob("checkpoint-*")}


def best(run):
    return trained(run).state.best_metric, run.state.best_global_step


def loads_best(run):
    calls = []
    run._load_best_model = lambda: calls.append(run.state.best_global_step)
    run.train()
    return calls


def norms(run):
    recorder = Recorder()
    run.add_callback(recorder)
    run.train()
    return recorder.norms


def substeps(run):
    recorder = Recorder()
    run.add_callback(recorder)
    run.train()
    return recorder.substeps, run.state.global_step


def seen_by_callbacks(field):
    def observe(run):
        recorder = Recorder()
        run.add_callback(recorder)
        run.train()
        return getattr(recorder.args, field)

    return observe


def of_loader(field):
    return lambda run: str(getattr(run.get_train_dataloader(), field))


def of_ddp(field):
    return lambda run: getattr(run.accelerator.ddp_handler, field)


def callbacks(run):
    return sorted(type(callback).__name__ for callback in run.callback_handler.callbacks if type(callback).__name__ != "Watch")


def checkpointed_layers(run):
    model = run.encoder.backbone if isinstance(run, ContrastiveTrainer) else run.model
    run.train()
    return [getattr(layer, "gradient_checkpointing", None) for layer in model.base_model.encoder.layer]


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
SAVE = EVERY_STEP | {"save_strategy": "steps", "save_steps": 1}
WORKER = {"dataloader_num_workers": 1}
# field: (value, other settings, the observation that the field changes). The tests compare our trainer with the field, a plain
# Trainer with the field, and our trainer without the field.
HONOURED = {
    "per_device_train_batch_size": (6, {"max_steps": -1, "num_train_epochs": 1}, logged),
    "num_train_epochs": (2, {"max_steps": -1}, logged),
    "max_steps": (5, {}, logged),
    "learning_rate": (1e-2, {}, rates),
    "lr_scheduler_type": ("cosine", {}, rates),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts", "max_steps": 5}, rates),
    "warmup_steps": (2, {}, rates),
    "optim": ("sgd", {}, optimizer),
    "optim_args": ("momentum=0.5", {"optim": "sgd"}, optimizer),
    "weight_decay": (0.1, {}, optimizer),
    "adam_beta1": (0.5, {}, optimizer),
    "adam_beta2": (0.5, {}, optimizer),
    "adam_epsilon": (1e-3, {}, optimizer),
    "gradient_accumulation_steps": (2, {}, substeps),
    "max_grad_norm": (1e-3, {}, norms),
    "bf16": (True, {}, lambda run: run.accelerator.mixed_precision),
    CHECKPOINTING: (True, {}, checkpointed_layers),
    f"{CHECKPOINTING}_kwargs": ({"every_n_layers": 2}, {CHECKPOINTING: True}, checkpointed_layers),
    "torch_compile": (True, {}, lambda run: str(run.accelerator.state.dynamo_plugin.backend)),
    "torch_compile_backend": ("eager", {}, lambda run: str(run.accelerator.state.dynamo_plugin.backend)),
    "torch_compile_mode": ("max-autotune", {}, lambda run: str(run.accelerator.state.dynamo_plugin.mode)),
    "use_cache": (True, {}, lambda run: run.model.config.use_cache),
    "logging_strategy": ("epoch", {}, logged),
    "logging_steps": (2, {}, logged),
    "logging_first_step": (True, {"logging_steps": 3}, logged),
    "include_num_input_tokens_seen": ("all", {}, lambda run: trained(run).state.num_input_tokens_seen > 0),
    "log_level": ("error", {}, lambda run: get_verbosity()),
    "disable_tqdm": (False, {}, lambda run: any(isinstance(c, ProgressCallback) for c in run.callback_handler.callbacks)),
    "run_name": ("mine", {}, seen_by_callbacks("run_name")),
    "project": ("mine", {}, seen_by_callbacks("project")),
    "trackio_space_id": ("mine", {}, seen_by_callbacks("trackio_space_id")),
    "trackio_bucket_id": ("mine", {}, seen_by_callbacks("trackio_bucket_id")),
    "trackio_static_space_id": ("mine", {}, seen_by_callbacks("trackio_static_space_id")),
    "eval_strategy": ("epoch", {}, logged),
    "eval_steps": (2, {"eval_strategy": "steps"}, logged),
    "eval_delay": (2, EVERY_STEP, logged),
    "eval_on_start": (True, {}, logged),
    "save_only_model": (True, {"save_strategy": "steps"}, folders),
    "save_strategy": ("best", EVERY_STEP, folders),
    "save_steps": (2, {"save_strategy": "steps"}, folders),
    "save_total_limit": (1, SAVE | {"metric_for_best_model": "spearman"}, folders),
    "load_best_model_at_end": (True, SAVE, loads_best),
    "metric_for_best_model": ("falling", SAVE, best),
    "greater_is_better": (False, SAVE | {"metric_for_best_model": "spearman"}, best),
    "seed": (7, {}, lambda run: torch.initial_seed()),
    "accelerator_config": (
        {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        {},
        lambda run: run.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"),
    ),
    "dataloader_drop_last": (True, {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 1}, logged),
    "dataloader_num_workers": (1, {}, of_loader("num_workers")),
    "dataloader_persistent_workers": (True, WORKER, of_loader("persistent_workers")),
    "dataloader_prefetch_factor": (3, WORKER, of_loader("prefetch_factor")),
    "dataloader_in_order": (False, WORKER, of_loader("in_order")),
    "ddp_find_unused_parameters": (True, {}, of_ddp("find_unused_parameters")),
    "ddp_bucket_cap_mb": (5, {}, of_ddp("bucket_cap_mb")),
    "ddp_broadcast_buffers": (False, {}, of_ddp("broadcast_buffers")),
    "ddp_static_graph": (True, {}, of_ddp("static_graph")),
    "skip_memory_metrics": (False, {}, lambda run: "train_mem_cpu_alloc_delta" in trained(run).state.log_history[-1]),
}
# Fields that methods of TrainingArguments use. Our class does not override these methods.
INHERITED = {
    "use_cpu": "_setup_devices", "ddp_backend": "_setup_devices", "local_rank": "_setup_devices",
    "ddp_timeout": "ddp_timeout_delta", "log_level_replica": "get_process_log_level", "log_on_each_node": "should_log",
    "save_on_each_node": "should_save", "fsdp_config": "_process_fsdp_args",
}  # fmt: skip
# Fields with their own test, in this file or in another one.
ELSEWHERE = {
    "output_dir": "test_training_arguments.py::test_output_dir",
    "dataloader_multiprocessing_context": "test_training_arguments.py::test_start_method_of_workers",
    "dataloader_pin_memory": "test_training_arguments.py::test_pinned_memory",
    "data_seed": "test_training_arguments.py::test_data_seed_orders_the_rows",
    "full_determinism": "test_training_arguments.py::test_full_determinism",
    "enable_jit_checkpoint": "test_stop.py::test_jit_checkpoint_stops_the_same_way",
    "torch_empty_cache_steps": "test_training_arguments.py::test_cache_is_emptied",
    "report_to": "test_training_arguments.py::test_report_to",
    "ignore_data_skip": "test_training_arguments.py::test_resuming_without_skipping",
    "restore_callback_states_from_checkpoint": "test_training_arguments.py::test_callbacks_are_restored",
    "optim_target_modules": "test_training_arguments.py::test_refused_where_it_means_nothing",
    "fp16": "test_training_arguments.py::test_refused_where_it_means_nothing",
    "tf32": "test_training_arguments.py::test_refused_where_it_means_nothing",
    "deepspeed": "test_training_arguments.py::test_refused_where_it_means_nothing",
    "resume_from_checkpoint": "test_recipes.py::test_sigkill_and_resume_end_bit_for_bit",
    "fsdp": "test_distributed.py::test_sharded_ranks_end_where_one_process_ends",
    "push_to_hub": "test_hub.py::test_a_recipe_pushes_its_results_too",
    "hub_model_id": "test_hub.py::test_a_recipe_pushes_its_results_too",
    "hub_token": "test_hub.py::test_a_name_or_token_that_the_hub_refuses_is_known_before_the_first_step",
    "hub_strategy": "test_hub.py::test_training_pushes",
    "hub_always_push": "test_hub.py::test_training_pushes",
    "hub_private_repo": "test_training_arguments.py::test_hub_fields_reach_the_hub",
    "hub_revision": "test_training_arguments.py::test_hub_fields_reach_the_hub",
}
if CHECKPOINTING == "activation_checkpointing":  # otherwise, these are the only names
    for deprecated in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        ELSEWHERE[deprecated] = "test_training_arguments.py::test_deprecated_names"


@SINCE_5_15
def test_every_field_is_decided_on():
    """A new field of a later transformers makes this test fail until the field is in one of the lists."""
    decided = [*HONOURED, *INHERITED, *ELSEWHERE, *REFUSED, *IGNORED]
    assert len(set(decided)) == len(decided), "a field is in two lists"
    assert set(decided) == {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("field", ELSEWHERE)
def test_tests_named_here_exist(field):
    file, name = ELSEWHERE[field].split("::")
    tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


WITHOUT = {}  # observations without the field; many fields share them
# Fields in which our own code takes part. Fields that only Trainer uses are tested in the slow suite.
FAST = {"per_device_train_batch_size", "max_steps", "gradient_accumulation_steps", "dataloader_drop_last", "seed", "data_seed",
        "load_best_model_at_end", "metric_for_best_model", "eval_steps", "eval_strategy", "max_grad_norm", "eval_on_start",
        "dataloader_num_workers", "neftune_noise_alpha", "lr_scheduler_type"}  # fmt: skip


@pytest.mark.parametrize("field", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in HONOURED])
def test_honoured_as_by_a_plain_trainer(tmp_path, field):
    value, more, observe = HONOURED[field]
    before = get_verbosity()
    try:
        # The settings are copied because Trainer changes some values.
        got = observe(ours(tmp_path / "ours", **copy.deepcopy(more | {field: value})))
        expected = observe(plain(tmp_path / "plain", **copy.deepcopy(more | {field: value})))
        set_verbosity(before)
        key = (repr(more), observe)
        if key not in WITHOUT:
            WITHOUT[key] = observe(ours(tmp_path / "without", **more))
    finally:
        set_verbosity(before)
    assert got == expected
    assert got != WITHOUT[key]


@pytest.mark.parametrize("field", INHERITED)
def test_inherited_methods_are_not_overridden(field):
    assert getattr(ContrastiveTrainingArguments, INHERITED[field]) is getattr(TrainingArguments, INHERITED[field])


# ---- refused fields, and fields with a warning ----

OTHER_VALUES = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "train_sampling_strategy": "sequential",
    "auto_find_batch_size": True, "bf16_full_eval": True, "fp16_full_eval": True, "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True}, "parallelism_config": "any", "debug": "underflow_overflow",
    "per_device_eval_batch_size": 3, "prediction_loss_only": True, "include_for_metrics": ["loss"], "batch_eval_metrics": True,
    "eval_do_concat_batches": False, "eval_accumulation_steps": 2, "eval_use_gather_object": True,
    "average_tokens_across_devices": False, "logging_nan_inf_filter": False, "label_names": ["labels"],
    "length_column_name": "n", "remove_unused_columns": False, "do_train": True, "do_eval": True, "do_predict": True,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(tmp_path, field):
    message = error_of(ours, tmp_path / "out", **{field: OTHER_VALUES[field]})
    assert message.startswith(f"{field} is ") and message.endswith("; remove it") and REFUSED[field] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", IGNORED)
def test_warned_of_by_name_and_not_in_the_card(tmp_path, caplog, field):
    with caplog.at_level(logging.WARNING, "hf_embed"):
        run = ours(tmp_path, **{field: OTHER_VALUES[field], "weight_decay": 0.5})
    message = f"{field} has no effect: {IGNORED[field]}"
    assert [said for said in caplog.messages if said.startswith(field)] == [message]
    plan = Plan(ModelArguments(), RunArguments(), run.args, SimCSE(), run.train_dataset, "rows", {})
    assert changed(plan) == {"max_steps": 3, "weight_decay": 0.5}


def test_tokens_that_are_also_the_padding_token_are_counted(tmp_path):
    """BUG: Trainer compares token ids with the padding token, and a batch here has no padding."""
    tokenizer = small_tokenizer()
    tokenizer.pad_token = tokenizer.sep_token
    args = ContrastiveTrainingArguments(tmp_path, **(DEFAULTS | {"max_steps": 1}), include_num_input_tokens_seen="non_padding")
    rows = [{"anchor": "the cat", "positive": "a dog"}] * 4  # [CLS], two words and [SEP] in each text
    run = ContrastiveTrainer(tiny_model(), args, train_dataset=rows, processing_class=tokenizer)
    run.train()
    assert run.state.num_input_tokens_seen == 4 * 2 * 4


def test_torch_compile_says_that_it_does_not_pay(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_embed"):
        ours(tmp_path, torch_compile_backend="eager")  # this sets torch_compile
    assert [said for said in caplog.messages if said.startswith("torch_compile: the chunks of each step have other sizes")]


def test_a_launch_that_compiles_says_so_too(tmp_path, caplog, monkeypatch):
    """BUG: the warning read the training arguments alone, but `accelerate launch --dynamo_backend` compiles as well."""
    for backend, warned in (("NO", False), ("EAGER", True)):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run = ours(tmp_path)
        assert (str(run.accelerator.state.dynamo_plugin.backend) == "EAGER") is warned
        assert any(said.startswith("torch_compile: the chunks") for said in caplog.messages) is warned


def test_no_warning_without_a_reason(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_embed"):
        ours(tmp_path, eval_strategy="steps", eval_steps=1)  # this sets do_eval
    assert not [message for message in caplog.messages if "no effect" in message or "torch_compile" in message]
    with caplog.at_level(logging.WARNING, "hf_embed"):
        ours(tmp_path, eval_steps=1)
    assert "eval_steps has no effect: eval_strategy is no; set eval_strategy to steps" in caplog.messages


# BUG: without eval_strategy, the other settings of an evaluation were ignored without a message.
@pytest.mark.parametrize(
    "settings", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_steps": 1}, {"metric_for_best_model": "spearman"}]
)
def test_settings_of_an_evaluation_without_sets_are_named_once(tmp_path, caplog, settings):
    """The preset of a recipe evaluates, but the user gives training rows and no evaluation set. A single warning says so."""
    args = ContrastiveTrainingArguments(tmp_path, use_cpu=True, **settings)
    with caplog.at_level(logging.WARNING, "hf_embed"):
        warn_of_ignored(without_evaluation(args), {})
    assert caplog.messages == [
        "no --eval_... NAME=PATH is given: nothing is evaluated, and the last model is kept, not the best one"
    ]


def test_the_warning_of_no_evaluation_comes_from_one_process(tmp_path, caplog, monkeypatch):
    """BUG: with two processes it was printed twice."""
    monkeypatch.setenv("RANK", "1")
    args = ContrastiveTrainingArguments(tmp_path, eval_strategy="steps", eval_steps=1, use_cpu=True)
    with caplog.at_level(logging.WARNING, "hf_embed"):
        assert without_evaluation(args).eval_strategy == "no"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("split_batches", True), ("dispatch_batches", True), ("even_batches", False), ("use_seedable_sampler", False),
     ("non_blocking", True)],
)  # fmt: skip
def test_loader_settings_of_accelerate_are_refused(tmp_path, setting, value):
    assert f"accelerator_config: {setting} is {value}" in error_of(ours, tmp_path, accelerator_config={setting: value})
    ours(tmp_path, accelerator_config={"split_batches": False, "even_batches": True, "dispatch_batches": None})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, "it is not supported on a CPU"),
        ({"fsdp": True}, "fsdp is set, but there is a single process; start several with accelerate launch, or remove fsdp"),
        (
            {f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
            f"but {CHECKPOINTING} is False; set it to True",
        ),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "'a/b/c' is not a valid name of a repository"),
        pytest.param({"tf32": True}, "requires Ampere", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
        ({"optim_target_modules": "all-linear"}, "only for galore and apollo, but optim is adamw_torch"),
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "galore_torch"),
        pytest.param(
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            "distribution was not found and is required",
            marks=WITHOUT_DEEPSPEED,
        ),
        pytest.param({"deepspeed": "zero.json"}, "distribution was not found and is required", marks=WITHOUT_DEEPSPEED),
    ],
)
def test_refused_where_it_means_nothing(tmp_path, settings, message):
    assert message in error_of(ours, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# ---- fields with their own test ----


def test_output_dir(tmp_path):
    ours(tmp_path / "there", save_strategy="steps", save_steps=3).train()
    assert (tmp_path / "there" / "checkpoint-3" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_start_method_of_workers(tmp_path, method):
    """Workers that start as new processes, not as forks, also get the rows, and the batches are the same."""
    settings = WORKER | {"dataloader_multiprocessing_context": method}
    loader = ours(tmp_path, **settings).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == method
    expected = [batch["text_ids"] for batch in ours(tmp_path).get_train_dataloader()]
    assert all(torch.equal(batch["text_ids"], other) for batch, other in zip(loader, expected, strict=True))


def test_pinned_memory(tmp_path, monkeypatch):
    run = ours(tmp_path)
    monkeypatch.setattr(ContrastiveTrainingArguments, "device", torch.device("cuda"))
    for wanted in (True, False):
        run.args.dataloader_pin_memory = wanted
        assert run.get_train_dataloader().pin_memory is wanted


def test_data_seed_orders_the_rows(tmp_path):
    orders = [
        list(ours(tmp_path, **settings).get_train_dataloader().batch_sampler)
        for settings in ({"data_seed": 5}, {"data_seed": 5, "seed": 9}, {"seed": 5}, {"data_seed": 6})
    ]
    assert orders[0] == orders[1] == orders[2] != orders[3]


def test_full_determinism(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # full_determinism sets it; monkeypatch restores it
    try:
        assert not torch.are_deterministic_algorithms_enabled()
        ours(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cache_is_emptied(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: calls.append(1))
    for make in (ours, plain):
        make(tmp_path, torch_empty_cache_steps=2).train()
    assert len(calls) == 2 * 2  # each of the two runs in its first and third step


def test_a_model_without_activation_checkpointing(tmp_path):
    """BUG: this was a ValueError."""
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    expected = (
        f"BertModel does not support {CHECKPOINTING.replace('_', ' ')}; use gradient_caching, which works for every model"
    )
    assert error_of(ours(tmp_path, model=model, **{CHECKPOINTING: True}).train) == expected


@pytest.mark.skipif(CHECKPOINTING == "gradient_checkpointing", reason="transformers before 5.23 has only this name")
def test_deprecated_names(tmp_path):
    with pytest.warns(FutureWarning):
        run = ours(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 2})
    assert checkpointed_layers(run) == checkpointed_layers(
        ours(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    )


def test_report_to(tmp_path):
    if is_tensorboard_available():
        assert "TensorBoardCallback" in callbacks(ours(tmp_path, report_to="tensorboard"))
    assert "report_to: unknown name 'wandbb'; use " in error_of(ours, tmp_path, report_to="wandbb")
    assert "report_to: the package of neptune is not installed" in error_of(ours, tmp_path, report_to=["neptune"])
    assert callbacks(ours(tmp_path, report_to="none")) == callbacks(ours(tmp_path, report_to=[]))


def test_resuming_without_skipping(tmp_path):
    """With ignore_data_skip, the resumed epoch starts again with its first batch, as in a plain Trainer."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    ours(tmp_path, **settings).train()

    def first_batch(**more):
        run, seen = ours(tmp_path, **settings | more), []
        compute = run.compute_loss
        run.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs["text_ids"]) or compute(model, inputs, **kwargs)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return seen[0]

    batches = [batch["text_ids"] for batch in ours(tmp_path, **settings).get_train_dataloader()]
    assert torch.equal(first_batch(), batches[2])
    assert torch.equal(first_batch(ignore_data_skip=True), batches[0])


def test_callbacks_are_restored(tmp_path):
    settings = SAVE | {"load_best_model_at_end": True, "max_steps": 2}
    ours(tmp_path, [EarlyStoppingCallback(early_stopping_patience=7)], **settings).train()
    for restore, patience in ((False, 1), (True, 7)):
        run = ours(tmp_path, [EarlyStoppingCallback(1)], restore_callback_states_from_checkpoint=restore, **settings)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        (stopping,) = [c for c in run.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        assert stopping.early_stopping_patience == patience


def test_hub_fields_reach_the_hub(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None, private=None: setattr(self, "hub_model_id", "a/b"))
    monkeypatch.setattr("hf_embed.checkpoint.hub.push_folder", lambda folder, repo, private, revision, **more: pushed.update(
        repo=repo, private=private, revision=revision))  # fmt: skip
    run = ours(tmp_path, hub_private_repo=True, hub_revision="v2", push_to_hub=True, hub_model_id="a/b")
    run.push_to_hub()
    assert pushed == {"repo": "a/b", "private": True, "revision": "v2"}


# ---- a learning rate that depends on a metric ----


@pytest.mark.parametrize(
    ("metric", "falls"), [(None, True), ("spearman", True), ("falling", True)], ids=["default", "spearman", "falling"]
)
def test_plateau_lowers_the_rate_when_the_metric_stops_rising(tmp_path, metric, falls):
    """The scores are 50, 70, 60, 65, 40. The learning rate falls first after the third score, and not when the score rises."""
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
                "max_steps": 5, "learning_rate": 1e-3, "metric_for_best_model": metric}  # fmt: skip
    if metric == "falling":
        settings["greater_is_better"] = False  # this metric is minus the score
    run = ours(tmp_path, **EVERY_STEP | settings)
    assert run.args.lr_scheduler_kwargs["mode"] == ("min" if metric == "falling" else "max")
    assert rates(run) == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 2.5e-4])


def test_plateau_refuses_the_wrong_direction(tmp_path):
    settings = EVERY_STEP | {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "min"}}
    assert "mode is min, but spearman is best at its maximum" in error_of(ours, tmp_path, **settings)
    assert "reduce_lr_on_plateau requires an eval strategy" in error_of(
        ours, tmp_path, lr_scheduler_type="reduce_lr_on_plateau"
    )
