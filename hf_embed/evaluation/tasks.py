"""The definition of a task, which is an evaluation set that scores an embedding function, and code that tasks share.

A new kind of task is a class that derives from `EvaluationTask`. Every rank calls the `score` of a task, encodes its share of
the texts with `embed_on_all_ranks`, and gets the same result. Metrics are x 100, except alignment, uniformity and thresholds.

Metrics with the same name are averaged over the evaluation sets. So two kinds of tasks may use the same metric name only if the
metrics mean the same: `triplet_accuracy` is not the `accuracy` of zero-shot classification, and `rerank_map` is not `map@100`.

Shapes: N texts, embeddings of dimension D.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hf_embed.distributed import check_same_on_ranks, gather_objects, get_rank, get_world_size
from hf_embed.encoding import WithSettings
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import cosines_of, unit
from hf_embed.files.work_files import digest
from hf_embed.progress import progress_bar

logger = logging.getLogger(__name__)

BATCH = 1024  # texts that are encoded, or pairs that are compared, at a time
THRESHOLD = "_threshold"  # ends the names of reported cosine thresholds, which are not scores
NO_ORDER = "all cosines are equal, or some are not finite; the model has collapsed, or its vectors are zero, NaN or infinite"


class Embed(Protocol):
    """The function that a task scores: it maps texts to embeddings. An `Encoder` stands for its method `encode`."""

    def __call__(self, texts: list[str], prompt_name: str | None = None, /) -> Tensor:
        """Return the embeddings (N, D) of texts. `prompt_name` is "query", "document", another prompt of the model, or None."""
        ...


@runtime_checkable
class Task(Protocol):
    """The interface of an evaluation set for the trainer and the recipes. Any object with these members is a task.

    A task that returns more metrics than it reports derives from `EvaluationTask`, and lists them in `logged`.
    """

    @property
    def kind(self) -> str:
        """The key of its results in results.json: "sts", "retrieval", "zero_shot", "triplet" ..."""
        ...

    @property
    def main(self) -> str:
        """The metric that selects the best checkpoint by default."""
        ...

    @property
    def reported(self) -> tuple[str, ...]:
        """The metrics that results.json stores."""
        ...

    def score(self, embed: Embed) -> dict[str, float]:
        """Return the metrics by name."""
        ...


class EvaluationTask:
    """The base class of tasks. `score` returns the metrics in `reported`, unless `logged` lists more.

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
        """All metrics that `score` returns. `metric_for_best_model` may name any of them."""
        return self.reported

    def score(self, embed: Embed) -> dict[str, float]:
        """Return the metrics of `embed` by name, the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__}.score")


def score_tasks(tasks: Mapping[str, Task], embed: Embed) -> dict[str, float]:
    """Return NAME_METRIC for every metric of every task, and METRIC as its mean over the tasks that have it (ignoring NaN).

    Raises:
        InputError: if two of these metrics would have the same name.
    """
    check_names(tasks)  # before the scores, which may take long
    metrics: dict[str, float] = {}
    by_metric: dict[str, list[float]] = {}
    for name, task in tasks.items():
        for key, value in task.score(embed).items():
            metrics[f"{name}_{key}"] = value
            by_metric.setdefault(key, []).append(value)
    check_names(tasks)  # again, because `compute_metrics` may have named further metrics
    for key, values in by_metric.items():
        metrics[key] = finite_mean(values)
    return metrics


def finite_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are finite, or NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def unranked(metrics: Iterable[str], what: str) -> dict[str, float]:
    """Return NaN for each metric, and warn that cosines cannot be ranked: `what` says which metric is NaN, and for how many."""
    logger.warning(f"{what}: {NO_ORDER}")
    return dict.fromkeys(metrics, math.nan)


def score_table(scores: Mapping[str, float], tasks: Mapping[str, Task]) -> list[str]:
    """Return the results of `score_tasks` as the lines of readable tables, one for all tasks that report the same metrics."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, task in tasks.items():
        alike.setdefault(task.reported, []).append(name)
    lines = []
    for metrics, names in alike.items():
        width = max(map(len, [*names, "average"]))
        columns = {metric: max(10, len(metric)) for metric in metrics}
        lines += ["", f"{'':{width}}" + "".join(f"  {metric:>{wide}}" for metric, wide in columns.items())]
        for name in names:
            cells = (f"  {scores[f'{name}_{metric}']:{wide}.3f}" for metric, wide in columns.items())
            lines.append(f"{name:{width}}" + "".join(cells))
        if len(names) > 1:
            lines.append(f"{'average':{width}}" + "".join(f"  {scores[metric]:{wide}.3f}" for metric, wide in columns.items()))
    return lines


def main_metric(tasks: Mapping[str, Task]) -> str:
    """Return the metric that represents all tasks: Spearman if there is an STS task, otherwise that of the first task."""
    kinds = {task.kind: task.main for task in tasks.values()}
    return kinds.get("sts") or next(iter(kinds.values()))


def metric_names(tasks: Mapping[str, Task]) -> set[str]:
    """Return the names of the metrics that `score_tasks` returns, without thresholds, as far as the tasks declare them.

    Raises:
        InputError: if two metrics would have the same name.
    """
    check_names(tasks)
    names = set()
    for name, task in tasks.items():
        metrics = {metric for metric in logged_by(task) if not metric.endswith(THRESHOLD)}
        names |= metrics | {f"{name}_{metric}" for metric in metrics}
    return names


def logged_by(task: Task) -> set[str]:
    """Return the names of the metrics that a task declares."""
    return {*task.reported, *(task.logged if isinstance(task, EvaluationTask) else ())}


def check_names(tasks: Mapping[str, Task]) -> None:
    """Raise InputError if NAME_METRIC of an evaluation set is also the name of another metric.

    For example, the accuracy of an evaluation set named "triplet" would be triplet_accuracy. But this is also the name of the
    mean over all evaluation sets of triplets.
    """
    taken = {metric for task in tasks.values() for metric in logged_by(task)}
    for name, task in tasks.items():
        for metric in sorted(logged_by(task)):
            if f"{name}_{metric}" in taken:
                raise InputError(
                    f"evaluation set '{name}': {name}_{metric} is also the name of another metric; rename the evaluation set"
                )
            taken.add(f"{name}_{metric}")


def embed_own_share(texts: list[str], embed: Embed, prompt_name: str | None = None) -> Iterator[Tensor]:
    """Yield the embeddings of this rank's texts, which have the indices rank, rank + ranks, rank + 2 * ranks ...

    Each yielded tensor has the shape (up to `BATCH`, D).

    Raises:
        InputError: if the ranks have different texts, or the same texts in another order.
    """
    rank, ranks = get_rank(), get_world_size()
    if ranks > 1:
        check_same_on_ranks("the texts", digest(texts))
    own = texts[rank::ranks]
    embed = embed.encode if isinstance(embed, WithSettings) else embed  # an Encoder
    # Every rank makes the same number of calls, because with FSDP each call runs collectives.
    calls = math.ceil(math.ceil(len(texts) / ranks) / BATCH)
    with progress_bar(total=len(own), desc="Encoding", unit="text") as bar:
        for i in range(calls):
            part = own[i * BATCH : (i + 1) * BATCH]
            yield torch.as_tensor(embed(part or texts[:1], prompt_name))[: len(part)]
            bar.update(len(part))


def embed_on_all_ranks(texts: list[str], embed: Embed, prompt_name: str | None = None) -> np.ndarray:
    """Return the embeddings (N, D) of all texts on every rank. Each rank encodes its share."""
    vectors = np.concatenate([part.cpu().numpy() for part in embed_own_share(texts, embed, prompt_name)])
    everyone = np.empty((len(texts), vectors.shape[1]), vectors.dtype)
    for rank, part in enumerate(gather_objects(vectors)):
        everyone[rank :: get_world_size()] = part
    return everyone


def embed_once(texts: Sequence[str], embed: Embed, prompt_name: str | None = None) -> Callable[[Sequence[str]], np.ndarray]:
    """Encode each different text once, and return a function that maps n of the texts to normalized embeddings (n, D).

    So equal texts have exactly equal embeddings and cosines.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    vectors = embed_on_all_ranks(list(place), embed, prompt_name)
    return lambda chosen: unit(vectors[[place[text] for text in chosen]])


def pair_cosines(
    first: Sequence[str],
    second: Sequence[str],
    first_vectors: Callable[[Sequence[str]], np.ndarray],
    second_vectors: Callable[[Sequence[str]], np.ndarray],
) -> np.ndarray:
    """Return the cosines (P,) of P pairs of texts, computed block by block.

    `first_vectors` and `second_vectors` map texts to their normalized embeddings, as the functions from `embed_once` do.
    """
    parts = []
    for i in range(0, len(first), BATCH):
        parts.append(cosines_of(first_vectors(first[i : i + BATCH]), second_vectors(second[i : i + BATCH])))
    return np.concatenate(parts)
