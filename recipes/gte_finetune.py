"""GTE, stage 2: labelled pairs with hard negatives, the improved contrastive loss, from the model of stage 1.

    python recipes/gte_finetune.py                    # offline, after recipes/gte_pretrain.py, in a few minutes
    accelerate launch --config_file recipes/accelerate/ddp_8gpu.yaml recipes/gte_finetune.py \
        --config recipes/configs/gte_finetune_base.yaml --sources sources.yaml
    python recipes/gte_finetune.py --model_name_or_path outputs/gte_pretrain --train_file mined.jsonl \
        --eval_retrieval_dir scifact=beir/scifact

recipes/mine_hard_negatives.py makes a file like mined.jsonl. Without data, negatives are mined for the docstrings of
recipes/gte_pretrain.py, with the model of outputs/gte_pretrain or of --model_name_or_path, and a few searches are shown at the
end.
"""

import shutil
from pathlib import Path

import torch
import yaml
from accelerate import PartialState

from hf_embed import Encoder, InputError
from hf_embed.data.mixture import read_sources
from hf_embed.kit.cli import run
from hf_embed.kit.docstrings import write_sources
from hf_embed.kit.finetune import embed_with, run_gte
from hf_embed.mining import MiningArguments, mine_hard_negatives

DATA = Path("outputs/docstrings")
PRETRAINED = Path("outputs/gte_pretrain")


def mined_docstrings(model: str) -> tuple[str, list[str]]:
    """Mine negatives with `model` for the docstring and code sources; -> the file of sources and the evaluation sets."""
    there = (DATA / "sources.yaml").is_file()
    if model == str(PRETRAINED) and not (there and (PRETRAINED / "config.json").is_file()):
        raise InputError(f"no model in {PRETRAINED} or no data in {DATA}: run recipes/gte_pretrain.py first")
    state = PartialState()
    embed = embed_with(Encoder.from_pretrained(model, dtype=torch.float32).to(state.device))
    folder = DATA / "mined"
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        if not there:
            write_sources(DATA)
    state.wait_for_everyone()
    entries = []
    for source in read_sources(DATA / "sources.yaml"):
        file = f"{source.name}.jsonl"
        if source.name.endswith(".name"):  # names are too short to have hard negatives
            file = f"../{file}"
        else:
            pairs = list(zip(source.rows["query"][:], source.rows["positive"][:]))
            mine_hard_negatives(pairs, [], embed, folder / file, MiningArguments(num_negatives=1))
        entries.append({"name": source.name, "file": file})
    if state.is_main_process:
        (folder / "sources.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    state.wait_for_everyone()
    return str(folder / "sources.yaml"), [f"doc_search={DATA}/doc_search", f"code_search={DATA}/code_search"]


def main() -> None:
    config = Path(__file__).with_name("configs") / "gte_finetune_quickstart.yaml"
    run_gte("gte_finetune", config, mined_docstrings, offline_model=str(PRETRAINED))


if __name__ == "__main__":
    run(main)
