"""Rules that decide which columns of a table hold which texts: by known column names, or as the user names the columns.

`hf_embed.data.known_columns` lists the names. There are two kinds of known layouts:

- A layout in `LAYOUTS` names its positives. The first such layout that matches is used, whatever other columns the table has.
- A layout in `DESCRIBED` or `ALIKE` only describes what its texts are. It is used only if nothing else matches. For example, a
  table with question, answer and context contains two such pairs, and is refused.

The user names columns with other names: `--columns anchor=frage positive=antwort`.
"""

import logging
import re
import shlex
from collections.abc import Sequence
from itertools import islice
from numbers import Number
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, Value

from hf_embed.data.known_columns import (
    ALIKE,
    ANCHORS,
    DESCRIBED,
    JUDGMENT,
    LAYOUTS,
    NO_TEXT,
    POSITIVES,
    SINGLE,
    WITH_TEXT,
    by_plain_name,
    is_negative,
    is_teacher_score,
    matching,
    numbers_in,
    plain,
    seems_to_hold,
)
from hf_embed.data.text_files import SEPARATOR_NAMES, other_separator
from hf_embed.errors import InputError, errors_of, shortened
from hf_embed.ranges import is_one_of

logger = logging.getLogger(__name__)

ACCEPTED = (
    "text; sent0, sent1[, hard_neg]; anchor, positive[, negative...]; query, positive[, negative...]; question, answer and "
    "others that docs/guides/own_data.md lists"
)
# An unused column of pairs with at least two and at most so many different values may judge them, whatever its name is.
FEW_VALUES = 10
LOOKED_AT = 10_000  # rows of a table whose values are looked at
FIRST_ROWS = 100  # rows of a stream that are checked before training
TRUTHS = {"true", "false", "yes", "no"}
NAMED_OTHERWISE = "(or columns: in a sources file, or rename_columns of a Dataset)"
# A column name with more words than this may be a text, because the file has no header.
NAME_WORDS = 4
# Roles that the user may give a column -> the name that the column gets.
ROLES = {"text": "text", "anchor": "anchor", "query": "anchor", "positive": "positive", "positives": "positive",
         "negative": "negative", "negatives": "negative", "score": "score"}  # fmt: skip


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns. If a stream does not list its columns, return those of its first rows."""
    return rows.column_names or list(dict.fromkeys(column for row in islice(rows, FIRST_ROWS) for column in row))


# ---- the layouts ----


def text_columns(names: list[str], name: str, paired: bool | None = None, scores: Sequence[str] = ()) -> list[str]:
    """Choose the columns that hold texts, in the order anchor, positive, negatives.

        anchor, positive, negative_1, negative_2    all four
        id, question, answer                        question, answer; a warning names id
        title, text                                 text; if `paired`, title and text
        question, answer, context                   refused, because answer and context could be the positive
        sentence1, sentence2, score                 refused, because score judges the pairs
        frage, antwort                              refused, because these names are not known

    Args:
        names: the names of all columns.
        name: the name of the rows in messages.
        paired: True requires anchor and positive, False requires single texts, None accepts both.
        scores: columns that are read as scores; see `hf_embed.data.scores`.

    Raises:
        InputError: if no columns match, if more than one choice is possible, or if an unused column judges the pairs, because
            then some pairs may not be positives.
    """
    single = single_column(names, name, paired)
    pair = None if paired is False else pair_of(names, name, None if paired else single)
    if pair is not None:
        columns = pair + negative_columns(names)
    elif paired is not True and single is not None:
        columns = [single]
    else:
        header = ""
        if any(len(column.split()) > NAME_WORDS or column.isdecimal() for column in names):
            header = "if the first row is data, add a header above it; otherwise "
        raise InputError(f"{name}: found the columns {', '.join(names)}; {header}{mend(names, paired)}")
    refuse_twins(names, columns, name)
    ignored = [column for column in names if column not in columns and column not in scores]
    if len(columns) > 1:
        refuse_judgements(ignored, name)
    if ignored:
        alone = f"; each row is a single text, '{columns[0]}'" if paired is None and len(columns) == 1 else ""
        logger.warning(f"{name}: columns {', '.join(ignored)} are not used{alone}")
    return columns


def single_column(names: list[str], name: str, paired: bool | None) -> str | None:
    """Return the column of single texts: text or sentence, or the only column, unless its name is that of positives.

    Raises:
        InputError: if the name of the only column may be a text, or several names.
    """
    found = by_plain_name(names)
    if known := [found[column] for column in SINGLE if column in found]:
        return known[0]
    if len(names) != 1 or (paired is not False and plain(names[0]) in POSITIVES):
        return None
    only, words = names[0], len(names[0].split())
    if separator := other_separator(only):
        raise InputError(
            f"{name}: there is only one column, '{shortened(only)}', and its name contains {SEPARATOR_NAMES[separator]}, "
            "which may be the separator of the file; write the file again, or rename the column"
        )
    if words > NAME_WORDS:
        raise InputError(
            f"{name}: there is only one column, '{shortened(only)}'; if this is a text, add a header above it, for "
            "example text; otherwise rename the column"
        )
    if words > 1:
        logger.warning(f"{name}: '{only}' is read as the name of the only column; if it is a text, add a header above it")
    return only


def pair_of(names: list[str], name: str, single: str | None = None) -> list[str] | None:
    """Return the columns of anchors and positives, or None if there are none.

    `single` is a column of single texts, if the table has one.

    Raises:
        InputError: if more than one pair of columns matches, or if the table could also hold single texts.
    """
    if named := matching(LAYOUTS, names):
        return named[0]
    found, described = by_plain_name(names), matching([*DESCRIBED, *ALIKE, *([] if single else WITH_TEXT)], names)
    asked = [found[column] for column in ANCHORS if column in found]
    if asked and not any(pair[0] in asked for pair in described):  # the query would be left out
        described = [[asked[0], single]] if single is not None else []
    if single is not None:
        described += [[single, found[positive]] for positive in POSITIVES if positive in found]
    meant = [*described, [single]] if described and single is not None else described
    if len(meant) > 1:
        raise InputError(
            f"{name}: found the columns {', '.join(names)}, and more than one choice is possible: "
            f"{' or '.join(' and '.join(columns) for columns in meant)}; name the columns with {flag(*meant[0])}"
        )
    return described[0] if described else None


def negative_columns(names: list[str]) -> list[str]:
    """Return the columns of negatives, with negative_10 after negative_9. Beside entailments, contradictions are negatives."""
    negatives = [column for column in names if is_negative(column)]
    if "entailment" in map(plain, names):
        negatives += [column for column in names if plain(column) == "contradiction"]
    return sorted(negatives, key=numbers_in)


def refuse_twins(names: list[str], columns: list[str], name: str) -> None:
    """Raise InputError if another column has the same plain name as one of `columns`, because either could be meant."""
    for column in columns:
        if twins := [other for other in names if other != column and plain(other) == plain(column)]:
            raise InputError(
                f"{name}: the names of the columns '{column}' and '{twins[0]}' differ only in case, spaces, hyphens or "
                f"underscores; remove one with --ignore_columns {shlex.quote(twins[0])}"
            )


def mend(names: list[str], paired: bool | None) -> str:
    """Return advice for a table whose columns are not recognized."""
    held: dict[str, list[str]] = {}
    for column in names:
        held.setdefault(seems_to_hold(column), []).append(column)
    anchors, positives, others = (held.get(role, []) for role in ("anchor", "positive", "text"))
    texts = [column for column in names if column in (*anchors, *positives, *others)]
    if paired is False:
        return f"name the column with {flag((texts or ['COLUMN'])[0])}; recognized names are text and sentence"
    accepted = f"recognized columns are {ACCEPTED if paired is None else ACCEPTED.removeprefix('text; ')}"
    judging = held.get(JUDGMENT)
    if len(texts) < 2:  # the name of the other column may be that of texts, too, such as target or paraphrase
        perhaps = f"if '{judging[0]}' holds texts, give {flag(texts[0], judging[0])}; " if texts and judging else ""
        return f"a pair needs two columns of texts; {perhaps}train on single texts with unsup-simcse; {accepted}"
    beside = f"; keep only the pairs that '{judging[0]}' marks as a match; the others are not positives" if judging else ""
    anchor = (anchors or others or positives)[0]
    positive = next(column for column in (*positives, *others, *anchors) if column != anchor)
    return f"name the columns with {flag(anchor, positive, *held.get('negative', []))}{beside}; {accepted}"


def flag(*columns: str) -> str:
    """Return the `--columns` flag that names these columns, and other ways to name them.

    One column holds single texts. Several columns are an anchor, a positive and any negatives, in this order.
    """
    roles = ["text"] if len(columns) == 1 else ["anchor", "positive", *["negative"] * (len(columns) - 2)]
    given = " ".join(shlex.quote(f"{role}={column}") for role, column in zip(roles, columns))
    return f"--columns {given} {NAMED_OTHERWISE}"


def judging_columns(names: list[str]) -> list[str]:
    """Return the columns whose names say that they judge pairs."""
    return [column for column in names if seems_to_hold(column) == JUDGMENT]


def judging_values(rows: Dataset | list[dict], unused: Sequence[str]) -> dict[str, list[str]]:
    """Return the unused columns whose values look like judgments of pairs, with their different values.

    Such a column has few different values, which are all numbers from -100 to 100, or all truth values. A column of ids, or
    one in which hardly any value repeats, does not count.

    Args:
        rows: a table, of which evenly spaced rows are looked at; or the first rows of a stream.
        unused: the columns to look at.
    """
    unused = [column for column in unused if seems_to_hold(column) != NO_TEXT]
    if isinstance(rows, Dataset):
        kinds = {column: rows.features[column] for column in unused if not has_times(rows, column)}
        unused = [column for column, kind in kinds.items() if isinstance(kind, Value | ClassLabel)]
        if not unused:  # a table with an order of its own (after `shuffle`) cannot be read without columns
            return {}
        step = max(1, -(-len(rows) // LOOKED_AT))
        table = rows.select_columns(unused).select(range(0, len(rows), step))[:]
        named = {column: ["", *kind.names] for column, kind in kinds.items() if isinstance(kind, ClassLabel)}  # -1: no label
        table |= {column: [names[0 if cell is None else cell + 1] for cell in table[column]] for column, names in named.items()}
    else:
        table = {column: [row.get(column) for row in rows] for column in unused}
    found = {}
    for column, cells in table.items():
        words = [str(cell).strip().lower() for cell in cells if isinstance(cell, str | Number)]
        words = [word for word in words if word not in ("", "nan")]
        values = sorted(set(words))
        numbers = all(re.fullmatch(r"-?\d{1,3}(\.\d+)?", value) and abs(float(value)) <= 100 for value in values)
        if 2 <= len(values) <= min(FEW_VALUES, len(words) // 2) and (numbers or TRUTHS.issuperset(values)):
            found[column] = values
    return found


def has_times(rows: Dataset, column: str) -> bool:
    """Return whether the cells of a column hold dates or times, some of which Python cannot represent."""
    return re.search(r"Value\('(timestamp|date|time|duration)", repr(rows.features[column])) is not None


def judged_in_words(column: str, values: Sequence[str]) -> str:
    """Describe an unused column whose values look like judgments, with both mends."""
    return (
        f"the column '{column}' is not used, but its values ({', '.join(values)}) may judge the pairs, and every pair is a "
        f"positive; learn from it by scored-pairs and --columns {shlex.quote(f'score={column}')}, or give "
        f"--ignore_columns {shlex.quote(column)} if all pairs belong together"
    )


def warn_of_judgements(rows: Dataset | list[dict], unused: Sequence[str], name: str) -> None:
    """Log a warning for each unused column of pairs whose values look like judgments of the pairs."""
    for column, values in judging_values(rows, unused).items():
        logger.warning(f"{name}: {judged_in_words(column, values)}")


def refuse_judgements(unused: list[str], name: str) -> None:
    """Raise InputError if an unused column judges the pairs.

    A pair with label 0 is not a positive pair, but the training would treat it as one.
    """
    if judging := judging_columns(unused):
        raise InputError(
            f"{name}: the column '{judging[0]}' judges the pairs, but training does not use it and would treat every pair "
            f"as a positive; keep only the matching pairs, and remove the column with --ignore_columns {' '.join(judging)} (or "
            "leave it out of --columns, or ignore_columns: in a sources file, or remove_columns of a Dataset); to learn from "
            "graded pairs, use scored-pairs or the objective CoSENT"
        )


# ---- columns that the user names ----


def read_columns(given: list[str]) -> dict[str, str | list[str]]:
    """Read `--columns anchor=question positive=answer` as {"anchor": "question", "positive": "answer"}.

    Negatives may have several columns: each is given as its own negative=COLUMN.

    Raises:
        InputError: if a word lacks the role or the column, a role is unknown, or a role is given twice.
    """
    columns: dict[str, Any] = {}
    for word in given:
        role, _, column = word.partition("=")
        if not role or not column:
            raise InputError(f"--columns {word}: give ROLE=COLUMN, for example anchor=question positive=answer")
        if role not in ROLES:
            raise InputError(f"--columns {word}: unknown role '{role}'; use one of {', '.join(ROLES)}")
        if role in columns and ROLES[role] != "negative":
            raise InputError(f"--columns: the role {role} is given twice, as {columns[role]} and as {column}; give it once")
        columns[role] = [*columns.get(role, []), column] if ROLES[role] == "negative" else column
    return columns


def take_columns(rows: Dataset | IterableDataset, columns: dict) -> Dataset | IterableDataset:
    """Select and rename the columns that `columns` maps: query (or anchor), positive, negative (one, or a list), or text.

    If it maps only a score, the columns of texts are recognized by their names. Columns of a teacher's scores are kept.

    Raises:
        InputError: if a role is unknown, a role is given under both of its names, a column does not exist, the roles do not
            form a row, or an unused column judges the pairs.
    """
    if not isinstance(columns, dict) or not columns or not all(is_one_of(role, ROLES) for role in columns):
        raise InputError(f"columns: expected a mapping from {', '.join(ROLES)} to the file's columns")
    found = column_names(rows)
    if {ROLES[key] for key in columns} == {"score"}:
        columns = with_known_texts(columns, found)
    names = new_names(columns)
    if missing := [column for column in names if column not in found]:
        raise InputError(f"there is no column '{missing[0]}'; found {', '.join(found)}")
    roles = {ROLES[key] for key in columns}
    if roles != {"text"} and ("text" in roles or not {"anchor", "positive"} <= roles):
        raise InputError(
            f"columns: the roles are {', '.join(columns)}; give anchor and positive (and negative, if any), or only text"
        )
    if len(names) > 1:
        unused = [column for column in found if column not in names]
        refuse_judgements(unused, "columns")
        if unused and "score" not in roles:
            warn_of_judgements(rows if isinstance(rows, Dataset) else list(islice(rows, FIRST_ROWS)), unused, "columns")
    scores = [column for column in found if is_teacher_score(column) and column not in names and len(names) > 1]
    rows = rows.select_columns([*names, *scores])
    # Rename in two steps, because a stream cannot swap two names in one step.
    rows = rows.rename_columns({old: f"{new} of {old}" for old, new in names.items()})
    return rows.rename_columns({f"{new} of {old}": new for old, new in names.items()})


def with_known_texts(columns: dict, found: list[str]) -> dict:
    """Return `columns` with the roles of the columns of texts, as far as the names in `found` are known."""
    texts = [column for column in found if column not in columns.values()]
    pair = pair_of(texts, "columns")
    if pair is None:
        return columns
    return {"anchor": pair[0], "positive": pair[1], "negative": negative_columns(texts)} | columns


def named_columns(rows: Dataset, given: list[str], name: str) -> Dataset:
    """Return rows with only the columns that `--columns` names, or with all columns if the flag is empty.

    `name` is the name of the rows in messages.
    """
    with errors_of(name):
        return take_columns(rows, read_columns(given)) if given else rows


def new_names(columns: dict) -> dict[str, str]:
    """Return a mapping from each column named in `columns` to its new name."""
    names: dict[str, str] = {}
    for key, taken in columns.items():
        if isinstance(taken, list) and ROLES[key] != "negative":
            raise InputError(f"columns: {key} is {taken!r}; give one column; only negatives may have several")
        taken = taken if isinstance(taken, list) else [taken]
        for i, column in enumerate(taken, 1):
            if not isinstance(column, str):
                raise InputError(f"columns: {key} is {columns[key]!r}; give the name of a column, in quotes")
            if column in names:
                raise InputError(f"columns: '{column}' is named twice; name it once")
            names[column] = ROLES[key] if len(taken) == 1 else f"{ROLES[key]}_{i}"
    if len(set(names.values())) < len(names):
        raise InputError(
            "columns: two roles mean the same (query and anchor, for example, or negative and negatives); give only one of them"
        )
    return names
