"""results.json records the settings that can change the result of a run, and no setting is forgotten."""

import dataclasses

from conftest import SINCE_5_15
from datasets import Dataset

from hf_embed import ContrastiveTrainingArguments, Matryoshka, SimCSE
from hf_embed.kit.plan import ModelArguments, Plan, PositiveArguments, RunArguments
from hf_embed.kit.report import changed
from hf_embed.library_internals import CHECKPOINTING
from hf_embed.training.record import RESULT_SETTINGS, settings_of
from hf_embed.training.settings import IGNORED, REFUSED

KINDS = (ModelArguments, ContrastiveTrainingArguments, PositiveArguments)
# Settings that do not change the result: where files go, the hardware, and what is logged, saved, evaluated and uploaded.
# Settings that results.json has under another name are here too: the model, the batch size and the seed.
OTHER_SETTINGS = {
    "model_name_or_path", "save_adapter", "output_dir", "per_device_train_batch_size", "seed",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "allow_changed",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "use_cpu", "accelerator_config", "fsdp", "fsdp_config", "deepspeed", "local_rank", "chunk_tokens",
}  # fmt: skip

RENAMED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # in transformers 5.23


@SINCE_5_15
def test_every_setting_is_known_to_matter_or_not():
    names = {field.name for kind in KINDS for field in dataclasses.fields(kind)}
    lists = (set(RESULT_SETTINGS), OTHER_SETTINGS, set(IGNORED), set(REFUSED))
    # A setting that is new in transformers must be added to OTHER_SETTINGS above, or to one of the other three lists.
    assert names - set().union(*lists) == set()
    later = set() if CHECKPOINTING in RENAMED else RENAMED  # not yet in the installed transformers
    assert set().union(*lists) - names == later
    assert sum(map(len, lists)) == len(names | later)  # each name is in one list only


def plan(rows, positive=None, **settings) -> Plan:
    args = ContrastiveTrainingArguments("out", use_cpu=True, report_to=[], **settings)
    return Plan(ModelArguments(dropout=0.2), RunArguments(), args, SimCSE(), rows, "rows", {}, positive=positive)


def test_what_is_changed_and_matters():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    settings = {"num_train_epochs": 2, "source_alpha": 0.3, "logging_steps": 7, "optim": "sgd", "prompts": {"query": "q: "}}
    of_one_set = {"dropout": 0.2, "num_train_epochs": 2, "prompts": {"query": "q: "}}
    assert {key: value for key, value in changed(plan(rows, **settings)).items() if key != "optim"} == of_one_set
    assert "source_alpha" in changed(plan([], **settings)) and "optim" in changed(plan([], **settings))
    assert "num_train_epochs" not in changed(plan(rows, max_steps=5, **settings))
    assert changed(plan(rows, normalize=False)) == {"dropout": 0.2, "normalize": False}  # None is another setting
    assert changed(plan(rows, PositiveArguments("crop:0.1"))) == {"dropout": 0.2, "positive": "crop:0.1"}


def test_an_objective_around_another_names_both():
    assert settings_of(SimCSE(0.1)) == {"name": "SimCSE"} | dataclasses.asdict(SimCSE(0.1))
    around = settings_of(Matryoshka(SimCSE(0.1), (8, 4)))
    assert around["name"] == "Matryoshka" and around["dims"] == (8, 4)
    assert around["objective"] == settings_of(SimCSE(0.1))
