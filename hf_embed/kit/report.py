"""The report of a finished run: results.json, the model card, the picture, and the printed scores."""

import contextlib
import dataclasses
import logging
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig

from hf_embed.checkpoint.card import own_results, read_results, write_card, write_results
from hf_embed.checkpoint.tables import comparison_table
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import with_model
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.tasks import Task, score_tasks
from hf_embed.files.read_files import read_json
from hf_embed.files.safe_files import clear_leftovers, writing
from hf_embed.kit.content import content_of
from hf_embed.kit.models import embed_with
from hf_embed.kit.overwrite import place_of, take_place
from hf_embed.kit.plan import Plan
from hf_embed.progress import hidden_bars, silent_libraries
from hf_embed.text_models import loading_class
from hf_embed.trainer import ContrastiveTrainer
from hf_embed.training.record import about_training, changed_settings, on_the_hub, publishable, summary

logger = logging.getLogger(__name__)

MOST_LABELS = 12  # points of the picture that are labeled with their step


def report(plan: Plan, trainer: ContrastiveTrainer, before: dict[str, float]) -> dict[str, Any]:
    """Score the saved folder, write results.json, the picture and the card, and push the folder if the flags say so.

    Returns the content of results.json.
    """
    plan = dataclasses.replace(plan, args=trainer.args)  # with the settings that the trainer read from the model's folder
    saved, after = None, {}
    if plan.tasks:
        # Weights in 4 bits may be the only ones that the GPU holds, and saving has checked that the saved ones are alike.
        saved = trainer.encoder if plan.model_args.load_in_4bit else load_saved(plan)
        tasks = with_model(trainer.eval_dataset or {}, saved, temperature=learned_temperature(trainer))
        with hidden_bars(bool(plan.args.disable_tqdm)):
            after = {f"eval_{key}": value for key, value in score_tasks(tasks, embed_with(saved)).items()}
    about = about_run(plan, trainer, after)
    results: dict[str, Any] = {"before": summary(before, plan.tasks), "after": summary(after, plan.tasks), "train": about}
    if plan.run.title:
        results["card"] = {"title": plan.run.title}
    if trainer.is_world_process_zero():
        write_report(plan, trainer, before, results)
        take_place(plan.folder)
    trainer.accelerator.wait_for_everyone()
    trainer.args.output_dir = str(place_of(plan.folder))
    if trainer.is_world_process_zero():
        print(saved_to(plan.folder, trainer.encoder.remote_code))
    if saved is not None and plan.run.show_searches:
        for name, task in plan.tasks.items():
            show_searches(name, task, saved, plan.run.show_searches)
    if plan.args.push_to_hub:
        trainer.push_to_hub()
    return results


def load_saved(plan: Plan) -> Encoder:
    """Load the saved folder again, as a user will load it."""
    with silent_libraries():
        trusted = plan.model_args.trust_remote_code
        encoder = Encoder.from_pretrained(str(plan.folder), trust_remote_code=trusted, dtype=torch.float32)
    for parameter in encoder.parameters():  # else they are read from the file, and Windows does not rename its folder
        parameter.data = parameter.data.clone()
    return encoder.to(plan.args.device)


def about_run(plan: Plan, trainer: ContrastiveTrainer, after: dict[str, float]) -> dict[str, Any]:
    """Return the "train" part of results.json: the model, the data and the settings. `after` has the final scores."""
    name = plan.model_args.model_name_or_path
    if plan.args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        metric, scored = plan.args.metric_for_best_model, trainer.state.best_global_step is not None
        reason = "no checkpoint was saved" if scored else f"no evaluation returned a number for {metric}"
        logger.warning(f"{reason}: the model of the last step is saved, not the best one")
    return about_training(trainer, after) | about_plan(plan) | {
        "base_model": on_the_hub(name), "datasets": plan.datasets, "language": plan.run.language, "license": plan.run.license,
    }  # fmt: skip


def about_plan(plan: Plan) -> dict[str, Any]:
    """Return the model, the data and the settings of a plan, as the "train" part of results.json has them."""
    name = plan.model_args.model_name_or_path
    model, data = publishable(name or "quickstart"), publishable(plan.source)
    return {"model": model, "data": data, "content": content_of(plan), "settings": changed(plan)}


def changed(plan: Plan) -> dict[str, Any]:
    """Return the settings of a plan that can change a result and that differ from their defaults."""
    return changed_settings((plan.model_args, plan.args, plan.positive), not isinstance(plan.rows, Dataset))


def learned_temperature(trainer: ContrastiveTrainer) -> Tensor | None:
    """Return the temperature that the objective has learned, or None if it learns none. Every rank must call this."""
    if trainer.step.log_temperature is None:
        return None
    ids = torch.tensor(trainer.encoder.tokenizer("a")["input_ids"], device=trainer.encoder.device)
    with torch.inference_mode():
        return trainer.model(ids, [len(ids)])["temperature"]


def write_report(plan: Plan, trainer: ContrastiveTrainer, before: dict[str, float], results: dict[str, Any]) -> None:
    """Write the picture and the card, print the table, and write results.json last, because it marks a finished run."""
    if plan.tasks:
        evaluations = [entry for entry in trainer.state.log_history if "eval_spearman" in entry]
        plot_trajectory([before | {"step": 0}, *evaluations], plan.folder / "geometry.png")
        print("\n" + "\n".join(comparison_table(results)))
    write_card(trainer.encoder, plan.folder, results)
    write_results(plan.folder, results)


def check_results(folder: str | Path, replaces: Iterable[str] = ("this package",)) -> None:
    """Raise InputError if `folder` has a results.json that this package did not write, unless it has the keys `replaces`."""
    path = Path(folder, "results.json")
    if own_results(path) is None:
        with contextlib.suppress(InputError):
            if read_json(path, with_nan=True).keys() >= set(replaces):
                return
        raise InputError(f"{path} has other content than results of a model, which would be lost; give another folder")


def store_evaluation(folder: Path, results: dict[str, Any]) -> Path:
    """Write results.json in `folder`, and return its path. In the folder of a model, earlier results are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    kept = read_results(folder)
    write_results(folder, kept | {"evaluated": results} if kept or (folder / "config.json").is_file() else results)
    return folder / "results.json"


def saved_to(folder: Path, remote_code: bool = False) -> str:
    """Return the last line that a recipe prints: where the model is, and how to load it."""
    loader = loading_class(AutoConfig.from_pretrained(folder, trust_remote_code=remote_code))
    call = f"{loader}.from_pretrained({str(folder)!r}{', trust_remote_code=True' if remote_code else ''})"
    return f"\nsaved to {folder}; load it with {call} (README.md shows how to pool)"


def show_searches(name: str, task: Task, encoder: Encoder, count: int) -> None:
    """Print some queries of a retrieval dataset with their three nearest documents. A star marks relevant documents."""
    if not isinstance(task, Retrieval):
        return
    chosen = list(task.qrels)[:: max(1, len(task.qrels) // count)][:count]
    some = dataclasses.replace(task, qrels={query: task.qrels[query] for query in chosen})
    _, found = some.rank(embed_with(encoder), 3)
    if PartialState().is_main_process:
        print(f"\nsearches in {name} ({len(task.corpus):,} documents; * marks relevant documents):")
        for query, documents in found.items():
            print(f"\n  {textwrap.shorten(task.queries[query], 100)}")
            for document in documents:
                star = "*" if document in task.qrels[query] else " "
                print(f"  {star} {textwrap.shorten(task.corpus[document], 90)}")


def plot_trajectory(history: list[dict[str, Any]], path: str | Path) -> None:
    """Plot alignment against uniformity along a run, one point per evaluation, colored by the STS score.

    `history` has the form of the Trainer's `log_history`.
    """
    from matplotlib.figure import Figure

    points = [log for log in history if np.isfinite(log.get("eval_alignment", np.nan) + log.get("eval_uniformity", np.nan))]
    if not points:
        return
    x = [point["eval_uniformity"] for point in points]
    y = [point["eval_alignment"] for point in points]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, color="0.7", linewidth=1, zorder=1)
    dots = axes.scatter(x, y, c=[point["eval_spearman"] for point in points], cmap="viridis", s=36, zorder=2)
    axes.margins(0.12)  # room for the labels
    middle = (min(x) + max(x)) / 2
    every = -(-len(points) // MOST_LABELS)
    for number, point in enumerate(points):
        if number % every == 0 or point is points[-1]:
            side = -1 if x[number] > middle else 1  # towards the middle, so that the label stays inside the frame
            place: dict[str, Any] = {"xytext": (7 * side, 5), "ha": "right" if side < 0 else "left", "fontsize": 9}
            label = f"step {point.get('step', 0)}"
            axes.annotate(label, (x[number], y[number]), textcoords="offset points", **place)
    axes.set_xlabel("uniformity: are all sentences spread out? (lower is better)")
    axes.set_ylabel("alignment: are similar sentences close? (lower is better)")
    axes.set_title("Alignment and uniformity after each evaluation")
    figure.colorbar(dots, label="STS, Spearman x 100 (higher is better)")
    with writing(path) as aside:
        figure.savefig(aside, dpi=125)
