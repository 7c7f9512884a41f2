"""Run tasks of MTEB on an encoder, and keep the results in a folder."""

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError

from hf_embed.checkpoint.tables import task_lines
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.disk import disk_errors
from hf_embed.progress import bars_shown

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger(__name__)


def find_tasks(names: list[str], benchmarks: list[str]) -> list["AbsTask"]:
    """Return the mteb tasks with these names, and the tasks of the benchmarks.

    Raises:
        InputError: if mteb does not know a name, or no name is given.
    """
    import mteb

    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            raise InputError(f"--tasks {name}: {error.args[0]}") from error
    for name in benchmarks:
        try:
            tasks += list(mteb.get_benchmark(name).tasks)
        except KeyError as error:
            raise InputError(
                f'--benchmark {name}: mteb has no such benchmark; give another name, such as "MTEB(eng, v2)"'
            ) from error
    if not tasks:
        raise InputError("there is nothing to evaluate; give --tasks NAME ... or --benchmark NAME")
    return tasks


def run_mteb(encoder: Encoder, tasks: list["AbsTask"], folder: str | Path, batch_size: int = 512) -> list[dict[str, Any]]:
    """Evaluate on `tasks`. Tasks whose results are already in `folder` are not run again.

    Returns:
        A dict for each task and split. `score` is mteb's main score x 100, as the mean over the subsets of the task:

            {"task": "STSBenchmark", "type": "STS", "split": "test", "metric": "cosine_spearman", "score": 82.03}

    Raises:
        InputError: if the data of a task are neither on this machine nor available for download.
    """
    import mteb

    remove_damaged(Path(folder))
    cache = mteb.ResultCache(Path(folder))
    model: Any = encoder  # it has the methods that mteb calls, but not the same argument names
    try:
        kwargs: Any = {"batch_size": batch_size, "show_progress_bar": False}
        with disk_errors(folder):
            results = mteb.evaluate(model, tasks, cache=cache, encode_kwargs=kwargs, show_progress_bar=bars_shown())
    except (ConnectionError, HTTPError, DatasetNotFoundError) as error:
        raise InputError(
            f"the data of a task cannot be downloaded ({error}); connect to the internet, or first run the task where this "
            "works"
        ) from error
    rows = []
    for task, result in zip(tasks, results.task_results):
        for split, scores in result.scores.items():
            mean = sum(score["main_score"] for score in scores) / len(scores)
            about = {"task": result.task_name, "type": task.metadata.type, "split": split}
            rows.append(about | {"metric": task.metadata.main_score, "score": round(100 * mean, 2)})
    return rows


def remove_damaged(folder: Path) -> None:
    """Remove result files that a killed run left incomplete. mteb cannot read them, so it runs their tasks again."""
    for path in sorted(folder.rglob("*.json*")):
        try:
            text = path.read_text(encoding="utf-8")
            for part in [text] if path.suffix == ".json" else filter(None, text.split("\n")):
                json.loads(part)
        except ValueError:
            logger.warning(f"{path}: the result file is incomplete; its task will be run again")
            path.unlink()


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the results of `run_mteb` as the lines of a readable table, with the mean over the tasks.

    The score of a task is the mean over its splits.
    """
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["task"], []).append(row["score"])
    return [*task_lines(rows), f"{'mean':{max(map(len, scores))}}  {'':>10}  {fmean(map(fmean, scores.values())):>6.2f}"]
