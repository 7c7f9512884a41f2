"""Train, on any number of ranks, models with parameters that no text uses, or that not every batch uses.

Each rank saves its weights in FOLDER/RANKS-RANK.pt.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker_unused.py FOLDER
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import torch
from accelerate import PartialState
from conftest import small_tokenizer
from datasets import Dataset
from transformers import AutoConfig, AutoModel, SwitchTransformersConfig, SwitchTransformersEncoderModel
from worker import BATCH, SETTINGS, rows_with

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments
from hf_embed.distributed import get_rank, get_world_size

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"vocab_size": 12000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 130, "pad_token_id": 0} | NO_DROPOUT  # fmt: skip
SWITCH = {"vocab_size": 12000, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_sparse_encoder_layers": 2,
          "num_heads": 4, "num_experts": 16, "expert_capacity": 1000, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
          "pad_token_id": 0, "router_dtype": "float32"}  # fmt: skip
CONFIGS = {
    "longformer": SMALL | {"attention_window": 8},
    "luke": SMALL | {"entity_vocab_size": 50, "entity_emb_size": 16, "use_entity_aware_attention": True},
    "biogpt": SMALL | {"layerdrop": 0.5, "activation_dropout": 0.0},
}
KINDS = [*CONFIGS, "switch"]


def make(kind: str):
    torch.manual_seed(0)
    if kind == "switch":  # one module for each expert
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig(**SWITCH))
    else:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval() if kind == "longformer" else model.double().eval()  # Longformer's gradients are NaN in float64


def trainer(kind: str, folder: str, **settings) -> ContrastiveTrainer:
    settings = SETTINGS | {"learning_rate": 0.01} | settings
    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=BATCH // get_world_size(), max_steps=3, **settings
    )  # fmt: skip
    return ContrastiveTrainer(
        model=make(kind), processing_class=small_tokenizer(), args=args, train_dataset=Dataset.from_list(rows_with(1))
    )


def train(kind: str, folder: str, **settings) -> dict:
    run = trainer(kind, folder, **settings)
    run.train()
    return {
        "weights": {name: p.detach().clone() for name, p in run.encoder.named_parameters()},
        "trained": {name for name, p in run.encoder.named_parameters() if p.requires_grad},
        "find_unused": run.args.ddp_find_unused_parameters,
    }


if __name__ == "__main__":
    PartialState()
    result = {kind: train(kind, sys.argv[1]) for kind in KINDS}
    result["switch cached"] = train("switch", sys.argv[1], gradient_caching=True)
    rank, ranks = get_rank(), get_world_size()
    torch.save(result | {"ranks": ranks}, os.path.join(sys.argv[1], f"{ranks}-{rank}.pt"))
    PartialState().destroy_process_group()
