r"""Show why SimCSE works: compare alignment and uniformity during training for dropout and for other positives.

    python recipes/simcse_ablation.py                 # offline: four variants, three seeds, ten minutes
    python recipes/simcse_ablation.py --train_file sentences.txt --eval_sts_file stsb=stsb-dev.tsv \
        --model_name_or_path google-bert/bert-base-uncased --variants dropout "no dropout" "crop 10%" --seeds 1,2,3
    python recipes/simcse_ablation.py --config recipes/configs/simcse_poolers.yaml --train_file ...

Each flag of recipes/unsup_simcse.py works, except those about saved models and the strategies of saving and evaluating. It
applies to all variants; the built-in model and sentences are the same too. In a YAML file, a variant may have any name, with
the flags in which it differs. The recipe prints a table. OUTPUT_DIR (default: outputs/simcse_ablation) has results.json,
ablation.png, and a folder for each run. If the recipe is interrupted, the same command trains the runs that are missing.
"""

from pathlib import Path
from typing import Any

from hf_embed.kit.ablation import AblationArguments, run_ablation
from hf_embed.kit.cli import Flags, run
from hf_embed.kit.plan import (
    Plan,
    PositiveArguments,
    make_plan,
    read_evaluation,
    read_flags,
    read_rows,
    settle_language_model,
)
from hf_embed.objectives import SimCSE

CONFIG = Path(__file__).with_name("configs") / "simcse_ablation_quickstart.yaml"  # settings for the built-in model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train each variant with each of `--seeds`, and return the content of results.json about the variants."""
    flags = read_flags([SimCSE, PositiveArguments, AblationArguments], CONFIG, unless=["model_name_or_path"], argv=argv)
    return run_ablation(settle_language_model(flags), read_plan)


def read_plan(flags: Flags) -> Plan:
    """Read the training rows and the evaluation sets of one run, as unsup_simcse.py does."""
    rows = read_rows(flags, built_in="sentences.txt")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(SimCSE), rows, tasks, positive=flags.make(PositiveArguments))


if __name__ == "__main__":
    run(main)
