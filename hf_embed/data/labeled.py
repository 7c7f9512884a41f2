"""Conversion of labeled pairs, such as those of SNLI and QQP, to anchors, positives and hard negatives.

    premise, hypothesis, label      also sentence1 and sentence2, question1 and question2, and similar names (`known_columns`);
                                    also labels, gold_label, is_duplicate, is_paraphrase in place of label

        {"premise": "a man plays a guitar", "hypothesis": "a man makes music", "label": "entailment"}
        {"premise": "a man plays a guitar", "hypothesis": "a man is asleep", "label": "contradiction"}
        {"premise": "a man plays a guitar", "hypothesis": "a man is in a band", "label": "neutral"}
    ->  {"anchor": "a man plays a guitar", "positive": ["a man makes music"], "negatives": ["a man is asleep"]}

Pairs with inference labels (entailment, neutral, contradiction) become triplets, as in SimCSE's NLI file
(https://arxiv.org/abs/2104.08821, section 4). The anchor is a premise. Its positives are the hypotheses that it entails. Its
hard negative is the first hypothesis in the file that contradicts it. A premise is left out if it lacks a positive or a
negative. Neutral hypotheses and pairs without a gold label (-1, "-", null) are left out too.

With two labels (1 and 0, or 1 and -1), 1 means that the pair matches. The anchor is the first text of a pair. Its positives are
the texts that match it, and its hard negatives are the texts that do not match it. Pairs that do not match are left out if no
text matches their anchor.

The positives of an anchor are a list. Later, each positive of the list becomes a row of its own (`hf_embed.data.sources`). The
grouping needs all rows, so a stream is refused.

The meaning of a label comes from its word, or from the name that a `ClassLabel` gives to its number. The plain number 1 means
a match, and 0 means no match. If 1 and -1 are the only labels, -1 means no match too. For premise and hypothesis, the plain
numbers 0, 1 and 2 are read in the order of SNLI: 0 entailment, 1 neutral, 2 contradiction. A message says how the labels were
read. All other labels are refused. For example, 0 and 1 without 2 are refused for premise and hypothesis, because 0 is the
entailment in some datasets (RTE) and 1 in others.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from hf_embed.data import text_files
from hf_embed.data.columns import column_names, negative_columns, text_columns
from hf_embed.data.known_columns import ALIKE, DESCRIBED, INFERENCE, LABELS, LAYOUTS, SINGLE, by_plain_name, matching, plain
from hf_embed.data.sources import kept_rows, texts_of
from hf_embed.errors import InputError

logger = logging.getLogger(__name__)

POSITIVE, NEGATIVE, NEUTRAL, NO_LABEL = "positive", "negative", "neutral", "without a label"
EMPTY, TWICE = "with an empty text", "repeated"
BATCH = 10_000  # rows read at a time
LABELS_OF_INFERENCE = {"entailment": POSITIVE, "neutral": NEUTRAL, "contradiction": NEGATIVE}
NUMBERS_OF_INFERENCE = {"0": "entailment", "1": "neutral", "2": "contradiction"}  # as in SNLI
# The words for the two labels of datasets with two labels.
MATCHES = ("1", "true", "yes", "duplicate", "equivalent", "paraphrase", "entailment")
NO_MATCHES = ("0", "-1", "false", "no", "notduplicate", "notequivalent", "notparaphrase", "notentailment")
ABSENT = ("", "-", "-1", "none", "nan")


class Layout(NamedTuple):
    """The columns of labeled pairs."""

    first: str
    second: str
    label: str

    @property
    def inference(self) -> bool:
        """Whether the two columns of texts are premise and hypothesis."""
        return (plain(self.first), plain(self.second)) == INFERENCE


def labeled_layout(names: list[str], name: str) -> Layout | None:
    """Return the columns of labeled pairs, or None if the rows are of another kind.

    Raises:
        InputError: if there are two columns of labels.
    """
    found, pairs = by_plain_name(names), matching([INFERENCE, *ALIKE], names)
    labels = [found[label] for label in LABELS if label in found]
    if len(pairs) != 1 or matching([*LAYOUTS, *DESCRIBED], names) or not labels or negative_columns(names):
        return None
    if len(labels) > 1:
        raise InputError(
            f"{name}: the columns {' and '.join(labels)} all hold labels; remove one with --ignore_columns {labels[1]} "
            "(or ignore_columns: in a sources file)"
        )
    first, second = pairs[0]
    return Layout(first, second, labels[0])


def as_pairs(
    rows: Dataset | IterableDataset, name: str, paired: bool | None = None, drop_empty_rows: bool = False
) -> Dataset | IterableDataset:
    """Convert labeled pairs to rows with anchor, positive and negatives. Return other rows unchanged.

    Args:
        rows: rows with any columns, and without a format.
        name: the name of the rows in messages.
        paired: see `hf_embed.data.columns.text_columns`; with False (single texts) nothing is converted.
        drop_empty_rows: drop and count pairs with an empty text.

    Raises:
        InputError: if the meaning of a label is unknown, no anchor has a positive (and a negative, for inference labels), a
            text is empty, or the labeled pairs are a stream.
    """
    names = column_names(rows)
    layout = None if paired is False else labeled_layout(names, name)
    if layout is None or (paired is None and any(plain(column) in SINGLE for column in names)):
        return rows
    if not isinstance(rows, Dataset):
        raise InputError(
            f"{name}: the labeled pairs of {layout.first}, {layout.second} and {layout.label} are grouped by {layout.first}, "
            "which is not supported for a streaming dataset; remove streaming: true"
        )
    meanings = meanings_of(rows, layout, name)
    groups = grouped(rows, layout, meanings, name, drop_empty_rows)
    kept = groups.rows()
    made = f"{groups.described(kept)}; {meanings.explained}"
    if not kept:
        wanted = "a positive and a negative" if meanings.inference else "a positive"
        raise InputError(
            f"{name}: no {layout.first} has {wanted}: {made}; if every pair is a positive, give "
            f"--ignore_columns {layout.label} --columns anchor={layout.first} positive={layout.second}"
        )
    unused = ", ".join(column for column in names if column not in layout)
    logger.warning(f"{name}: {made}" + (f"; columns {unused} are not used" if unused else ""))
    return cached(kept)


# ---- what labels mean ----


class Meanings(NamedTuple):
    """The meanings of the labels of a table."""

    of: dict[Any, str]  # label -> POSITIVE, NEGATIVE, NEUTRAL or NO_LABEL; a NaN label is stored as None
    inference: bool  # whether the labels are inference labels, whose pairs become triplets
    explained: str


def meanings_of(rows: Dataset, layout: Layout, name: str) -> Meanings:
    """Return what each label in the rows means.

    Raises:
        InputError: if the meaning of a label is unknown.
    """
    texts = texts_of_labels(rows, layout.label)
    absent = words_without_meaning(set(texts.values()), layout, rows.features[layout.label])
    words = set(texts.values()) - absent
    where = f"{name}, column '{layout.label}'"
    if graded := sorted(word for word in words if re.fullmatch(r"\d*\.\d+", word)):
        raise InputError(
            f"{where}: {graded[0]} is a score, which does not say if a pair is a positive or a negative; evaluate on these "
            f"pairs with --eval_sts_file, or keep only similar pairs and remove the column with --ignore_columns {layout.label}"
        )
    written = {text: written_as(label, rows.features[layout.label]) for label, text in texts.items()}
    shown = {word: written[word] for word in words}
    if layout.inference and "2" in words and words <= NUMBERS_OF_INFERENCE.keys():
        inference, known = True, {word: LABELS_OF_INFERENCE[NUMBERS_OF_INFERENCE[word]] for word in words}
        shown = {word: f"{word} ({NUMBERS_OF_INFERENCE[word]})" for word in words}
    elif words <= LABELS_OF_INFERENCE.keys():
        inference, known = True, LABELS_OF_INFERENCE
    elif layout.inference and all(word.isdecimal() for word in words):  # nothing says which number is the entailment
        inference, known = True, {}
    else:
        inference, known = False, dict.fromkeys(MATCHES, POSITIVE) | dict.fromkeys(NO_MATCHES, NEGATIVE)
    if not words or not words <= known.keys():
        some = sorted(shown.values())[:5] + ["..."] * (len(words) > 5)
        raise InputError(f"{where}: the labels are {', '.join(some) or 'all missing'}; {mend_of(words, layout)}")
    parts = {meaning: sorted(shown[word] for word in words if known[word] == meaning) for meaning in (POSITIVE, NEGATIVE)}
    explained = "; ".join(f"{meaning}s have the label {' or '.join(found)}" for meaning, found in parts.items() if found)
    return Meanings({label: NO_LABEL if text in absent else known[text] for label, text in texts.items()}, inference, explained)


def texts_of_labels(rows: Dataset, column: str) -> dict[Any, str]:
    """Return the word of each different label in a column."""
    batches = rows.select_columns(column).iter(BATCH)
    labels = dict.fromkeys(hashable(label) for batch in batches for label in batch[column])
    return {label: text_of(label, rows.features[column]) for label in labels}


def are_graded(rows: Dataset, layout: Layout) -> bool:
    """Return whether the labels are numbers that grade the pairs, such as 0 to 5: they say how similar the texts are."""
    words = set(texts_of_labels(rows, layout.label).values()).difference(ABSENT)
    numbers = all(re.fullmatch(r"\d*\.?\d+", word) for word in words)
    return numbers and not words <= {"0", "1"} and not (layout.inference and words <= {"0", "1", "2"})


def words_without_meaning(words: set[str], layout: Layout, feature: Any) -> set[str]:
    """Return the words that say that a pair has no label. The number -1 is a label if 1 is the only other one."""
    signed = words.difference(ABSENT) == {"1"} and not layout.inference and not isinstance(feature, ClassLabel)
    return set(ABSENT) - {"-1"} if signed else set(ABSENT)


def hashable(label: Any) -> Any:
    """Return a label in a form that can be a dict key: None for NaN, and the repr of a value of an unexpected type."""
    if isinstance(label, float) and math.isnan(label):
        return None
    return label if isinstance(label, str | int | float | None) else repr(label)


def text_of(label: Any, feature: Any) -> str:
    """Return the word of a label: "1" for 1.0, "true" for True, "notentailment" for "Not entailment", a ClassLabel's name."""
    text = written_as(label, feature)
    return text if text in ABSENT or text.startswith("-") else plain(text)  # `plain` removes "-"


def written_as(label: Any, feature: Any) -> str:
    """Return a label as messages show it: "1" for 1.0, "not_entailment" for Not_Entailment, the name of a ClassLabel."""
    if isinstance(feature, ClassLabel) and label is not None and label >= 0:
        label = feature.int2str(label)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(label).strip().lower())


def mend_of(words: set[str], layout: Layout) -> str:
    """Return advice for labels whose meaning is unknown."""
    if words and words <= {"0", "1"} and layout.inference:
        return "entailment is 0 in some datasets and 1 in others; write the words entailment and contradiction"
    return "write entailment, neutral and contradiction, or 1 for a match and 0 for no match"


# ---- grouping the pairs by anchor ----


@dataclass
class Groups:
    """The pairs grouped by anchor, in the order of the file, and counts of the pairs by what happened to them."""

    layout: Layout
    triplets: bool  # keep only anchors with a negative, and one negative per anchor
    positives: dict[str, dict[str, None]] = field(default_factory=dict)  # anchor -> ordered set of texts
    negatives: dict[str, dict[str, None]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, first: str, second: str, meaning: str) -> None:
        """Add a pair as a positive or a negative. A repeated pair is counted as a duplicate."""
        texts = (self.positives if meaning == POSITIVE else self.negatives).setdefault(first, {})
        self.counts[TWICE if second in texts else meaning] += 1
        texts[second] = None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per anchor: its text, its positives and its negatives."""
        kept = []
        for anchor, positives in self.positives.items():
            negatives = list(self.negatives.get(anchor, ()))[: 1 if self.triplets else None]
            if negatives or not self.triplets:
                kept.append({"anchor": anchor, "positive": list(positives), "negatives": negatives})
        return kept

    def described(self, kept: list[dict[str, Any]]) -> str:
        """Describe in words what happened to the pairs. `kept` are the rows that `rows` returns."""
        positives, negatives = (sum(len(row[key]) for row in kept) for key in ("positive", "negatives"))
        made = f"{positives:,} triplets" if self.triplets else f"{positives:,} pairs with {negatives:,} hard negatives"
        alone = sum(len(texts) for anchor, texts in self.negatives.items() if anchor not in self.positives)
        counts = {what: self.counts[what] for what in (NEUTRAL, NO_LABEL, EMPTY, TWICE)} | {
            "positive without a negative": self.counts[POSITIVE] - positives,
            "negative without a positive": alone,
            "additional negative of an anchor": self.counts[NEGATIVE] - negatives - alone,
        }
        left_out = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        return (
            f"{self.counts.total():,} pairs of {self.layout.first} and {self.layout.second} became {made} of {len(kept):,} "
            f"anchors{f'; left out: {left_out}' if left_out else ''}"
        )


def grouped(rows: Dataset, layout: Layout, meanings: Meanings, name: str, drop_empty_rows: bool) -> Groups:
    """Group pairs by their first text.

    Raises:
        InputError: if a text is empty, unless such pairs are dropped.
    """
    groups = Groups(layout, meanings.inference)
    for start, batch in enumerate(rows.select_columns(list(layout)).iter(BATCH)):
        for place, (first, second, label) in enumerate(zip(*(batch[column] for column in layout)), 1):
            meaning = meanings.of[hashable(label)]
            if meaning not in (POSITIVE, NEGATIVE):
                groups.counts[meaning] += 1
                continue
            pair = {layout.first: first, layout.second: second}
            kept = kept_rows(pair, list(pair), f"{name}, row {start * BATCH + place}", drop_empty_rows)
            groups.counts[EMPTY] += not kept
            for texts, _ in kept:
                groups.add(texts[0], texts[1], meaning)
    return groups


def cached(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows as a table in the cache of `datasets`, so that they are tokenized only once for all runs and processes."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(repr(row).encode())
    texts = List(Value("string"))
    features = Features({"anchor": Value("string"), "positive": texts, "negatives": texts})
    return text_files.cached_rows(hashed.hexdigest()[:32], features, rows)


def read_pairs(rows: Dataset, name: str) -> list[tuple[str, str]]:
    """Return the (anchor, positive) pairs of a table. A row with several positives gives a pair for each of them.

    Raises:
        InputError: if the columns are not recognized, or a text is empty.
    """
    rows = as_pairs(rows, name, paired=True)
    return [(anchor, positive) for anchor, positive in texts_of(rows, pair_columns(rows, name), name)]


def pair_columns(rows: Dataset, name: str) -> list[str]:
    """Return the columns of anchors and positives. Warn if there are negatives, which the caller does not use."""
    columns = text_columns(rows.column_names, name, paired=True)
    if negatives := columns[2:]:
        logger.warning(f"{name}: the negatives in {', '.join(negatives)} are not used, only the pairs")
    return columns[:2]
