"""Why SimCSE works: alignment against uniformity along training, for dropout and for what might take its place.

    python recipes/simcse_ablation.py                 # offline: four variants, three seeds, a few minutes
    python recipes/simcse_ablation.py --train_file sentences.txt --eval_sts_file stsb=stsb-dev.tsv \
        --model_name_or_path google-bert/bert-base-uncased --variants dropout "no dropout" "crop 10%" --seeds 1,2,3
    python recipes/simcse_ablation.py --config recipes/configs/simcse_poolers.yaml --train_file ...

Every flag of recipes/unsup_simcse.py works, and holds for all variants; in a YAML file a variant may be a name of your own and
the flags in which it differs. Printed: a table. In OUTPUT_DIR: results.json, ablation.png, and a folder for each run. The same
command again runs what is missing.
"""

import sys
from functools import partial
from pathlib import Path

from hf_embed.kit import cli
from hf_embed.kit.ablation import AblationArguments, run_ablation
from hf_embed.kit.plan import plan_simcse

CONFIG = Path(__file__).with_name("configs") / "simcse_ablation_quickstart.yaml"


def main() -> None:
    run_ablation(partial(plan_simcse, None, False, CONFIG, "sentences.txt", more=(AblationArguments,)), sys.argv[1:])


if __name__ == "__main__":
    cli.run(main)
