"""Columns of scores: the score of a pair, or a teacher's scores of the candidates of a row.

    sentence1, sentence2, score                                   one score per pair
    anchor, positive, negative, scores                            a list: of the positive, then of each negative
    anchor, positive, negative, positive_score, negative_score    a column for each text after the anchor

Scores are read only for an objective that needs them (`Objective.needs`). Otherwise a column that judges pairs is refused
(`hf_embed.data.columns`).
"""

import math
import re
import shlex
from typing import Any

from datasets import ClassLabel, Dataset

from hf_embed.data.columns import NAMED_OTHERWISE, judging_columns, negative_columns, pair_of
from hf_embed.data.known_columns import LABELS, is_teacher_score, numbers_in, plain
from hf_embed.data.labeled import ABSENT, MATCHES, texts_of_labels
from hf_embed.errors import InputError


def score_columns(names: list[str], name: str) -> list[str]:
    """Choose the columns of scores: one column, or the columns of a teacher's scores in the order of the texts.

    Args:
        names: the names of all columns.
        name: the name of the rows in messages.

    Raises:
        InputError: if there is no column of scores, or more than one that could be meant.
    """
    if "score" in names or "scores" in names:
        return ["score" if "score" in names else "scores"]
    if teacher := [column for column in names if is_teacher_score(column)]:
        return sorted(teacher, key=lambda column: (not plain(column).startswith("pos"), numbers_in(column)))
    judging = judging_columns(names)
    if len(judging) == 1:
        return judging
    found = f"{' or '.join(judging)} could be the scores" if judging else f"found the columns {', '.join(names)}"
    if negative_columns(names):
        raise InputError(
            f"{name}: the objective needs a score for each text after the anchor; {found}; give the columns positive_score, "
            "negative_score ..., or a list of numbers in a column scores"
        )
    texts = "" if pair_of(names, name) else " anchor=COLUMN positive=COLUMN"
    raise InputError(
        f"{name}: the objective needs a score for each pair; {found}; name the column with --columns score=COLUMN{texts} "
        f"{NAMED_OTHERWISE}"
    )


def has_scores(names: list[str]) -> bool:
    """Return whether a table has columns that are certainly scores: score, scores, or a teacher's scores."""
    return any(column in ("score", "scores") or is_teacher_score(column) for column in names)


def row_scores(cells: dict[str, Any], texts: int, where: str) -> list[float]:
    """Return the scores of a row, one for each text after the anchor.

    Args:
        cells: the cells of the row by column of scores, in the order of the texts.
        texts: the number of texts in the row, with the anchor.
        where: the place of the row in messages.

    Raises:
        InputError: if a score is missing or is not a finite number, or if the number of scores is wrong.
    """
    scores: list[float] = []
    for column, cell in cells.items():
        if cell is None and scores:
            continue  # the row has fewer negatives. The score of the positive comes first, and must be there.
        for value in cell if isinstance(cell, list) else [cell]:
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InputError(f"{where}, column '{column}': {value!r} is not a score; give a number, or delete the row")
            scores.append(number)
    if len(scores) != texts - 1:
        raise InputError(
            f"{where}: there are {len(scores)} scores ({', '.join(cells)}) for {texts - 1} texts after the anchor; give one "
            "score for the positive and one for each negative (for a margin m, the list [m, 0])"
        )
    return scores


def check_gaps(cells: dict[str, Any], texts: list[str], scores: list[str], where: str) -> None:
    """Check that each text with its own column of scores has a score, and that each score has its text.

    The number of scores alone would not show that the score of another text is missing.

    Args:
        cells: the cells of the row by column.
        texts: the columns of the positive and the negatives.
        scores: the columns of the scores, in the same order.
        where: the place of the row in messages.

    Raises:
        InputError: if only one of the two is there.
    """
    for text, score in zip(texts, scores) if len(texts) == len(scores) > 1 else ():
        no_score = cells[score] in (None, [])  # mined rows without negatives have an empty list
        if no_score != (not cells[text]):
            absent, there = (score, text) if no_score else (text, score)
            raise InputError(f"{where}: there is a value in column '{there}', but none in column '{absent}'; give both or none")


# ---- labels as scores ----


def check_label_names(rows: Dataset, column: str, name: str) -> None:
    """Check that the numbers of a `ClassLabel` can be used as scores: 0 is the lowest, and -1 stands for no label.

    Raises:
        InputError: if a row has no label, if names that are numbers (such as 1 to 5) are not in ascending order, or if the
            lowest number means that texts belong together, as in GLUE's RTE, where it is entailment.
    """
    kind = rows.features[column]
    if not isinstance(kind, ClassLabel):
        return
    first = kind.names[0]
    numbers = [float(name) for name in kind.names if re.fullmatch(r"-?\d+(\.\d+)?", name)]
    all_numbers = len(numbers) == len(kind.names)
    in_order = numbers == sorted(numbers) if all_numbers else plain(first) not in (*MATCHES, "relevant")
    if not in_order:
        raise InputError(
            f"{name}: the label 0 of column '{column}' is named {first}, but a higher number must mean that two texts belong "
            "together more; write scores, or 0 and 1, in place of the names"
        )
    labels = rows[column][:]
    if -1 in labels:
        raise InputError(
            f"{name}, row {labels.index(-1) + 1}, column '{column}': -1 stands for no label; fill it in or delete the row"
        )


def refuse_inference_labels(rows: Dataset, column: str, name: str) -> None:
    """Raise InputError if 0, 1 and 2 in a column of labels may be those of NLI, whose order is not that of similarity."""
    if plain(column) not in LABELS or isinstance(rows.features[column], ClassLabel):  # its names were checked
        return
    words = set(texts_of_labels(rows, column).values()).difference(ABSENT)
    if "2" in words and words <= {"0", "1", "2"}:
        raise InputError(
            f"{name}, column '{column}': the labels 0, 1 and 2 may mean entailment, neutral and contradiction, which are not "
            f"scores; write scores in their place, or give --columns {shlex.quote(f'score={column}')} {NAMED_OTHERWISE} if 2 "
            "stands for the most similar texts"
        )
