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
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.load import load_encoder
from hf_embed.data.cache import cache_folder
from hf_embed.data.collator import VectorRows
from hf_embed.distributed import check_same, gather_objects, get_rank
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.objectives import Objective
from hf_embed.objectives.base import called
from hf_embed.read_files import read_array
from hf_embed.safe_files import BUSY
from hf_embed.vector_files import identity_of, read_vectors, write_vectors

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"normalize": True, "precision": "float32"}  # of `Encoder.encode`
WAIT = 2  # seconds between two looks at a file that another run writes
SAMPLE = 20_000  # the principal directions are those of about this many evenly spaced vectors
ROWS_AT_ONCE = 10_000  # rows of a table that are read at a time


class Teacher:
    """A teacher model, which is loaded when its vectors are first needed.

    Args:
        name: a folder, or the name of a model on the Hub.
        device: where the teacher runs.
        width: D.

    Raises:
        InputError: if the model cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, width: int):
        self.name, self.device, self.width = name, device, width

    @cached_property
    def encoder(self) -> Encoder:
        """The model, in float32. Its default prompt is off, because the texts get the prompts for queries and documents."""
        encoder = load_encoder(Encoder, self.name, dtype=torch.float32).to(self.device)
        encoder.default_prompt_name = None
        return encoder

    def add_to(self, tables: Sequence[Dataset], needs: Sequence[Sequence[str]]) -> tuple[list[Dataset], dict[str, VectorRows]]:
        """Replace the column `texts` of tables by what their objectives need. Every rank calls this.

        Args:
            tables: tokenized tables with a column `texts`.
            needs: `Objective.needs` of the objective of each table.

        Returns:
            The tables, and the vectors for the collator by the name of the objective's argument.

        Raises:
            InputError: if a text is empty, or if a vector is not finite.
        """
        texts, numbers = number_texts(tables, self.encoder.prompt("query"), self.encoder.prompt("document"))
        file = self.vectors_of(texts)
        vectors, made = VectorFile(file), []
        for table, of_table, needed in zip(tables, numbers, needs):
            table = table.remove_columns("texts")
            if "scores" in needed and "scores" not in table.column_names:
                table = table.add_column("scores", cosines(vectors, of_table))
            if not {"teacher", "target"}.isdisjoint(needed):
                table = table.add_column("vectors", of_table)
            made.append(table)
        wanted = {name for needed in needs for name in needed}
        found: dict[str, VectorRows] = {"teacher": vectors} if "teacher" in wanted else {}
        if "target" in wanted:
            found["target"] = VectorFile(file, self.width)
        return made, found

    def vectors_of(self, texts: list[str]) -> Path:
        """Return the file with the vectors of the texts, (M, E). Encode the texts if there is no such file yet."""
        identity = identity_of(self.encoder, texts, OPTIONS, "the texts")
        check_same("the teacher or the training texts", identity)
        file = cache_folder() / "teachers" / f"{identity}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        while not gather_objects(file.is_file())[0]:  # all ranks go by the main process
            try:
                write_vectors(self.encoder, texts, file, **OPTIONS)
            except InputError as error:
                if BUSY not in str(error):
                    raise
                time.sleep(WAIT)  # another run writes the same vectors
        read_vectors(file, self.encoder, texts)  # raises an error if the file is damaged
        if get_rank() == 0:
            logger.info(f"teacher {self.name}: the vectors of {len(texts):,} texts are in {file}")
        return file


def teacher_of(args: ContrastiveTrainingArguments, encoder: Encoder) -> Teacher | None:
    """Return the teacher that `args` names for training `encoder`, or None."""
    return None if args.teacher is None else Teacher(args.teacher, args.device, encoder.full_dimension)


def with_teacher(
    tables: list[Any], objectives: list[Objective], teacher: Teacher | None
) -> tuple[list[Any], dict[str, VectorRows]]:
    """Add to each table what its objective needs of the teacher.

    Args:
        tables: tokenized tables and streams.
        objectives: the objective of each.
        teacher: the teacher, or None.

    Returns:
        The tables, and the vectors for the collator.

    Raises:
        InputError: if an objective needs a teacher and there is none, or if no objective uses the teacher.
    """
    waiting = [i for i, table in enumerate(tables) if isinstance(table, Dataset) and "texts" in table.column_names]
    if waiting and teacher is None:
        objective = called(objectives[waiting[0]])
        raise InputError(f"the objective {objective} needs the vectors of a teacher; set teacher to a model (--teacher MODEL)")
    if teacher is None:
        return tables, {}
    if not waiting:
        raise InputError(
            f"teacher is {teacher.name}, but no objective uses it; remove it, or set an objective that does (guide_margin of "
            "SimCSE and ImprovedContrastive, TeacherKL, MarginMSE, VectorDistillation)"
        )
    found, vectors = teacher.add_to([tables[i] for i in waiting], [objectives[i].needs for i in waiting])
    made = dict(zip(waiting, found))
    return [made.get(i, table) for i, table in enumerate(tables)], vectors


class VectorFile:
    """The vectors of a file, looked up by row number. With a width D, they are turned into vectors of D numbers.

    If E is larger than D, the vectors are projected on their D leading principal directions. The directions are not centered,
    so the projection keeps dot products as well as D numbers can. If E is smaller than D, the vectors are filled up with zeros,
    which keeps all dot products.
    """

    def __init__(self, path: Path, width: int | None = None):
        self.path, self.width = path, width
        self.directions = None if width is None else directions_of(self.rows, width)  # (E, D)

    @property
    def identity(self) -> str:
        """A hash of the teacher and the texts."""
        return self.path.stem

    @cached_property
    def rows(self) -> np.ndarray:
        """The memory map, (M, E)."""
        return read_array(self.path)

    def __getstate__(self) -> dict:
        """Leave the memory map out. The workers of a data loader open the file themselves."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def __getitem__(self, numbers: list[int]) -> np.ndarray:
        """Return the vectors with these numbers, (len(numbers), E or D)."""
        found = np.array(self.rows[numbers])
        return found if self.directions is None else found @ self.directions


def directions_of(rows: np.ndarray, width: int) -> np.ndarray:
    """Return the matrix (E, D) that turns vectors (M, E) into vectors of D = `width` numbers; see `VectorFile`."""
    own = rows.shape[1]
    if own <= width:
        return np.eye(own, width, dtype=rows.dtype)
    sample = np.asarray(rows[:: max(1, len(rows) // SAMPLE)], dtype=np.float64)
    _, vectors = np.linalg.eigh(sample.T @ sample)  # the eigenvalues rise
    directions = vectors[:, ::-1][:, :width]
    kept = np.square(sample @ directions).sum() / np.square(sample).sum()
    if get_rank() == 0:
        logger.info(f"{width} directions keep {kept:.1%} of the squared length of the teacher's vectors of {own} numbers")
    # Ranks on different hardware may find other signs, so all of them use the directions of the main process.
    return gather_objects(directions.astype(rows.dtype))[0]


def number_texts(tables: Sequence[Dataset], query: str, document: str) -> tuple[list[str], list[list[list[int]]]]:
    """Give numbers to the different texts of tables.

    Args:
        tables: tables with a column `texts` of lists: the texts of each row, the anchor first.
        query: the prompt before anchors.
        document: the prompt before other texts.

    Returns:
        The M texts with their prompts, and for each table the numbers of the texts of each row, from 0 to M - 1.
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


def cosines(vectors: VectorFile, rows: list[list[int]]) -> list[list[float]]:
    """Return the cosine similarity of the first text of each row with each further text of the row.

    Args:
        vectors: unit vectors.
        rows: the numbers of the texts of each row.
    """
    return [(vectors[row[1:]] @ vectors[row[:1]][0]).tolist() for row in rows]
