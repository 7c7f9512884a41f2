"""`--seeds 1,2,3`: train one run with each seed, keep the best one by the evaluation sets, and report the scores of all."""

import dataclasses
import gc
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_embed.checkpoint.card import write_card, write_results
from hf_embed.checkpoint.save import put_in_place, renewed
from hf_embed.checkpoint.tables import seeds_table
from hf_embed.checkpoint.whole import checkpoints_in, newest_whole, read_manifest
from hf_embed.encoder import Encoder
from hf_embed.entry import recipe_command
from hf_embed.errors import InputError
from hf_embed.files.read_files import read_json
from hf_embed.files.safe_files import SAVING, clear_leftovers, link_tree
from hf_embed.kit.cli import Flags
from hf_embed.kit.overwrite import EarlierRun, begin, earlier_files, place_of, take_place
from hf_embed.kit.plan import Plan
from hf_embed.kit.preflight import preflight_plan
from hf_embed.kit.report import about_plan, saved_to
from hf_embed.kit.run_folder import LATEST
from hf_embed.progress import silent_libraries
from hf_embed.ranges import SEED
from hf_embed.ranks import writing_alone
from hf_embed.training.record import settings_of
from hf_embed.training.resume import as_json, same_settings


def read_seeds(given: str) -> list[int]:
    """Read "1,2,3" as [1, 2, 3]. Raise InputError if the text is not a list of different seeds."""
    words = [word.strip() for word in given.split(",") if word.strip()]
    seeds = [int(word) if word.isdecimal() else -1 for word in words]
    if not seeds or not all(seed in SEED for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds '{given}' is not a list of seeds; give different whole numbers below 2^32, such as 1,2,3")
    return seeds


def train_each_seed(flags: Flags, read_plan: Callable[[Flags], Plan], train: Callable[[Plan], dict]) -> dict[str, Any]:
    """Train as the flags say, once or once with each of `--seeds`. With `--preflight`, only check the data.

    The run of seed N is in OUTPUT_DIR/seed-N. OUTPUT_DIR itself gets the model of the seed that is best on the evaluation
    sets, with the scores of all seeds in its card. With `--resume_from_checkpoint`, finished seeds are not trained again,
    unless they had other settings or data.

    Args:
        flags: the flags. They already say in which folder the run trains.
        read_plan: makes a plan from flags.
        train: runs a plan, and returns the content of its results.json.

    Returns:
        The content of OUTPUT_DIR/results.json; with `--preflight` the report of the preflight.

    Raises:
        InputError: if another run writes to the folder, or if something is wrong with the flags or the data.
    """
    if flags.values["preflight"]:
        return preflight_plan(read_plan(flags))
    folder = Path(str(flags.values["output_dir"]))
    with writing_alone(folder, place_of(folder)):
        return train_alone(flags, read_plan, train)


def train_alone(flags: Flags, read_plan: Callable[[Flags], Plan], train: Callable[[Plan], dict]) -> dict[str, Any]:
    """Do the training of `train_each_seed` while no other run can write to the folder."""
    plan = read_plan(flags)
    if not plan.run.seeds:
        return train(plan)
    seeds, resume = read_seeds(plan.run.seeds), plan.args.resume_from_checkpoint
    if resume and resume not in LATEST:
        raise InputError(f"--resume_from_checkpoint {resume} with --seeds: each seed has its own checkpoints; remove the path")
    if not plan.tasks:
        raise InputError("--seeds needs an evaluation set to choose the best run; give one, such as --eval_sts_file NAME=PATH")
    if plan.args.push_to_hub:
        push = f"{recipe_command('push')} FOLDER NAME"
        raise InputError(f"--push_to_hub does not work with --seeds; upload the finished folder with {push} instead")
    earlier = EarlierRun([] if resume else earlier_files(plan.folder), plan.folder)
    runs = {}
    if PartialState().is_main_process:
        begin(plan.folder)
        for folder in [plan.folder, *(plan.folder / f"seed-{seed}" for seed in seeds)]:
            clear_leftovers(folder)
    PartialState().wait_for_everyone()
    for seed in seeds:
        folder = plan.folder / f"seed-{seed}"
        if resume and (results := finished_run(folder, plan)):
            runs[seed] = results
            continue
        checkpoint = interrupted_run(folder, plan) if resume else None
        earlier_run = (folder / "results.json").is_file() or bool(checkpoints_in(folder))
        other = resume and earlier_run and checkpoint is None
        anew = ": training it again, because its earlier run had other settings or data" if other else ""
        if PartialState().is_main_process:
            print(f"\nseed {seed}{anew}")
        own = {"seeds": None, "seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
        of_seed = read_plan(flags.override(**own, resume_from_checkpoint=checkpoint))
        if anew:  # after its first step, the new run removes the files of the seed's earlier run
            earlier = EarlierRun([*of_seed.earlier.paths, folder / "results.json"])
        runs[seed] = train(dataclasses.replace(of_seed, earlier=earlier, shows_rows=seed == seeds[0]))
        gc.collect()  # frees the memory of the trainer and its model, which refer to each other
    with plan.args.main_process_first():
        return keep_best(plan.folder, runs, plan.model_args.trust_remote_code)


def finished_run(folder: Path, plan: Plan) -> dict[str, Any] | None:
    """Return the results of a seed's run; None if it is not finished, or if it had other settings or data."""
    if not (folder / "results.json").is_file():
        return None
    results, args = read_json(folder / "results.json", with_nan=True), plan.args
    batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    now = about_plan(plan) | {"objective": settings_of(plan.objective), "batch_size": batch_size}
    return results if {name: results.get("train", {}).get(name) for name in now} == as_json(now) else None


def interrupted_run(folder: Path, plan: Plan) -> str | None:
    """Return the newest complete checkpoint of a seed's interrupted run; None if there is none or it has other settings."""
    checkpoint = None if (folder / "results.json").is_file() else newest_whole(folder)
    same = checkpoint and same_settings(read_manifest(checkpoint)["run"], plan.args, plan.objective)
    return str(checkpoint) if same else None


def keep_best(folder: Path, runs: dict[int, dict], trust_remote_code: bool = False) -> dict[str, Any]:
    """Copy the files of the best seed to `folder`. Its results.json and README.md get the scores of all seeds."""
    scores = {seed: run["train"].get("score") or run["train"]["chosen_by"] for seed, run in runs.items()}
    sign = 1 if next(iter(scores.values()))["greater_is_better"] else -1
    best = max(scores, key=lambda seed: -math.inf if scores[seed]["score"] is None else sign * scores[seed]["score"])
    results = runs[best] | {"seed": best, "seeds": {str(seed): run["after"] for seed, run in runs.items()}}
    results["train"] = results["train"] | {"chosen_by": scores[best]}
    if PartialState().is_main_process:
        left_out = shutil.ignore_patterns("checkpoint-*", "runs", "README.md", f"{SAVING}*")
        with renewed(folder, clear=True) as place:
            with tempfile.TemporaryDirectory(prefix=SAVING, dir=place) as new:
                seed, copied = folder / f"seed-{best}", Path(new, "best")
                copied.mkdir()
                for name in set(os.listdir(seed)) - left_out(str(seed), os.listdir(seed)):
                    link_tree(seed / name, copied / name, copy=True)
                write_results(copied, results)
                put_in_place(copied, place)
            with silent_libraries():
                encoder = Encoder.from_pretrained(str(place), trust_remote_code=trust_remote_code)
            write_card(encoder, place, results)
        print("\n" + "\n".join(seeds_table(results)))
        print(saved_to(take_place(folder), encoder.remote_code))
    return results
