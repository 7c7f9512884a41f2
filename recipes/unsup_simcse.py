"""Train unsupervised SimCSE on plain sentences: the positive of a sentence is the sentence itself with another dropout mask.

    python recipes/unsup_simcse.py                    # offline, on a laptop CPU, in a minute
    python recipes/unsup_simcse.py --config recipes/configs/unsup_simcse_bert_base.yaml
    python recipes/unsup_simcse.py --train_file sentences.txt --eval_sts_file stsb=stsb-dev.tsv
    python recipes/unsup_simcse.py --positive delete:0.1      # the positive is the sentence without a tenth of its words

Without a model, the recipe trains a built-in language model, which has only learned to fill in masked words. Without data, it
trains on built-in sentences. The trained model is written to OUTPUT_DIR (default: outputs/unsup_simcse; on the built-in texts
outputs/quickstart, which each run replaces). AutoModel and sentence-transformers can load it. Its README.md and results.json
show the scores before and after the training.

A training file is a txt file with one sentence per line, or a table with a column text or sentence. Each flag of
`transformers.TrainingArguments` works as in a plain Trainer, or is refused with an error. `--help all` lists them.
"""

from pathlib import Path
from typing import Any

from hf_embed.kit.cli import Flags, run
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.plan import (
    Plan,
    PositiveArguments,
    make_plan,
    read_evaluation,
    read_flags,
    read_rows,
    settle_language_model,
    settle_quickstart,
)
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import SimCSE

CONFIG = Path(__file__).with_name("configs") / "unsup_simcse_quickstart.yaml"  # settings for the built-in model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([SimCSE, PositiveArguments], CONFIG, unless=["model_name_or_path"], argv=argv)
    flags.make(PositiveArguments).check_used()
    flags = settle_language_model(settle_quickstart(flags, "unsup_simcse"))
    return train_each_seed(flags, read_plan, train)


def read_plan(flags: Flags) -> Plan:
    """Read the training rows, give each a positive, and read the evaluation sets."""
    rows = read_rows(flags, built_in="sentences.txt")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(SimCSE), rows, tasks, positive=flags.make(PositiveArguments))


def train(plan: Plan) -> dict[str, Any]:
    """Load the model, train and save it, and score it before and after the training."""
    trainer = make_trainer(plan)
    before = score_model(trainer)
    fine_tune(plan, trainer)
    return report(plan, trainer, before)


if __name__ == "__main__":
    run(main)
