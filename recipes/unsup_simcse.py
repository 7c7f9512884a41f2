"""Unsupervised SimCSE: plain sentences; a sentence's positive is itself under another dropout mask.

    python recipes/unsup_simcse.py                    # offline, on a laptop CPU, in a few minutes
    python recipes/unsup_simcse.py --config recipes/configs/unsup_simcse_bert_base.yaml
    python recipes/unsup_simcse.py --train_file sentences.txt --eval_sts_file stsb=stsb-dev.tsv

A training file is a txt with one sentence a line, or a table with a column text or sentence. Flags of
`transformers.TrainingArguments` do what they do for a plain Trainer, or are refused by name; `--help` lists them all.
"""

from pathlib import Path

from hf_embed.kit.cli import run
from hf_embed.kit.finetune import run_simcse


def main() -> None:
    run_simcse(
        "unsup_simcse",
        paired=False,
        quickstart_config=Path(__file__).with_name("configs") / "unsup_simcse_quickstart.yaml",
        quickstart_file="sentences.txt",
    )


if __name__ == "__main__":
    run(main)
