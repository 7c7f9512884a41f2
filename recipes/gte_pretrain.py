r"""Train a model as in GTE's stage 1, on pairs from many sources, with a very large batch and the improved contrastive loss.

    python recipes/gte_pretrain.py                    # offline, on a laptop CPU, in a few minutes
    hf-embed launch --config_file recipes/accelerate/ddp_8gpu.yaml gte-pretrain \
        --config recipes/configs/gte_pretrain_base.yaml --sources sources.yaml
    python recipes/gte_pretrain.py --sources sources.yaml --eval_retrieval_dir scifact=beir/scifact \
        --directions query_to_doc                                # the same with the usual in-batch loss

The trained model is written to OUTPUT_DIR (default: outputs/gte_pretrain). AutoModel and sentence-transformers can load it. Its
README.md and results.json show the scores before and after the training.

docs/gte.md shows an example of sources.yaml. Without arguments, the built-in encoder learns to search the
docstrings of the Python packages that are installed on this machine; the recipe writes these to outputs/docstrings.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_embed.kit.cli import Flags, run
from hf_embed.kit.docstrings import write_sources
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.plan import MatryoshkaArguments, Plan, make_plan, read_evaluation, read_flags, read_rows, settle_offline
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import ImprovedContrastive

DATA = Path("outputs/docstrings")
CONFIG = Path(__file__).with_name("configs") / "gte_pretrain_quickstart.yaml"  # settings for a run without data


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([ImprovedContrastive, MatryoshkaArguments], CONFIG, argv=argv)
    flags = settle_offline(flags, "gte_pretrain", docstrings)
    return train_each_seed(flags, read_plan, train)


def read_plan(flags: Flags) -> Plan:
    """Read the training rows and the evaluation sets."""
    rows = read_rows(flags)
    tasks = read_evaluation(flags)
    objective = flags.make(MatryoshkaArguments).wrap(flags.make(ImprovedContrastive))
    return make_plan(flags, objective, rows, tasks)


def train(plan: Plan) -> dict[str, Any]:
    """Load the model, train and save it, and score it before and after the training."""
    trainer = make_trainer(plan)
    before = score_model(trainer)
    fine_tune(plan, trainer)
    return report(plan, trainer, before)


def docstrings(_: str) -> tuple[str, list[str]]:
    """Collect pairs from the installed packages. Return the file of sources and the evaluation sets."""
    state = PartialState()
    if state.is_main_process:
        found = write_sources(DATA)
        print(", ".join(f"{count:,} {what}" for what, count in found.items()), f"from docstrings, in {DATA}")
    state.wait_for_everyone()
    return str(DATA / "sources.yaml"), [f"doc_search={DATA}/doc_search", f"code_search={DATA}/code_search"]


if __name__ == "__main__":
    run(main)
