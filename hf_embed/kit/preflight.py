"""The command-line side of the preflight, which checks data before a training.

recipes/preflight.py checks files. The flag `--preflight` checks the rows that a fine-tuning recipe would train on.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from hf_embed.data.columns import column_names
from hf_embed.data.mixture import Source
from hf_embed.data.sources import read_file
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.sts import COLUMNS, STS, read_sts
from hf_embed.evaluation.tasks import Task
from hf_embed.files.read_files import read_json
from hf_embed.files.safe_files import write_json
from hf_embed.kit.eval_flags import joined
from hf_embed.kit.false_negatives import uses_batch
from hf_embed.kit.plan import HELD_OUT, QUICKSTART, DataArguments, Plan, read_held_out, read_train_rows
from hf_embed.kit.preflight_report import Given, Report, lines, plot_lengths, preflight
from hf_embed.kit.preflight_source import Settings
from hf_embed.step import make_encoder
from hf_embed.training.inputs import load_to_train
from hf_embed.training.settings import check_batch

PICTURES = (".png", ".pdf", ".svg")


def read_files(paths: Sequence[str], data: DataArguments, tasks: dict[str, Task]) -> tuple[list[Given], dict[str, Task]]:
    """Read the training files, the data that the other flags name, and the held-out rows.

    A file with the columns of an STS dataset is read as an evaluation set, unless flags say which columns to use or to ignore.

    Returns:
        The sources to train on; and `tasks` together with the evaluation sets that were found here.

    Raises:
        InputError: if a file cannot be used, if there is no data at all, or if two sources have the same name.
    """
    given: list[Given] = []
    short = [Path(masked(path)).name for path in paths]
    for path, name in zip(paths, short):
        name = name if short.count(name) == 1 else masked(path)
        columns = {column.lower() for column in column_names(read_file(path, quoting=data.quoting))}
        if columns >= set(COLUMNS) and not (data.columns or data.ignore_columns):
            tasks = joined(tasks, {name: STS(read_sts(path))}, path)
            continue
        alone: dict[str, Any] = {"dataset_name": None, "dataset_config": None, "dataset_split": "train", "sources": None}
        of_file = dataclasses.replace(data, train_file=path, **alone)
        given += as_given(*read_train_rows(of_file), name, path)
    if data.train_file or data.dataset_name or data.sources:
        given += as_given(*read_train_rows(data), None, data.train_file)
    if data.eval_file:
        beside = dataclasses.replace(data, train_file=data.train_file or (paths[0] if paths else None))
        tasks = joined(tasks, {HELD_OUT: read_held_out(beside)}, "--eval_file")
    if not given and not tasks:
        raise InputError("there is nothing to check; give FILE ..., --train_file FILE, --dataset_name NAME or --sources FILE")
    if twice := [each[0].name for i, each in enumerate(given) if each[0].name in [other[0].name for other in given[:i]]]:
        raise InputError(f"two sources have the name '{twice[0]}'; give each file once")
    return given, tasks


def as_given(
    rows: Dataset | list[Source], where: str, name: str | None, path: str | None, paired: bool | None = None
) -> list[Given]:
    """Return training rows as sources, each with what messages call it and whether its rows are pairs."""
    if isinstance(rows, Dataset):
        return [(Source(name or where, rows, origin=path), where, paired)]
    return [(source, None, None) for source in rows]


def preflight_plan(plan: Plan) -> dict[str, Any]:
    """Check the rows that a recipe would train on, print and store the report, and return it.

    Only the main process does this. The other processes return {}.

    Raises:
        InputError: if the training would refuse the data for any reason other than empty texts.
        SystemExit: with status 1, if the report has findings and the run is strict.
    """
    if not PartialState().is_main_process:
        return {}
    check_outputs(plan.run.preflight_file)
    check_batch(plan.args)
    if not uses_batch(plan.objective):
        raise InputError(
            f"--preflight looks for false negatives among the texts of a batch, which {type(plan.objective).__name__} does not "
            "use as negatives; remove the flag"
        )
    name = plan.model_args.model_name_or_path or str(QUICKSTART / "encoder")
    trusted = plan.model_args.trust_remote_code
    model = load_to_train(name, plan.args, dtype=torch.float32, trust_remote_code=trusted)
    encoder = make_encoder(model, None, plan.args)
    settings = Settings(
        objectives={type(plan.objective).__name__: plan.objective},
        batches=(plan.args.per_device_train_batch_size * plan.args.world_size,),
        sample=plan.run.preflight_sample,
        masks_answers=plan.objective.mask_other_positives,
        teacher=plan.args.teacher,
    )
    given = as_given(plan.rows, plan.source, None, plan.source, plan.paired)
    report = preflight(given, encoder, settings, plan.tasks)
    finish(report, plan.run.preflight_file, None, plan.run.strict)
    return report


def check_outputs(output_file: str | None, picture: str | None = None) -> None:
    """Raise InputError if an output file could not be written. This is checked before any data is read."""
    for path in filter(None, (output_file, picture)):
        if not Path(path).parent.is_dir():
            raise InputError(f"{path}: the folder {Path(path).parent} does not exist; create it first")
        if Path(path).is_dir():
            raise InputError(f"{path}: this is a folder; give the name of a file")
    if output_file is not None and Path(output_file).exists() and not is_report(output_file):
        raise InputError(f"{output_file}: this file has other content than a report, which would be lost; give another file")
    if picture is not None and Path(picture).suffix.lower() not in PICTURES:
        raise InputError(f"{picture}: a picture's name must end in {', '.join(PICTURES)}; change its ending")


def is_report(path: str) -> bool:
    """Return whether a file is a report of a preflight, which a new report may replace."""
    with contextlib.suppress(InputError):
        return read_json(path, with_nan=True).keys() >= {"sources", "findings"}
    return False


def finish(report: Report, output_file: str | None, picture: str | None, strict: bool) -> None:
    """Print a report, and write the report and the picture to files if their paths are given.

    Raises:
        SystemExit: with status 1, if the report has findings and the run is strict.
    """
    print("\n".join(lines(report)))
    if picture:
        plot_lengths(report, picture)
    if output_file:
        write_json(output_file, report)
    for path in filter(None, (output_file, picture)):
        print(f"wrote {path}")
    if strict and report["findings"]:
        raise SystemExit(1)
