"""Checks and conversions of the arguments of `ContrastiveTrainer`. Anything else is refused with a one-line message."""

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.optimization import GreedyLR

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.load import load_encoder, load_tokenizer
from hf_embed.checkpoint.settings import has_mlp_head
from hf_embed.data.columns import ACCEPTED, judging_columns, text_columns
from hf_embed.data.labeled import are_graded, labeled_layout
from hf_embed.data.mixture import Source, TrainData
from hf_embed.data.python_rows import RowData, as_rows, described, is_frame
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.sts import COLUMNS, STS, check_sts
from hf_embed.evaluation.tasks import Task
from hf_embed.library_internals import NOT_CALLED
from hf_embed.objectives import OBJECTIVES, Objective, SimCSE, as_objective
from hf_embed.objectives.base import NEEDS, parameters_of
from hf_embed.pooling import uses_pooler
from hf_embed.step import TrainingStep, reset_dense
from hf_embed.training.settings import check_reader

logger = logging.getLogger(__name__)

# The positional arguments that a loss given as a function is called with.
CALLED_WITH = ("embeddings", "text_ids", "all_embeddings", "all_text_ids", "first_row")

Model: TypeAlias = PreTrainedModel | Encoder | TrainingStep | str | Path
TrainRows: TypeAlias = RowData | Mapping[str, RowData] | Source | list[Source]
EvalSet: TypeAlias = Task | RowData
EvalSets: TypeAlias = EvalSet | Mapping[str, EvalSet]

# Arguments that other trainers have, and what to use here instead.
ELSEWHERE = {
    "tokenizer": "pass the tokenizer as processing_class=",
    "loss": "pass the loss as objective=, for example SimCSE(temperature=0.05)",
    "compute_loss_func": "pass the loss as objective=",
    "evaluator": "pass the evaluation sets as eval_dataset=",
    "preprocess_logits_for_metrics": "each evaluation set in eval_dataset= computes its own metrics",
    "data_collator": "the trainer tokenizes and collates the rows itself",
    "peft_config": "pass the model with its adapters, as peft.get_peft_model returns it",
    "optimizer_cls_and_kwargs": "pass the optimizer and the schedule as optimizers=, or set optim and optim_args in args",
}


def with_metrics(
    tasks: dict[str, Task], compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None
) -> dict[str, Task]:
    """Let the STS sets call `compute_metrics` too.

    Raises:
        InputError: if it is not a function, or if there is no STS set.
    """
    if compute_metrics is None:
        return tasks
    if not callable(compute_metrics):
        raise InputError(f"compute_metrics is {described(compute_metrics)}; give a function")
    sets = {name: task for name, task in tasks.items() if isinstance(task, STS)}
    if not sets:
        raise InputError(
            "compute_metrics gets the cosines and the scores of the pairs of an STS set, and eval_dataset has none; add an STS "
            "set, or remove compute_metrics"
        )
    others = {name: task for name, task in sets.items() if task.compute_metrics != compute_metrics}
    return tasks | {name: replace(task, compute_metrics=compute_metrics) for name, task in others.items()}


def first_model(model: Model | None, model_init: Callable[..., Model] | None, optimizers: tuple[Any, Any]) -> Model | None:
    """Return `model`, or the one that `model_init` makes.

    Raises:
        InputError: if both are given, if `model_init` does not have 0 or 1 parameters, or if an optimizer is given as well,
            because it would belong to the first model only.
    """
    if model_init is None:
        return model
    if model is not None:
        raise InputError("model and model_init are both given; give one")
    if any(optimizers):
        raise InputError("model_init makes a new model for each training, so optimizers= cannot be given; set optim in args")
    parameters = len(inspect.signature(model_init).parameters)
    if parameters > 1:
        raise InputError(f"model_init has {parameters} parameters; it may have one, the trial of a search, or none")
    return model_init(None) if parameters else model_init()


def refuse_unknown(arguments: Mapping[str, object]) -> None:
    """Refuse arguments that the trainer does not have.

    Raises:
        InputError: if other trainers have the argument. The message says what to use instead.
        TypeError: if the argument is any other.
    """
    for name in arguments:
        if name in ELSEWHERE:
            raise InputError(f"ContrastiveTrainer has no argument {name}: {ELSEWHERE[name]}")
        raise TypeError(f"ContrastiveTrainer got an unexpected keyword argument '{name}'")


def refuse_uncalled(kind: type) -> None:
    """Raise InputError if a subclass of `ContrastiveTrainer` defines a method of `Trainer` that would never be called."""
    for name, mend in NOT_CALLED.items():
        if not getattr(kind, name).__module__.startswith(("transformers.", "hf_embed.")):
            raise InputError(
                f"{kind.__name__} defines {name}, which ContrastiveTrainer never calls; define {mend} in its place"
            )


# ---- args, objective, optimizers ----


def as_arguments(args: TrainingArguments | None, tasks: Mapping[str, Task]) -> ContrastiveTrainingArguments:
    """Return a copy of the training arguments as `ContrastiveTrainingArguments`.

    It is a copy because the trainer changes settings that follow from the data and the model. The caller's object must stay
    the same.

    Raises:
        InputError: if `args` are not TrainingArguments, or have a setting that is not available here.
    """
    if args is None:
        return ContrastiveTrainingArguments("tmp_trainer")
    if isinstance(args, ContrastiveTrainingArguments):
        return adjusted(copy.copy(args))
    if isinstance(args, TrainingArguments):
        return adjusted(ContrastiveTrainingArguments.of(args, any(task.kind == HeldOut.kind for task in tasks.values())))
    raise InputError(f"args is {described(args)}; give ContrastiveTrainingArguments(...), or plain TrainingArguments")


def adjusted(args: ContrastiveTrainingArguments) -> ContrastiveTrainingArguments:
    """Adjust copied arguments, so that Trainer writes nothing into the caller's object and counts rightly. Return them.

    Raises:
        InputError: if the settings of accelerate accumulate gradients.
    """
    args.accelerator_config = copy.deepcopy(args.accelerator_config)  # Trainer writes to it
    if "num_steps" in (cast(Any, args.accelerator_config).gradient_accumulation_kwargs or {}):
        raise InputError("accelerator_config: num_steps is not supported; set gradient_accumulation_steps")
    if args.include_num_input_tokens_seen == "non_padding":
        # A batch has no padding. Trainer would not count tokens that are also the tokenizer's padding token.
        args.include_num_input_tokens_seen = "all"
    return args


def checked_objective(objective: Objective | Callable[..., Tensor] | None) -> Objective:
    """Return the loss as an `Objective`; the default is SimCSE.

    Raises:
        InputError: if it is a class, or cannot be called with the arguments in `CALLED_WITH`.
    """
    if objective is None:
        return SimCSE()
    if isinstance(objective, type) or not callable(objective):
        raise InputError(f"objective is {described(objective)}; give an instance, for example SimCSE(), or a function")
    if not isinstance(objective, Objective):
        called = objective.forward if isinstance(objective, nn.Module) else objective
        try:
            needed = dict.fromkeys(name for name in NEEDS if name in parameters_of(called))
            inspect.signature(called).bind(*CALLED_WITH, **needed)
        except ValueError:  # some functions written in C have no signature
            pass
        except TypeError as error:
            raise InputError(
                f"objective is {described(objective)}, which cannot be called with ({', '.join(CALLED_WITH)}): {error}; give "
                f"{', '.join(OBJECTIVES)}, or a function with these arguments"
            ) from error
    return as_objective(objective)


def checked_optimizers(optimizers: object, args: TrainingArguments) -> tuple[torch.optim.Optimizer | None, Any]:
    """Return the optimizer and the learning-rate schedule.

    Raises:
        InputError: if they are not such a pair, or if the schedule reads a metric that it does not get.
    """
    pair = tuple(optimizers) if isinstance(optimizers, list | tuple) else (optimizers,)
    if len(pair) != 2:
        raise InputError(
            f"optimizers is {described(optimizers)}; give the pair (optimizer, schedule), with None for one that the trainer "
            "creates"
        )
    check_schedule_of(*pair)
    if isinstance(pair[1], ReduceLROnPlateau | GreedyLR):
        kind, wanted = f"optimizers: {type(pair[1]).__name__}", "max" if args.greater_is_better else "min"
        check_reader(args, kind)
        if pair[1].mode != wanted:
            raise InputError(
                f"{kind} has mode={pair[1].mode!r}, but {args.metric_for_best_model} is best at its {wanted}imum; give "
                f"mode={wanted!r}"
            )
    return cast(tuple[torch.optim.Optimizer | None, Any], pair)


def check_schedule_of(optimizer: Any, schedule: Any) -> None:
    """Raise InputError if a learning-rate schedule was made for another optimizer: it would be logged, and have no effect."""
    scheduled = schedule.optimizer.param_groups if isinstance(schedule, LRScheduler | GreedyLR) else None
    if scheduled is not None and (optimizer is None or scheduled is not optimizer.param_groups):
        raise InputError(
            "the learning-rate schedule was made for another optimizer, so it would have no effect; give optimizers= both, or "
            "neither"
        )


# ---- the model and its tokenizer ----


def as_model(
    model: Any, tokenizer: Any, args: ContrastiveTrainingArguments
) -> tuple[PreTrainedModel | Encoder | TrainingStep | None, PreTrainedTokenizerBase | None]:
    """Return the model and the tokenizer, and load them if they are given by name.

    A model that is given by name is loaded as `Encoder.from_pretrained` loads it: with the settings of its folder, in float32.

    Raises:
        InputError: if `tokenizer` is not a tokenizer, if the model cannot be loaded, or if it is one of sentence-transformers.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"processing_class is {described(tokenizer)}; give the tokenizer, for example AutoTokenizer.from_pretrained(NAME), "
            "or its name"
        )
    if isinstance(model, str | Path):
        model = load_to_train(str(model), args, dtype=torch.float32)
    if type(model).__module__.startswith("sentence_transformers."):
        raise InputError(
            f"the model is a {type(model).__name__} of sentence-transformers, and training would not change that object; give "
            'its folder or its name on the Hub, model="NAME", or save it first: model.save_pretrained("start")'
        )
    return model, tokenizer


def load_to_train(name: str, args: ContrastiveTrainingArguments, **kwargs: Any) -> Encoder:
    """Load a model to train, with the settings of its folder and those in `args`.

    With the pooling `cls_mlp`, the MLP head is newly initialized, as in SimCSE's code, unless the folder has a trained one.

    Args:
        name: a folder, or a model on the Hub.
        args: only pooling, max_length and normalize are used.
        **kwargs: passed to `Encoder.from_pretrained`.
    """
    settings = {key: getattr(args, key) for key in ("pooling", "max_length", "normalize")}
    encoder = load_encoder(Encoder, name, **settings, new_pooler=uses_pooler(args.pooling), **kwargs)
    if uses_pooler(encoder.pooling) and not has_mlp_head(name, encoder.backbone):
        reset_dense(cast(nn.Linear, encoder.backbone.get_submodule("pooler.dense")), encoder.config)
    return encoder


# ---- rows to train on, and evaluation sets ----


def as_train_data(rows: Any, name: str, args: ContrastiveTrainingArguments) -> TrainData | None:
    """Return the training rows as one table, or as a list of sources.

    Raises:
        InputError: if `rows` holds no rows, or if the keys of a dict are the splits of one dataset.
    """
    if rows is None or (isinstance(rows, list) and rows and all(isinstance(source, Source) for source in rows)):
        return rows
    if isinstance(rows, Source):
        return [rows]
    if isinstance(rows, Mapping):
        refuse_columns(rows, name)
        if splits := {"train", "validation", "test"} & set(rows):
            raise InputError(
                f"{name}: the keys of a dict name sources, but '{min(splits)}' looks like a split; choose one split"
            )
        return [Source(str(key), as_rows(table, f"{name}['{key}']")) for key, table in rows.items()]
    table = as_rows(rows, name)
    if isinstance(table, Dataset):
        return table
    # One epoch lasts the whole run. A shorter epoch could end with an update that accumulates fewer batches than others.
    batches = args.max_steps * args.gradient_accumulation_steps
    size = batches * args.per_device_train_batch_size * args.world_size if args.max_steps > 0 else None
    return [Source(name, table, size=size)]


def refuse_columns(rows: Mapping[str, object], name: str) -> None:
    """Refuse a dict of columns and a dict that is a single row. A dict must map names to datasets.

    Raises:
        InputError: if the dict is empty, or if one of its values is a list of texts or a text that is not a file name.
    """
    if not rows:
        raise InputError(f"{name}: the dict is empty; give datasets by name, or a single dataset")
    for key, value in rows.items():
        texts = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        if texts or (isinstance(value, str) and not Path(value).suffix):
            raise InputError(
                f"{name}: a dict must map names to datasets, but '{key}' holds texts; turn columns into a dataset with "
                "datasets.Dataset.from_dict"
            )


def as_tasks(sets: Any) -> dict[str, Task]:
    """Return evaluation sets by name, with the held-out rows last.

    A table with the columns sentence1, sentence2 and score is an STS set. A table with the columns of training rows is held
    out, and its metric is the loss. A single evaluation set is named after its kind.

    Raises:
        InputError: if a table could be neither kind or both kinds, or if a value is not an evaluation set.
    """
    if sets is None:
        return {}
    if not isinstance(sets, Mapping):
        task = as_task(sets, "eval_dataset")
        return {task.kind: task}
    if sets:
        refuse_columns(sets, "eval_dataset")
    tasks = {str(key): as_task(value, str(key)) for key, value in sets.items()}
    return dict(sorted(tasks.items(), key=lambda named: isinstance(named[1], HeldOut)))


def as_task(given: Any, name: str) -> Task:
    """Return one evaluation set as a task. A table of training rows becomes `HeldOut`.

    Raises:
        InputError: if `given` is a class, or a table that could be both kinds or neither.
    """
    if isinstance(given, type):
        raise InputError(f"{name}: {described(given)} is not an evaluation set; give an instance")
    if isinstance(given, Task) and not is_frame(given):
        return given
    rows = stored_rows(given, name)
    if not set(COLUMNS) <= set(rows.column_names):  # a column of an STS set is missing
        return held_out(rows, name)
    others = [column for column in rows.column_names if column not in COLUMNS]
    try:
        pair = text_columns(others, name, paired=True)[:2]
    except InputError:
        return STS(check_sts(rows, name))
    raise InputError(
        f"{name}: the columns {' and '.join(pair)} make it held-out rows, but {', '.join(COLUMNS)} make it an STS set; remove "
        "the columns of one of them (remove_columns)"
    )


def stored_rows(given: Any, name: str) -> Dataset:
    """Return the rows of an evaluation set as a table. Raises InputError for a streaming dataset, and if there are no rows."""
    rows = as_rows(given, name)
    if isinstance(rows, IterableDataset):
        raise InputError(f"{name}: a streaming dataset cannot be an evaluation set; give a Dataset with some of its rows")
    return rows


def held_out(rows: Dataset, name: str) -> Task:
    """Return a table of held-out training rows as `HeldOut`.

    Raises:
        InputError: if the columns are not those of training rows with pairs. If sentence1 and sentence2 are there, the message
            says what an STS set lacks.
    """
    layout = labeled_layout(rows.column_names, name)
    if layout is not None:
        if are_graded(rows, layout):
            raise graded_pairs(layout.label, name)
        return HeldOut(rows)
    try:
        text_columns(rows.column_names, name, paired=True)
    except InputError as error:
        names = [column.lower() for column in rows.column_names]
        if {"sentence1", "sentence2"} <= set(names):
            return STS(check_sts(rows, name))
        if len(names) == 1 or {"text", "sentence"} & set(names):
            raise InputError(
                f"{name}: rows of a single text cannot be held out, because without dropout a text is its own positive and "
                "the loss has no meaning; give pairs (anchor, positive), or an STS set"
            ) from error
        if judging := judging_columns(rows.column_names):
            raise graded_pairs(judging[0], name) from error
        raise InputError(
            f"{name}: found the columns {', '.join(rows.column_names)}; an STS set has sentence1, sentence2 and score, "
            f"held-out rows have {ACCEPTED.removeprefix('text; ')}"
        ) from error
    return HeldOut(rows)


def graded_pairs(column: str, name: str) -> InputError:
    """Return the error for an evaluation set with a column that judges its pairs."""
    return InputError(
        f"{name}: the column '{column}' judges the pairs; for an STS set, rename the columns to sentence1, sentence2 and "
        "score; for held-out rows, keep only the matching pairs and remove the column"
    )
