"""Train, evaluate and save in FOLDER a tiny model that is sharded over the ranks (FSDP 2). See worker.py.

The second argument is plain, cached (gradient caching), or lora (a decoder with adapters, with gradient caching). The third, if
there is one, is the checkpoint from which the training resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from worker import BATCH, NO_DROPOUT, SEARCH, SETTINGS, STS, rows_with

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive
from hf_embed.distributed import get_world_size

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def make_model(lora: bool):
    """Return a tiny model in float64: BERT, or Qwen3 with LoRA adapters."""
    if not lora:
        return tiny_model(**NO_DROPOUT).double()
    torch.manual_seed(0)
    return get_peft_model(tiny_model("qwen3"), LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0)).double()


def main(folder: str, kind: str, checkpoint: str | None = None) -> None:
    PartialState(cpu=True)
    # torch cannot resume a sharded optimizer without state, such as SGD.
    optimizer = {"optim": "adamw_torch", "learning_rate": 0.01} if kind == "lora" else {}
    ranks = get_world_size()
    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=BATCH // ranks, max_steps=2, gradient_caching=kind != "plain",
        pooling="last" if kind == "lora" else "mean",
        per_device_eval_batch_size=6 // ranks,
        **(SETTINGS | {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1} | optimizer),
    )  # fmt: skip
    if ranks > 1:
        # accelerate shards only on accelerators. With this one switch set by hand, everything works with gloo too.
        assert args.world_size == ranks
        os.environ.update(FSDP)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = ContrastiveTrainer(
        model=make_model(kind == "lora"), processing_class=small_tokenizer(), args=args,
        objective=ImprovedContrastive(0.2, learn_temperature=True), train_dataset=Dataset.from_list(rows_with(3)),
        eval_dataset={"s": Dataset.from_list(STS), "r": SEARCH, "h": rows_with(1)[:11]},
    )  # fmt: skip
    assert trainer.is_fsdp_enabled == (ranks > 1)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
