"""Which columns of a table hold which texts: the layouts that are known by name, and the columns that a user names.

Two kinds of layouts are known, and names are compared without case, spaces, hyphens and underscores. Of those that name their
positives (LAYOUTS) the first match is taken, whatever other columns there are. Those that only describe what the texts are
(DESCRIBED) are taken where nothing else could be meant: a table of question, answer and context has two pairs, and is refused.
Whatever has other names is named by the user: `--columns anchor=frage positive=antwort`.
"""

import logging
import re
import shlex
from typing import Any

from datasets import Dataset, IterableDataset

from hf_embed.data.files import NEGATIVE, SEPARATOR_NAMES, other_separator, shortened
from hf_embed.distributed import get_rank
from hf_embed.errors import InputError
from hf_embed.ranges import is_one_of

logger = logging.getLogger(__name__)

ACCEPTED = (
    "text; sent0, sent1[, hard_neg]; anchor, positive[, negative...]; query, positive[, negative...]; question, answer and "
    "others that README.md lists"
)
SINGLE = ("text", "sentence")
ANCHORS, POSITIVES = ("anchor", "query", "question"), ("positive", "positives", "pos")
LAYOUTS = [
    *((anchor, positive) for anchor in ANCHORS[:2] for positive in POSITIVES),
    ("sent0", "sent1"),
    *(("question", positive) for positive in POSITIVES),
    ("anchor", "entailment"),
    ("premise", "entailment"),
]
# Pairs of one kind of text, which a column of labels may call the same or not; `hf_embed.data.labelled` reads those.
INFERENCE = ("premise", "hypothesis")  # without a label it is not said what these are to each other
ALIKE = [
    ("sentence1", "sentence2"),
    ("sentencea", "sentenceb"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("title1", "title2"),
    ("caption1", "caption2"),
]
DESCRIBED = [
    *((query, document) for query in ("question", "query") for document in ("answer", "passage", "document", "context")),
    ("title", "body"),
    ("title", "abstract"),
    ("summary", "article"),
    ("comment", "code"),
    *ALIKE,
]
# A table with a column text has single texts, unless pairs are asked for.
WITH_TEXT = [("title", "text")]
# A column that judges a pair has one of these words in its name: label, gold_label, is_duplicate, relevance_score ...
JUDGING = {"label", "labels", "score", "scores", "similarity", "sim", "gold", "duplicate", "paraphrase", "relevance",
           "relevant", "relatedness", "entailment", "judgment", "judgement", "grade", "rating", "target", "y"}  # fmt: skip
GRADES = {"score", "scores", "similarity", "sim", "relatedness", "rating"}
# A teacher's scores of texts that are known to be positives or negatives judge no pair.
TEACHER = re.compile(r"(pos|neg)(itive|ative)?s?_scores?", re.IGNORECASE)
# Columns of these names hold no texts to train on.
NO_TEXT = {"id", "ids", "idx", "index", "url", "urls", "link", "lang", "language", "date", "split", "unnamed", "type", "genre",
           "uid", "key", "hash", "number", "nr"}  # fmt: skip
# A name of more words than these may be a text, of a file without a header.
NAME_WORDS = 4
# What the user may call a column, and what it is called from then on.
ROLES = {"text": "text", "anchor": "anchor", "query": "anchor", "positive": "positive", "positives": "positive",
         "negative": "negative", "negatives": "negative"}  # fmt: skip


def plain(column: str) -> str:
    """Return a name without case, spaces, hyphens and underscores: "Sentence 1" is "sentence1"."""
    return re.sub(r"[\s_-]+", "", column).lower()


def words_of(column: str) -> list[str]:
    """Return the words of a name in lower case: relevanceScore is relevance, score."""
    return re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower())


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns, of a stream that does not know them those of its first row."""
    return rows.column_names or list(next(iter(rows)))


# ---- the layouts ----


def text_columns(names: list[str], name: str, paired: bool | None = None) -> list[str]:
    """Choose the columns that hold texts, in the order anchor, positive, negatives.

    Args:
        names: of all columns.
        name: what messages call the rows.
        paired: True asks for anchor and positive, False for single texts, None takes what is there.

    Raises:
        InputError: there are no such columns, several could be meant, or one judges the pairs, which then may not all be
            positives.
    """
    found = {column.lower(): column for column in names}
    single = next((found[column] for column in SINGLE if column in found), None)
    if single is None and len(names) == 1:
        single = names[0]
        if separator := other_separator(single):
            raise InputError(
                f"{name}: there is one column, '{shortened(single)}'; its name holds {SEPARATOR_NAMES[separator]}, "
                "which looks like the file's separator: write the file again, or rename the column"
            )
    pair = None if paired is False else pair_of(names, name, None if paired else single)
    if pair is not None:
        columns = pair + negative_columns(names)
    elif paired is not True and single is not None:
        columns = [single]
    else:
        header = ""
        if any(len(column.split()) > NAME_WORDS for column in names):
            header = "the first row of a file names its columns: if it is data, put a header above it; else "
        raise InputError(f"{name}: found the columns {', '.join(names)}; {header}{mend(names, paired)}")
    refuse_twins(names, columns, name)
    ignored = [column for column in names if column not in columns]
    if len(columns) > 1:
        refuse_judgements(ignored, name)
    if ignored and get_rank() == 0:
        logger.warning(f"{name}: columns {', '.join(ignored)} are not used")
    return columns


def pair_of(names: list[str], name: str, single: str | None = None) -> list[str] | None:
    """Return the columns of anchors and positives, None where there are none; `single` is a column of texts by themselves.

    Raises:
        InputError: several pairs could be meant, or single texts.
    """
    found = {plain(column): column for column in reversed(names)}

    def matches(layouts: list[tuple[str, str]]) -> list[list[str]]:
        return [[found[column] for column in pair] for pair in layouts if found.keys() >= set(pair)]

    if named := matches(LAYOUTS):
        return named[0]
    described = matches(DESCRIBED if single else DESCRIBED + WITH_TEXT)
    if single is not None:
        described += [[single, found[positive]] for positive in POSITIVES if positive in found]
    meant = [*described, [single]] if described and single is not None else described
    if len(meant) > 1:
        raise InputError(
            f"{name}: found the columns {', '.join(names)}; {' or '.join(' and '.join(columns) for columns in meant)} could be "
            f"meant; name them: {flag(*meant[0])}"
        )
    return described[0] if described else None


def negative_columns(names: list[str]) -> list[str]:
    """Return the columns of negatives, negative_10 behind negative_9; beside entailments, contradictions are negatives."""
    negatives = [column for column in names if NEGATIVE.fullmatch(column)]
    if "entailment" in map(plain, names):
        negatives += [column for column in names if plain(column) == "contradiction"]
    return sorted(negatives, key=lambda column: [int(digits) for digits in re.findall(r"\d+", column)])


def refuse_twins(names: list[str], columns: list[str], name: str) -> None:
    """Refuse a column whose name is the same as another's: either could be meant."""
    for column in columns:
        if twins := [other for other in names if other != column and plain(other) == plain(column)]:
            raise InputError(
                f"{name}: the columns '{column}' and '{twins[0]}' have the same name but for case and spaces; leave one out by "
                f"--ignore_columns {shlex.quote(twins[0])}"
            )


def mend(names: list[str], paired: bool | None) -> str:
    """Return what to do about columns that are not known."""
    judging = judging_columns(names)
    texts = [column for column in names if column not in judging and not NO_TEXT.intersection(words_of(column))]
    negatives = [column for column in texts if NEGATIVE.fullmatch(column)]
    texts = [column for column in texts if column not in negatives]
    if paired is False:
        return f"name them: {flag((texts or ['COLUMN'])[0])}; known by name are text or sentence"
    accepted = f"known by name are {ACCEPTED if paired is None else ACCEPTED.removeprefix('text; ')}"
    if len(texts) < 2:
        return f"a pair needs two columns of texts, and single texts are for unsup-simcse; {accepted}"
    beside = f"; a pair that '{judging[0]}' calls no match is no positive: keep the true ones" if judging else ""
    return f"name them: {flag(*texts[:2], *negatives)}{beside}; {accepted}"


def flag(*columns: str) -> str:
    """Return the flag that names a column of texts, or those of anchors, positives and negatives; and its other forms."""
    roles = ["text"] if len(columns) == 1 else ["anchor", "positive", *["negative"] * (len(columns) - 2)]
    given = " ".join(shlex.quote(f"{role}={column}") for role, column in zip(roles, columns))
    return f"--columns {given} (columns: in a sources file, rename_columns of a Dataset)"


def judging_columns(names: list[str]) -> list[str]:
    """Return the columns that by their names judge pairs."""
    return [column for column in names if JUDGING.intersection(words_of(column)) and not TEACHER.fullmatch(column)]


def refuse_judgements(unused: list[str], name: str) -> None:
    """Refuse a column that judges the pairs: a pair of label 0 is none, and trained on as it stands it would be a positive."""
    if judging := judging_columns(unused):
        scores = "; --eval_sts_file scores a model on graded pairs" if GRADES.intersection(words_of(judging[0])) else ""
        raise InputError(
            f"{name}: the column '{judging[0]}' judges the pairs and would not be used: every pair would be trained as a "
            f"positive; keep the true pairs, and leave it out by --ignore_columns {' '.join(judging)} (ignore_columns: in a "
            f"sources file, remove_columns of a Dataset){scores}"
        )


# ---- columns that the user names ----


def read_columns(given: list[str]) -> dict[str, str | list[str]]:
    """Read `--columns anchor=question positive=answer` as {"anchor": "question", "positive": "answer"}.

    Negatives may have several columns, each with its own negative=COLUMN.

    Raises:
        InputError: a word without a role or a column, an unknown role, or a role given twice.
    """
    columns: dict[str, Any] = {}
    for word in given:
        role, _, column = word.partition("=")
        if not role or not column:
            raise InputError(f"--columns {word}: give ROLE=COLUMN, for example anchor=question positive=answer")
        if role not in ROLES:
            raise InputError(f"--columns {word}: unknown role '{role}'; there are {', '.join(ROLES)}")
        if role in columns and ROLES[role] != "negative":
            raise InputError(f"--columns: {role} is given twice, {columns[role]} and {column}; give one")
        columns[role] = [*columns.get(role, []), column] if ROLES[role] == "negative" else column
    return columns


def take_columns(rows: Dataset | IterableDataset, columns: dict) -> Dataset | IterableDataset:
    """Select and rename the columns that `columns` maps: query (or anchor), positive, negative (one, or a list), or text.

    Raises:
        InputError: an unknown role, two names of one role, a column that is not there, or roles that make no row.
    """
    if not isinstance(columns, dict) or not columns or not all(is_one_of(role, ROLES) for role in columns):
        raise InputError(f"columns: expected a mapping from {', '.join(ROLES)} to the file's columns")
    names = new_names(columns)
    found = column_names(rows)
    if missing := [column for column in names if column not in found]:
        raise InputError(f"no column '{missing[0]}'; found {', '.join(found)}")
    roles = {ROLES[key] for key in columns}
    if roles != {"text"} and ("text" in roles or not {"anchor", "positive"} <= roles):
        raise InputError(f"columns: found {', '.join(columns)}; give anchor and positive, also negative, or text alone")
    if len(names) > 1:
        refuse_judgements([column for column in found if column not in names], "columns")
    rows = rows.select_columns(list(names))
    # In two steps, for a stream cannot swap two names in one.
    rows = rows.rename_columns({old: f"{new} of {old}" for old, new in names.items()})
    return rows.rename_columns({f"{new} of {old}": new for old, new in names.items()})


def named_columns(rows: Dataset, given: list[str], name: str) -> Dataset:
    """Return rows with the columns that `--columns` names, all where it names none; `name` is what messages call the rows."""
    try:
        return take_columns(rows, read_columns(given)) if given else rows
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def new_names(columns: dict) -> dict[str, str]:
    """Return the new name of each column that `columns` maps."""
    names: dict[str, str] = {}
    for key, taken in columns.items():
        if isinstance(taken, list) and ROLES[key] != "negative":
            raise InputError(f"columns: {key} is {taken!r}; give one column, only negatives may have several")
        taken = taken if isinstance(taken, list) else [taken]
        for i, column in enumerate(taken, 1):
            if not isinstance(column, str):
                raise InputError(f"columns: {key} is {columns[key]!r}; give the name of a column, in quotes")
            if column in names:
                raise InputError(f"columns: '{column}' is named twice")
            names[column] = ROLES[key] if len(taken) == 1 else f"{ROLES[key]}_{i}"
    if len(set(names.values())) < len(names):
        raise InputError(
            "columns: query and anchor are two names of one thing, as are negative and negatives; give one of them"
        )
    return names
