"""Train a model on what a teacher says: on its vectors of the texts, or on its scores of candidates.

    python recipes/distill.py                         # offline, on a laptop CPU, in a few minutes
    python recipes/distill.py --train_file sentences.txt.gz --teacher intfloat/e5-large-v2 --model_name_or_path small-model
    python recipes/distill.py --objective TeacherKL --train_file mined.jsonl     # with scores of a reranker in columns

The trained model is written to OUTPUT_DIR (default: outputs/distill; on the built-in texts outputs/quickstart, which each
run replaces). docs/guides/scores_and_teachers.md explains the objectives and the columns of scores.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_embed import InputError
from hf_embed.kit.cli import Flags, run, setting
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.plan import (
    QUICKSTART,
    Plan,
    make_plan,
    read_evaluation,
    read_flags,
    read_rows,
    settle_language_model,
    settle_quickstart,
    uses_quickstart,
)
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import OBJECTIVES

CONFIG = Path(__file__).with_name("configs") / "distill_quickstart.yaml"  # settings for the built-in models
CHOICES: dict[str, type] = {name: OBJECTIVES[name] for name in ("VectorDistillation", "TeacherKL", "MarginMSE")}


@dataclass
class DistillArguments:
    """The choice of the objective."""

    objective: str = setting(
        "VectorDistillation", "Learn the teacher's vectors, or its scores of candidates.", choices=list(CHOICES)
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([DistillArguments, *CHOICES.values()], CONFIG, argv=argv)
    if uses_quickstart(flags) and not flags.values["teacher"]:
        flags = flags.override(teacher=str(QUICKSTART / "encoder"))
    flags = settle_quickstart(settle_language_model(flags), "distill")
    return train_each_seed(flags, read_plan, train)


def read_plan(flags: Flags) -> Plan:
    """Make the chosen objective, and read the training rows and the evaluation sets.

    Flags of the other objectives are refused, because they would have no effect.
    """
    chosen = flags.values["objective"]
    for name, kind in CHOICES.items():
        if name != chosen and (wrong := [own.name for own in fields(kind) if own.name in flags.given]):
            raise InputError(f"--{wrong[0]} is a setting of {name}, but --objective is {chosen}; remove the flag")
    rows = read_rows(flags, built_in="sentences.txt")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(CHOICES[chosen]), rows, tasks)


def train(plan: Plan) -> dict[str, Any]:
    """Load the model, train and save it, and score it before and after the training."""
    trainer = make_trainer(plan)
    before = score_model(trainer)
    fine_tune(plan, trainer)
    return report(plan, trainer, before)


if __name__ == "__main__":
    run(main)
