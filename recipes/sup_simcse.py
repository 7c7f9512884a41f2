"""Supervised SimCSE: sentences, sentences they entail, and sentences that contradict them.

    python recipes/sup_simcse.py                      # offline, on a laptop CPU, in a few minutes
    python recipes/sup_simcse.py --config recipes/configs/sup_simcse_bert_base.yaml --learning_rate 3e-5
    python recipes/sup_simcse.py --train_file nli.csv --eval_sts_file stsb=stsb-dev.tsv

Training rows have the columns sent0, sent1[, hard_neg], or anchor, positive[, negative ...], or query, positive[,
negative ...]. Flags of `transformers.TrainingArguments` do what they do for a plain Trainer, or are refused by name; `--help`
lists them all.
"""

from pathlib import Path

from hf_embed.kit.cli import run
from hf_embed.kit.finetune import run_simcse


def main() -> None:
    run_simcse(
        "sup_simcse",
        paired=True,
        quickstart_config=Path(__file__).with_name("configs") / "sup_simcse_quickstart.yaml",
        quickstart_file="triplets.csv",
    )


if __name__ == "__main__":
    run(main)
