"""The record of a finished training for results.json: the model, the data, the settings and the scores."""

import dataclasses
import logging
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
import transformers
from datasets import Dataset, IterableDataset

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.tables import Results
from hf_embed.checkpoint.whole import step_of
from hf_embed.data.mixture import Mixture, Source
from hf_embed.errors import masked
from hf_embed.evaluation.held_out import HeldOutLoss
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import THRESHOLD, Task, finite_mean, main_metric
from hf_embed.objectives import Matryoshka, Objective
from hf_embed.objectives.base import FunctionObjective
from hf_embed.training.settings import LOWER_IS_BETTER, default_of
from hf_embed.version import __version__

if TYPE_CHECKING:
    from hf_embed.trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)

# The settings that a result depends on. results.json and the model card list those that are not at their default.
# tests/test_report.py lists the other settings by name, so that each new field of TrainingArguments must be classified.
RESULT_SETTINGS = frozenset({
    # the model
    "dropout", "trust_remote_code", "attn_implementation", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "load_in_4bit", "pooling", "max_length", "normalize", "prompts", "add_eos_token", "temp_scale", "teacher",
    # the rows
    "positive", "synonyms", "fill_model", "same_dropout_mask", "drop_empty_rows", "source_alpha", "small_sources",
    "shuffle_buffer_size", "data_seed", "ignore_data_skip",
    # the optimization
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "gradient_accumulation_steps", "nan_steps", "restore_callback_states_from_checkpoint",
    # the computation
    "bf16", "fp16", "tf32", "full_determinism", "gradient_caching", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cache", "enable_jit_checkpoint",
    "include_num_input_tokens_seen", "skip_memory_metrics",
})  # fmt: skip
UNNAMED = "data given in a script"
OFF_BY_DEFAULT = {"activation_checkpointing", "gradient_checkpointing"}  # TrainingArguments turns their None into False
SOURCE_SETTINGS = {"source_alpha", "small_sources", "shuffle_buffer_size"}  # settings that matter only with several sources


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of training rows: a name for people, and the datasets on the Hub that they come from, as OWNER/NAME."""

    name: str
    datasets: list[str] = dataclasses.field(default_factory=list)


def training_results(trainer: "ContrastiveTrainer") -> Results:
    """Return the content of results.json for a training, taken from the trainer's log, or {} if there is nothing to report.

    The scores belong to the current model. They come from an evaluation after the training, or from one at the step whose
    weights the model has. If there is neither, they come from the last evaluation, and `train` holds the step of that
    evaluation (`scored_step`).
    """
    results: Results = {"card": trainer.card_facts} if trainer.card_facts else {}
    if not trainer.describes_itself:
        return results
    trained = trainer.state.global_step > 0
    scores, step = last_scores(trainer)
    if scores:
        # The log of this process also has the entries from before the training, and that of the run those of a resumed run.
        logged = [*trainer.state.log_history, *trainer.watch.history] if trained else []
        before = metrics_of(entry for entry in logged if entry.get("step") == 0 and entry not in trainer.unrecorded)
        results |= {"before": summary(before, trainer.scored_tasks), "after": summary(scores, trainer.scored_tasks)}
    if trained:
        results["train"] = about_training(trainer, scores)
        if scores and step is not None:
            results["train"]["scored_step"] = step
    return results


def note_scores(trainer: "ContrastiveTrainer", tasks: Mapping[str, Task]) -> None:
    """Note an evaluation, which was logged last, for the record.

    If `evaluate` was given other rows under the name of one of the trainer's own sets, the record leaves them out, because it
    would mix them up with the scores of that set.
    """
    own = trainer.eval_dataset or {}
    if others := [name for name, task in tasks.items() if name in own and not same_rows(task, own[name])]:
        trainer.unrecorded.append(trainer.state.log_history[-1])
        logger.warning(
            f"evaluate: '{others[0]}' is the name of the trainer's own evaluation set, so the scores of these other rows "
            'are not in the model card; give them another name, for example {"test": rows}'
        )
    else:
        trainer.scored_tasks |= tasks


def same_rows(one: Task, other: Task) -> bool:
    """Return whether two tasks are the same, or have equal rows."""
    if isinstance(one, STS | HeldOutLoss) and isinstance(other, STS | HeldOutLoss):
        return bool(one.rows.with_format("arrow")[:].equals(other.rows.with_format("arrow")[:]))
    return one is other


def last_scores(trainer: "ContrastiveTrainer") -> tuple[dict[str, float], float | None]:
    """Return metrics, and the step of the evaluation that they come from.

    The step is None if the metrics belong to the current model. Otherwise they are those of the last evaluation. For example,
    if the training ended at step 200 and then loaded the best checkpoint, that of step 100:

        {"step": 100, "eval_dev_spearman": 70.1}     of the current model
        {"step": 200, "eval_dev_spearman": 69.0}     of other weights
        {"step": 200, "train_runtime": 12.0}         the end of the training
        {"step": 200, "eval_test_spearman": 65.0}    of the current model, as everything after the end
    """
    history = [entry for entry in trainer.state.log_history if entry not in trainer.unrecorded]
    ends = [i for i, entry in enumerate(history) if ends_training(entry)]
    after_end = history[ends[-1] + 1 :] if ends else []
    step = step_of_weights(trainer)
    evaluations = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    of_model = [entry for entry in evaluations if entry.get("step") == step and entry not in after_end] + after_end
    if scores := metrics_of(of_model):
        return scores, None
    last = evaluations[-1].get("step") if evaluations else None
    return metrics_of(entry for entry in evaluations if entry.get("step") == last), last


def step_of_weights(trainer: "ContrastiveTrainer") -> int | None:
    """Return the step after which the model had the weights that it has now: that of the best checkpoint, or the last one."""
    ended = any(ends_training(entry) for entry in trainer.state.log_history)
    best = trainer.state.best_model_checkpoint if ended and trainer.args.load_best_model_at_end else None
    return trainer.state.global_step if best is None else step_of(best)


def ends_training(logs: Mapping[str, Any]) -> bool:
    """Return whether a log entry is the last one of a training."""
    # With `include_num_input_tokens_seen`, each training log has a runtime.
    return "train_runtime" in logs and "loss" not in logs


def metrics_of(entries: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the evaluation metrics in log entries. If several entries have the same metric, the last value counts."""
    return {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}


def about_training(trainer: "ContrastiveTrainer", scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the entry `train` of results.json: the model, the data and the settings of the training.

    `scores` are the metrics of the model.
    """
    args, state, encoder = trainer.args, trainer.state, trainer.encoder
    end = next((entry for entry in reversed(state.log_history) if ends_training(entry)), {})
    name = encoder.config.name_or_path
    score = score_of(args, trainer.eval_dataset or trainer.scored_tasks, scores)
    evaluations = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    chosen = args.load_best_model_at_end and state.best_model_checkpoint is not None and len(evaluations) > 1
    settings = changed_settings([args], isinstance(trainer.train_dataset, Mixture))
    replaced = {name for names in trainer.replaced_settings.values() for name in names}
    settings = {name: value for name, value in settings.items() if name not in replaced}
    if trainer.replaced_settings:
        settings["optimizers"] = ", ".join(trainer.replaced_settings)
    return {
        "model": publishable(name or "") or type(encoder.base).__name__, "data": trainer.origin.name,
        "base_model": on_the_hub(name), "datasets": trainer.origin.datasets,
        "rows": len(cast(Any, trainer.train_dataset)), "language": None, "license": None,
        "pooling": encoder.pooling, "max_length": encoder.max_length,
        "objective": settings_of(trainer.main_objective), **source_objectives(trainer.train_dataset),
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": None if "learning_rate" in replaced else args.learning_rate, "steps": state.global_step,
        "step_of_weights": step_of_weights(trainer),
        "score": score, "chosen_by": score if chosen else None, **loss_and_time(end, state.global_step),
        "seed": args.seed, "processes": args.world_size,
        "hardware": hardware(args), "settings": settings,
        "versions": {"hf_embed": __version__, "transformers": transformers.__version__,
                     "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def source_objectives(rows: Any) -> dict[str, dict[str, Any]]:
    """Return the entry of the sources that have an objective of their own, by name, or {} if there are none."""
    if not isinstance(rows, Mixture):
        return {}
    own = {name: settings_of(objective) for name, objective in zip(rows.names, rows.objectives) if objective is not None}
    return {"source_objectives": own} if own else {}


def loss_and_time(end: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the mean loss and the duration of a training in seconds.

    If the training was resumed, both count from the step where it resumed, and that step is returned too.

    Args:
        end: the last log entry of the training.
        steps: the number of steps of the whole run. If the run was resumed after its last step, loss and seconds are None.
    """
    resumed = end.get("resumed_at_step", 0)
    told = {"loss": end.get("train_loss"), "seconds": end.get("train_runtime")}
    if resumed:
        told = {key: None if resumed >= steps else value for key, value in told.items()} | {"resumed_at_step": resumed}
    return told


def score_of(args: ContrastiveTrainingArguments, tasks: Mapping[str, Task], scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the metric that chooses the best model, its value, and whether a greater value is better.

    The value is that of the evaluation sets in `tasks`, also if other sets, or only one of them, were evaluated later.
    """
    metric = (args.metric_for_best_model or main_metric(tasks)).removeprefix("eval_") if tasks else None
    greater = args.greater_is_better
    if args.metric_for_best_model is None:
        greater = not str(metric).endswith(LOWER_IS_BETTER)
    of_one = any(str(metric).startswith(f"{name}_") for name in tasks)
    keys = [f"eval_{metric}"] if of_one else [f"eval_{name}_{metric}" for name in tasks]
    score = finite_mean([scores[key] for key in keys if key in scores])
    return {"metric": metric, "score": number(score, 4), "greater_is_better": greater is not False}


def changed_settings(objects: Iterable[Any], several_sources: bool) -> dict[str, Any]:
    """Return the settings that a result depends on (`RESULT_SETTINGS`) and that are not at their default.

    Args:
        objects: dataclass objects with settings; None is skipped.
        several_sources: whether the training rows come from several sources.
    """
    objects = [settings for settings in objects if settings is not None]
    names = RESULT_SETTINGS - (set() if several_sources else SOURCE_SETTINGS)
    if any(isinstance(settings, ContrastiveTrainingArguments) and settings.max_steps > 0 for settings in objects):
        names -= {"num_train_epochs"}
    found = {}
    for settings in objects:
        for field in dataclasses.fields(settings):
            value, default = getattr(settings, field.name), False if field.name in OFF_BY_DEFAULT else default_of(field)
            if field.name in names and value != default:
                is_plain = isinstance(value, int | float | bool | list | dict)
                found[field.name] = value if is_plain else publishable(str(value))  # it may be a path, such as `teacher`
    return found


def summary(metrics: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Group metrics by the kind of their task, for results.json.

        {"sts": {NAME: Spearman}, "alignment": x, "uniformity": y, "retrieval": {NAME: {METRIC: value}}, "zero_shot": ...,
         "held_out": {NAME: {"loss": value}}}

    Only tasks whose reported metrics are all in `metrics` are included.
    """
    scores: dict[str, Any] = {}
    for name, task in tasks.items():
        if all(f"eval_{name}_{key}" in metrics for key in task.reported):
            digits = {key: 4 if key == "loss" or key.endswith(THRESHOLD) else 2 for key in task.reported}
            reported = {key: number(metrics[f"eval_{name}_{key}"], digits[key]) for key in task.reported}
            scores.setdefault(task.kind, {})[name] = reported["spearman"] if task.kind == "sts" else reported
    for key in ("alignment", "uniformity") if "sts" in scores else ():
        scores[key] = number(finite_mean(metrics[f"eval_{name}_{key}"] for name in scores["sts"]), 4)
    return scores


def settings_of(objective: Objective) -> dict[str, Any]:
    """Return the class name and the settings of an objective. For `Matryoshka`, include those of the objective inside it."""
    named = objective.function if isinstance(objective, FunctionObjective) else type(objective)
    settings = {"name": getattr(named, "__name__", type(named).__name__)}
    if dataclasses.is_dataclass(objective):
        settings |= dataclasses.asdict(cast(Any, objective))
    if isinstance(objective, Matryoshka):
        settings["objective"] = settings_of(objective.inner)
    return settings


def hardware(args: ContrastiveTrainingArguments) -> str:
    """Describe the devices of a run, for example "8 x NVIDIA H100" or "2 CPU cores"."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{psutil.cpu_count(logical=False) or os.cpu_count()} {args.device.type.upper()} cores"


def number(value: float, digits: int) -> float | None:
    """Round a number for results.json. Return None for NaN and infinity, which JSON does not have."""
    return round(value, digits) if math.isfinite(value) else None


# ---- names that may be published ----


def publishable(name: str) -> str:
    """Return the form of a file or folder name that may be published.

    For an absolute path this is its last part, so that the folders of this machine stay private. Secrets are masked.
    """
    return Path(name).name if Path(name).is_absolute() else masked(name)


def on_the_hub(name: str | None) -> str | None:
    """Return the name of a model or dataset if it looks like OWNER/NAME on the Hub, else None.

    A name that ends like a data file, or that is an existing local path, does not count.
    """
    files = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
    named = name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(files) and not Path(name).exists()
    return name if named else None


def origin_of(rows: Any, name: str) -> Origin:
    """Return the origin of training rows, as far as it is known: a path, datasets on the Hub, or the names of the sources.

    Args:
        rows: the rows as they are given to the trainer.
        name: the name of the rows in messages. If it is not the default, "train_dataset", and `rows` is not a path, then it is
            also the name of the origin.
    """
    if isinstance(rows, str | Path):
        return Origin(publishable(str(rows)))
    parts: dict[str, Any] = {}
    if isinstance(rows, Mapping):
        parts = {str(key): table for key, table in rows.items()}
    elif isinstance(rows, list) and rows and all(isinstance(source, Source) for source in rows):
        parts = {source.name: source.rows for source in rows}
    datasets = sorted({found for table in parts.values() or [rows] for found in hub_names(table)})
    if name != "train_dataset":
        return Origin(publishable(name), datasets)
    return Origin(", ".join(parts or datasets) or UNNAMED, datasets)


def hub_names(rows: Any) -> list[str]:
    """Return the datasets on the Hub that `datasets.load_dataset` read these rows from."""
    if not isinstance(rows, Dataset | IterableDataset):
        return []
    files = list(rows.info.download_checksums or ())
    return sorted({found[1] for file in files if (found := re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@", str(file)))})
