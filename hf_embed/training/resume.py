"""Decide whether the current run may resume from a checkpoint of an earlier run.

`facts_of` describes a run, and the manifest of each checkpoint holds this description. `compare` compares the description in a
checkpoint with that of the current run. What happens if one of these differs:

    rows, objective, pooling, prompts ...         error that names the change; `allow_changed` resumes with a warning
    trained parameters, optimizer, base model     error, because the tensors of the checkpoint would not fit
    number of ranks                               resume if every step still has the same rows, else as in the first line
    learning rate, schedule, batch size, seed ... resume with the new values, and warn
    a schedule that reads the metric              error, because the schedule has changed the learning rate itself
    more epochs or steps                          resume
"""

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.compute
import torch
import xxhash
from datasets import Dataset
from transformers import PreTrainedModel, Trainer

from hf_embed.adapters import configs_of, has_adapters
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.mixture import Mixture, data_seed
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler
from hf_embed.data.stream import Stream
from hf_embed.errors import InputError
from hf_embed.forward.dropout import dropout_rates
from hf_embed.objectives import Objective
from hf_embed.objectives.base import FunctionObjective
from hf_embed.tempscale import applied_tempscale
from hf_embed.training.record import settings_of
from hf_embed.training.settings import METRIC_SCHEDULES, NEED_A_MODEL

if TYPE_CHECKING:
    from hf_embed.training.checkpoint_trainer import CheckpointTrainer

Facts = dict[str, Any]

ROWS = "the rows"  # the name of a single table
ALL_ROWS = 100_000  # tables of up to this many rows are hashed completely, larger tables by a sample
SAMPLED_ROWS = 1_000  # the number of rows in that sample
SAMPLED_NUMBERS = 1_000  # about how many numbers of each tensor of a base model are hashed
# Entries of a config that do not change what the model computes, or that are compared in another way.
IGNORED_CONFIG_KEYS = re.compile(
    r"drop|name|path|revision|version|dtype|cache|^output_|return_dict|temp_scale|inference_mode|task_type|_attn|^init|_init|"
    "token_id|chunk_size"
)
# Settings that may change when a run is resumed. A warning names the changes.
WARNED_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed", "gradient_accumulation_steps",
    "per_device_train_batch_size", "dataloader_drop_last", "mixed_precision",
)  # fmt: skip
# Facts that must be the same on all ranks.
SAME_ON_RANKS = ("data", "seed_of_rows", "objective", "encoder", "config", "parameters", "optimizer", "settings")


# ---- the description of a run ----


def facts_of(trainer: "CheckpointTrainer") -> Facts:
    """Return the description of a trainer's run, as values that JSON can store.

    The rows of a table are described by a hash of their token ids, in order. Tables of more than `ALL_ROWS` rows are hashed by
    an evenly spaced sample that includes the first and the last row. A streaming dataset is described by its name and settings
    only, so its rows are not compared.
    """
    args, encoder = trainer.args, trainer.encoder
    scaling = applied_tempscale(encoder.backbone)
    # What the vectors of a teacher depend on. The scores of a teacher are part of the rows.
    teacher = {"teacher": trainer.teacher_identity} if trainer.teacher_identity else {}
    facts = {
        "data": data_facts(trainer.train_dataset, args),
        "order": order_of(trainer.train_dataset, args),
        "seed_of_rows": data_seed(args),
        "objective": objective_facts(trainer.main_objective) | teacher,
        "encoder": {
            "pooling": encoder.pooling, "max_length": encoder.max_length, "prompts": encoder.prompts,
            "temp_scale": None if scaling is None else scaling.to_dict(), "same_dropout_mask": args.same_dropout_mask,
        },
        "config": config_facts(encoder.backbone),
        "parameters": {name: list(p.shape) for name, p in trainer.step.named_parameters() if p.requires_grad},
        "base": base_model_hash(encoder.backbone),
        "optimizer": optimizer_class(trainer),
        "ranks": args.world_size,
        "rows_of_epoch": rows_of_epoch(trainer.train_dataset, args),
        "settings": {name: getattr(args, name) for name in WARNED_SETTINGS}
        | {"normalize": encoder.normalize, "dtype": str(encoder.dtype).removeprefix("torch."),
           "dropout": dropout_rates(encoder.backbone)},
    }  # fmt: skip
    return as_json(facts)


def as_json(facts: Facts) -> Facts:
    """Return facts in the form in which they are read from a JSON file (for example, tuples become lists)."""
    return json.loads(json.dumps(facts, default=str))


def same_settings(then: Facts, args: ContrastiveTrainingArguments, objective: Objective) -> bool:
    """Return whether these arguments and this objective equal those of a checkpoint's run (`then`), except for the seed.

    The direction of a schedule that reads the metric (`mode`) is not compared, because the trainer sets it.
    """
    now = as_json({name: getattr(args, name) for name in WARNED_SETTINGS} | {"seed": None})
    settings = now | {name: value for name, value in then["settings"].items() if name in now} | {"seed": None}
    for each in (now, settings):
        each["lr_scheduler_kwargs"] = (each["lr_scheduler_kwargs"] or {}) | {"mode": None}
    return settings == now and then["objective"] == as_json(objective_facts(objective))


def data_facts(rows: Dataset | Mixture, args: ContrastiveTrainingArguments) -> Facts:
    """Return the description of the training rows: that of each source by its name, or that of the single table."""
    if not isinstance(rows, Mixture):
        return {ROWS: table_facts(rows)}
    facts = {}
    for name, table, probability in zip(rows.names, rows.tables, rows.probabilities):
        found = stream_facts(table) if isinstance(table, Stream) else table_facts(table)
        facts[name] = found | {"share of the batches": round(probability, 9)}
    for name, objective in zip(rows.names, rows.objectives):
        if objective is not None:
            facts[name]["objective"] = objective_facts(objective)
    return facts


def table_facts(table: Dataset) -> Facts:
    """Return the number of rows and the hash of their token ids."""
    return {"number of rows": len(table), "content": rows_hash(table)}


def stream_facts(stream: Stream) -> Facts:
    """Return the settings of a streaming dataset."""
    tokenizer = stream.tokenizer
    return {
        "stream": True, "columns": stream.columns, "negatives": stream.negatives,
        "shuffle_buffer_size": stream.buffer_size, "max_length": tokenizer.max_length,
        "prompts": [tokenizer.query_prompt, tokenizer.document_prompt],
    }  # fmt: skip


def rows_hash(table: Dataset) -> str:
    """Return a hash of the token ids, the other positives and the scores in a table, as `facts_of` describes."""
    columns = [name for name in ("input_ids", "other_ids", "scores") if name in table.column_names]
    digest = xxhash.xxh3_128()
    for batch in hashed_rows(table).select_columns(columns).with_format("arrow").iter(batch_size=1_000):
        for name in columns:
            column = batch.column(name).combine_chunks()
            while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                digest.update(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
                column = pyarrow.compute.list_flatten(column)
            numbers = column if pyarrow.types.is_floating(column.type) else column.cast(pyarrow.int64())
            digest.update(numbers.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def hashed_rows(table: Dataset) -> Dataset:
    """Return the rows of a table that a hash of its content reads, as `facts_of` describes."""
    if len(table) <= ALL_ROWS:
        return table
    return table.select([number * (len(table) - 1) // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)])


def order_of(rows: Dataset | Mixture, args: ContrastiveTrainingArguments) -> str:
    """Return a hash of the first three global batches of epoch 0 for the run's seed. It detects changes of the sampling code.

    Only the first 10,000 rows of each table take part, to save time.
    """
    batch, seed = args.per_device_train_batch_size * args.world_size, data_seed(args)
    sampler: GlobalBatchSampler | SourceBatchSampler
    if isinstance(rows, Mixture):
        sizes = [min(size, 10_000) for size in rows.sizes]
        sampler = SourceBatchSampler(sizes, rows.probabilities, batch, 0, 1, seed, rows.streams)
    else:
        sampler = GlobalBatchSampler(min(len(rows), 10_000), batch, 0, 1, seed, args.dataloader_drop_last)
    batches: list[Any] = list(islice(sampler, 3))
    return xxhash.xxh3_128_hexdigest(json.dumps(batches).encode())


def rows_of_epoch(rows: Dataset | Mixture, args: ContrastiveTrainingArguments) -> int | None:
    """Return how many rows of a table an epoch uses with this number of ranks. None for several sources, which use all rows."""
    if isinstance(rows, Mixture):
        return None
    batch = args.per_device_train_batch_size
    sampler = GlobalBatchSampler(len(rows), batch, 0, args.world_size, 0, args.dataloader_drop_last)
    return len(rows) - sampler.left_out


def objective_facts(objective: Objective) -> Facts:
    """Return the name and the settings of an objective. For a function, the name includes arguments bound by `partial`."""
    facts = settings_of(objective)
    if isinstance(objective, FunctionObjective):
        facts["name"] = name_of(objective.function)
        facts |= {"temperature": objective.temperature, "mlm_weight": objective.mlm_weight}
    elif not dataclasses.is_dataclass(objective):
        settings = {name: value for name, value in vars(objective).items() if isinstance(value, int | float | str | None)}
        facts |= {"name": name_of(type(objective))} | settings
    return facts


def name_of(function: Any) -> str:
    """Return the full name of a function, of a class, or of the class of an object."""
    if isinstance(function, functools.partial):
        bound = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        return f"{name_of(function.func)}({', '.join(bound)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def config_facts(backbone: PreTrainedModel) -> Facts:
    """Return the entries in the configs of a model and its adapters that decide what the model computes."""
    configs = configs_of(backbone)
    entries = [(key, value) for config in configs for key, value in config.items()]
    facts = {key: value for key, value in entries if isinstance(value, int | float | str) or key == "rope_parameters"}
    return {key: value for key, value in facts.items() if not IGNORED_CONFIG_KEYS.search(key)}


def base_model_hash(backbone: PreTrainedModel) -> str | None:
    """Return a hash of the frozen base weights under adapters, which a checkpoint does not hold. None without adapters."""
    if not has_adapters(backbone):
        return None
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(backbone.named_parameters()):
        if not parameter.requires_grad:
            numbers = parameter.detach().flatten()
            sample = numbers[:: max(1, len(numbers) // SAMPLED_NUMBERS)].to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def optimizer_class(trainer: "CheckpointTrainer") -> str:
    """Return the name of the class of the user's own optimizer, or else of the one that `optim` names.

    For an optimizer that cannot be built without a model, return `optim`.
    """
    if trainer.optimizer is not None and trainer.optimizer_made_for is None:
        return type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__  # accelerate wraps it
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if name.startswith(NEED_A_MODEL):
        return name
    made_by = Trainer.get_optimizer_cls_and_kwargs(trainer.args)[0]
    return made_by.__name__ if isinstance(made_by, type) else name


# ---- the ranks of a run ----


def check_ranks_alike(facts: list[Facts]) -> None:
    """Raise InputError if ranks have different rows, settings or parameters. `facts` describes each rank, in rank order.

    Ranks may have different seeds, as long as they draw the same rows.
    """
    alike = [{name: of_rank[name] for name in SAME_ON_RANKS} for of_rank in facts]
    for of_rank in alike:
        of_rank["settings"] = of_rank["settings"] | {"seed": None}
    if other := [rank for rank, of_rank in enumerate(alike) if of_rank != alike[0]]:
        changes = changes_of(alike[0], alike[other[0]], None, "is", f"on rank {other[0]}")
        raise InputError(
            f"rank 0 differs from rank {', '.join(map(str, other))}: {'; '.join(changes[:3])}; give all ranks the same rows "
            "and settings"
        )


# ---- the checkpoint's run and the current run ----


def compare(checkpoint: Path, then: Facts, now: Facts, allow_changed: bool) -> list[str]:
    """Compare the description of a checkpoint's run with that of the current run.

    Args:
        checkpoint: the folder of the checkpoint, for messages.
        then: the facts of the checkpoint's run.
        now: the facts of the current run.
        allow_changed: if True, other rows, another objective and the like cause a warning instead of an error.

    Returns:
        The warnings, one line each.

    Raises:
        InputError: if the current run cannot or should not resume from this checkpoint.
    """
    changes = run_changes(then, now)
    check_fit(checkpoint, then, now, changes)
    ranks, notes = other_ranks(then, now)
    told = changes_to_warn_about(then, now)
    if not (changes or ranks):
        return notes + ([f"{checkpoint}: resuming with other settings: {'; '.join(told)}"] if told else [])
    if not allow_changed:
        raise InputError(
            f"{checkpoint}: the checkpoint belongs to a run with other settings: {'; '.join(changes + ranks)}; restore "
            "these settings, start again in another folder, or set allow_changed to resume anyway"
        )
    return notes + [f"{checkpoint}: resuming because allow_changed is set, although {'; '.join(changes + ranks + told)}"]


def run_changes(then: Facts, now: Facts) -> list[str]:
    """Describe the changes that `allow_changed` must permit: those of the model, the objective and the rows."""
    changes = [change for key in ("encoder", "objective") for change in changes_of(then[key], now[key])]
    common = then["config"].keys() & now["config"].keys()  # another version of transformers may have added or removed entries
    changes += changes_of(then["config"], now["config"], common)
    retokenized = {"max_length", "prompts"} & changed_keys(then["encoder"], now["encoder"])
    data, present_data = (without_content(facts["data"], bool(retokenized)) for facts in (then, now))
    changes += changes_of(data, present_data)
    if not changes and same_draws(then, now) and then["order"] != now["order"]:
        changes.append("the order of the rows: this version draws a different order from the same seed")
    return changes


def check_fit(checkpoint: Path, then: Facts, now: Facts, changes: list[str]) -> None:
    """Raise InputError if the tensors or the schedule of the checkpoint do not fit the current run.

    If parameters differ, the message also lists the other `changes`, because they may be the cause.
    """
    besides = f" ({'; '.join(changes)})" if changes else ""
    before, present = then["parameters"], now["parameters"]
    if before != present:
        other = sorted(changed_keys(before, present))
        shown = f"for example {other[0]} was {shape(before.get(other[0]))} and is {shape(present.get(other[0]))}"
        raise InputError(
            f"{checkpoint}: the checkpoint belongs to another model: {len(other):,} trained parameters differ, {shown}{besides}"
            "; use the model, the objective and the adapters of its run"
        )
    if then["base"] != now["base"]:
        raise InputError(f"{checkpoint}: the adapters were trained on another base model; use the base model of its run")
    if then["optimizer"] != now["optimizer"]:
        raise InputError(
            f"{checkpoint}: the optimizer was {then['optimizer']} and is {now['optimizer']}, so its saved state cannot "
            "be loaded; use the earlier one, or start again in another folder"
        )
    schedules = {then["settings"]["lr_scheduler_type"], now["settings"]["lr_scheduler_type"]}
    told = changes_of(then["settings"], now["settings"], {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"})
    if told and not schedules.isdisjoint(METRIC_SCHEDULES):
        raise InputError(
            f"{checkpoint}: {'; '.join(told)}, but a schedule that reads the metric cannot be changed when a run is resumed; "
            "restore these settings, or start again in another folder"
        )


def shape(size: list[int] | None) -> str:
    """Format the shape of a parameter: "768x768", "a number" for a scalar, or "absent" for None."""
    return "absent" if size is None else "x".join(map(str, size)) or "a number"


def without_content(data: Facts, leave_out: bool) -> Facts:
    """Return the description of the rows; if `leave_out`, without the parts that change with the tokenization.

    These are the hashes of token ids, max_length and prompts.
    """
    names = ("content", "max_length", "prompts") if leave_out else ()
    return {name: {key: value for key, value in facts.items() if key not in names} for name, facts in data.items()}


def same_draws(then: Facts, now: Facts) -> bool:
    """Return whether both runs should draw the same rows: seed, global batch size and `dataloader_drop_last` are equal."""
    last = "dataloader_drop_last"
    seeds, drops = then["seed_of_rows"] == now["seed_of_rows"], then["settings"].get(last) == now["settings"][last]
    return seeds and drops and global_batch(then) == global_batch(now)


def global_batch(facts: Facts) -> int:
    """Return the number of rows in a batch on all ranks together, without gradient accumulation."""
    return int(facts["settings"]["per_device_train_batch_size"]) * int(facts["ranks"])


def other_ranks(then: Facts, now: Facts) -> tuple[list[str], list[str]]:
    """Compare the numbers of ranks.

    Returns:
        If the number has changed: the reasons why a resumed run would not have the same batches, and the warnings if it would.
    """
    before, ranks = int(then["ranks"]), int(now["ranks"])
    if before == ranks:
        return [], []
    change, batch = f"the number of ranks was {before} and is {ranks}", global_batch(then)
    steps = "gradient_accumulation_steps"
    if any(facts.get("stream") for facts in then["data"].values()):
        return [f"{change}, but the rows of a stream are divided among the ranks: set it to {before}"], []
    if batch != global_batch(now) or then["settings"][steps] != now["settings"][steps]:
        given = f"--per_device_train_batch_size {batch // ranks} --gradient_accumulation_steps {then['settings'][steps]}"
        other = f"set it to {before}, because {batch} rows cannot be divided equally among {ranks}"
        mend = f"{given} makes the same batches" if batch % ranks == 0 else other
        return [f"{change}: {mend}"], []
    if then["rows_of_epoch"] != now["rows_of_epoch"]:
        uses = f"an epoch used {then['rows_of_epoch']:,} rows and uses {now['rows_of_epoch']:,}"
        return [f"{change}: {uses}, because the last batch is divided; set it to {before}"], []
    if not any(now["settings"]["dropout"].values()):
        return [], []
    return [], [f"{change}: the batches are the same, but dropout draws different numbers"]


def changes_to_warn_about(then: Facts, now: Facts) -> list[str]:
    """Describe the changes of settings that only cause a warning: those in `WARNED_SETTINGS`, normalize, the dtype and dropout.

    If the number of ranks has changed, the batch size per device is left out, because `other_ranks` reports it.
    """
    before, present = then["settings"], now["settings"]
    names = (before.keys() & present.keys()) - ({"per_device_train_batch_size"} if then["ranks"] != now["ranks"] else set())
    return changes_of(before, present, names)


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the keys whose values differ, and the keys that only one of the two has."""
    return {key for key in {*then, *now} if (key in then) != (key in now) or then[key] != now[key]}


def changes_of(then: Facts, now: Facts, names: Collection[str] | None = None, was: str = "was", is_: str = "is") -> list[str]:
    """Describe each difference of two sets of facts: "pooling was mean and is cls". Nested differences begin with their key.

    `names` are the facts to compare. Default: all.
    """
    told = []
    for key in sorted(changed_keys(then, now) if names is None else changed_keys(then, now) & set(names)):
        before, present = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(present, dict):
            told += [f"{key}: {change}" for change in changes_of(before, present, None, was, is_)]
        elif key == "content":
            told.append("their content differs")
        elif isinstance(before, dict) or isinstance(present, dict):
            told.append(f"{key} {was} {'given' if before else 'absent'} and {is_} {'given' if present else 'absent'}")
        else:
            told.append(f"{key} {was} {shown(before)} and {is_} {shown(present)}")
    return told


def shown(value: Any) -> str:
    """Format a value for a message, in at most 60 characters."""
    text = "absent" if value is None else f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
