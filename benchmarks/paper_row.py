"""Append the row of a run to a table of docs/paper_runs.md. benchmarks/paper_simcse.sh and paper_gte.sh run this at their end.

    python benchmarks/paper_row.py SimCSE "unsup bert_base" outputs/papers/unsup_simcse_bert_base --table docs/paper_runs.md
    python benchmarks/paper_row.py GTE base outputs/papers/gte_base/pretrain outputs/papers/gte_base/finetune --table ...

There is one folder for each stage of the training. The content of the row comes from their results.json; the last folder has
the scores. The commits come from the files FOLDER.started, which the scripts write. The date is today's date. A row that is
already in the table is not appended again.
"""

import argparse
import datetime
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from hf_embed.checkpoint.card import read_results
from hf_embed.checkpoint.tables import duration
from hf_embed.errors import InputError
from hf_embed.evaluation.sts import SEVEN_TASKS
from hf_embed.files.read_files import read_text
from hf_embed.files.safe_files import write_text
from hf_embed.kit.cli import run

KINDS = ["Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization"]
DATE = -3  # the position of the date in a row


def simcse_scores(results: dict[str, Any], name: str) -> list[str]:
    """Return the seven scores and their average."""
    found = results.get("evaluated", {}).get("sts", {})
    if missing := [task for task in SEVEN_TASKS if found.get(task) is None]:
        raise InputError(f"{name}: there is no score on {', '.join(missing)}; run recipes/evaluate.py --seven_sts")
    scores = [found[task] for task in SEVEN_TASKS]
    return [f"{score:.2f}" for score in [*scores, mean(scores)]]


def gte_scores(results: dict[str, Any], name: str) -> list[str]:
    """Return the number of datasets, the mean over the datasets of each kind, and the mean over all datasets."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in results.get("mteb", []):
        found.setdefault((row["type"], row["task"]), []).append(row["score"])  # one score for each split
    scores = {key: mean(splits) for key, splits in found.items()}
    if not scores or not all(map(math.isfinite, scores.values())):
        raise InputError(f"{name}: there are no scores on MTEB, or some are not numbers; run recipes/evaluate_mteb.py")
    if others := {kind for kind, _ in scores} - set(KINDS):
        raise InputError(f"{name}: the table has no column for the task kinds {', '.join(sorted(others))}; remove these tasks")
    of_kinds = [[score for (kind, _), score in scores.items() if kind == column] for column in KINDS]
    means = [f"{mean(part):.2f}" if part else "" for part in of_kinds]
    return [str(len(scores)), *means, f"{mean(scores.values()):.2f}"]


SCORES = {"SimCSE": simcse_scores, "GTE": gte_scores}


def cpu_name() -> str:
    """Return the name of this machine's processor, or "" if the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def hardware(train: dict[str, Any]) -> str:
    """Return the hardware of a stage, "8 x NVIDIA H100" for example. For a CPU, add its name, which results.json lacks."""
    found = train["hardware"]
    return f"{found} ({cpu_name()})" if "CPU" in found and cpu_name() else found


def versions(train: dict[str, Any], folder: Path) -> str:
    """Return the library versions that a stage was trained with, and the commits at which it was started."""
    started = Path(f"{folder}.started")
    commits = read_text(started).splitlines()[1:] if started.is_file() else []
    at = f" ({joined(commits)})" if commits else ""
    found = train["versions"]
    return f"hf_embed {found['hf_embed']}{at}, torch {found['torch']}, transformers {found['transformers']}"


def settings(train: dict[str, Any], results: dict[str, Any]) -> str:
    """Describe the data and settings of a stage, so that readers see where a run differs from the paper."""
    changed = train["settings"]
    words = [
        train["model"], train["data"], f"batch {train['batch_size']:,}", f"{train['steps']:,} steps",
        f"learning rate {train['learning_rate']:g}", f"{train['max_length']} tokens",
        next((name for name in ("bf16", "fp16") if changed.get(name)), "float32"), f"seed {train['seed']}",
    ]  # fmt: skip
    if seeds := results.get("seeds"):
        words[-1] += f", the best of seeds {', '.join(seeds)} by the development set"
    resumed = f" from step {train['resumed_at_step']:,}" if train.get("resumed_at_step") else ""
    return ", ".join([*words, f"{train['processes']} process(es)", f"{duration(train['seconds'])}{resumed}"])


def joined(parts: Iterable[str]) -> str:
    """Join the different parts in order, with ", then " between them."""
    return ", then ".join(dict.fromkeys(parts))


def row_of(paper: str, name: str, folders: list[Path]) -> list[str]:
    """Return the cells of the row of a run."""
    stages = [(folder, read_results(folder)) for folder in folders]
    for folder, results in stages:
        if not results.get("train"):
            raise InputError(f"{folder}: results.json is missing or has no record of a training; finish the training first")
    folder, last = stages[-1]
    scores = SCORES[paper](last, str(folder))
    about = [
        joined(hardware(results["train"]) for _, results in stages),
        datetime.date.today().isoformat(),
        joined(versions(results["train"], folder) for folder, results in stages),
        joined(settings(results["train"], results) for _, results in stages),
    ]
    return [cell.replace("|", "\\|") for cell in [name, "measured", *scores, *about]]


def append(path: Path, paper: str, row: list[str]) -> bool:
    """Append a row to the table whose first heading is the name of the paper. Return False if the row is already there."""
    lines = read_text(path).splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"| {paper} |")), None)
    if start is None:
        raise InputError(f"{path}: there is no table that begins with | {paper} |; copy docs/paper_runs.md there")
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    columns = len(cells(lines[start]))
    if len(row) != columns:
        raise InputError(
            f"{path}: the table of {paper} has {columns} columns, but the row has {len(row)}; copy docs/paper_runs.md there"
        )
    if any(undated(cells(line)) == undated(row) for line in lines[start:end]):
        return False
    lines.insert(end, f"| {' | '.join(row)} |")
    write_text(path, "\n".join(lines) + "\n")
    return True


def cells(line: str) -> list[str]:
    """Return the cells of a line of a table."""
    return [cell.strip() for cell in line.replace("\\|", "\0").strip().strip("|").split("|")]


def undated(row: list[str]) -> list[str]:
    """Return a row without its date, with the cells as `cells` reads them."""
    return [cell.replace("\\|", "\0") for i, cell in enumerate(row) if i != len(row) + DATE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=list(SCORES))
    parser.add_argument("run", help="name of the run, for the first column")
    parser.add_argument("folders", type=Path, nargs="+", help="a folder for each stage; the last one has the scores")
    parser.add_argument("--table", type=Path, required=True)
    args = parser.parse_args()
    row = row_of(args.paper, args.run, args.folders)
    new = append(args.table, args.paper, row)
    print(f"\n{'appended to' if new else 'already in'} {args.table}:\n| {' | '.join(row)} |")


if __name__ == "__main__":
    run(main)
