"""When a recipe for the built-in model evaluates and saves, if the user changes a part of its schedule."""

import logging
from typing import Any

from hf_embed.entry import is_first_process
from hf_embed.kit.cli import Flags

logger = logging.getLogger(__name__)

STRATEGIES, STEPS = ("eval_strategy", "save_strategy"), ("eval_steps", "save_steps")


def settle_schedule(flags: Flags) -> Flags:
    """Let the schedule of a recipe's preset give way to what the user gives, so that the two do not conflict."""
    if flags.preset is None:
        return flags
    values = dict(flags.values)
    if values["eval_strategy"] == "no" and {"eval_strategy", "eval_steps"} & flags.given == {"eval_strategy"}:
        values["eval_steps"] = None
    if values["load_best_model_at_end"]:
        follow(values, flags.given)
    if values["load_best_model_at_end"] and "load_best_model_at_end" not in flags.given:
        values["load_best_model_at_end"] = evaluates_checkpoints(values)
    return flags.override(**values)


def follow(values: dict[str, Any], given: frozenset[str]) -> None:
    """Let checkpoints follow the evaluations. If the user gives only when to save, let evaluations follow the checkpoints."""
    given |= {name.replace("_steps", "_strategy") for name in given}  # a number of steps means the strategy "steps"
    for evaluation, checkpoint in (STRATEGIES, STEPS):
        only_checkpoint = checkpoint in given and evaluation not in given
        followed, follower = (checkpoint, evaluation) if only_checkpoint else (evaluation, checkpoint)
        settled = follower in given or values[followed] in ("no", None)
        if not settled and not agree(values[evaluation], values[checkpoint]):
            values[follower] = values[followed]


def evaluates_checkpoints(values: dict[str, Any]) -> bool:
    """Return whether each checkpoint is evaluated. If not, warn that the last model is kept."""
    by_steps = [STEPS] if values["eval_strategy"] == values["save_strategy"] == "steps" else []
    for evaluation, checkpoint in (STRATEGIES, *by_steps):
        if not agree(values[evaluation], values[checkpoint]):
            settings = f"{evaluation} is {values[evaluation]} and {checkpoint} is {values[checkpoint]}"
            if is_first_process():
                logger.warning(f"{settings}, so not every checkpoint is evaluated: the last model is kept, not the best one")
            return False
    return True


def agree(evaluated: Any, saved: Any) -> bool:
    """Return whether each checkpoint is evaluated, given two strategies, or two numbers of steps or shares of the run."""
    if isinstance(saved, str):
        return evaluated != "no" and saved in (evaluated, "best")
    return bool(evaluated) and (evaluated < 1) == (saved < 1) and saved % evaluated == 0
