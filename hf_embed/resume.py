"""What run a checkpoint belongs to, and whether the present run goes on with it.

`facts_of` says it of a run, for the manifest of its checkpoints; `compare` sets the facts of a checkpoint against those of the
run that is resumed from it. What a resumed run can do with what is other:

    other rows, objective, pooling, prompts ...      refused by name; `allow_changed` goes on
    other trained parameters, optimizer, base model  refused: the checkpoint's tensors would not fit
    other number of ranks                            goes on where every step has the same rows, else refused
    other learning rate, schedule, batch, seed ...   goes on with the new ones, and says so
    more epochs or steps                             goes on
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.compute
import torch
import xxhash
from datasets import Dataset
from torch import nn
from transformers import Trainer

from hf_embed.adapters import has_adapters
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.mixture import Mixture, Stream, data_seed
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler
from hf_embed.errors import InputError
from hf_embed.objectives import Objective
from hf_embed.objectives.base import FunctionObjective
from hf_embed.tempscale import applied_tempscale
from hf_embed.trainer_settings import NEED_A_MODEL
from hf_embed.training_record import settings_of

if TYPE_CHECKING:
    from hf_embed.trainer import ContrastiveTrainer

Facts = dict[str, Any]

ROWS = "the rows"  # the name of a single table
ALL_ROWS = 100_000  # up to so many rows all are hashed, of more tables a sample
SAMPLED_ROWS = 1_000
SAMPLED_NUMBERS = 1_000  # of each tensor of a base model
# Entries of a config that do not change what the model computes, or are compared otherwise.
OF_NO_FUNCTION = re.compile(
    r"drop|name|path|revision|version|dtype|cache|^output_|return_dict|temp_scale|inference_mode|task_type|_attn|^init|_init|"
    "token_id|chunk_size"
)
# The settings that a run may change on its way, and that are told.
TOLD = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed", "gradient_accumulation_steps",
    "per_device_train_batch_size", "dataloader_drop_last", "mixed_precision",
)  # fmt: skip


# ---- what a run is ----


def facts_of(trainer: "ContrastiveTrainer") -> Facts:
    """Return what run a trainer's is, as JSON has it.

    The rows of a table are hashed as token ids, in their order: all of them up to `ALL_ROWS`, of more a sample that is spread
    evenly and has the first and the last. Of a stream there are the name and the settings alone: its rows are not checked.
    """
    args, encoder = trainer.args, trainer.encoder
    scaling = applied_tempscale(encoder.backbone)
    facts = {
        "data": data_facts(trainer.train_dataset, args),
        "order": order_of(trainer.train_dataset, args),
        "seed_of_rows": data_seed(args),
        "objective": objective_facts(trainer.objective),
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
        "settings": {name: getattr(args, name) for name in TOLD}
        | {"normalize": encoder.normalize, "dtype": str(encoder.dtype).removeprefix("torch."),
           "dropout": dropout_rates(encoder.backbone)},
    }  # fmt: skip
    return as_json(facts)


def as_json(facts: Facts) -> Facts:
    """Return facts as they are read from a file."""
    return json.loads(json.dumps(facts, default=str))


def same_settings(then: Facts, args: ContrastiveTrainingArguments, objective: Objective) -> bool:
    """Return whether a run with these arguments and this objective has the settings of a checkpoint's, the seed left out."""
    now = as_json({name: getattr(args, name) for name in TOLD} | {"seed": None})
    settings = now | {name: value for name, value in then["settings"].items() if name in now} | {"seed": None}
    return settings == now and then["objective"] == as_json(objective_facts(objective))


def data_facts(rows: Dataset | Mixture, args: ContrastiveTrainingArguments) -> Facts:
    """Return what the rows to train on are: of each source by its name, or of the one table."""
    if not isinstance(rows, Mixture):
        return {ROWS: table_facts(rows)}
    facts = {}
    for name, table, probability in zip(rows.names, rows.tables, rows.probabilities):
        found = stream_facts(table) if isinstance(table, Stream) else table_facts(table)
        facts[name] = found | {"share of the batches": round(probability, 9)}
    return facts


def table_facts(table: Dataset) -> Facts:
    """Return the number of rows and the hash of their token ids."""
    return {"number of rows": len(table), "content": rows_hash(table)}


def stream_facts(stream: Stream) -> Facts:
    """Return the settings of a stream."""
    tokenizer = stream.tokenizer
    return {
        "stream": True, "columns": stream.columns, "negatives": stream.negatives,
        "shuffle_buffer_size": stream.buffer_size, "max_length": tokenizer.max_length,
        "prompts": [tokenizer.query_prompt, tokenizer.document_prompt],
    }  # fmt: skip


def rows_hash(table: Dataset) -> str:
    """Return a hash of the token ids of a table, and of the other positives of its rows; see `facts_of`."""
    columns = [name for name in ("input_ids", "other_ids") if name in table.column_names]
    if len(table) > ALL_ROWS:
        table = table.select([number * (len(table) - 1) // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)])
    digest = xxhash.xxh3_128()
    for batch in table.select_columns(columns).with_format("arrow").iter(batch_size=1_000):
        for name in columns:
            column = batch.column(name).combine_chunks()
            while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                digest.update(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
                column = pyarrow.compute.list_flatten(column)
            digest.update(column.cast(pyarrow.int64()).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def order_of(rows: Dataset | Mixture, args: ContrastiveTrainingArguments) -> str:
    """Return a hash of the first global batches that are drawn from (seed, epoch 0), of at most 10,000 rows of each table."""
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
    """Return how many rows of a table an epoch uses on this number of ranks; None for several sources, which use all."""
    if isinstance(rows, Mixture):
        return None
    batch = args.per_device_train_batch_size
    sampler = GlobalBatchSampler(len(rows), batch, 0, args.world_size, 0, args.dataloader_drop_last)
    return len(rows) - sampler.left_out


def objective_facts(objective: Objective) -> Facts:
    """Return the name of an objective and its settings; of a function its full name, and what is bound to it."""
    facts = settings_of(objective)
    if isinstance(objective, FunctionObjective):
        facts["name"] = name_of(objective.function)
        facts |= {"temperature": objective.temperature, "mlm_weight": objective.mlm_weight}
    elif not dataclasses.is_dataclass(objective):
        settings = {name: value for name, value in vars(objective).items() if isinstance(value, int | float | str | None)}
        facts |= {"name": name_of(type(objective))} | settings
    return facts


def name_of(function: Any) -> str:
    """Return the full name of a function, a class or the class of an object."""
    if isinstance(function, functools.partial):
        bound = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        return f"{name_of(function.func)}({', '.join(bound)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def config_facts(backbone: nn.Module) -> Facts:
    """Return what the configs of a model and of its adapters say of its function, as numbers and names."""
    configs = configs_of(backbone)
    facts = {key: value for config in configs for key, value in config.items() if isinstance(value, int | float | str)}
    return {key: value for key, value in facts.items() if not OF_NO_FUNCTION.search(key)}


def configs_of(backbone: nn.Module) -> list[Facts]:
    """Return the config of a model, and those of its adapters."""
    configs = [backbone.config.to_dict()]  # type: ignore[operator, union-attr]
    if has_adapters(backbone):  # type: ignore[arg-type]
        configs += [config.to_dict() for config in backbone.peft_config.values()]  # type: ignore[operator]
    return configs


def base_model_hash(backbone: nn.Module) -> str | None:
    """Return a hash of the weights that adapters are put on, which a checkpoint does not hold; None without adapters."""
    if not has_adapters(backbone):  # type: ignore[arg-type]
        return None
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(backbone.named_parameters()):
        if not parameter.requires_grad:
            numbers = parameter.detach().flatten()
            sample = numbers[:: max(1, len(numbers) // SAMPLED_NUMBERS)].to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def optimizer_class(trainer: Trainer) -> str:
    """Return the name of the optimizer's class; of one that can be made for a model only, its name in `optim`."""
    if trainer.optimizer is not None:
        return type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__  # accelerate wraps it
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if name.startswith(NEED_A_MODEL):
        return name
    made_by = Trainer.get_optimizer_cls_and_kwargs(trainer.args)[0]
    return made_by.__name__ if isinstance(made_by, type) else name


def dropout_rates(backbone: nn.Module) -> Facts:
    """Return the dropout rates of a model's config and of its adapters, by their names."""
    rates = {key: value for config in configs_of(backbone) for key, value in config.items() if "drop" in key}
    return {key: value for key, value in rates.items() if isinstance(value, int | float) and not isinstance(value, bool)}


# ---- the ranks of a run ----


def check_ranks_alike(facts: list[Facts]) -> None:
    """Raise InputError where ranks would train on different rows; `facts` are those of each rank, in rank order."""
    other = [str(rank) for rank, of_rank in enumerate(facts) if of_rank["data"] != facts[0]["data"]]
    if other:
        changes = changes_of(facts[0]["data"], facts[int(other[0])]["data"], "is", f"on rank {other[0]}")
        raise InputError(
            f"ranks read different rows: rank {', '.join(other)} others than rank 0 ({'; '.join(changes)}); give all ranks the "
            "same files"
        )


# ---- a checkpoint's run and the present one ----


def compare(checkpoint: Path, then: Facts, now: Facts, allow_changed: bool) -> list[str]:
    """Set the facts of a checkpoint's run against those of the present one.

    Args:
        checkpoint: for messages.
        then: the facts of the checkpoint's run.
        now: those of the present one.
        allow_changed: whether other rows, another objective and the like are only told.

    Returns:
        The warnings, each in one line.

    Raises:
        InputError: the present run cannot go on from this checkpoint, or should not.
    """
    changes = run_changes(then, now)
    check_fit(checkpoint, then, now, changes)
    ranks, notes = other_ranks(then, now)
    told = told_changes(then, now)
    if not (changes or ranks):
        return notes + ([f"{checkpoint}: goes on with other settings: {'; '.join(told)}"] if told else [])
    if not allow_changed:
        raise InputError(
            f"{checkpoint}: the checkpoint is of a run with other settings: {'; '.join(changes + ranks)}; go back to those, or "
            "start anew in another folder (allow_changed goes on all the same)"
        )
    return notes + [f"{checkpoint}: allow_changed goes on although {'; '.join(changes + ranks + told)}"]


def run_changes(then: Facts, now: Facts) -> list[str]:
    """Say what is other than it was of what a run is about: the model's function, the objective, the rows."""
    changes = [change for key in ("encoder", "objective") for change in changes_of(then.get(key, {}), now.get(key, {}))]
    config, present_config = then.get("config", {}), now["config"]
    common = config.keys() & present_config.keys()  # another version of transformers may have further ones
    changes += changes_of({key: config[key] for key in common}, {key: present_config[key] for key in common})
    retokenized = {"max_length", "prompts"} & changed_keys(then.get("encoder", {}), now.get("encoder", {}))
    data, present_data = (without_content(facts.get("data", {}), bool(retokenized)) for facts in (then, now))
    changes += changes_of(data, present_data)
    if not changes and same_draws(then, now) and then.get("order") != now.get("order"):
        changes.append("the order of the rows: this version draws another one from the same seed")
    return changes


def check_fit(checkpoint: Path, then: Facts, now: Facts, changes: list[str]) -> None:
    """Raise InputError where the checkpoint's tensors are not those of the present model and optimizer.

    The message tells the other `changes` too, which may be why.
    """
    besides = f" ({'; '.join(changes)})" if changes else ""
    before, present = then.get("parameters", {}), now.get("parameters", {})
    if before != present:
        other = sorted(changed_keys(before, present))
        shown = f"{other[0]} is {shape(before.get(other[0]))} there and {shape(present.get(other[0]))} here"
        raise InputError(
            f"{checkpoint}: the checkpoint is of another model: {len(other):,} trained parameters differ, {shown}{besides}; "
            "give the model, the objective and the adapters that its run had"
        )
    if then.get("base") != now.get("base"):
        raise InputError(f"{checkpoint}: the adapters were trained on another base model; give the one that the run had")
    if then.get("optimizer") != now.get("optimizer"):
        raise InputError(
            f"{checkpoint}: the optimizer was {then.get('optimizer')} and is {now.get('optimizer')}, whose state is another; "
            "go back to that one, or start anew in another folder"
        )


def shape(size: list[int] | None) -> str:
    """Return the shape of a parameter, in words."""
    return "absent" if size is None else "x".join(map(str, size)) or "a number"


def without_content(data: Facts, leave_out: bool) -> Facts:
    """Return the facts of the rows; without the hashes of token ids where these differ anyway."""
    names = ("content", "max_length", "prompts") if leave_out else ()
    return {name: {key: value for key, value in facts.items() if key not in names} for name, facts in data.items()}


def same_draws(then: Facts, now: Facts) -> bool:
    """Return whether both runs draw the same rows, by what the draws depend on."""
    last = "dataloader_drop_last"
    seeds, drops = then.get("seed_of_rows") == now["seed_of_rows"], then["settings"].get(last) == now["settings"][last]
    return seeds and drops and global_batch(then) == global_batch(now)


def global_batch(facts: Facts) -> int:
    """Return the rows of a batch on all ranks."""
    return int(facts["settings"]["per_device_train_batch_size"]) * int(facts["ranks"])


def other_ranks(then: Facts, now: Facts) -> tuple[list[str], list[str]]:
    """Return why another number of ranks is not exact, if it is not; and what is to be said where it is."""
    before, ranks = int(then["ranks"]), int(now["ranks"])
    if before == ranks:
        return [], []
    change, batch = f"the number of ranks was {before} and is {ranks}", global_batch(then)
    steps = "gradient_accumulation_steps"
    if any(facts.get("stream") for facts in then["data"].values()):
        return [f"{change}, and a stream's rows are divided among the ranks: start {before}"], []
    if batch != global_batch(now) or then["settings"][steps] != now["settings"][steps]:
        given = f"--per_device_train_batch_size {batch // ranks} --gradient_accumulation_steps {then['settings'][steps]}"
        mend = f"{given} makes the same batches" if batch % ranks == 0 else f"start {before}, for {batch} rows do not divide"
        return [f"{change}: {mend}"], []
    if then["rows_of_epoch"] != now["rows_of_epoch"]:
        uses = f"an epoch used {then['rows_of_epoch']:,} rows and uses {now['rows_of_epoch']:,}, for the last batch is divided"
        return [f"{change}: {uses}; start {before}"], []
    if not any(now["settings"]["dropout"].values()):
        return [], []
    return [], [f"{change}: the batches are the same, but dropout draws other numbers than it would have drawn"]


def told_changes(then: Facts, now: Facts) -> list[str]:
    """Say each change of the settings of which a change is told; with another number of ranks the batch is told with that."""
    before, present = then["settings"], now["settings"]
    names = (before.keys() & present.keys()) - ({"per_device_train_batch_size"} if then["ranks"] != now["ranks"] else set())
    return changes_of({name: before[name] for name in names}, {name: present[name] for name in names})


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the keys with different values, or without one in one of the two."""
    return {key for key in {*then, *now} if (key in then) != (key in now) or then[key] != now[key]}


def changes_of(then: Facts, now: Facts, was: str = "was", is_: str = "is") -> list[str]:
    """Say each difference of two sets of facts, those of a source with its name: "pooling was mean and is cls"."""
    told = []
    for key in sorted(changed_keys(then, now)):
        before, present = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(present, dict):
            told += [f"{key}: {change}" for change in changes_of(before, present, was, is_)]
        elif key == "content":
            told.append("their content differs")
        elif isinstance(before, dict) or isinstance(present, dict):
            told.append(f"{key} {was} {'given' if before else 'absent'} and {is_} {'given' if present else 'absent'}")
        else:
            told.append(f"{key} {was} {shown(before)} and {is_} {shown(present)}")
    return told


def shown(value: Any) -> str:
    """Return a value for a message, not too much of it."""
    text = "absent" if value is None else f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
