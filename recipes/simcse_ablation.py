"""Why SimCSE works: alignment against uniformity along training, for dropout and for what might take its place.

    python recipes/simcse_ablation.py                 # offline: four variants, three seeds, a few minutes
    python recipes/simcse_ablation.py --train_file sentences.txt --eval_sts_file stsb=stsb-dev.tsv \
        --model_name_or_path google-bert/bert-base-uncased --variants dropout "no dropout" "crop 10%" --seeds 1,2,3
    python recipes/simcse_ablation.py --config recipes/configs/simcse_poolers.yaml --train_file ...

Every flag of recipes/unsup_simcse.py works, and holds for all variants; in a YAML file a variant may be a name of your own and
the flags in which it differs. Printed: a table. In OUTPUT_DIR: results.json, ablation.png, and a folder for each run. The same
command again runs what is missing.
"""

from pathlib import Path
from typing import Any

from hf_embed.kit.ablation import AblationArguments, run_ablation
from hf_embed.kit.cli import Flags, run
from hf_embed.kit.plan import Plan, PositiveArguments, make_plan, read_evaluation, read_flags, read_rows
from hf_embed.objectives import SimCSE

CONFIG = Path(__file__).with_name("configs") / "simcse_ablation_quickstart.yaml"  # of the built-in model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train each variant with each of `--seeds`; return what results.json holds of them."""
    flags = read_flags([SimCSE, PositiveArguments, AblationArguments], CONFIG, unless=["model_name_or_path"], argv=argv)
    return run_ablation(flags, read_plan)


def read_plan(flags: Flags) -> Plan:
    """Load the rows and the evaluation sets of one run, as unsup_simcse.py does."""
    rows = read_rows(flags, built_in="sentences.txt")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(SimCSE), rows, tasks, positive=flags.make(PositiveArguments))


if __name__ == "__main__":
    run(main)
