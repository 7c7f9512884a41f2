"""The tables that the console and a model card show, as lines of text.

`Results` is the content of results.json. The scores in it, under `before`, `after` and for each of the `seeds`, look like this:

    {"sts": {set: score}, "retrieval": {set: {metric: score}}, "zero_shot": {set: {"accuracy": score}},
     "held_out": {set: {"loss": number}}, "alignment": number, "uniformity": number}

Here `set` is the name of an evaluation set. Other kinds of evaluation sets have the form of retrieval.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from hf_embed.progress import duration

# The metric that tables show for a kind of evaluation set, and its label. For other kinds it is the first metric.
SHOWN = {
    "retrieval": ("ndcg@10", "nDCG@10"),
    "zero_shot": ("accuracy", "accuracy"),
    "triplet": ("triplet_accuracy", "triplet accuracy"),
    "pair_classification": ("pair_ap", "average precision"),
    "reranking": ("rerank_map", "MAP"),
}

Results = dict[str, Any]
Scores = dict[str, Any]


def comparison_table(results: Results) -> list[str]:
    """Return a line for each evaluation set with its scores before and after training, then alignment and uniformity.

    If a score from before the training is unknown, the line shows only the score after it.
    """
    before, after = labeled(results.get("before", {})), labeled(results["after"])
    width = max(map(len, after), default=0)
    if not before:
        return [f"{label:{width}}  {score:8.{digits_of(label)}f}" for label, score in after.items()]
    lines = [f"{'':{width}}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for label, new in after.items():
        old, digits = before.get(label), digits_of(label)
        known = (
            f"  {old:8.{digits}f}  {new:8.{digits}f}  {new - old:+8.{digits}f}" if old is not None else f"{new:20.{digits}f}"
        )
        lines.append(f"{label:{width}}{known}")
    return lines


def seeds_table(results: Results) -> list[str]:
    """Return a line for each measure with its mean, minimum and maximum over the seeds, and its value for this model's seed."""
    seeds = {seed: labeled(scores) for seed, scores in results["seeds"].items()}
    kept = seeds[str(results["seed"])]
    width = max(map(len, kept))
    lines = [f"{f'{len(seeds)} seeds':{width}}  {'mean':>8}  {'min':>8}  {'max':>8}  {'seed ' + str(results['seed']):>8}"]
    for label, value in kept.items():
        values, digits = np.array([scores[label] for scores in seeds.values()]), digits_of(label)
        numbers = (values.mean(), values.min(), values.max(), value)  # NaN if one of the seeds has no number
        lines.append(f"{label:{width}}  " + "  ".join(f"{number:8.{digits}f}" for number in numbers))
    return lines


def sweep_table(sweep: dict[str, Any]) -> list[str]:
    """Return a line for each temperature that was tried, with a star at the chosen one, and then the gain of that one."""
    names = swept_columns(sweep)
    about = "nDCG@10 x 100 (of an STS set: Spearman x 100) at each temperature; a star marks the best one:"
    lines = [about, "temperature" + "".join(f"  {name:>12}" for name in names)]
    for row in sweep["curve"]:
        star = "*" if row["temperature"] == sweep["temperature"] else " "
        lines.append(f"{row['temperature']:>10g}{star}" + "".join(f"  {row[name]:>12.2f}" for name in names))
    return [
        *lines,
        "",
        f"best temperature: {sweep['temperature']:g}; gain over temperature 1: {sweep['gain']:+.2f} on the queries that chose "
        f"it, {sweep['cross_validated_gain']:+.2f} on queries that did not ({len(sweep['fold_temperatures'])} folds)",
        *length_table(sweep),
    ]


def length_table(sweep: dict[str, Any]) -> list[str]:
    """Return a line for each third of the queries, grouped by the length of their document.

    There are no lines if the best temperature is 1 or if the results hold no such groups.
    """
    rows = sweep.get("by_length", [])
    if not rows or sweep["temperature"] == 1:
        return []
    width = max(len(row["set"]) for row in rows)
    best = f"at {sweep['temperature']:g}"
    lines = ["", f"{'':{width}}  {'words of the document':>21}  {'queries':>7}  {'at 1':>7}  {best:>7}  {'change':>7}"]
    for row in rows:
        words = "{:,} to {:,}".format(*row["words"])
        scores = f"{row['before']:7.2f}  {row['after']:7.2f}  {row['after'] - row['before']:+7.2f}"
        lines.append(f"{row['set']:{width}}  {words:>21}  {row['queries']:>7,}  {scores}")
    return lines


def swept_columns(sweep: dict[str, Any]) -> list[str]:
    """Return the tasks of a temperature search, and their mean if there are several tasks."""
    names = [name for name in sweep["curve"][0] if name != "temperature"]
    return names if len(names) > 2 else names[:1]


def task_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each task and split of MTEB, from the rows of `hf_embed.kit.mteb_runs.run_mteb`."""
    width = max((len(row["task"]) for row in rows), default=0)
    return [f"{row['task']:{width}}  {row['split']:>10}  {row['score']:>6.2f}  {row['metric']}" for row in rows]


def labeled(scores: Scores) -> dict[str, float]:
    """Return the scores of a model under the labels that tables show."""
    found = {f"STS {name} (Spearman x 100)": score for name, score in scores.get("sts", {}).items()}
    for kind, (metric, label) in SHOWN.items():
        found |= {f"{name} ({label} x 100)": metrics[metric] for name, metrics in scores.get(kind, {}).items()}
    found |= {f"{name} (loss, lower is better)": metrics["loss"] for name, metrics in scores.get("held_out", {}).items()}
    for kind in [
        kind for kind in scores if kind not in ("sts", "alignment", "uniformity", "held_out", *SHOWN)
    ]:  # tasks that users have added
        for name, metrics in scores[kind].items():
            metric = next(iter(metrics))
            found[f"{name} ({metric})"] = metrics[metric]
    found |= {f"{key} (lower is better)": scores[key] for key in ("alignment", "uniformity") if key in scores}
    return {label: math.nan if value is None else value for label, value in found.items()}


def digits_of(label: str) -> int:
    """Return the number of decimals that a measure is shown with."""
    return 3 if "lower is better" in label else 2


# ---- the card ----


def results_section(results: Results, picture: bool) -> str:
    """Return the scores before and after the training, and those of the seeds."""
    lines = comparison_table(results) if results.get("after") else []
    lines += ["", *seeds_table(results)] if results.get("seeds") else []
    section = code_section("Results", lines, "Scores before and after the training." if results.get("before") else "")
    if section and picture:
        section += "\n\n![Alignment and uniformity during the training](geometry.png)"
    return section


def training_rows(train: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of the training settings that the card shows. `train` is that entry of results.json."""
    resumed = train.get("resumed_at_step")
    since = (
        f" (from step {resumed + 1:,} on, because the training was resumed)"
        if resumed and train.get("seconds") is not None
        else ""
    )
    chosen = train.get("step_of_weights") or train["steps"]  # unknown in earlier results, or if a checkpoint was renamed
    best = "" if chosen == train["steps"] else f"; the weights are those of step {chosen:,}, the best checkpoint"
    rows = [
        ("Base model", str(train["model"])),
        ("Training data", f"{train['data']}, {train['rows']:,} rows"),
        ("Objective", shown_objective(train["objective"])),
        *((f"Objective of {name}", shown_objective(own)) for name, own in train.get("source_objectives", {}).items()),
        ("Training steps", f"{train['steps']:,}, with a batch size of {train['batch_size']:,}{best}"),
    ]
    if train.get("loss") is not None:
        rows.append(("Mean training loss", f"{train['loss']:.4g}{since}"))
    rate = {"learning_rate": f"{train['learning_rate']:g}"} if train.get("learning_rate") is not None else {}
    rows += [(key, str(value)) for key, value in (rate | train.get("settings", {})).items()]
    rows.append(("Seed", str(train["seed"])))
    if train.get("hardware"):
        time = "unknown time" if train["seconds"] is None else duration(train["seconds"])
        rows.append(("Training time", f"{time} on {train['hardware']}{since}"))
    return [*rows, ("Software", ", ".join(f"{package} {version}" for package, version in train["versions"].items()))]


def shown_objective(objective: dict[str, Any]) -> str:
    """Return the name and the settings of an objective for the card."""
    inner = {key: f"({shown_objective(value)})" for key, value in objective.items() if isinstance(value, dict)}
    settings = ", ".join(f"{key} {value}" for key, value in (objective | inner).items() if key != "name")
    return f"{objective['name']}: {settings}" if settings else objective["name"]


def inner_name(objective: dict[str, Any]) -> str:
    """Return the name of the objective inside another one, such as Matryoshka, or "" if there is none."""
    return objective["objective"]["name"] if objective.get("objective") else ""


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table. The text in its cells stays plain text."""
    lines = [f"| {' | '.join(map(escaped, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def averaged_section(averaged: list[dict[str, Any]]) -> str:
    """Return the section of a card on the models whose weights were averaged, or "" for a model that is not an average."""
    if not averaged:
        return ""
    rows = [(str(entry["model"]), f"{entry['share']:.4g}") for entry in averaged]
    text = "The weights of this model are the weighted mean of the weights of these models, computed in float32."
    return "\n".join(["## Averaged models", "", text, "", *markdown_table(("Model", "Share"), rows)])


def code_section(title: str, lines: list[str], before: str = "") -> str:
    """Return a section with literal lines, or "" if there are none.

    The lines are indented as code, so that Markdown and HTML in them stay text.
    """
    if not lines:
        return ""
    code = [f"    {one_line(line)}".rstrip() for line in lines]
    return "\n".join([f"## {title}", "", *([before, ""] if before else []), *code])


def escaped(text: str) -> str:
    r"""Return a user's text as one line without active Markdown or HTML.

    >>> print(escaped("<b> my_model"))
    \<b\> my_model
    """
    return re.sub(r"([\\`*{}\[\]<>#|~&!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text)).strip()


def one_line(text: str) -> str:
    """Return `text` as one line. Characters that are not printable become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def slug(name: str) -> str:
    """Return a name with only letters, digits and _-./ in it."""
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "unnamed"
