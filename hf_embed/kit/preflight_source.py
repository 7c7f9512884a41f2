"""The preflight of one source of training rows: what is wrong with it, its text lengths and its false negatives.

All rows are read and compared by hashes (`hf_embed.kit.row_hashes`). A random sample of the rows is tokenized, and the texts
of the sample are compared piece by piece. Rows are read as the training reads them, and what the training refuses is refused
here too, with two exceptions: rows with an empty text are counted, and scores are not read.

Shapes: R training rows, M negatives of all rows, T texts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow
from datasets import Dataset

from hf_embed.data.columns import judging_values
from hf_embed.data.labeled import NEGATIVE, POSITIVE, Layout, hashable, labeled_layout, meanings_of
from hf_embed.data.mixture import Source, source_rows, source_tokenizer
from hf_embed.data.stream import Stream
from hf_embed.data.text_files import as_column, features_of
from hf_embed.data.tokenization import RowTokenizer, columns_to_read, text_id, too_few_rows
from hf_embed.encoder import Encoder
from hf_embed.encoding import beginning
from hf_embed.kit.false_negatives import equal_candidates, guessing, in_a_batch, uses_batch
from hf_embed.kit.row_hashes import (
    Ids,
    RowIds,
    Texts,
    batches,
    exact_ids,
    hash_rows,
    in_parts,
    looked_up,
    plain_texts,
    repeated,
    row_ids,
)
from hf_embed.kit.similar import similar_pairs
from hf_embed.objectives import Objective, SimCSE
from hf_embed.progress import progress_bar

SAMPLE, CHARACTERS = 20_000, 20_000_000  # a sample has so many rows or, if texts are long, about so many characters
VARIANTS = 20_000  # tokenize at most so many texts to see which ones are equal to the model
QUANTILES = (0.5, 0.9, 0.95, 0.99)
LONGEST = 2048  # count lengths up to so many tokens, or up to 4 times the maximum length if that is more
ROLES = ("anchor", "positive", "negative")
# Words that pandas writes for a missing value, or reads as one.
MISSING_WORDS = ["nan", "NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaT"]


@dataclass(frozen=True)
class Settings:
    """The settings of the training that a preflight needs.

    Args:
        objectives: losses by name.
        batches: sizes of a batch, in rows on all ranks together.
        sample: number of rows to tokenize. 0 means all. None means `SAMPLE` or, if texts are long, as many rows as have
            about `CHARACTERS` characters.
        masks_answers: whether the loss masks other positives of the same anchor.
        teacher: the model that scores texts whose source has no scores.
    """

    objectives: Mapping[str, Objective] = field(default_factory=dict)
    batches: tuple[int, ...] = (64,)
    sample: int | None = None
    masks_answers: bool = True
    teacher: str | None = None


@dataclass(frozen=True)
class Subject:
    """The rows of one source, prepared as for the training.

    Args:
        name: name of the source.
        where: what messages call the rows.
        rows: a table with `columns`.
        columns: the columns of anchors, positives and negatives, in this order.
        tokenizer: tokenizer with the source's prompts and maximum length.
        negatives: how many negatives of each row are used. None means all.
        about: the part of the report that is known before the texts are read.
        in_batch: whether the texts of other rows are negatives.
    """

    name: str
    where: str
    rows: Dataset
    columns: list[str]
    tokenizer: RowTokenizer
    negatives: int | None
    about: dict[str, Any]
    in_batch: bool

    def texts(self, rows: Dataset) -> Iterator[Texts]:
        """Read the texts of `rows`, a part of the source or all of it."""
        return batches(rows, self.columns, self.where, self.negatives)


def make_subject(
    source: Source, encoder: Encoder, settings: Settings, where: str | None = None, paired: bool | None = None
) -> Subject:
    """Prepare a source as the training does.

    Args:
        source: a source with a table or a stream. Of a stream, only the first `settings.sample` rows are read: the first
            `SAMPLE` rows if `settings.sample` is None, and all rows if it is 0.
        encoder: its tokenizer, maximum length and prompts are used.
        settings: the settings of the training.
        where: what messages call the rows. Default: the source's label.
        paired: see `hf_embed.data.columns.text_columns`.

    Raises:
        InputError: if the training would refuse the rows for any reason other than empty texts.
    """
    where, rows = where or source.label, source.rows
    objective = source.own_objective or next(iter(settings.objectives.values()), SimCSE())
    tokenizer = source_tokenizer(source, encoder, objective, settings.teacher)
    taken = source_rows(source, tokenizer, where, paired, drop_empty_rows=True)
    about: dict[str, Any] = {"from": source.origin}
    scores: list[str] = []
    if not isinstance(rows, Dataset):
        columns = Stream(source, tokenizer, rank=0, ranks=1, seed=0, buffer_size=1, drop=True).columns
        limit = SAMPLE if settings.sample is None else settings.sample or None  # None: all rows
        taken = rows = in_memory(list(islice(rows, limit)))
        if limit is not None:
            about["first_rows_of_a_stream"] = len(rows)
    else:
        columns, scores = columns_to_read(cast(Dataset, taken), tokenizer.scored, where, paired)
    known = columns
    if taken is not rows:
        layout = cast(Layout, labeled_layout(rows.column_names, where))
        known, about = list(layout), about | about_labels(rows, layout, where)
    about["columns"] = {column: role(i, len(columns)) for i, column in enumerate(known)} | dict.fromkeys(scores, "score")
    if known is not columns:
        about["columns"][known[-1]] = "label"
    about["unused"] = [column for column in rows.column_names if column not in about["columns"]]
    about["judged"] = judging_values(rows, about["unused"]) if len(columns) > 1 and known is columns and not scores else {}
    return Subject(source.name, where, taken, columns, tokenizer, source.negatives, about, uses_batch(objective))


def in_memory(rows: list[dict]) -> Dataset:
    """Return rows as a table whose columns have the types that they would have in a file with these rows."""
    features = features_of(rows)
    columns = [as_column([row.get(name) for row in rows], feature) for name, feature in features.items()]
    return Dataset(pyarrow.table(columns, schema=features.arrow_schema))


def role(place: int, columns: int) -> str:
    """Return the role of the column at position `place`: anchor, positive, negative, or text if it is the only column."""
    return ROLES[min(place, 2)] if columns > 1 else "text"


def about_labels(rows: Dataset, layout: Layout, where: str) -> dict[str, Any]:
    """Count labeled pairs and their labels, and list the numbers, from 0, of the pairs that an empty text excludes."""
    labels, meanings = rows[layout.label][:], meanings_of(rows, layout, where).of
    empty = [number for texts in batches(rows, [layout.first, layout.second], where) for number in texts.empty.tolist()]
    used = [number for number in empty if meanings[hashable(labels[number])] in (POSITIVE, NEGATIVE)]
    return {"labeled_pairs": len(rows), "labels": dict(sorted(Counter(map(str, labels)).items())), "empty_pairs": used}


# ---- one source ----


def check_source(subject: Subject, settings: Settings) -> tuple[dict[str, Any], Ids, RowIds]:
    """Read the rows of a source, and make the part of the report about it.

    Returns:
        The report about the source, the hashes of its rows, and the hashes of its texts. The report is

            {"rows": 9, "training_rows": 9, "texts": 27,   one training row per positive; rows with an empty text are left out
             "empty": {"count": 1, "rows": [4]},           `rows` are the numbers of the first ones, from 1
             "duplicates": {"count": ..., "rows": ...},    rows that equal an earlier row; also the others of `equal_texts`
             "sample": {"rows": ..., "truncated": {"all": 0.01, ...}, ...},    see `check_sample`
             "batches": [{"batch": 64, ...}], ...}                             see `check_batches`
    """
    ids = hash_rows(subject.texts(subject.rows))
    whole = row_ids(ids)
    found = dict(subject.about) | {
        "rows": subject.about.get("labeled_pairs", len(subject.rows)),
        "training_rows": len(ids.origins),
        "texts": len(ids.everything("exact")),
        "negatives_per_row": round(len(ids.owners) / max(1, len(ids.origins)), 4),
        "repeated_anchors": len(ids.origins) - len(np.unique(ids.anchors.exact)),
        "empty": numbered(np.array(subject.about.get("empty_pairs", ids.empty), dtype=int)),
        "odd": {name: {"count": ids.odd[name], "rows": [ids.first_odd[name] + 1]} for name in ids.odd},
    }
    if len(ids.origins) < 2 and not found["empty"]["count"] and "first_rows_of_a_stream" not in found:
        raise too_few_rows(len(ids.origins), subject.where)
    found |= {name: numbered(ids.origins[places]) for name, places in equal_texts(ids, whole).items()}
    size = settings.sample
    if size is None:
        size = min(SAMPLE, 1 + CHARACTERS * len(subject.rows) // max(1, ids.characters))
    found["sample"] = check_sample(subject, size)
    found["batches"] = check_batches(subject, ids, settings) if subject.in_batch and len(ids.origins) > 1 else []
    return found, whole, ids


def numbered(rows: np.ndarray) -> dict[str, Any]:
    """Return the number of rows, and the numbers of the first five rows, counted from 1."""
    return {"count": len(rows), "rows": [int(row) + 1 for row in rows[:5]]}


def equal_texts(ids: RowIds, whole: Ids) -> dict[str, np.ndarray]:
    """Return the training rows that equal an earlier row, or that contain equal or odd texts, by the code of the finding."""
    again = repeated(whole.exact)
    found = {"duplicates": np.flatnonzero(again), "near_duplicates": np.flatnonzero(repeated(whole.plain) & ~again)}
    words = exact_ids(MISSING_WORDS)
    found["missing_word"] = np.unique(ids.row_of_each()[np.isin(ids.everything("exact"), words)])
    if ids.positives is not None:
        anchors, positives, negatives = ids.anchors.plain, ids.positives.plain, ids.negatives.plain
        found["positive_is_anchor"] = np.flatnonzero(anchors == positives)
        found["negative_is_positive"] = np.unique(ids.owners[negatives == positives[ids.owners]])
        found["negative_is_anchor"] = np.unique(ids.owners[negatives == anchors[ids.owners]])
    return found


# ---- the sample ----


def check_sample(subject: Subject, size: int) -> dict[str, Any]:
    """Tokenize `size` random rows, or all rows if `size` is 0, and look for similar texts among them."""
    rows = len(subject.rows)
    if 0 < size < rows:
        chosen = subject.rows.select(np.sort(np.random.default_rng(0).choice(rows, size, replace=False)))
    else:
        chosen = subject.rows
    longest = max(LONGEST, 4 * subject.tokenizer.max_length)
    lengths: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    words: dict[str, str] = {}  # one text for each different wording (`plain_texts`)
    for texts in progress_bar(subject.texts(chosen), desc=f"Tokenizing {subject.name}", unit="batch"):
        for role, part in zip(ROLES, (texts.anchors, texts.positives, texts.negatives)):
            if part:
                prompt = subject.tokenizer.query_prompt if role == "anchor" else subject.tokenizer.document_prompt
                lengths[role].append(token_counts(part, prompt, longest, subject.tokenizer))
                words |= zip(plain_texts(part), part)
    by_role = {role: np.concatenate(parts) for role, parts in lengths.items() if parts}
    everything = np.concatenate([np.array([], int), *by_role.values()])
    similar, pairs = similar_pairs(list(words))
    shown = list(words.values())
    return {
        "rows": len(chosen),
        "texts": len(everything),
        "max_length": subject.tokenizer.max_length,
        "told_apart_up_to": longest,
        "without_a_token": int((everything == 0).sum()),
        "tokens": {role: quantiles(part) for role, part in by_role.items()} | {"all": quantiles(everything)},
        "truncated": {role: share(part > subject.tokenizer.max_length) for role, part in by_role.items()}
        | {"all": share(everything > subject.tokenizer.max_length)},
        "histogram": histogram(everything),
        "different_texts": len(words),
        "similar": int(similar.sum()),
        "similar_pairs": [[shown[first], shown[second]] for first, second in pairs[:3]],
    }


def token_counts(texts: list[str], prompt: str, longest: int, tokenizer: RowTokenizer) -> np.ndarray:
    """Return the number of tokens of each text with its prompt. Numbers above `longest` become `longest + 1`."""
    prompted = [beginning(prompt + text, longest, tokenizer.tokenizer) for text in texts]
    ids = tokenizer.tokenizer(prompted, verbose=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    return np.minimum([len(tokens) for tokens in ids], longest + 1)


def share(found: np.ndarray) -> float:
    """Return the share of True values, rounded to six digits; 0 for an empty array."""
    return round(float(found.mean()), 6) if len(found) else 0.0


def quantiles(lengths: np.ndarray) -> dict[str, float]:
    """Return the number of lengths, their mean, their quantiles (each is the length of a text) and the largest one."""
    if not len(lengths):
        return {}
    found = {f"{level:.0%}": int(np.quantile(lengths, level, method="inverted_cdf")) for level in QUANTILES}
    return {"texts": len(lengths), "mean": round(float(lengths.mean()), 2), **found, "longest": int(lengths.max())}


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Return a histogram of lengths in tokens. A bin includes its lower edge, and not its upper edge."""
    if not len(lengths):
        return {"edges": [], "counts": []}
    width = max(1, -(-int(lengths.max() + 1) // 40))
    edges = np.arange(0, lengths.max() + width + 1, width)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


# ---- batches ----


def check_batches(subject: Subject, ids: RowIds, settings: Settings) -> list[dict[str, Any]]:
    """Return what a batch of random rows contains on average, for each batch size.

    The candidates of a batch are all its positives and hard negatives. For each row, those of the other rows are counted:

    equal       candidates with the token ids of the row's anchor or positive. The loss masks them
    answers     candidates that are another positive of the same anchor. The loss masks them too, except SimCSE without
                mask_other_positives
    near        candidates with the words, but not the token ids, of the row's anchor or positive. They are trained on as
                negatives
    guessing    the loss of a model that gives all texts the same embedding, by the name of the objective
    """
    rows = len(ids.origins)
    anchors, negatives = ids.anchors, ids.negatives
    positives = anchors if ids.positives is None else ids.positives
    known = tokens_as_ids(subject, ids)
    by_tokens = tuple(looked_up(part.exact, *known, otherwise=part.exact) for part in (anchors, positives, negatives))
    equal, answers = equal_candidates(by_tokens[0], by_tokens[1], by_tokens[2], ids.owners)
    near, _ = equal_candidates(anchors.plain, positives.plain, negatives.plain, ids.owners)
    found = []
    for batch in settings.batches:
        counts = {"equal": equal, "answers": answers, "near": near - equal}
        most, each = min(batch, rows), len(ids.owners) / rows
        losses = {name: guessing(objective, most, each) for name, objective in settings.objectives.items()}
        found.append({
            "batch": batch, **{name: round(in_a_batch(count, rows, batch), 6) for name, count in counts.items()},
            "guessing": {name: round(loss, 4) for name, loss in losses.items()},
        })  # fmt: skip
    return found


def tokens_as_ids(subject: Subject, ids: RowIds) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the token ids of texts that differ from another text only in case, spaces or punctuation.

    Only the first `VARIANTS` such texts are tokenized. The others count as different to the model.

    Returns:
        The exact hashes of the texts, sorted; and for each the hash of its token ids, uint64.
    """
    exact, plain = ids.everything("exact"), ids.everything("plain")
    variants = [np.array([], int)]
    for places in in_parts(plain):
        _, first = np.unique(exact[places], return_index=True)
        _, which, counts = np.unique(plain[places[first]], return_inverse=True, return_counts=True)
        variants.append(places[first[counts[which] > 1]])
    chosen = np.sort(np.concatenate(variants))[:VARIANTS]
    wanted = exact[chosen]
    by_hash: dict[int, int] = {}
    numbers = np.unique(ids.origins[ids.row_of_each()[chosen]])
    for texts in subject.texts(subject.rows.select(numbers)) if len(numbers) else []:
        everything = texts.everything()
        hashes = exact_ids(everything)
        places = np.flatnonzero(np.isin(hashes, wanted))
        tokens, _ = subject.tokenizer.tokenize([everything[i] for i in places], subject.tokenizer.text_length)
        by_hash |= zip(hashes[places].tolist(), map(text_id, tokens))
    keys = np.sort(np.array(list(by_hash), np.uint64))
    return keys, np.array([by_hash[int(key)] for key in keys], np.int64).view(np.uint64)
