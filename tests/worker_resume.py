"""Two ranks save checkpoints, resume from those of one process, and try to resume where that would not be exact.

Rank 0 saves the results in FOLDER/seen.pt.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker_resume.py FOLDER
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
import torch
from accelerate import PartialState
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from worker import BATCH, NO_DROPOUT, ROWS, WORDS

import hf_embed.training.teacher
from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, InputError, mine_hard_negatives
from hf_embed.checkpoint import whole
from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.training.teacher import vectors_of


def make_trainer(
    folder, rows: list[dict] = ROWS, batch: int = BATCH // 2, model_seed: int = 0, sets=None, **settings
) -> ContrastiveTrainer:
    """Return a trainer of 5 steps, two per epoch, in float64, without dropout, and with `batch` rows on each rank."""
    args = ContrastiveTrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=5, save_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, **({"learning_rate": 1e-3} | settings),
    )  # fmt: skip
    return ContrastiveTrainer(
        model=tiny_model(seed=model_seed, **NO_DROPOUT).double(), processing_class=small_tokenizer(), args=args,
        train_dataset=Dataset.from_list(rows), eval_dataset=sets,
    )  # fmt: skip


def weights_of(trainer: ContrastiveTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.step.named_parameters()}


def refusal_of(function: Callable, *args, **named) -> list[str]:
    """Call a function, and return the error message of each rank, or "done"."""
    try:
        function(*args, **named)
        message = "done"
    except InputError as error:
        message = str(error)
    return gather_objects(message)


def main(folder: Path) -> None:
    PartialState()  # initializes the process group
    hf_embed.training.teacher.cache_folder = lambda: folder / "cache"
    whole_run = make_trainer(folder / "two", save_total_limit=3)
    whole_run.train()
    resumed = make_trainer(folder / "resumed")
    resumed.train(str(folder / "one" / "checkpoint-3"))
    rank = get_rank()
    own = ROWS if rank == 0 else ROWS[::-1]
    fewer = ROWS if rank == 0 else ROWS[:-2]
    texts = [row["anchor"] for row in own]
    mixed = make_trainer(folder / "other", model_seed=rank)
    seen = {
        "ranks": get_world_size(),
        "whole": weights_of(whole_run),
        "resumed": weights_of(resumed),
        "kept": sorted(whole.checkpoints_in(folder / "two").values()),
        "files": whole.names_in(folder / "two" / "checkpoint-3"),
        "damage": whole.damage(folder / "two" / "checkpoint-3"),
        "before training": torch.from_numpy(mixed.predict(Dataset.from_dict({"text": WORDS})).predictions),
        "other rows": refusal_of(make_trainer(folder / "other", own).train),
        "fewer rows": refusal_of(make_trainer(folder / "other", fewer).train),
        "other seed": refusal_of(make_trainer(folder / "other", seed=rank).train),
        "other dropout": refusal_of(make_trainer(folder / "other", seed=rank, data_seed=1).train),
        "other rate": refusal_of(make_trainer(folder / "other", learning_rate=1e-3 * (1 + rank)).train),
        "other batch": refusal_of(make_trainer(folder / "other", batch=BATCH).train, str(folder / "one" / "checkpoint-3")),
        "other texts": refusal_of(mixed.predict, Dataset.from_dict({"text": texts})),
        "other held-out rows": refusal_of(make_trainer, folder / "other", sets={"held": Dataset.from_list(own)}),
        "other corpus": refusal_of(
            mine_hard_negatives, Dataset.from_list(ROWS), mixed.encoder, texts, folder / "mined.jsonl", num_negatives=1
        ),
        "other teacher": refusal_of(vectors_of, mixed.encoder, texts),
        "no checkpoint": refusal_of(make_trainer(folder / "other").train, str(folder / "nowhere")),
    }  # fmt: skip
    if get_rank() == 0:
        torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()
