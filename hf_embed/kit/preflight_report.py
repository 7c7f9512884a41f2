"""The preflight report: all sources and evaluation sets, the findings, the tables and the picture.

A finding is something about a source or an evaluation set that the user should look at. It has one of the codes below.
"Has the words of" means: is equal after differences in case, spaces, punctuation and Unicode forms are removed.

    empty                  rows with an empty text: the training refuses them, or drops them with --drop_empty_rows
    odd                    texts with replacement characters, control characters, or UTF-8 that was read as Latin-1
    missing_word           rows with a text that is only a word for a missing value: nan, NULL, None, N/A ...
    judged                 an unused column whose values look like judgments of the pairs, for example 0 and 1
    duplicates             rows that equal an earlier row
    near_duplicates        rows that do not equal an earlier row, but have the words of one
    shared                 different rows that have the words of a row in another source
    positive_is_anchor     rows whose positive has the words of the anchor
    negative_is_positive   rows with a negative that has the words of the positive
    negative_is_anchor     rows with a negative that has the words of the anchor
    similar                texts of the sample that share 80% of their 5-byte pieces with another, if more than 5% do
    truncated              texts of the sample that are longer than the maximum length, if more than 5% are
    no_token               texts of the sample for which the tokenizer returns no token
    false_negatives        right answers that are trained on as negatives, if a batch has 0.1 or more on average
    few_negatives          more than half of the other rows' texts in a batch are no negatives, because their texts are equal
    few_rows               fewer training rows than the largest batch has
    seen                   texts of an evaluation set whose words are also in the training rows; its documents do not count
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset

from hf_embed.data.columns import column_names, judged_in_words, text_columns
from hf_embed.data.labeled import as_pairs
from hf_embed.data.mixture import Source
from hf_embed.data.python_rows import as_rows
from hf_embed.data.tokenization import TRUNCATION_WARNING
from hf_embed.encoder import Encoder
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.pair_classification import PairClassification
from hf_embed.evaluation.reranking import Reranking
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import Task
from hf_embed.evaluation.triplets import Triplets
from hf_embed.evaluation.zero_shot import ZeroShot
from hf_embed.files.safe_files import writing
from hf_embed.kit.preflight_source import QUANTILES, Settings, check_source, make_subject, numbered
from hf_embed.kit.row_hashes import Ids, RowIds, batches, text_ids

Report = dict[str, Any]
Given = tuple[Source, str | None, bool | None]  # rows, what messages call them, and whether they are pairs
DOCUMENTS = "documents"  # the part of an evaluation set that may be trained on without harm
FEW = 0.1  # a finding if a batch has at least so many false negatives on average
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # palette of Okabe and Ito
STYLES = ("-", ":", "-.", "--")
SIMILAR_WARNING = 0.05
COUNTED = ("duplicates", "near_duplicates", "positive_is_anchor", "negative_is_positive", "negative_is_anchor")
ROW_HEADS = ("empty", "odd texts", "duplicates", "near duplicates", "pos = anchor", "neg = pos", "neg = anchor")
BUT_FOR_CASE = "if case, spaces and punctuation are ignored"
MANY_EQUAL = 0.5  # a finding if so large a share of the candidates of a row are no negatives
WORDS = {
    "missing_word": "rows with a text that is only a word for a missing value, such as nan, NULL or N/A",
    "duplicates": "rows that equal an earlier row",
    "near_duplicates": f"rows that equal an earlier row {BUT_FOR_CASE}",
    "positive_is_anchor": f"rows whose positive equals the anchor {BUT_FOR_CASE}",
    "negative_is_positive": f"rows with a negative that equals the positive {BUT_FOR_CASE}",
    "negative_is_anchor": f"rows with a negative that equals the anchor {BUT_FOR_CASE}",
}


def preflight(sources: Sequence[Given], encoder: Encoder, settings: Settings, tasks: Mapping[str, Task]) -> Report:
    """Check the training rows, and count which texts of the evaluation sets are among them.

    Args:
        sources: each source, with what messages call it and whether its rows are pairs; see
            `hf_embed.kit.preflight_source.make_subject`.
        encoder: its tokenizer, maximum length and prompts are used. No text goes through the model.
        settings: the settings of the training.
        tasks: evaluation sets by name.

    Returns:
        {"sources": {name: report of `check_source`}, "total": {...}, "evaluation": {name: {...}}, "findings": [...], ...}

    Raises:
        InputError: if the training would refuse the data for any reason other than empty texts.
    """
    subjects = [make_subject(source, encoder, settings, where, paired) for source, where, paired in sources]
    found, rows, texts = {}, {}, {}
    for subject in subjects:
        found[subject.name], rows[subject.name], texts[subject.name] = check_source(subject, settings)
    report: Report = {
        "max_length": encoder.max_length,
        "sample": settings.sample,
        "sources": found,
        "total": total(found, rows),
        "evaluation": {name: check_task(task, name, texts) for name, task in tasks.items()},
    }
    if len(rows) > 1:
        for name in rows:
            others = np.concatenate([ids.plain for other, ids in rows.items() if other != name])
            found[name]["shared"] = int(np.isin(np.unique(rows[name].plain), others).sum())
    report["findings"] = findings(report, settings)
    return report


def total(found: Mapping[str, Report], rows: Mapping[str, Ids]) -> Report:
    """Add up the counts of all sources. Duplicates are counted across sources: the earlier row may be in another source."""
    summed = ("rows", "training_rows", "texts", "repeated_anchors")
    counted = ("empty", *COUNTED[2:])
    sums: Report = {key: sum(each[key] for each in found.values()) for key in summed}
    sums |= {key: sum(each.get(key, {"count": 0})["count"] for each in found.values()) for key in counted}
    exact, plain = (np.concatenate([np.array([], np.uint64), *(ids[i] for ids in rows.values())]) for i in range(2))
    sums["duplicates"] = len(exact) - len(np.unique(exact))
    sums["near_duplicates"] = len(plain) - len(np.unique(plain)) - sums["duplicates"]
    sums["odd"] = sum(kind["count"] for each in found.values() for kind in each["odd"].values())
    return sums


# ---- evaluation sets ----


def texts_of(task: Task, name: str) -> dict[str, list[str]]:
    """Return the texts of an evaluation set by their role; {} if the kind of the set is unknown."""
    if isinstance(task, HeldOut):
        rows = as_pairs(cast(Dataset, as_rows(task.rows, name)), name, paired=True, drop_empty_rows=True)
        read = list(batches(cast(Dataset, rows), text_columns(column_names(rows), name, paired=True)[:2], name))
        pairs = [(texts.anchors, texts.positives or []) for texts in read]
        return {side: [text for pair in pairs for text in pair[i]] for i, side in enumerate(("anchors", "positives"))}
    if isinstance(task, STS):
        return {"sentences": [*task.rows["sentence1"], *task.rows["sentence2"]]}
    if isinstance(task, Retrieval):
        return {"queries": [task.queries[query] for query in task.qrels], DOCUMENTS: list(task.corpus.values())}
    if isinstance(task, Triplets):
        return {"anchors": list(task.anchors), "positives": list(task.positives)}
    if isinstance(task, PairClassification):
        return {"sentences": [*task.sentences1, *task.sentences2]}
    if isinstance(task, Reranking):
        documents = [text for each in task.judged for text in (*each.positives, *each.negatives)]
        return {"queries": [each.query for each in task.judged], DOCUMENTS: documents}
    return {"texts": task.texts} if isinstance(task, ZeroShot) else {}


def check_task(task: Task, name: str, sources: Mapping[str, RowIds]) -> Report:
    """Return what an evaluation set has in common with the training rows. Texts are compared by their words.

    {"kind": "sts", "range": [0.0, 5.0],
     "texts": {"sentences": {"different": 5500, "seen": 12}},     different texts, and how many of them are trained on
     "training_rows": {"nli": {"count": 9, "rows": [...]}}}       rows whose anchor or positive is one (no documents)
    """
    found: Report = {"kind": task.kind, "texts": {}, "training_rows": {}}
    if isinstance(task, STS):
        found |= {"pairs": len(task.rows), "range": [min(task.rows["score"]), max(task.rows["score"])]}
    if isinstance(task, PairClassification):
        found |= {"pairs": len(task.labels), "matches": int(sum(map(int, task.labels)))}
    asked = np.array([], np.uint64)
    for part, texts in texts_of(task, name).items():
        ids = np.unique(text_ids(texts).plain)
        trained = np.zeros(len(ids), bool)
        for source in sources.values():
            trained |= np.isin(ids, source.everything("plain"))
        found["texts"][part] = {"different": len(ids), "seen": int(trained.sum())}
        asked = asked if part == DOCUMENTS else np.concatenate([asked, ids])
    for source_name, source in sources.items():
        sides = [side.plain for side in (source.anchors, source.positives) if side is not None]
        rows = np.flatnonzero(np.any([np.isin(side, asked) for side in sides], axis=0))
        if len(rows):
            found["training_rows"][source_name] = numbered(source.origins[rows])
    return found


# ---- findings ----


def findings(report: Report, settings: Settings) -> list[Report]:
    """Return all findings: [{"of": "nli", "code": "duplicates", "count": 12, "text": "rows that ..."}]."""
    found = []
    for name, source in report["sources"].items():
        for code, count, text in [*of_rows(source), *of_sample(source["sample"]), *of_batches(source, settings)]:
            found.append({"of": name, "code": code, "count": count, "text": text})
    for name, task in report["evaluation"].items():
        seen = sum(part["seen"] for kind, part in task["texts"].items() if kind != DOCUMENTS)
        if seen:
            rows = [f"in {of} {row_numbers(numbers)}" for of, numbers in task["training_rows"].items()]
            where = "; ".join(rows) or "only as negatives"
            text = f"texts that are also in the training rows {BUT_FOR_CASE}: {seen:,} ({where})"
            found.append({"of": name, "code": "seen", "count": seen, "text": text})
    return found


def row_numbers(numbers: Report) -> str:
    """Return the first of some row numbers as text: "row 4", or "rows 4, 9, 11, 12, 30, ..."."""
    rows = ", ".join(f"{row:,}" for row in numbers["rows"])
    if numbers["count"] == 1:
        return f"row {rows}"
    return f"rows {rows}{', ...' if numbers['count'] > len(numbers['rows']) else ''}"


def of_rows(source: Report) -> Iterator[tuple[str, float, str]]:
    """Yield the findings about all rows of a source: code, count and text."""
    if count := source["empty"]["count"]:
        mend = "fill it in or delete the row, or give --drop_empty_rows"
        yield "empty", count, f"rows with an empty text: {count:,} ({row_numbers(source['empty'])}); {mend}"
    for kind, numbers in source["odd"].items():
        first = row_numbers(numbers | {"count": 1})
        yield "odd", numbers["count"], f"texts that contain {kind}: {numbers['count']:,} (first in {first})"
    for column, values in source["judged"].items():
        yield "judged", len(values), judged_in_words(column, values)
    for code in (*COUNTED, "missing_word"):
        if count := source.get(code, {"count": 0})["count"]:
            yield code, count, f"{WORDS[code]}: {count:,} ({row_numbers(source[code])})"
    if count := source.get("shared", 0):
        yield "shared", count, f"different rows that also occur in another source: {count:,}"


def of_sample(sample: Report) -> Iterator[tuple[str, float, str]]:
    """Yield the findings about the sample of a source: code, count or share, and text."""
    if (part := sample["truncated"]["all"]) > TRUNCATION_WARNING:
        yield "truncated", part, f"texts longer than {sample['max_length']} tokens, which are truncated: {part:.1%}"
    if count := sample["without_a_token"]:
        yield "no_token", count, f"texts of the sample for which the tokenizer returns no token: {count:,}"
    if (part := sample["similar"] / max(1, sample["different_texts"])) > SIMILAR_WARNING:
        yield "similar", part, f"different texts of the sample that are similar to another one: {part:.1%}"


def of_batches(source: Report, settings: Settings) -> Iterator[tuple[str, float, str]]:
    """Yield the findings about the largest batch of a source: code, count and text."""
    batch = max(settings.batches)
    if source["training_rows"] < batch:
        yield "few_rows", source["training_rows"], f"fewer training rows than a batch of {batch:,}: {source['training_rows']:,}"
    for each in source["batches"]:
        if each["batch"] != batch:
            continue
        if (part := masked_share(source, each, settings.masks_answers)) > MANY_EQUAL:
            text = "texts of other rows in a batch that are no negatives, because positives or anchors repeat"
            yield "few_negatives", part, f"{text}: {part:.0%}"
        if (wrong := each["near"] + (0 if settings.masks_answers else each["answers"])) >= FEW:
            text = f"right answers that are trained on as negatives in a batch of {batch:,}"
            yield "false_negatives", wrong, f"{text}: {wrong:.2f}"


def masked_share(source: Report, batch: Report, masks_answers: bool) -> float:
    """Return which share of the other rows' candidates in a batch the loss leaves out, because texts are equal."""
    rows = min(batch["batch"], source["training_rows"])
    masked = batch["equal"] + (batch["answers"] if masks_answers else 0)
    return masked / (rows * (rows - 1) * (1 + source["negatives_per_row"]))


# ---- tables and the picture ----


def lines(report: Report) -> list[str]:
    """Return the lines of the report as they are printed."""
    shown = []
    sources = report["sources"]
    if sources:
        shown += ["", *columns_lines(sources), "", *rows_table(report), "", *tokens_table(sources), "", *batches_table(sources)]
    if report["evaluation"]:
        shown += ["", *evaluation_table(report["evaluation"])]
    shown += ["", f"findings: {len(report['findings']):,}" if report["findings"] else "no findings"]
    return [*shown[1:], *(f"  {each['of']}: {each['text']} [{each['code']}]" for each in report["findings"])]


def columns_lines(sources: Mapping[str, Report]) -> list[str]:
    """Return one line per source: which role each column has, and how the source was read."""
    shown = []
    for name, source in sources.items():
        columns = ", ".join(f"{column} as {role}" if column != role else column for column, role in source["columns"].items())
        parts = [f"{name}: {columns}"]
        parts += [f"not used: {', '.join(source['unused'])}"] if source["unused"] else []
        if "labels" in source:
            labels = ", ".join(f"{label} {count:,}" for label, count in source["labels"].items())
            parts.append(f"labeled pairs ({labels}) make {source['training_rows']:,} rows")
        if "first_rows_of_a_stream" in source:
            parts.append(f"the first {source['first_rows_of_a_stream']:,} rows of a stream")
        shown.append("; ".join(parts))
    return shown


def rows_table(report: Report) -> list[str]:
    """Return the table of the counts over all rows, with a total if there are several sources."""
    heads = ["all rows", "rows", "training rows", "texts", *ROW_HEADS]
    body = []
    for name, source in report["sources"].items():
        odd = sum(kind["count"] for kind in source["odd"].values())
        counts = [source.get(code, {"count": None})["count"] for code in COUNTED]
        body.append([name, source["rows"], source["training_rows"], source["texts"], source["empty"]["count"], odd, *counts])
    if len(body) > 1:
        sums = report["total"]
        body.append(["total", *(sums[key] for key in ("rows", "training_rows", "texts", "empty", "odd", *COUNTED))])
    return aligned(heads, body)


def tokens_table(sources: Mapping[str, Report]) -> list[str]:
    """Return the table of the text lengths in the sample: of each role, if there are several, and of all texts."""
    levels = [f"{level:.0%}" for level in QUANTILES]
    heads = ["tokens (sample)", "texts", "mean", *levels, "longest", "truncated", "similar"]
    body = []
    for name, source in sources.items():
        sample = source["sample"]
        kinds = list(sample["tokens"])
        for kind in kinds if len(kinds) > 2 else ["all"]:
            found, limit = sample["tokens"][kind], sample["told_apart_up_to"]
            if found:
                longest = f"over {limit:,}" if found["longest"] > limit else found["longest"]
                quantiles = [found[level] for level in levels]
                similar = sample["similar"] if kind == "all" else ""
                label = name if kind == "all" else f"  {kind}s of {name}"
                truncated = f"{sample['truncated'][kind]:.2%}"
                body.append([label, found["texts"], f"{found['mean']:.1f}", *quantiles, longest, truncated, similar])
    return aligned(heads, body)


def batches_table(sources: Mapping[str, Report]) -> list[str]:
    """Return the table of what a batch of random rows contains on average."""
    found = [(name, each) for name, source in sources.items() for each in source["batches"]]
    objectives = list(dict.fromkeys(objective for _, each in found for objective in each["guessing"]))
    losses = [f"loss of guessing, {objective}" for objective in objectives]
    heads = ["right answers per batch", "batch size", "equal", "same anchor", "nearly equal", *losses]
    sizes = {name: source["training_rows"] for name, source in sources.items()}
    body = [
        [name, batch_size(each["batch"], sizes[name]), *(f"{each[key]:.3f}" for key in ("equal", "answers", "near")),
         *(f"{each['guessing'][objective]:.3f}" for objective in objectives)]
        for name, each in found
    ]  # fmt: skip
    return aligned(heads, body)


def batch_size(size: int, rows: int) -> int | str:
    """Return the batch size as the table shows it. A batch cannot have more rows than there are."""
    return size if size <= rows else f"{size:,} (only {rows:,} rows)"


def evaluation_table(tasks: Mapping[str, Report]) -> list[str]:
    """Return the table of what the evaluation sets contain, and how many of their texts are trained on."""
    body = []
    for name, task in tasks.items():
        about = ""
        if "range" in task:
            about = f"{task['pairs']:,} pairs, scores {task['range'][0]:g} to {task['range'][1]:g}"
        elif "matches" in task:
            about = f"{task['pairs']:,} pairs, {task['matches']:,} match"
        for part, counts in task["texts"].items():
            share = f"{counts['seen'] / max(1, counts['different']):.2%}"
            body.append([f"{name}: {part}", counts["different"], counts["seen"], share, about])
    return aligned(["evaluation sets", "different texts", "in training rows", "share", ""], body)


def aligned(heads: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table. The first column is left-aligned, the others are right-aligned, 1000 becomes 1,000."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else "-" if cell is None else str(cell) for cell in row] for row in body]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    shown = []
    for first, *others in [list(heads), *cells]:
        padded = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
        shown.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    return shown


def plot_lengths(report: Report, path: str | Path) -> None:
    """Draw the share of texts of each length, with one line per source, and mark each maximum length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    longest = max((max(source["sample"]["histogram"]["edges"], default=0) for source in report["sources"].values()), default=0)
    for line, (name, source) in enumerate(report["sources"].items()):
        edges, counts = (source["sample"]["histogram"][key] for key in ("edges", "counts"))
        if counts:
            color, style = COLORS[line % len(COLORS)], STYLES[line % len(STYLES)]
            truncated = f"{name}: {source['sample']['truncated']['all']:.1%} truncated"
            shares = [100 * count / sum(counts) for count in counts]
            axes.stairs(shares, edges, color=color, linestyle=style, linewidth=1.5, label=truncated)
    for length in sorted({source["sample"]["max_length"] for source in report["sources"].values()}):
        axes.axvline(length, color="black", linewidth=1, linestyle="--", label=f"max_length {length}")
    if all(source["sample"]["max_length"] > 2 * longest for source in report["sources"].values()):
        axes.set_xlim(0, max(1, longest))  # do not stretch the axis to a maximum length far beyond all texts
    axes.set_xlabel("length of a text with its prompt, in tokens")
    axes.set_ylabel("share of the texts, in %")
    axes.set_title("Lengths of the training texts")
    axes.legend()
    with writing(path) as aside:
        figure.savefig(aside, dpi=100)
