"""Train supervised SimCSE: on sentences, sentences that they entail, and sentences that contradict them.

    python recipes/sup_simcse.py                      # offline, on a laptop CPU, in a few minutes
    python recipes/sup_simcse.py --config recipes/configs/sup_simcse_bert_base.yaml --learning_rate 3e-5
    python recipes/sup_simcse.py --train_file nli.csv --eval_sts_file stsb=stsb-dev.tsv

The trained model is written to OUTPUT_DIR (default: outputs/sup_simcse; on the built-in texts outputs/quickstart, which
each run replaces). AutoModel and sentence-transformers can load it. Its README.md and results.json show the scores before and
after the training.

Training rows have the columns sent0, sent1[, hard_neg], or anchor, positive[, negative ...], or others that
docs/guides/own_data.md lists. `--columns anchor=question positive=answer` selects columns with other names. Each flag of
`transformers.TrainingArguments` works as in a plain Trainer, or is refused with an error. `--help all` lists them.
"""

from pathlib import Path
from typing import Any

from hf_embed.kit.cli import Flags, run
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.plan import Plan, make_plan, read_evaluation, read_flags, read_rows, settle_quickstart
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import SimCSE

CONFIG = Path(__file__).with_name("configs") / "sup_simcse_quickstart.yaml"  # settings for the built-in model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([SimCSE], CONFIG, unless=["model_name_or_path"], argv=argv)
    flags = settle_quickstart(flags, "sup_simcse")
    return train_each_seed(flags, read_plan, train)


def read_plan(flags: Flags) -> Plan:
    """Read the training rows and the evaluation sets."""
    rows = read_rows(flags, built_in="triplets.csv")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(SimCSE), rows, tasks, paired=True)


def train(plan: Plan) -> dict[str, Any]:
    """Load the model, train and save it, and score it before and after the training."""
    trainer = make_trainer(plan)
    before = score_model(trainer)
    fine_tune(plan, trainer)
    return report(plan, trainer, before)


if __name__ == "__main__":
    run(main)
