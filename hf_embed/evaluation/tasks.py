"""What a task is, an evaluation set that scores an embedding function; and what the kinds of tasks share.

A new kind is a class that derives from `EvaluationTask`. Every rank calls a task's `score`, encodes its share of the texts by
`embed_on_all_ranks`, and gets the same result. Metrics are x 100, but for alignment and uniformity.

Shapes: N texts, D wide.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.progress import progress_bar

NO_ORDER = "the cosines are all equal, or not numbers; the model has collapsed, or its vectors are zero, NaN or infinite"


class Embed(Protocol):
    """What a task scores: a function from texts to vectors."""

    def __call__(self, texts: list[str], prompt_name: str | None = None, /) -> Tensor:
        """Return the vectors (N, D) of texts; `prompt_name` is "query", "document", another prompt of the model, or None."""
        ...


@runtime_checkable
class Task(Protocol):
    """What the trainer and the recipes ask of an evaluation set; any object that has it will do."""

    @property
    def kind(self) -> str:
        """Where its results stand in results.json: "sts", "retrieval", "zero_shot"."""
        ...

    @property
    def main(self) -> str:
        """The metric that chooses a checkpoint where nothing else is said."""
        ...

    @property
    def reported(self) -> tuple[str, ...]:
        """The metrics that results.json keeps."""
        ...

    def score(self, embed: Embed) -> dict[str, float]:
        """Return metrics by name."""
        ...


@runtime_checkable
class LogsMore(Protocol):
    """A task that logs other metrics than those it reports, and says which."""

    @property
    def logged(self) -> Sequence[str]:
        """All metrics that `score` returns."""
        ...


class EvaluationTask:
    """The base of tasks: what `score` returns is what is reported, unless `logged` says more.

    @dataclass
    class Lengths(EvaluationTask):
        texts: list[str]

        kind, main, reported = "lengths", "longest", ("longest", "mean")

        def score(self, embed):
            norms = np.linalg.norm(embed_on_all_ranks(self.texts, embed), axis=-1)
            return {"longest": float(norms.max()), "mean": float(norms.mean())}
    """

    kind: ClassVar[str]
    main: ClassVar[str]
    reported: ClassVar[tuple[str, ...]]

    @property
    def logged(self) -> Sequence[str]:
        """All metrics that `score` returns; `metric_for_best_model` may name one of them."""
        return self.reported

    def score(self, embed: Embed) -> dict[str, float]:
        """Return metrics by name, the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__}.score")


def score_tasks(tasks: Mapping[str, Task], embed: Embed) -> dict[str, float]:
    """Return NAME_METRIC for every metric of every task; and METRIC, its mean over the tasks that have it (NaN aside)."""
    metrics: dict[str, float] = {}
    by_metric: dict[str, list[float]] = {}
    for name, task in tasks.items():
        for key, value in task.score(embed).items():
            metrics[f"{name}_{key}"] = value
            by_metric.setdefault(key, []).append(value)
    for key, values in by_metric.items():
        metrics[key] = float(np.mean([v for v in values if math.isfinite(v)] or [math.nan]))
    return metrics


def score_table(scores: Mapping[str, float], tasks: Mapping[str, Task]) -> list[str]:
    """Return tables for people of what `score_tasks` returns, one for the tasks that report the same metrics."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, task in tasks.items():
        alike.setdefault(task.reported, []).append(name)
    lines = []
    for metrics, names in alike.items():
        width = max(map(len, [*names, "average"]))
        lines += ["", f"{'':{width}}" + "".join(f"  {metric:>10}" for metric in metrics)]
        for name in names:
            lines.append(f"{name:{width}}" + "".join(f"  {scores[f'{name}_{metric}']:10.3f}" for metric in metrics))
        if len(names) > 1:
            lines.append(f"{'average':{width}}" + "".join(f"  {scores[metric]:10.3f}" for metric in metrics))
    return lines


def main_metric(tasks: Mapping[str, Task]) -> str:
    """Return the mean that stands for all tasks: Spearman if there is an STS set, else the first task's."""
    kinds = {task.kind: task.main for task in tasks.values()}
    return kinds.get("sts") or next(iter(kinds.values()))


def metric_names(tasks: Mapping[str, Task]) -> set[str]:
    """Return the names under which `score_tasks` gives metrics, as far as the tasks say what they log."""
    names = set()
    for name, task in tasks.items():
        metrics = {*task.reported, *(task.logged if isinstance(task, LogsMore) else ())}
        names |= metrics | {f"{name}_{metric}" for metric in metrics}
    return names


def embed_own_share(texts: list[str], embed: Embed, prompt_name: str | None = None, batch: int = 1024) -> Iterator[Tensor]:
    """Yield vectors, a tensor (up to `batch`, D) at a time, of texts rank, rank + ranks, rank + 2 * ranks ..."""
    rank, ranks = get_rank(), get_world_size()
    own = texts[rank::ranks]
    # Every rank makes the same number of calls: under FSDP a call is a collective.
    calls = math.ceil(math.ceil(len(texts) / ranks) / batch)
    with progress_bar(total=len(own), desc="Encoding", unit="text") as bar:
        for i in range(calls):
            part = own[i * batch : (i + 1) * batch]
            yield embed(part or texts[:1], prompt_name)[: len(part)]
            bar.update(len(part))


def embed_on_all_ranks(texts: list[str], embed: Embed, prompt_name: str | None = None, batch: int = 1024) -> np.ndarray:
    """Return the vectors (N, D) of all texts, on every rank; each rank encodes its share."""
    vectors = np.concatenate([part.cpu().numpy() for part in embed_own_share(texts, embed, prompt_name, batch)])
    everyone = np.empty((len(texts), vectors.shape[1]), vectors.dtype)
    for rank, part in enumerate(gather_objects(vectors)):
        everyone[rank :: get_world_size()] = part
    return everyone
