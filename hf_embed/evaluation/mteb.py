"""MTEB (https://arxiv.org/abs/2210.07316) on an `Encoder`, run by mteb 2. `mteb.evaluate` accepts the encoder directly.

`Encoder.encode` accepts the batches of mteb, and `prompt_type` selects the encoder's own prompt "query" or "document".
`mteb_model_meta` describes the model. Without it, mteb would drop the encoder and keep only an empty description.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError

from hf_embed.adapters import count_parameters
from hf_embed.disk import disk_errors
from hf_embed.errors import InputError
from hf_embed.fingerprint import fingerprint
from hf_embed.progress import bars_shown

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    from hf_embed.encoder import Encoder


def texts_and_prompt(
    batches: Iterable[Any],
    prompt_type: "PromptType | None",
    prompts: dict[str, str],
    task_metadata: "TaskMetadata | None" = None,
) -> tuple[list[str], str | None]:
    """Return all texts of mteb's batches ({"text": [...]} each), and the name of the prompt to put before the texts.

    By the rules of mteb, a prompt named after the task or its type is preferred to "query" and "document".

    >>> texts_and_prompt([{"text": ["a cat", "a dog"]}, {"text": ["rain"]}], None, {})
    (['a cat', 'a dog', 'rain'], None)
    """
    texts = [text for batch in batches for text in batch["text"]]
    name = getattr(prompt_type, "value", prompt_type)
    if prompts and task_metadata is not None:
        from mteb.models.abs_encoder import get_prompt_name

        name = get_prompt_name(prompts, task_metadata, prompt_type) or name
    return texts, name


def model_meta(encoder: "Encoder") -> "ModelMeta":
    """Return mteb's ModelMeta of an encoder. mteb stores the results under its name and revision."""
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    name = encoder.config.name_or_path or type(encoder.base).__name__
    if Path(name).exists() or name.count("/") != 1:  # mteb requires the form OWNER/NAME
        name = f"local/{Path(name).resolve().name if Path(name).exists() else name.replace('/', '-')}"
    about = {
        "name": name,
        "revision": fingerprint(encoder),
        "n_parameters": count_parameters(encoder),
        "max_tokens": encoder.max_length,
        "embed_dim": encoder.dimension,
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction(encoder.similarity_fn_name),
        "use_instructions": any(encoder.prompts.values()),
    }
    return ModelMeta.create_empty(about)


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
            raise InputError(f"--tasks {name}: {' '.join(str(error.args[0]).split())}") from error
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


def run_mteb(encoder: "Encoder", tasks: list["AbsTask"], folder: str | Path, batch_size: int = 512) -> list[dict[str, Any]]:
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
        reason = " ".join(str(error).split())
        raise InputError(
            f"the data of a task cannot be downloaded ({reason}); connect to the internet, or first run the task where this "
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


def task_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each task and split."""
    width = max((len(row["task"]) for row in rows), default=0)
    return [f"{row['task']:{width}}  {row['split']:>10}  {row['score']:>6.2f}  {row['metric']}" for row in rows]
