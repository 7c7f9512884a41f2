r"""Fine-tune a model as in GTE's stage 2, on labeled pairs with hard negatives and with the improved contrastive loss.

    python recipes/gte_finetune.py                    # offline, in a few minutes; run recipes/gte_pretrain.py first
    hf-embed launch --config_file recipes/accelerate/ddp_8gpu.yaml gte-finetune \
        --config recipes/configs/gte_finetune_base.yaml --sources sources.yaml
    python recipes/gte_finetune.py --model_name_or_path outputs/gte_pretrain --train_file mined.jsonl \
        --eval_retrieval_dir scifact=beir/scifact

The trained model is written to OUTPUT_DIR (default: outputs/gte_finetune). AutoModel and sentence-transformers can load it. Its
README.md and results.json show the scores. recipes/mine_hard_negatives.py makes files like mined.jsonl. Without data, negatives
are mined for the docstrings of recipes/gte_pretrain.py, with the model in outputs/gte_pretrain or --model_name_or_path, and a
few searches are printed at the end.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_embed import Encoder, InputError
from hf_embed.entry import recipe_command
from hf_embed.kit.cli import Flags, run
from hf_embed.kit.docstrings import mine_negatives, write_sources
from hf_embed.kit.finetune import fine_tune, make_trainer, score_model
from hf_embed.kit.models import embed_with
from hf_embed.kit.plan import MatryoshkaArguments, Plan, make_plan, read_evaluation, read_flags, read_rows, settle_offline
from hf_embed.kit.report import report
from hf_embed.kit.seeds import train_each_seed
from hf_embed.objectives import ImprovedContrastive

DATA = Path("outputs/docstrings")
PRETRAINED = Path("outputs/gte_pretrain")
CONFIG = Path(__file__).with_name("configs") / "gte_finetune_quickstart.yaml"  # settings for a run without data


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train once, or once with each of `--seeds`, and return the content of results.json."""
    flags = read_flags([ImprovedContrastive, MatryoshkaArguments], CONFIG, argv=argv)
    flags = settle_offline(flags, "gte_finetune", mined_docstrings, model=str(PRETRAINED))
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


def mined_docstrings(model: str) -> tuple[str, list[str]]:
    """Mine negatives with `model` for the docstring sources. Return the file of sources and the evaluation sets."""
    there = (DATA / "sources.yaml").is_file()
    if model == str(PRETRAINED) and not (there and (PRETRAINED / "config.json").is_file()):
        raise InputError(f"there is no model in {PRETRAINED} or no data in {DATA}; run {recipe_command('gte_pretrain')} first")
    state = PartialState()
    embed = embed_with(Encoder.from_pretrained(model, dtype=torch.float32).to(state.device))
    if state.is_main_process and not there:
        write_sources(DATA)
    state.wait_for_everyone()
    sources = mine_negatives(DATA, embed)
    return str(sources), [f"doc_search={DATA}/doc_search", f"code_search={DATA}/code_search"]


if __name__ == "__main__":
    run(main)
