"""The rows of a trainer: for training, for the loss on held-out rows, and for `predict`."""

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pyarrow.compute
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput, speed_metrics

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.columns import judging_columns, text_columns
from hf_embed.data.loader import batch_sampler
from hf_embed.data.mixture import Mixture, Source, TrainData, has_several_positives, make_mixture, row_width, tokenize_source
from hf_embed.data.python_rows import RowData
from hf_embed.data.sources import texts_of
from hf_embed.data.stream import Stream
from hf_embed.data.teacher_vectors import TeacherVectors
from hf_embed.data.tokenization import most_texts, truncated_share, warn_of_truncation
from hf_embed.distributed import check_same_on_ranks, get_rank
from hf_embed.encoder import Encoder
from hf_embed.encoding import room_for_text
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut, HeldOutLoss, seen_in_training
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import Embed, Task, embed_on_all_ranks
from hf_embed.fingerprint import tokenizer_facts
from hf_embed.objectives import Objective
from hf_embed.objectives.base import FunctionObjective, check_other_positives
from hf_embed.progress import hidden_bars
from hf_embed.step import TrainingStep
from hf_embed.training.inputs import EvalSets, as_tasks, stored_rows, with_metrics
from hf_embed.training.resume import rows_hash
from hf_embed.training.settings import check_batch, check_training
from hf_embed.training.teacher import with_teacher

if TYPE_CHECKING:
    from hf_embed.training.guarded_trainer import GuardedTrainer

logger = logging.getLogger(__name__)


# ---- training rows ----


class TrainingRows(NamedTuple):
    """The training rows, ready for the trainer. Lists have an entry for each source."""

    tokens: Dataset | Mixture | None  # the tokenized rows; None: the trainer only evaluates
    texts_per_row: list[int]  # the largest number of texts in a row
    objectives: list[Objective]
    vectors: dict[str, TeacherVectors]  # a teacher's vectors; see `RaggedCollator`


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
        InputError: if something is wrong with the rows, if the run would train nothing, or if a prompt of the model leaves no
            room for a text.
    """
    # An evaluation may use any prompt.
    room_for_text(step.encoder.tokenizer, ["", *step.encoder.prompts.values()], step.encoder.max_length)
    if rows is None:
        return TrainingRows(None, [2], [objective], {})
    check_batch(args)
    with args.main_process_first(desc="tokenizing"), hidden_bars(bool(args.disable_tqdm)):
        tokens: Dataset | Mixture
        if isinstance(rows, Dataset):
            tokens = tokenize_rows(rows, step.encoder, args, objective, name, paired)
        else:
            tokens = make_mixture(rows, step.encoder, args, objective)
    tables: list[Dataset | Stream]
    if isinstance(tokens, Mixture):
        tables, widths, labels = tokens.tables, tokens.texts_per_row, tokens.labels
        objectives = [own or objective for own in tokens.objectives]
    else:
        tables, widths, labels, objectives = [tokens], [row_width(tokens)], [name], [objective]
        if len(tokens) < args.world_size:
            raise InputError(
                f"{name}: {len(tokens)} rows for {args.world_size} processes; give at least one row for each process"
            )
    if args.same_dropout_mask and (isinstance(tokens, Mixture) or most_texts(tokens) > 1):
        raise InputError(
            f"{name}: same_dropout_mask requires rows of a single text, because this text is both views; remove "
            "same_dropout_mask"
        )
    check_objectives(objective, objectives, list(zip(tables, widths, labels)), step.encoder.full_dimension)
    check_training(args, step.encoder, len(batch_sampler(tokens, args, args.train_batch_size)), name)
    tables, vectors = with_teacher(tables, objectives, args, step.encoder.full_dimension)
    if isinstance(tokens, Mixture):
        tokens.tables = tables
        return TrainingRows(tokens, widths, objectives, vectors)
    return TrainingRows(cast(Dataset, tables[0]), widths, objectives, vectors)


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
            texts = max(most for other, (_, most, _) in zip(objectives, sources) if other is own)
        check_objective(own, table, texts, label)
        own.check_width(width)
        if own is not main and (own.learn_temperature or own.mlm_weight or main.learn_temperature):
            raise InputError(
                f"{label}: if a source has its own objective, no temperature can be learned, and only the objective of the "
                "trainer can add masked language modeling; turn learn_temperature off, and set mlm_weight there"
            )


def tokenize_rows(
    rows: Dataset,
    encoder: Encoder,
    args: ContrastiveTrainingArguments,
    objective: Objective,
    name: str,
    paired: bool | None,
) -> Dataset:
    """Tokenize one table, which is a source without settings of its own.

    Args:
        rows: the table.
        encoder: the encoder whose tokenizer, maximum length and prompts are used.
        args: the training arguments.
        objective: the objective of the rows.
        name: the name of the rows in messages.
        paired: see `hf_embed.data.columns.text_columns`.

    Raises:
        InputError: if anything is wrong with the rows.
    """
    tokens = cast(Dataset, tokenize_source(Source(name, rows), encoder, args, objective, name, paired))
    warn_of_truncation({name: truncated_share(tokens)})
    return tokens


def check_objective(objective: Objective, tokens: Dataset | Stream, texts_per_row: int, name: str) -> None:
    """Check that an objective suits the tokenized rows.

    Args:
        objective: the objective of the rows.
        tokens: the tokenized rows of a table or a stream.
        texts_per_row: the number of texts in the largest row.
        name: the name of the rows in messages.

    Raises:
        InputError: if the objective does not suit the rows.
    """
    objective.check_rows(texts_per_row, name)
    of_user = isinstance(objective, FunctionObjective)  # which may need no negatives
    if get_rank() == 0 and not of_user and not {"scores", "target", "teacher"}.intersection(objective.needs):
        warn_without_negatives(tokens.probed_ids if isinstance(tokens, Stream) else tokens.data["text_ids"], objective, name)
    if "scores" in objective.needs and isinstance(tokens, Dataset) and "scores" in tokens.column_names:
        refuse_equal_scores(tokens, name)
    if has_several_positives(tokens):
        check_other_positives(objective, name)


def refuse_equal_scores(tokens: Dataset, name: str) -> None:
    """Raise InputError if all scores of a table are equal, because no order can be learned from them."""
    scores = pyarrow.compute.list_flatten(tokens.with_format("arrow")[:]["scores"])
    if are_equal(scores):
        raise InputError(
            f"{name}: all scores are {scores[0].as_py():g}, so there is nothing to learn; give rows with other scores"
        )


def warn_without_negatives(text_ids: pyarrow.ChunkedArray, objective: Objective, name: str) -> None:
    """Log a warning if no row can have a negative, because the positives, or the anchors, of all rows are the same text.

    Args:
        text_ids: the text hashes of each row: of a table, or of the first rows of a stream.
        objective: the objective of the rows.
        name: the name of the rows in messages.
    """
    if len(text_ids) < 2:
        return
    most = pyarrow.compute.max(pyarrow.compute.list_value_length(text_ids)).as_py()
    candidates = pyarrow.compute.list_flatten(pyarrow.compute.list_slice(text_ids, min(1, most - 1)))
    same = None
    if are_equal(candidates):
        same = "positives"
    elif most == 2 and objective.mask_other_positives and are_equal(pyarrow.compute.list_element(text_ids, 0)):
        same = "anchors"
    if same:
        logger.warning(
            f"{name}: the {same} of all rows are the same text (after truncation to max_length tokens), so no row of a batch "
            f"has a negative, and nothing can be learned; give rows with different {same}, or raise max_length"
        )


def are_equal(numbers: pyarrow.ChunkedArray) -> bool:
    """Return whether all numbers are equal."""
    limits = pyarrow.compute.min_max(numbers).as_py()
    return limits["min"] == limits["max"]


def check_same_tokens(first: Encoder, encoder: Encoder) -> None:
    """Raise InputError if a model of `model_init` needs other tokens than the first one, for which the rows were tokenized."""
    same = {
        "max_length": first.max_length == encoder.max_length,
        "prompts": first.prompts == encoder.prompts,
        "tokenizer": first.tokenizer is encoder.tokenizer
        or tokenizer_facts(first.tokenizer) == tokenizer_facts(encoder.tokenizer),
    }
    if other := [name for name, unchanged in same.items() if not unchanged]:
        raise InputError(
            f"model_init returns models with different {other[0]}, but the rows are tokenized once, when the trainer is made; "
            "make a trainer for each"
        )


# ---- evaluation sets and held-out rows ----


def own_tasks(trainer: "GuardedTrainer") -> dict[str, Task]:
    """Return the evaluation sets of a trainer. Make them anew if a script has replaced `eval_dataset` or `compute_metrics`."""
    trainer.check_read()
    tasks = tasks_of(trainer, trainer.eval_dataset)
    trainer.eval_dataset = tasks or None
    return tasks


def tasks_of(trainer: "GuardedTrainer", sets: EvalSets | None) -> dict[str, Task]:
    """Return evaluation sets by name, as the trainer scores them. Sets that are ready stay as they are."""
    vectors = cast(RaggedCollator, trainer.data_collator).vectors or {}
    tasks = make_held_out(as_tasks(sets), trainer.step, trainer.args, trainer.main_objective, vectors)
    has_pairs = any(isinstance(task, STS) for task in tasks.values())
    return with_metrics(tasks, trainer.compute_metrics) if has_pairs else tasks


def choose_tasks(trainer: "GuardedTrainer", sets: EvalSets | str | None) -> dict[str, Task]:
    """Return the tasks to evaluate.

    Args:
        trainer: the trainer that evaluates them.
        sets: None for all of the trainer's own tasks, the name of one of them, or other evaluation sets to use instead.

    Raises:
        InputError: if there is no task, or none with that name.
    """
    tasks = own_tasks(trainer) if sets is None or isinstance(sets, str) else tasks_of(trainer, sets)
    if isinstance(sets, str):
        if sets not in tasks:
            raise InputError(f"evaluate: there is no evaluation set '{sets}'; available: {', '.join(tasks or ['none'])}")
        return {sets: tasks[sets]}
    if not tasks:
        raise InputError(
            "evaluation needs an eval_dataset, with the columns sentence1, sentence2 and score, or with anchor and positive"
        )
    return tasks


def make_held_out(
    tasks: Mapping[str, Task],
    step: TrainingStep,
    args: ContrastiveTrainingArguments,
    objective: Objective,
    vectors_of_training: Mapping[str, TeacherVectors],
    training: Dataset | Mixture | None = None,
) -> dict[str, Task]:
    """Return the tasks, after tokenizing and checking the held-out rows among them in the same way as training rows.

    They get the vectors of a teacher in the form that the training rows have (`vectors_of_training`). A warning counts the
    held-out rows that are also training rows (`training`).

    Raises:
        InputError: if a batch would have one row, and so no negatives, if something is wrong with the rows, or if the ranks
            have different rows.
    """
    made = dict(tasks)
    batch_size = args.per_device_eval_batch_size * args.world_size
    for name, task in tasks.items():
        if not isinstance(task, HeldOut) or isinstance(task, HeldOutLoss):
            continue
        if batch_size < 2:
            raise InputError(
                f"{name}: per_device_eval_batch_size is 1, but a held-out row has no negatives in a batch of its own; set it, "
                "for example, to per_device_train_batch_size"
            )
        with args.main_process_first(desc="tokenizing"), hidden_bars(bool(args.disable_tqdm)):
            table = tokenize_rows(stored_rows(task.rows, name), step.encoder, args, objective, name, paired=True)
        check_same_on_ranks(f"{name}: the rows", rows_hash(table))
        check_objective(objective, table, row_width(table), name)
        (table,), vectors = with_teacher([table], [objective], args, step.encoder.full_dimension, vectors_of_training)
        normalize = step.encoder.normalize
        made[name] = HeldOutLoss(table, objective, batch_size, step, args.chunk_tokens, vectors=vectors, normalize=normalize)
        if args.process_index == 0:
            warn_of_seen(table, training, name)
    return made


def warn_of_seen(rows: Dataset, training: Dataset | Mixture | None, name: str) -> None:
    """Warn about held-out rows that are also training rows: on them, the loss measures memorization, not generalization."""
    tables = training.tables if isinstance(training, Mixture) else [training]
    if seen := seen_in_training(rows, [table for table in tables if isinstance(table, Dataset)]):
        logger.warning(
            f"{name}: {seen:,} of {len(rows):,} held-out rows are also training rows; remove them from one of the two"
        )


# ---- predict ----


def predict(given: RowData, embed: Embed, prefix: str) -> PredictionOutput:
    """Embed the texts of a dataset, in the same way on every rank.

    Args:
        given: rows of the kinds that `ContrastiveTrainer` trains on, each with the same number of texts.
        embed: the function that embeds texts.
        prefix: the prefix of the metric names.

    Returns:
        `predictions` (N, D) for N rows of a single text; (N, V, D) for rows of V texts, with the prompt for queries before the
        first text and the prompt for documents before the others. `label_ids` is None, and `metrics` has the time.

    Raises:
        InputError: if the columns are not recognized, a text is empty, or the rows have different numbers of texts.
    """
    start, columns = time.time(), columns_of_texts(given, "test_dataset")
    prompts = [None] if len(columns) == 1 else ["query", *["document"] * (len(columns) - 1)]
    parts = [embed_on_all_ranks(texts, embed, prompt) for texts, prompt in zip(columns, prompts)]
    embeddings = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
    metrics = speed_metrics(prefix, start, len(embeddings)) | {f"{prefix}_samples": len(embeddings)}
    return PredictionOutput(embeddings, None, metrics)


def columns_of_texts(given: RowData, name: str) -> list[list[str]]:
    """Return the texts of rows, column by column: V lists of N texts.

    Raises:
        InputError: if the columns are not recognized, a text is empty, or the rows have different numbers of texts.
    """
    rows = stored_rows(given, name)
    judges = judging_columns(rows.column_names)  # a score or a label is no reason not to embed the texts
    texts = list(texts_of(rows, text_columns([column for column in rows.column_names if column not in judges], name), name))
    if len(set(map(len, texts))) > 1:
        raise InputError(f"{name}: the rows have different numbers of texts; give one column of texts, or rows of equal length")
    return list(map(list, zip(*texts)))
