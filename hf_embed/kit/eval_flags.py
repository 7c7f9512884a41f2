"""The flags for evaluation sets, which all recipes share, and the reader of these sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hf_embed.errors import InputError
from hf_embed.evaluation.pair_classification import read_pair_classification
from hf_embed.evaluation.reranking import read_reranking
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.evaluation.tasks import Task
from hf_embed.evaluation.triplets import read_triplets
from hf_embed.evaluation.zero_shot import read_zero_shot
from hf_embed.kit.code_search import read_code_search
from hf_embed.ranges import setting


def sets(help: str) -> list[str]:
    """Return a field for evaluation sets, whose flag may be repeated. `help` is what `--help` says of it."""
    return setting([], help, action="extend")


@dataclass
class EvalArguments:
    """Flags of the evaluation sets."""

    eval_sts_file: list[str] = sets(
        "NAME=PATH of an STS set, or NAME=OWNER/DATASET:SPLIT (or :CONFIG:SPLIT) on the Hub. May be repeated."
    )
    eval_retrieval_dir: list[str] = sets(
        "NAME=DIR of a BEIR folder, NAME=DIR:SPLIT for its qrels/SPLIT.tsv, or NAME=OWNER/DATASET:SPLIT on the Hub. May be "
        "repeated."
    )
    eval_zero_shot: list[str] = sets(
        "NAME=PATH or NAME=OWNER/DATASET:SPLIT, with the columns label and text, for zero-shot classification."
    )
    zero_shot_template: str = setting("this is an example of {label}", "Template that makes a text from a label.")
    zero_shot_labels: list[str] = sets("NAME=PATH of a JSON file {label: text}, with texts to use instead of the labels.")
    eval_code_search: list[str] = sets(
        "NAME=PATH of a jsonl file with docstring and code, or of a Python package. A docstring is the query for the "
        "function that it describes."
    )
    eval_triplet_file: list[str] = sets(
        "NAME=PATH of a file with anchor, positive and negative, or NAME=OWNER/DATASET:SPLIT (or :CONFIG:SPLIT) on the Hub. "
        "May be repeated."
    )
    eval_pair_file: list[str] = sets(
        "NAME=PATH or NAME=OWNER/DATASET:SPLIT, with sentence1, sentence2, and label: 1 for pairs that belong together, 0 "
        "for others."
    )
    eval_reranking_file: list[str] = sets(
        "NAME=PATH or NAME=OWNER/DATASET:SPLIT, with query, positive, negative: texts, or lists of texts."
    )


def read_tasks(args: EvalArguments) -> dict[str, Task]:
    """Read the evaluation tasks that the flags name.

    Raises:
        InputError: if a file cannot be read, if two sets have the same name, if `--zero_shot_labels` names a set that
            `--eval_zero_shot` does not, or if `--zero_shot_template` is given without such a set.
    """
    if args.zero_shot_template != EvalArguments.zero_shot_template and not args.eval_zero_shot:
        raise InputError("--zero_shot_template has no effect without --eval_zero_shot; remove it, or give a set")
    labels = named_paths(args.zero_shot_labels, "--zero_shot_labels")
    if unknown := set(labels) - set(named_paths(args.eval_zero_shot, "--eval_zero_shot")):
        raise InputError(f"--zero_shot_labels {min(unknown)}=...: no --eval_zero_shot set has this name")
    readers: dict[str, Callable[[str, str], Task]] = {
        "eval_sts_file": lambda name, path: STS(read_sts(path)),
        "eval_retrieval_dir": lambda name, path: read_retrieval(path),
        "eval_zero_shot": lambda name, path: read_zero_shot(path, args.zero_shot_template, labels.get(name)),
        "eval_code_search": lambda name, path: read_code_search(path),
        "eval_triplet_file": lambda name, path: read_triplets(path),
        "eval_pair_file": lambda name, path: read_pair_classification(path),
        "eval_reranking_file": lambda name, path: read_reranking(path),
    }
    tasks: dict[str, Task] = {}
    for flag, read in readers.items():
        paths = named_paths(getattr(args, flag), f"--{flag}")
        tasks = joined(tasks, {name: read(name, path) for name, path in paths.items()}, f"--{flag}")
    return tasks


def joined(tasks: Mapping[str, Task], more: Mapping[str, Task], flag: str) -> dict[str, Task]:
    """Return both groups of evaluation sets together. Raise InputError if two sets have the same name."""
    if twice := sorted(tasks.keys() & more.keys()):
        raise InputError(f"{flag}: two sets are named '{twice[0]}'; names must differ")
    return {**tasks, **more}


def named_paths(items: list[str], flag: str) -> dict[str, str]:
    """Parse items of the form NAME=PATH as {NAME: PATH}.

    Raises:
        InputError: if an item has another form, or if a name is given twice.
    """
    paths = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise InputError(f"{flag} {item}: give NAME=PATH, for example {flag} dev={path or item.rstrip('=') or 'PATH'}")
        if name in paths:
            raise InputError(f"{flag}: two sets are named '{name}'; names must differ")
        paths[name] = path
    return paths
