"""Train, evaluate and save in FOLDER a tiny model with DeepSpeed ZeRO-2, or in one process without it. See worker.py.

The second argument is plain, cached (gradient caching), or lora (a decoder with adapters, with gradient caching). The third, if
there is one, is the checkpoint from which the training resumes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
from conftest import small_tokenizer
from datasets import Dataset
from worker import BATCH, SEARCH, SETTINGS, STS, rows_with
from worker_fsdp import make_model

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive
from hf_embed.distributed import get_world_size


def main(folder: str, kind: str, checkpoint: str | None = None) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=BATCH // ranks, max_steps=2, gradient_caching=kind != "plain",
        pooling="last" if kind == "lora" else "mean", per_device_eval_batch_size=6 // ranks,
        **(SETTINGS | {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}),
    )  # fmt: skip
    trainer = ContrastiveTrainer(
        model=make_model(kind == "lora").float(), processing_class=small_tokenizer(), args=args,
        objective=ImprovedContrastive(0.2, learn_temperature=True), train_dataset=Dataset.from_list(rows_with(3)),
        eval_dataset={"s": Dataset.from_list(STS), "r": SEARCH, "h": rows_with(1)[:11]},
    )  # fmt: skip
    assert trainer.is_deepspeed_enabled == (ranks > 1) and get_world_size() == ranks
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
