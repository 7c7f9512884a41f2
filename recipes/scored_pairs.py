"""Train on pairs of sentences with scores: a pair with a higher score gets more similar embeddings (CoSENT).

    python recipes/scored_pairs.py                    # offline, on a laptop CPU, in about a minute
    python recipes/scored_pairs.py --train_file sts-train.tsv --eval_sts_file stsb=sts-dev.tsv
    python recipes/scored_pairs.py --train_file ratings.csv --columns anchor=question positive=answer score=stars

The trained model is written to OUTPUT_DIR (default: outputs/scored_pairs; on the built-in texts outputs/quickstart, which
each run replaces). AutoModel and sentence-transformers can load it. Its README.md and results.json show the scores before and
after the training.

Training rows have the columns sentence1, sentence2, score, or others that docs/guides/own_data.md lists. A tsv or csv file
without a header has score, sentence1, sentence2. Scores are compared with each other only, so any scale will do. To train on
scored pairs and on other data in one run, list both in a file of sources, with `objective: CoSENT` for the pairs
(docs/guides/scores_and_teachers.md).
"""

from pathlib import Path
from typing import Any

from hf_embed.kit.cli import Flags, run
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.plan import Plan, make_plan, read_evaluation, read_flags, read_scored_rows, settle_quickstart
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import CoSENT

CONFIG = Path(__file__).with_name("configs") / "scored_pairs_quickstart.yaml"  # settings for the built-in model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([CoSENT], CONFIG, unless=["model_name_or_path"], argv=argv)
    flags = settle_quickstart(flags, "scored_pairs")
    return train_each_seed(flags, read_plan, train)


def read_plan(flags: Flags) -> Plan:
    """Read the training rows and the evaluation sets."""
    rows = read_scored_rows(flags, built_in="graded.tsv")
    tasks = read_evaluation(flags, built_in="sts.tsv")
    return make_plan(flags, flags.make(CoSENT), rows, tasks, paired=True)


def train(plan: Plan) -> dict[str, Any]:
    """Load the model, train and save it, and score it before and after the training."""
    trainer = make_trainer(plan)
    before = score_model(trainer)
    fine_tune(plan, trainer)
    return report(plan, trainer, before)


if __name__ == "__main__":
    run(main)
