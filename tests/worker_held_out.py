"""Measure the validation loss on each rank, for tests/test_held_out.py: python worker_held_out.py FOLDER."""

import os
import sys

import torch
from accelerate import PartialState
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from worker import NO_DROPOUT, SETTINGS, WORDS, rows_with

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, SimCSE
from hf_embed.distributed import gather_objects, get_rank, get_world_size

GLOBAL_BATCH = 6
NEW = [{"anchor": f"some {a}", "positive": f"{a} and {b}"} for a, b in zip(WORDS, WORDS[::-1])]
HELD_OUT = {
    "even": rows_with(1)[:12],
    "ragged": rows_with(3)[:11],  # the last batch has five rows, which two ranks cannot share evenly
    "single": rows_with(1)[:7],  # one row more than a batch
    "few": NEW[:2],
    # Each row has two positives. The second one is also a hard negative of the next row.
    "lists": [{"anchor": f"some {word}", "positive": [f"{word} here", f"{word} there"], "negatives": [f"{before} there"]}
              for word, before in zip(WORDS, WORDS[-1:] + WORDS[:-1])],
}  # fmt: skip
OBJECTIVES = {
    "simcse": lambda: SimCSE(0.2),
    "gte": lambda: ImprovedContrastive(0.2),
    "learned": lambda: ImprovedContrastive(0.2, learn_temperature=True),
}


def losses(folder: str, **settings) -> dict[str, dict[str, float]]:
    """Return for each objective the loss of each evaluation set before and after two training steps."""
    found = {}
    for name, objective in OBJECTIVES.items():
        args = ContrastiveTrainingArguments(
            folder, per_device_train_batch_size=12 // get_world_size(), max_steps=2,
            per_device_eval_batch_size=GLOBAL_BATCH // get_world_size(), **(SETTINGS | settings),
        )  # fmt: skip
        trainer = ContrastiveTrainer(
            model=tiny_model(**NO_DROPOUT).double(), processing_class=small_tokenizer(), args=args, objective=objective(),
            train_dataset=Dataset.from_list(rows_with(1)[12:]), eval_dataset=HELD_OUT,
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        found[name] = {f"{when} {key}": value for when, scores in (("before", before), ("after", after))
                       for key, value in scores.items() if key.endswith("loss")}  # fmt: skip
    return found


def main(folder: str) -> None:
    PartialState()  # initializes the process group
    everyone = gather_objects(losses(folder))
    assert all(found == everyone[0] for found in everyone)  # the same on every rank, to the last bit
    if get_rank() == 0:
        torch.save(everyone[0], os.path.join(folder, f"{get_world_size()}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
    PartialState().destroy_process_group()
