"""The vectors of a teacher model in a file, looked up by row number. `hf_embed.training.teacher` makes the file.

Shapes: M vectors of E numbers each, the width of the teacher; D numbers per embedding of the model that is trained.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np

from hf_embed.distributed import gather_objects, get_rank
from hf_embed.files.read_files import read_array

logger = logging.getLogger(__name__)

SAMPLE = 20_000  # the principal directions are those of about this many evenly spaced vectors


class TeacherVectors:
    """The vectors of a file, looked up by row number. With a width D, they are turned into vectors of D numbers.

    If E is larger than D, the vectors are projected on their D leading principal directions. The directions are not centered,
    so the projection keeps dot products as well as D numbers can. If E is smaller than D, the vectors are filled up with zeros,
    which keeps all dot products.

    `like` is a file of the same teacher whose directions are used: those of the training rows, for held-out rows.
    """

    def __init__(self, path: Path, width: int | None = None, like: "TeacherVectors | None" = None):
        self.path, self.width = path, width
        self.directions: np.ndarray | None = None  # (E, D)
        if width is not None:
            self.directions = directions_of(self.rows, width) if like is None else like.directions

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
    """Return the matrix (E, D) that turns vectors (M, E) into vectors of D = `width` numbers; see `TeacherVectors`."""
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
