"""What a finished run says of itself: results.json, the card, the picture, and what is printed."""

import dataclasses
import logging
import math
import os
import platform
import textwrap
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig
from transformers.trainer_utils import TrainOutput

import hf_embed
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.card import store_results, write_card
from hf_embed.checkpoint.tables import comparison_table
from hf_embed.checkpoint.verify import quiet
from hf_embed.encoder import Encoder
from hf_embed.errors import masked
from hf_embed.evaluation.geometry import plot_trajectory
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.tasks import Task, main_metric, score_tasks
from hf_embed.kit.models import embed_with
from hf_embed.kit.plan import Plan, on_the_hub
from hf_embed.objectives import Matryoshka, Objective
from hf_embed.progress import hidden_bars
from hf_embed.text_models import loading_class
from hf_embed.trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)

# The settings that a result depends on: results.json and the card have those that are not at their default. The test of
# `changed` has the others, each named, so that a new field of TrainingArguments has to be put in one of the two lists.
RESULT_SETTINGS = frozenset({
    # the model
    "dropout", "trust_remote_code", "attn_implementation", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "pooling", "max_length", "normalize", "prompts", "temp_scale",
    # the rows
    "positive", "synonyms", "fill_model", "same_dropout_mask", "drop_empty_rows", "source_alpha", "small_sources",
    "shuffle_buffer_size", "data_seed", "ignore_data_skip",
    # the optimisation
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "gradient_accumulation_steps", "restore_callback_states_from_checkpoint",
    # how it is computed
    "bf16", "fp16", "tf32", "full_determinism", "gradient_caching", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cache", "enable_jit_checkpoint",
    "include_num_input_tokens_seen", "skip_memory_metrics",
})  # fmt: skip
SOURCE_SETTINGS = {"source_alpha", "small_sources", "shuffle_buffer_size"}  # of several sources


def report(plan: Plan, trainer: ContrastiveTrainer, before: dict[str, float], trained: TrainOutput) -> dict[str, Any]:
    """Score the saved folder, write results.json, the picture and the card, and push the folder if that is asked for.

    Returns what results.json holds.
    """
    plan = dataclasses.replace(plan, args=trainer.args)  # with what the model's folder says
    saved, after = None, {}
    if plan.tasks:
        saved = load_saved(plan)
        with hidden_bars(bool(plan.args.disable_tqdm)):
            after = score_encoder(saved, plan.tasks)
    about = about_run(plan, trainer, trained, after)
    results = {"before": summary(before, plan.tasks), "after": summary(after, plan.tasks), "train": about}
    if trainer.is_world_process_zero():
        write_report(plan, trainer, before, results)
    if saved is not None and plan.run.show_searches:
        for name, task in plan.tasks.items():
            show_searches(name, task, saved, plan.run.show_searches)
    if plan.args.push_to_hub:
        trainer.push_to_hub()
    return results


def load_saved(plan: Plan) -> Encoder:
    """Load the saved folder anew, as a user will."""
    with quiet():
        trusted = plan.model_args.trust_remote_code
        encoder = Encoder.from_pretrained(str(plan.folder), trust_remote_code=trusted, dtype=torch.float32)
    return encoder.to(plan.args.device)


def about_run(plan: Plan, trainer: ContrastiveTrainer, trained: TrainOutput, after: dict[str, float]) -> dict[str, Any]:
    """Say what was trained on what and how, as results.json has it; `after` are the saved folder's scores."""
    args, name = plan.args, plan.model_args.model_name_or_path
    score = score_of(plan, after)
    return {
        "model": shown(name or "quickstart"), "data": shown(plan.source),
        "base_model": on_the_hub(name), "datasets": plan.datasets,
        "rows": len(cast(Sized, trainer.train_dataset)),
        "language": plan.run.language, "license": plan.run.license,
        "pooling": trainer.encoder.pooling, "max_length": trainer.encoder.max_length,
        "objective": settings_of(plan.objective),
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate, "steps": trained.global_step, "loss": trained.training_loss,
        "score": score, "chosen_by": score if chose_a_step(trainer) else None,
        "seconds": trained.metrics.get("train_runtime"), "seed": args.seed, "processes": args.world_size,
        "hardware": hardware(args), "settings": changed(plan),
        "versions": {"hf_embed": hf_embed.__version__, "transformers": transformers.__version__,
                     "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def score_of(plan: Plan, scores: dict[str, float]) -> dict[str, Any]:
    """Return the metric by which models are chosen, and its value."""
    metric = (plan.args.metric_for_best_model or main_metric(plan.tasks)).removeprefix("eval_") if plan.tasks else None
    return {"metric": metric, "score": number(scores.get(f"eval_{metric}", math.nan), 4),
            "greater_is_better": plan.args.greater_is_better is not False}  # fmt: skip


def chose_a_step(trainer: ContrastiveTrainer) -> bool:
    """Tell whether the evaluation sets chose the model among several steps; warn where they should have and could not."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end:
        return False
    if state.best_model_checkpoint is None:
        logger.warning(
            f"no evaluation gave {trainer.args.metric_for_best_model} as a number: the last step is kept, not the best"
        )
    evaluated = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    return state.best_model_checkpoint is not None and len(evaluated) > 1


def changed(plan: Plan) -> dict[str, Any]:
    """Return those of a plan's settings that a result depends on and that are not at their default."""
    names = RESULT_SETTINGS - (SOURCE_SETTINGS if isinstance(plan.rows, Dataset) else set())
    if plan.args.max_steps > 0:
        names -= {"num_train_epochs"}
    found = {}
    for settings in (plan.model_args, plan.args, plan.positive):
        if settings is None:
            continue
        kind = type(settings)  # its defaults as `__post_init__` leaves them, which fills some in
        defaults = kind("unused") if issubclass(kind, ContrastiveTrainingArguments) else kind()
        for field in dataclasses.fields(kind):
            value = getattr(settings, field.name)
            if field.name in names and value != getattr(defaults, field.name):
                found[field.name] = value if isinstance(value, int | float | str | bool | list | dict) else str(value)
    return found


def shown(name: str) -> str:
    """Return what others may see of the name of a file or folder.

    Of a full path that is the last part: where it lies here is nobody's business. Secrets are masked.
    """
    return Path(name).name if Path(name).is_absolute() else masked(name)


def settings_of(objective: Objective) -> dict[str, Any]:
    """Return the name of an objective's class and its settings; of one around another, the other's too."""
    settings = {"name": type(objective).__name__} | dataclasses.asdict(cast(Any, objective))
    if isinstance(objective, Matryoshka):
        settings["objective"] = settings_of(objective.inner)
    return settings


def hardware(args: ContrastiveTrainingArguments) -> str:
    """Name the devices of a run, for example "8 x NVIDIA H100" or "2 CPU cores"."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{psutil.cpu_count(logical=False) or os.cpu_count()} {args.device.type.upper()} cores"


def score_encoder(encoder: Encoder, tasks: dict[str, Task]) -> dict[str, float]:
    """Score an encoder; the metrics are named as the trainer names them."""
    return {f"eval_{key}": value for key, value in score_tasks(tasks, embed_with(encoder)).items()}


def summary(metrics: dict[str, float], tasks: dict[str, Task]) -> dict[str, Any]:
    """Sum up metrics for results.json.

        {"sts": {NAME: Spearman}, "alignment": x, "uniformity": y, "retrieval": {NAME: {METRIC: value}}, "zero_shot": ...}

    of the kinds of tasks that there are.
    """
    if not metrics:
        return {}
    scores: dict[str, Any] = {}
    for name, task in tasks.items():
        reported = {key: number(metrics[f"eval_{name}_{key}"], 2) for key in task.reported}
        scores.setdefault(task.kind, {})[name] = reported["spearman"] if task.kind == "sts" else reported
    if "sts" in scores:
        scores |= {key: number(metrics[f"eval_{key}"], 4) for key in ("alignment", "uniformity")}
    return scores


def number(value: float, digits: int) -> float | None:
    """Round a number for results.json, which knows no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def write_report(plan: Plan, trainer: ContrastiveTrainer, before: dict[str, float], results: dict[str, Any]) -> None:
    """Write results.json, the picture and the card; print the table."""
    store_results(plan.folder, results)
    if plan.tasks:
        evaluations = [entry for entry in trainer.state.log_history if "eval_spearman" in entry]
        plot_trajectory([before | {"step": 0}, *evaluations], plan.folder / "geometry.png")
        print("\n" + "\n".join(comparison_table(results)))
    write_card(trainer.encoder, plan.folder, results)
    print(saved_to(plan.folder, trainer.encoder.remote_code))


def saved_to(folder: Path, remote_code: bool = False) -> str:
    """Return the last line that a recipe prints: where the model is, and how to load it."""
    loader = loading_class(AutoConfig.from_pretrained(folder, trust_remote_code=remote_code))
    call = f"{loader}.from_pretrained({str(folder)!r}{', trust_remote_code=True' if remote_code else ''})"
    return f"\nsaved to {folder}: {call} loads it; README.md says how to pool"


def show_searches(name: str, task: Task, encoder: Encoder, count: int) -> None:
    """Print some queries of a retrieval set with the three nearest documents; the right ones are starred."""
    if not isinstance(task, Retrieval):
        return
    chosen = list(task.qrels)[:: max(1, len(task.qrels) // count)][:count]
    some = dataclasses.replace(task, qrels={query: task.qrels[query] for query in chosen})
    _, found = some.rank(embed_with(encoder), 3)
    if PartialState().is_main_process:
        print(f"\nsearches in {name} ({len(task.corpus):,} documents; * is the one looked for):")
        for query, documents in found.items():
            print(f"\n  {textwrap.shorten(task.queries[query], 100)}")
            for document in documents:
                star = "*" if document in task.qrels[query] else " "
                print(f"  {star} {textwrap.shorten(task.corpus[document], 90)}")
