"""The vectors that a teacher model has for the training texts. An objective learns from them, or is guided by them.

    ContrastiveTrainingArguments("out", teacher="intfloat/e5-large-v2")        or --teacher intfloat/e5-large-v2

1. The tokenized tables keep their texts. The teacher encodes each different text once, with its own prompts: "query" before
   anchors, and "document" before the other texts. The ranks share the work.
2. The vectors are written to a file in the cache of `datasets`, which later runs with the same teacher and the same texts use
   again. A stopped run resumes the file (`hf_embed.vector_files`), and a run beside another waits for its file. With several
   machines, the cache must be on a shared disk.
3. The tables get a column `vectors` with the row numbers of their texts in the file, and the collator looks the vectors up. If
   the objective needs only scores, the tables get a column `scores` instead: the cosine similarity of the teacher's vectors.

Shapes: M different texts, E width of the teacher, D width of the model that is trained.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.load import load_encoder
from hf_embed.data.cache import cache_folder
from hf_embed.data.teacher_vectors import TeacherVectors
from hf_embed.distributed import check_same_on_ranks, gather_objects, get_rank
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.safe_files import BUSY
from hf_embed.objectives import Objective
from hf_embed.objectives.base import loss_name
from hf_embed.vector_files import identity_of, read_vectors, write_vectors

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"normalize": True, "precision": "float32"}  # of `Encoder.encode`
WAIT = 2  # seconds between two looks at a file that another run writes
ROWS_AT_ONCE = 10_000  # rows of a table that are read at a time


def with_teacher(
    tables: list[Any],
    objectives: list[Objective],
    args: ContrastiveTrainingArguments,
    width: int,
    training: Mapping[str, TeacherVectors] | None = None,
) -> tuple[list[Any], dict[str, TeacherVectors]]:
    """Replace the column `texts` of tables by what their objectives need of the teacher. Every rank calls this.

    Args:
        tables: tokenized tables and streams. The tables whose objective needs a teacher have a column `texts`.
        objectives: the objective of each.
        args: the training arguments, which name the teacher.
        width: D.
        training: for held-out rows, what this function returned for the training rows.

    Returns:
        The tables, and the vectors for the collator by the name of the objective's argument.

    Raises:
        InputError: if an objective needs a teacher and there is none, if no objective uses the teacher, if the teacher cannot
            be loaded, if a text is empty, or if a vector is not finite. For held-out rows, also if the teacher is wider than
            the model, and no training row learns its vectors.
    """
    waiting = [i for i, table in enumerate(tables) if isinstance(table, Dataset) and "texts" in table.column_names]
    if waiting and args.teacher is None:
        objective = loss_name(objectives[waiting[0]])
        raise InputError(f"the objective {objective} needs the vectors of a teacher; set teacher to a model (--teacher MODEL)")
    if args.teacher is None:
        return tables, {}
    if not waiting:
        raise InputError(
            f"teacher is {args.teacher}, but no objective uses it; remove it, or set an objective that does (guide_margin of "
            "SimCSE and ImprovedContrastive, TeacherKL, MarginMSE, VectorDistillation)"
        )
    teacher, made = load_teacher(args.teacher, args.device), list(tables)
    texts, numbers = number_texts([tables[i] for i in waiting], teacher.prompt("query"), teacher.prompt("document"))
    file = vectors_of(teacher, texts)
    if get_rank() == 0:
        logger.info(f"teacher {args.teacher}: the vectors of {len(texts):,} texts are in {file}")
    vectors, wanted = TeacherVectors(file), {need for i in waiting for need in objectives[i].needs}
    for i, of_table in zip(waiting, numbers):
        table, needed = tables[i].remove_columns("texts"), objectives[i].needs
        if "scores" in needed and "scores" not in table.column_names:
            table = table.add_column("scores", cosines(vectors, of_table))
        made[i] = table if {"teacher", "target"}.isdisjoint(needed) else table.add_column("vectors", of_table)
    found = {"teacher": vectors} if "teacher" in wanted else {}
    like = None if training is None else training.get("target")
    if training is not None and like is None and "target" in wanted and vectors.rows.shape[1] > width:
        raise InputError(
            f"the teacher's vectors are wider than the model's ({vectors.rows.shape[1]} and {width} numbers), so the loss of "
            "held-out rows needs the directions of the training rows; give a train_dataset that VectorDistillation trains on"
        )
    return made, found | ({"target": TeacherVectors(file, width, like)} if "target" in wanted else {})


def load_teacher(name: str, device: torch.device) -> Encoder:
    """Load a teacher, in float32. Its default prompt is off, because the texts get the prompts for queries and documents."""
    teacher = load_encoder(Encoder, name, dtype=torch.float32).to(device)
    teacher.default_prompt_name = None
    return teacher


def vectors_of(teacher: Encoder, texts: list[str]) -> Path:
    """Return the file with the vectors of the texts, (M, E). Encode the texts if there is no such file yet."""
    identity = identity_of(teacher, texts, OPTIONS, "the texts")
    check_same_on_ranks("the teacher or the training texts", identity)
    file = cache_folder() / "teachers" / f"{identity}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    while not gather_objects(file.is_file())[0]:  # all ranks go by the main process
        try:
            write_vectors(teacher, texts, file, **OPTIONS)
        except InputError as error:
            if BUSY not in str(error):
                raise
            time.sleep(WAIT)  # another run writes the same vectors
    read_vectors(file, teacher, texts)  # raises an error if the file is damaged
    return file


def number_texts(tables: Sequence[Dataset], query: str, document: str) -> tuple[list[str], list[list[list[int]]]]:
    """Give numbers to the different texts of tables.

    Args:
        tables: tables with a column `texts` of lists: the texts of each row, the anchor first.
        query: the prompt before anchors.
        document: the prompt before other texts.

    Returns:
        The M texts with their prompts, and for each table the numbers of the texts of each row, from 0 to M - 1. For one table
        with the rows ["a cat", "a kitten"] and ["a dog", "a cat"], and without prompts:

            ["a cat", "a kitten", "a dog"], [[[0, 1], [2, 0]]]
    """
    known: dict[str, int] = {}

    def number(row: list[str]) -> list[int]:
        prompted = [(document if i else query) + text for i, text in enumerate(row)]
        return [known.setdefault(text, len(known)) for text in prompted]

    numbers = [
        [number(row) for batch in table.select_columns("texts").iter(ROWS_AT_ONCE) for row in batch["texts"]]
        for table in tables
    ]
    return list(known), numbers


def cosines(vectors: TeacherVectors, rows: list[list[int]]) -> list[list[float]]:
    """Return the cosine similarity of the first text of each row with each further text of the row.

    Args:
        vectors: unit vectors.
        rows: the numbers of the texts of each row.
    """
    return [(vectors[row[1:]] @ vectors[row[:1]][0]).tolist() for row in rows]
