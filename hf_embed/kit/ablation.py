"""Trains variants of unsupervised SimCSE, and compares them in a table and in a picture like figure 3 of the paper.

A variant is a name and the flags in which it differs from the other variants. Rows are tokenized once, because `datasets`
caches the tokenized table. Runs with the same seed see the same batches, so they differ only in the variant. Each finished run
is stored in a file and is not trained again.
"""

import dataclasses
import gc
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback, ProgressCallback

from hf_embed.errors import InputError
from hf_embed.files.disk import check_folder
from hf_embed.files.read_files import parse_json, read_json
from hf_embed.files.safe_files import write_text, writing
from hf_embed.kit.cli import FROM_HAND, Flags
from hf_embed.kit.content import content_of
from hf_embed.kit.finetune import make_trainer
from hf_embed.kit.overwrite import EarlierRun
from hf_embed.kit.plan import Plan
from hf_embed.kit.preflight import preflight_plan
from hf_embed.kit.seeds import read_seeds
from hf_embed.ranges import setting
from hf_embed.ranks import writing_alone
from hf_embed.training.log_lines import Progress
from hf_embed.training.record import number

VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "no dropout": {"dropout": 0.0},
    "same mask": {"positive": "same_mask"},
    "delete one word": {"positive": "delete_one_word"},
    "delete one word, no dropout": {"positive": "delete_one_word", "dropout": 0.0},
    "delete 10%": {"positive": "delete:0.1"},
    "crop 10%": {"positive": "crop:0.1"},
    "repeat 10%": {"positive": "repeat:0.1"},
    "fill 15%": {"positive": "mask_fill:0.15"},
    "next sentence": {"positive": "next_sentence"},
}
METRICS = ("spearman", "alignment", "uniformity")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # palette of Okabe and Ito
MARKERS = "os^DvPX"  # 7 beside 8 colors, so that 56 lines differ
# Settings of every run. No model is saved; only the scores along the training are needed.
FIXED = {"save_strategy": "no", "load_best_model_at_end": False, "eval_strategy": "steps"}
# Flags that would have no effect with any other value than this.
UNUSED = FIXED | {"early_stopping_patience": None, "push_to_hub": False, "resume_from_checkpoint": None, "save_adapter": False,
                  "show_searches": 0, "title": None, "language": None, "license": None}  # fmt: skip


@dataclass
class AblationArguments:
    """The flag that selects the variants."""

    variants: list[str] = setting(
        list(VARIANTS)[:4],
        f"Variants to train, from: {', '.join(VARIANTS)}. A YAML file may define variants by a name and "
        "flags, as recipes/configs/simcse_poolers.yaml does.",
    )


def read_variants(given: list[str]) -> dict[str, dict[str, Any]]:
    """Return the variants as {name: flags}.

    Args:
        given: names in `VARIANTS`, or a single text with a JSON dict {name: flags}.

    Raises:
        InputError: if a name is unknown, or if the dict or its flags are invalid.
    """
    if len(given) == 1 and given[0].startswith("{"):
        try:
            variants = parse_json(given[0])
        except ValueError as error:
            raise InputError(f"--variants is not valid JSON ({error}): {given[0][:60]}") from error
        if wrong := [name for name, flags in variants.items() if not isinstance(flags, dict)]:
            raise InputError(f"variant '{wrong[0]}' has no dict of flags; give the flags in which it differs, {{}} for none")
        if wrong := [name for name, flags in variants.items() if FROM_HAND in {key.replace("-", "_") for key in flags}]:
            raise InputError(f"variant '{wrong[0]}': {FROM_HAND} allows a model's own code to run; give it on the command line")
        slugs = [slug(name) for name in variants]
        if twice := [name for i, name in enumerate(variants) if slugs[i] in slugs[:i]]:
            raise InputError(f"variant '{twice[0]}': the name of another variant differs only in punctuation; rename one")
        return variants
    if unknown := [name for name in given if name not in VARIANTS]:
        known = ", ".join(f"'{name}'" for name in VARIANTS)  # in quotes, because names hold spaces and commas
        raise InputError(f"unknown variant '{unknown[0]}'; give one of {known}")
    return {name: VARIANTS[name] for name in given}


def seeds_of(flags: Flags) -> list[int]:
    """Return the seeds that the flags name: those of --seeds, or else that of --seed."""
    seed, seeds = flags.values["seed"], flags.values["seeds"]
    return [seed] if "seed" in flags.given and "seeds" not in flags.given else read_seeds(seeds or "1")


def check_flags(flags: Flags, variants: dict[str, dict[str, Any]]) -> None:
    """Raise InputError if a flag of the ablation or of a variant would have no effect."""
    for name, value in UNUSED.items():
        if name in flags.given and flags.values[name] != value:
            raise InputError(
                f"--{name} has no effect in an ablation, which saves no model and evaluates every --eval_steps steps; remove it"
            )
    of_all = {"seed", "seeds", "output_dir", "variants", *UNUSED}
    for variant, changes in variants.items():
        if wrong := sorted({name.replace("-", "_") for name in changes} & of_all):
            raise InputError(f"variant '{variant}': {wrong[0]} has no effect in a single variant; remove it")


def run_ablation(flags: Flags, read_plan: Callable[[Flags], Plan]) -> dict[str, Any]:
    """Train the variants with the seeds that the flags name. Write results.json and ablation.png, and print the table.

    Finished runs are not trained again.

    Args:
        flags: the flags of all runs, with those of `AblationArguments`.
        read_plan: makes the plan of a run from its flags.

    Returns:
        The content of results.json about the variants; see `run_variants`.

    Raises:
        InputError: if one of the runs is not possible. This is checked before the first step of the first run.
    """
    given = flags.values["output_dir"]
    folder = Path("outputs/simcse_ablation" if given in (None, "trainer_output") else given)
    check_folder(folder, "--output_dir")
    base = read_plan(flags)
    if base.run.preflight:
        return preflight_plan(base)
    changes, seeds = read_variants(flags.make(AblationArguments).variants), seeds_of(flags)
    check_flags(flags, changes)
    if not any(task.kind == "sts" for task in base.tasks.values()):
        raise InputError("an ablation needs an STS set to compare the variants on; give --eval_sts_file NAME=PATH")
    for of_variant in changes.values():
        read_plan(flags.override_as_given(of_variant))
    old = [path for path in sorted(folder.glob("runs/*/*")) if base.run.overwrite_output_dir]
    with writing_alone(folder):
        results = run_variants(flags, read_plan, changes, seeds, folder, EarlierRun(old))
    if base.args.process_index == 0:
        write_text(folder / "results.json", json.dumps({"variants": results}, indent=1) + "\n")
        plot_variants(results, folder / "ablation.png")
        print("\n" + "\n".join(table(results)))
        print(f"\nwrote {folder}/results.json and ablation.png")
    return results


def run_variants(
    flags: Flags,
    read_plan: Callable[[Flags], Plan],
    variants: dict[str, dict[str, Any]],
    seeds: list[int],
    folder: Path,
    earlier: EarlierRun,
) -> dict[str, Any]:
    """Train each variant with each seed, except finished runs.

    Args:
        flags: the flags of all runs.
        read_plan: makes the plan of a run from its flags.
        variants: for each variant, by name, the flags in which it differs.
        seeds: the seeds.
        folder: the output folder.
        earlier: a callback that removes the files of an earlier ablation after the first step.

    Returns:
        The content of results.json:

            {"dropout": {"flags": {},
                         "seeds": {"1": [{"step": 0, "spearman": 42.6, "alignment": 0.44, "uniformity": -1.7}, ...]},
                         "before": 42.6,
                         "spearman": [43.1, 43.0, 43.3],            of the last steps: mean, smallest, largest
                         "best": [44.9, 44.8, 45.0], ...}}          of the best step of each run: mean, smallest, largest

    Raises:
        InputError: if the folder holds runs with other flags.
    """
    results: dict[str, Any] = {}
    for name, changes in variants.items():
        of_variant = flags.override(**FIXED).override_as_given(changes)
        paths = {}
        for seed in seeds:
            output = folder / "runs" / f"{slug(name)}-seed-{seed}"
            plan = read_plan(of_variant.override(seed=seed, output_dir=str(output)))
            file = output / "path.json"
            if file.is_file() and file not in earlier.paths:
                paths[str(seed)] = finished_path(plan, file)
            else:
                first = not results and not paths  # only the first run prints some of its rows
                plan = dataclasses.replace(plan, earlier=earlier, shows_rows=first)
                paths[str(seed)] = run_path(plan, f"{name}, seed {seed}", file)
                gc.collect()  # frees the memory of the trainer and its model, which refer to each other
        results[name] = {"flags": changes, "seeds": paths} | summary(list(paths.values()))
    return results


def slug(name: str) -> str:
    """Make the name of a folder from the name of a variant."""
    return re.sub(r"\W+", "-", name.replace("%", "-percent")).strip("-")


def finished_path(plan: Plan, file: Path) -> list[dict[str, Any]]:
    """Read the path of a finished run. Raises InputError if the file is damaged or the run had other settings or data."""
    done = read_json(file, with_nan=True)
    if not isinstance(done.get("settings"), dict) or not isinstance(done.get("path"), list):
        raise InputError(f"{file} does not hold the settings and the path of a run; remove it to train this run again")
    if changed := [key for key, value in settings(plan).items() if done["settings"].get(key) != value]:
        raise InputError(
            f"{file.parent} holds a run with a different setting ({changed[0]}); replace all runs with --overwrite_output_dir"
        )
    return done["path"]


def run_path(plan: Plan, title: str, file: Path) -> list[dict[str, Any]]:
    """Train one run, and return its path: the scores before the first step and at each evaluation.

    The main process stores the path and the settings in `file`.
    """
    trainer = make_trainer(plan)
    trainer.add_callback(plan.earlier)
    trainer.watch.warned = True  # no warning of a bad geometry, because the picture shows it
    trainer.stop_requests.saves = False  # a stopped run saves no checkpoint, because it is trained again from its first step
    main = trainer.is_world_process_zero()
    if main:
        print(f"{title} ...", flush=True)
    trainer.remove_callback(PrinterCallback)  # the line printed below is enough
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress(desc=title))
    before = trainer.evaluate()
    trainer.train()
    evaluated = [before | {"step": 0}, *(entry for entry in trainer.state.log_history if "eval_spearman" in entry)]
    path: list[dict[str, Any]] = [
        {"step": entry["step"]} | {key: number(entry[f"eval_{key}"], 4) for key in METRICS} for entry in evaluated
    ]
    if main:
        scores = np.array([point["spearman"] for point in path], dtype=float)  # None becomes NaN
        print(f"    STS {scores[0]:.2f} -> {scores[-1]:.2f}, best {best_score(path):.2f}, {trainer.state.global_step} steps")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"settings": settings(plan), "path": path}, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return path


def settings(plan: Plan) -> dict[str, Any]:
    """Return all settings and data that a run's path depends on, converted to JSON values and back."""
    training = plan.args.to_dict()
    for key in ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "overwrite_output_dir"):
        training.pop(key, None)
    about = {"data": plan.source, **content_of(plan), "number of processes": plan.args.world_size}
    parts = [vars(plan.model_args), vars(plan.objective), vars(plan.positive), training, about]
    return json.loads(json.dumps({key: value for part in parts for key, value in part.items()}, default=str))


def best_score(path: list[dict[str, Any]]) -> float:
    """Return the best STS score of a run after its first step, or NaN if a collapsed model has none.

    Step 0 is the untrained model, so it does not count.
    """
    return max((score for point in path[1:] or path if (score := point["spearman"]) is not None), default=math.nan)


def summary(paths: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the mean, the smallest and the largest value of each metric over the runs of a variant.

    They are None if the metric is NaN in a run, because its model has collapsed.
    """

    def mean_and_limits(given: list[Any]) -> list[float | None]:
        values = np.array(given, dtype=float)  # None becomes NaN
        return [number(float(value), 4) for value in (values.mean(), values.min(), values.max())]

    last = {key: mean_and_limits([path[-1][key] for path in paths]) for key in METRICS}
    best = mean_and_limits([best_score(path) for path in paths])
    return {"before": paths[0][0]["spearman"], "best": best} | last


def table(results: dict[str, Any]) -> list[str]:
    """Return the lines of the table: for each variant, the scores of the last step and the best STS score of the run."""
    width = max(len(name) for name in [*results, "variant"])
    several = any(len(result["seeds"]) > 1 for result in results.values())
    span = 22 if several else 14
    heads = f"{'STS, last step':>{span}}  {'STS, best step':>{span}}  {'alignment':>9}  {'uniformity':>10}"
    lines = [f"{'variant':{width}}  {'before':>6}  {heads}"]
    for name, result in results.items():
        before, last, best, alignment, uniformity = numbers(result, "before", "spearman", "best", "alignment", "uniformity")
        spans = [f"{mean:.2f} ({low:.2f} to {high:.2f})" if several else f"{mean:.2f}" for mean, low, high in (last, best)]
        lines.append(
            f"{name:{width}}  {before:6.2f}  {spans[0]:>{span}}  {spans[1]:>{span}}  {alignment[0]:9.3f}  {uniformity[0]:10.3f}"
        )
    return lines


def numbers(result: dict[str, Any], *keys: str) -> list[np.ndarray]:
    """Return some scores of a variant as arrays. None becomes NaN."""
    return [np.array(result[key], dtype=float) for key in keys]


def plot_variants(results: dict[str, Any], path: str | Path) -> None:
    """Draw alignment against uniformity, with one line for each variant.

    A line has a point for each evaluation (mean over the seeds), and its arrows follow the training. Lines differ in color and
    in marker.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    starts: set[tuple[float, float]] = set()
    for line, (name, result) in enumerate(results.items()):
        paths = list(result["seeds"].values())
        measured = [[(point["uniformity"], point["alignment"]) for point in path] for path in paths]
        points = np.array(measured, dtype=float).mean(axis=0)  # (evaluations, 2)
        finite = np.flatnonzero(np.isfinite(points).all(axis=1))  # no point for a collapsed model without numbers
        if not len(finite):
            continue
        x, y = points[finite].T
        color, marker = COLORS[line % len(COLORS)], MARKERS[line % len(MARKERS)]
        before, last, best = numbers(result, "before", "spearman", "best")
        label = f"{name}: STS {last[0]:.1f} at the end, best {best[0]:.1f}"
        axes.plot(x, y, linewidth=1, label=label, color=color, marker=marker, markersize=6)
        arrow = {"arrowstyle": "-|>", "color": color, "mutation_scale": 12}
        for start, end in itertools.pairwise(zip(x, y)):
            middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
            axes.annotate("", xy=middle, xytext=start, arrowprops=arrow)
        axes.annotate(
            f"step {paths[0][finite[-1]]['step']}", (x[-1], y[-1]), xytext=(7, 5), textcoords="offset points", color=color
        )
        if (x[0], y[0]) not in starts:  # variants with the same pooling start at the same point, which is labeled once
            starts.add((x[0], y[0]))
            start_label = f"before training: STS {before:.1f}"
            axes.annotate(start_label, (x[0], y[0]), xytext=(-7, -14), textcoords="offset points", ha="right")
    axes.margins(0.1)  # room for the labels
    axes.set_xlabel("uniformity: are all sentences spread out? (lower is better)", fontsize=11)
    axes.set_ylabel("alignment: are similar sentences close? (lower is better)", fontsize=11)
    axes.set_title("Alignment and uniformity during training (arrows follow time)")
    axes.legend()
    with writing(path) as aside:
        figure.savefig(aside, dpi=100)
