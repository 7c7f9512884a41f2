"""Checks and conversions of the arguments of `ContrastiveTrainer`. Anything else is refused with a one-line message."""

import copy
import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.load import load_encoder, load_tokenizer
from hf_embed.checkpoint.settings import has_mlp_head
from hf_embed.data.collator import VectorRows
from hf_embed.data.columns import ACCEPTED, judging_columns, text_columns
from hf_embed.data.labelled import labelled_layout
from hf_embed.data.mixture import Mixture, Source, Stream
from hf_embed.data.python_rows import RowData, as_rows, described, is_frame
from hf_embed.data.training_rows import TrainData, batch_sampler, check_objective, tokenize_all
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut, HeldOutLoss, seen_in_training
from hf_embed.evaluation.sts import COLUMNS, named_tasks
from hf_embed.evaluation.tasks import Task
from hf_embed.library_internals import uncompiled
from hf_embed.objectives import OBJECTIVES, Objective, SimCSE, as_objective
from hf_embed.objectives.base import NEEDS, parameters_of
from hf_embed.pooling import uses_pooler
from hf_embed.progress import hidden_bars
from hf_embed.step import TrainingStep, reset_dense
from hf_embed.teacher import teacher_of, with_teacher
from hf_embed.trainer_settings import check_batch, check_training

logger = logging.getLogger(__name__)

# The positional arguments that a loss given as a function is called with.
CALLED_WITH = ("embeddings", "text_ids", "all_embeddings", "all_text_ids", "first_row")

Model: TypeAlias = PreTrainedModel | Encoder | TrainingStep | str | Path
TrainRows: TypeAlias = TrainData | RowData | dict[str, RowData]
EvalSet: TypeAlias = Task | RowData
EvalSets: TypeAlias = EvalSet | Mapping[str, EvalSet]

# Arguments that other trainers have, and what to use here instead.
ELSEWHERE = {
    "tokenizer": "pass the tokenizer as processing_class=",
    "loss": "pass the loss as objective=, for example SimCSE(temperature=0.05)",
    "compute_loss_func": "pass the loss as objective=",
    "evaluator": "pass the evaluation sets as eval_dataset=",
    "compute_metrics": "each evaluation set in eval_dataset= computes its own metrics",
    "preprocess_logits_for_metrics": "each evaluation set in eval_dataset= computes its own metrics",
    "data_collator": "the trainer tokenizes and collates the rows itself",
    "model_init": "create the model and pass it as model=",
    "peft_config": "pass the model with its adapters, as peft.get_peft_model returns it",
    "optimizer_cls_and_kwargs": "pass the optimizer and the schedule as optimizers=, or set optim and optim_args in args",
}


def refuse_unknown(arguments: Mapping[str, object], known: list[str]) -> None:
    """Refuse arguments that the trainer does not have.

    Raises:
        InputError: if other trainers have the argument. The message says what to use instead.
        TypeError: if the argument is any other.
    """
    for name in arguments:
        if name in ELSEWHERE:
            raise InputError(f"ContrastiveTrainer has no argument {name}: {ELSEWHERE[name]}")
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise TypeError(f"ContrastiveTrainer got an unexpected keyword argument '{name}'{hint}")


# ---- args, objective, callbacks, optimizers ----


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
        return copy.copy(args)
    if isinstance(args, TrainingArguments):
        return ContrastiveTrainingArguments.of(args, any(task.kind == HeldOut.kind for task in tasks.values()))
    text = f'ContrastiveTrainingArguments("{args}")' if isinstance(args, str | Path) else "ContrastiveTrainingArguments(...)"
    raise InputError(f"args is {described(args)}; give {text}, or plain TrainingArguments")


def checked_objective(objective: Objective | Callable[..., Tensor] | None) -> Objective:
    """Return the loss as an `Objective`; the default is SimCSE.

    Raises:
        InputError: if it is a text or a class, or cannot be called with the arguments in `CALLED_WITH`.
    """
    if objective is None:
        return SimCSE()
    if isinstance(objective, str):
        names = {name.lower(): name for name in OBJECTIVES}
        close = difflib.get_close_matches(objective.lower(), names, 1)
        raise InputError(f"objective is the text {objective!r}; give an instance, {names[close[0]] if close else 'SimCSE'}()")
    if isinstance(objective, type):
        raise InputError(f"objective is {described(objective)}; give an instance, {objective.__name__}()")
    if not callable(objective):
        raise InputError(f"objective is {described(objective)}; give {', '.join(OBJECTIVES)}, or a function")
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


def checked_callbacks(callbacks: object) -> list[TrainerCallback]:
    """Return the callbacks as a list; a single callback is also accepted.

    Raises:
        InputError: if one of them is not a TrainerCallback.
    """
    given = [] if callbacks is None else list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in given:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise InputError(f"callbacks holds {described(callback)}; give a list of objects of transformers' TrainerCallback")
    return cast(list[TrainerCallback], given)


def checked_optimizers(optimizers: object) -> tuple[torch.optim.Optimizer | None, Any]:
    """Return the optimizer and the learning-rate schedule. Raises InputError if they are not such a pair."""
    pair = tuple(optimizers) if isinstance(optimizers, list | tuple) else (optimizers,)
    if len(pair) != 2:
        raise InputError(
            f"optimizers is {described(optimizers)}; give the pair (optimizer, schedule), with None for one that the trainer "
            "creates"
        )
    if pair[0] is not None and not isinstance(pair[0], torch.optim.Optimizer) and not hasattr(pair[0], "param_groups"):
        raise InputError(f"optimizers: {described(pair[0])} is not an optimizer; give an object of torch.optim, or None")
    if pair[1] is not None and not hasattr(pair[1], "get_last_lr"):
        raise InputError(f"optimizers: {described(pair[1])} is not a learning-rate schedule; give one of torch.optim, or None")
    return cast(tuple[torch.optim.Optimizer | None, Any], pair)


# ---- the model and its tokenizer ----


def as_model(
    model: Any, tokenizer: Any, args: ContrastiveTrainingArguments
) -> tuple[PreTrainedModel | Encoder | TrainingStep | None, PreTrainedTokenizerBase | None]:
    """Return the model and the tokenizer, and load them if they are given by name.

    A model that is given by name is loaded as `Encoder.from_pretrained` loads it: with the settings of its folder, in float32.

    Raises:
        InputError: if `model` is neither a model nor the name of one, if `tokenizer` is not a tokenizer, or if the model cannot
            be loaded.
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
    plain = uncompiled(model) if isinstance(model, nn.Module) else None
    if type(model).__module__.startswith("sentence_transformers."):
        raise InputError(
            f"the model is a {type(model).__name__} of sentence-transformers, and training would not change that object; give "
            'its folder or its name on the Hub, model="NAME", or save it first: model.save_pretrained("start")'
        )
    if isinstance(model, type) or (model is not None and plain is None and not hasattr(model, "config")):
        mend = 'model="NAME" loads one' if not isinstance(model, nn.Module) else "for a wrapped model, give model.module"
        raise InputError(f"the model is {of_type(model)}; give a PreTrainedModel, an Encoder, or a name or folder; {mend}")
    return model, tokenizer


def of_type(thing: object) -> str:
    """Describe the type of an object that is not a model, for the error message."""
    return described(thing) if isinstance(thing, type) else f"of the type {type(thing).__name__}"


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


def as_train_data(rows: Any, name: str) -> TrainData | None:
    """Return the training rows as datasets, or as a list of sources. Raises InputError if `rows` holds no rows."""
    if rows is None or (isinstance(rows, list) and rows and all(isinstance(source, Source) for source in rows)):
        return rows
    if isinstance(rows, Source):
        return [rows]
    if not isinstance(rows, Mapping) or isinstance(rows, DatasetDict):
        return rows if isinstance(rows, DatasetDict) else as_rows(rows, name)
    refuse_columns(rows, name)
    return {str(key): as_rows(table, f"{name}['{key}']") for key, table in rows.items()}


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


def as_tasks(sets: Any, name: str = "eval_dataset") -> dict[str, Task]:
    """Return evaluation sets by name, with the held-out rows last.

    A table with the columns sentence1, sentence2 and score is an STS set. A table with the columns of training rows is held
    out, and its metric is the loss. A single evaluation set is named after its kind.

    Raises:
        InputError: if a table could be neither kind or both kinds, or if a value is not an evaluation set.
    """
    if sets is None:
        return {}
    if not isinstance(sets, Mapping):
        task = as_task(sets, name)
        sets = {"sts" if isinstance(task, Dataset) else task.kind: task}
    else:
        if sets:
            refuse_columns(sets, name)
        sets = {str(key): as_task(value, str(key)) for key, value in sets.items()}
    last = {key: task for key, task in sets.items() if isinstance(task, HeldOut)}
    return named_tasks({key: task for key, task in sets.items() if key not in last}) | last


def choose_tasks(
    own: Mapping[str, Task] | None,
    sets: EvalSets | str | None,
    step: TrainingStep,
    args: ContrastiveTrainingArguments,
    objective: Objective,
) -> dict[str, Task]:
    """Return the tasks to evaluate.

    Args:
        own: the trainer's own tasks.
        sets: None for all of the trainer's own tasks, the name of one of them, or other evaluation sets to use instead.
        step: the module that is trained.
        args: the settings of the training.
        objective: computes the loss of held-out rows.

    Raises:
        InputError: if there is no task, or none with that name.
    """
    if isinstance(sets, str):
        if sets not in (own or {}):
            raise InputError(f"evaluate: there is no evaluation set '{sets}'; available: {', '.join(own or ['none'])}")
        return {sets: cast(Mapping, own)[sets]}
    tasks = dict(own or {}) if sets is None else make_held_out(as_tasks(sets), step, args, objective)
    if not tasks:
        raise InputError(
            "evaluation needs an eval_dataset, with the columns sentence1, sentence2 and score, or with anchor and positive"
        )
    return tasks


def as_task(given: Any, name: str) -> Task | Dataset:
    """Convert one evaluation set.

    Returns:
        A task as it is, a table with an STS set as a `Dataset`, and a table of training rows as `HeldOut`.

    Raises:
        InputError: if `given` is a class, or a table that could be both kinds or neither.
    """
    if isinstance(given, type):
        raise InputError(f"{name}: {described(given)} is not an evaluation set; give an instance")
    if isinstance(given, Task) and not is_frame(given):
        return given
    rows = stored_rows(given, name)
    others = [column for column in rows.column_names if column not in COLUMNS]
    if len(others) + len(COLUMNS) > len(rows.column_names):  # a column of an STS set is missing
        return held_out(rows, name)
    try:
        pair = text_columns(others, name, paired=True)[:2]
    except InputError:
        return rows
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


def held_out(rows: Dataset, name: str) -> Dataset | HeldOut:
    """Return a table of held-out training rows as `HeldOut`.

    A table that has sentence1 and sentence2 but is not a complete STS set is returned unchanged. The check of STS sets then
    reports what is wrong.

    Raises:
        InputError: if the columns are not those of training rows with pairs.
    """
    if labelled_layout(rows.column_names, name) is not None:
        return HeldOut(rows)
    try:
        text_columns(rows.column_names, name, paired=True)
    except InputError as error:
        names = [column.lower() for column in rows.column_names]
        if {"sentence1", "sentence2"} <= set(names):
            return rows
        if len(names) == 1 or {"text", "sentence"} & set(names):
            raise InputError(
                f"{name}: rows of a single text cannot be held out, because without dropout a text is its own positive and "
                "the loss has no meaning; give pairs (anchor, positive), or an STS set"
            ) from error
        if judging_columns(rows.column_names):  # the error of `text_columns` already says what to do
            raise
        raise InputError(
            f"{name}: found the columns {', '.join(rows.column_names)}; an STS set has sentence1, sentence2 and score, "
            f"held-out rows have {ACCEPTED.removeprefix('text; ')}"
        ) from error
    return HeldOut(rows)


def make_held_out(
    tasks: Mapping[str, Task],
    step: TrainingStep,
    args: ContrastiveTrainingArguments,
    objective: Objective,
    training: Dataset | Mixture | None = None,
) -> dict[str, Task]:
    """Return the tasks, after tokenizing and checking the held-out rows among them in the same way as training rows.

    A warning counts the held-out rows that are also training rows (`training`).

    Raises:
        InputError: if a batch would have one row, and so no negatives, or if something is wrong with the rows.
    """
    made = dict(tasks)
    batch_size = args.per_device_eval_batch_size * args.world_size
    encoding = copy.copy(args)
    encoding.same_dropout_mask = False  # this setting is for rows of a single text, and held-out rows are pairs
    for name, task in tasks.items():
        if not isinstance(task, HeldOut) or isinstance(task, HeldOutLoss):
            continue
        if batch_size < 2:
            raise InputError(
                f"{name}: per_device_eval_batch_size is 1, but a held-out row has no negatives in a batch of its own; set it, "
                "for example, to per_device_train_batch_size"
            )
        with args.main_process_first(desc="tokenizing"), hidden_bars(bool(args.disable_tqdm)):
            rows, views = tokenize_all(stored_rows(task.rows, name), step.encoder, encoding, objective, name, paired=True)
        table = cast(Dataset, rows)
        check_objective(objective, table, max(views), name)
        (table,), vectors = with_teacher([table], [objective], teacher_of(args, step.encoder))
        loss = made[name] = HeldOutLoss(table, objective, batch_size, step, args.chunk_tokens, vectors=vectors)
        if args.process_index == 0:
            warn_of_seen(loss.rows, training, name)
    return made


def warn_of_seen(rows: Dataset, training: Dataset | Mixture | None, name: str) -> None:
    """Warn about held-out rows that are also training rows: on them, the loss measures memorization, not generalization."""
    tables = training.tables if isinstance(training, Mixture) else [training]
    if seen := seen_in_training(rows, [table for table in tables if isinstance(table, Dataset)]):
        logger.warning(
            f"{name}: {seen:,} of {len(rows):,} held-out rows are also training rows; remove them from one of the two"
        )


class TrainingRows(NamedTuple):
    """The training rows, ready for the trainer. Lists have an entry for each source."""

    tokens: Dataset | Mixture | None  # the tokenized rows; None: the trainer only evaluates
    views: list[int]  # the largest number of texts in a row
    objectives: list[Objective]
    vectors: dict[str, VectorRows]  # a teacher's vectors; see `RaggedCollator`


def read_training_rows(
    rows: TrainData | None,
    step: TrainingStep,
    args: ContrastiveTrainingArguments,
    objective: Objective,
    name: str,
    paired: bool | None,
) -> TrainingRows:
    """Tokenize and check the training rows.

    Raises:
        InputError: if something is wrong with the rows, or if the run would train nothing.
    """
    if rows is None:
        return TrainingRows(None, [2], [objective], {})
    check_batch(args)
    with args.main_process_first(desc="tokenizing"), hidden_bars(bool(args.disable_tqdm)):
        tokens, views = tokenize_all(rows, step.encoder, args, objective, name, paired)
    if isinstance(tokens, Dataset) and len(tokens) < args.world_size:
        raise InputError(f"{name}: {len(tokens)} rows for {args.world_size} processes; give at least one row for each process")
    tables, labels = (tokens.tables, tokens.labels) if isinstance(tokens, Mixture) else ([tokens], [name])
    objectives = [own or objective for own in tokens.objectives] if isinstance(tokens, Mixture) else [objective]
    check_objectives(objective, objectives, list(zip(tables, views, labels)), step.encoder.full_dimension)
    check_training(args, step.encoder, len(batch_sampler(tokens, args, args.train_batch_size)), name)
    tables, vectors = with_teacher(tables, objectives, teacher_of(args, step.encoder))
    if isinstance(tokens, Mixture):
        tokens.tables = tables
    return TrainingRows(tokens if isinstance(tokens, Mixture) else tables[0], views, objectives, vectors)


def check_objectives(
    main: Objective, objectives: list[Objective], sources: list[tuple[Dataset | Stream, int, str]], width: int
) -> None:
    """Check that the objective of each source suits its rows and the model.

    Args:
        main: the objective of the trainer.
        objectives: the objective of each source.
        sources: the tokenized rows of each source, the number of texts in its largest row, and its name in messages.
        width: the width of the embedding.

    Raises:
        InputError: if one does not suit.
    """
    for own, (table, texts, label) in zip(objectives, sources):
        if "scores" not in own.needs:  # then it is enough if one of the sources with this objective has negatives, say
            texts = max(views for other, (_, views, _) in zip(objectives, sources) if other is own)
        check_objective(own, table, texts, label)
        own.check_width(width)
        if own is not main and (own.learn_temperature or own.mlm_weight or main.learn_temperature):
            raise InputError(
                f"{label}: if a source has its own objective, no temperature can be learned, and only the objective of the "
                "trainer can add masked language modeling; turn learn_temperature off, and set mlm_weight there"
            )
