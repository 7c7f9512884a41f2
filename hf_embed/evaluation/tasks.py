"""What the kinds of evaluation share.

Every rank calls a task's `score`, encodes its share of the texts, and gets the same result. Metrics are x 100, but for
alignment and uniformity.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from hf_embed.distributed import gather_objects, get_rank, get_world_size

NO_ORDER = "the cosines are all equal, or not numbers; the model has collapsed, or its vectors are zero, NaN or infinite"


class Task(Protocol):
    kind: str  # where its results stand in results.json: "sts", "retrieval", "zero_shot"
    main: str  # the metric that chooses a checkpoint where nothing else is said
    reported: tuple[str, ...]  # the metrics that results.json keeps; a task that logs more lists all of them in `logged`

    def score(self, embed: Callable) -> dict[str, float]:
        """Metrics by name. `embed(texts, prompt_name=None)` maps texts to a tensor (N, D)."""


def score_tasks(tasks: dict[str, Task], embed: Callable) -> dict[str, float]:
    """NAME_METRIC for every metric of every task; and METRIC, its mean over the tasks that have it (NaN aside)."""
    metrics, by_metric = {}, {}
    for name, task in tasks.items():
        for key, value in task.score(embed).items():
            metrics[f"{name}_{key}"] = value
            by_metric.setdefault(key, []).append(value)
    for key, values in by_metric.items():
        metrics[key] = float(np.mean([v for v in values if math.isfinite(v)] or [math.nan]))
    return metrics


def main_metric(tasks: dict[str, Task]) -> str:
    """The mean that stands for all tasks: Spearman if there is an STS set, else the first task's."""
    kinds = {task.kind: task.main for task in tasks.values()}
    return kinds.get("sts") or next(iter(kinds.values()))


def metric_names(tasks: dict[str, Task]) -> set[str]:
    """The names under which `score_tasks` gives metrics, as far as the tasks say what they log."""
    keys = {name: {*task.reported, *getattr(task, "logged", ())} for name, task in tasks.items()}
    return {key for of in keys.values() for key in of} | {f"{name}_{key}" for name, of in keys.items() for key in of}


def embed_own_share(texts: list[str], embed: Callable, prompt_name: str | None = None, batch: int = 1024):
    """Vectors, a tensor (up to `batch`, D) at a time, of texts rank, rank + ranks, rank + 2 * ranks ..."""
    rank, ranks = get_rank(), get_world_size()
    own = texts[rank::ranks]
    # Every rank makes the same number of calls: under FSDP a call is a collective.
    calls = math.ceil(math.ceil(len(texts) / ranks) / batch)
    for i in range(calls):
        part = own[i * batch : (i + 1) * batch]
        yield embed(part or texts[:1], prompt_name)[: len(part)]


def embed_on_all_ranks(texts: list[str], embed: Callable, prompt_name: str | None = None, batch: int = 1024) -> np.ndarray:
    """Vectors (N, D) of all texts, on every rank; each rank encodes its share."""
    vectors = np.concatenate([part.cpu().numpy() for part in embed_own_share(texts, embed, prompt_name, batch)])
    everyone = np.empty((len(texts), vectors.shape[1]), vectors.dtype)
    for r, part in enumerate(gather_objects(vectors)):
        everyone[r :: get_world_size()] = part
    return everyone
