"""Two ranks save checkpoints, resume from those of one process, and try to resume where that would not be exact.

Rank 0 saves the results in FOLDER/seen.pt.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker_resume.py FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
import torch
from accelerate import PartialState
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from worker import BATCH, NO_DROPOUT, ROWS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, InputError
from hf_embed.checkpoint import whole
from hf_embed.distributed import gather_objects, get_rank, get_world_size


def make_trainer(folder, rows: list[dict] = ROWS, batch: int = BATCH // 2, **settings) -> ContrastiveTrainer:
    """Return a trainer of 5 steps, two per epoch, in float64, without dropout, and with `batch` rows on each rank."""
    args = ContrastiveTrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=5, save_steps=1, learning_rate=1e-3, report_to=[],
        disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    model, tokenizer = tiny_model(**NO_DROPOUT).double(), small_tokenizer()
    return ContrastiveTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=Dataset.from_list(rows))


def weights_of(trainer: ContrastiveTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.step.named_parameters()}


def refusal_of(trainer: ContrastiveTrainer, resume: str | None = None) -> list[str]:
    """Train, and return the error message of each rank, or "trained"."""
    try:
        trainer.train(resume)
        message = "trained"
    except InputError as error:
        message = str(error)
    return gather_objects(message)


def main(folder: Path) -> None:
    PartialState()  # initializes the process group
    whole_run = make_trainer(folder / "two", save_total_limit=3)
    whole_run.train()
    resumed = make_trainer(folder / "resumed")
    resumed.train(str(folder / "one" / "checkpoint-3"))
    own = ROWS if get_rank() == 0 else ROWS[::-1]
    fewer = ROWS if get_rank() == 0 else ROWS[:-2]
    seen = {
        "ranks": get_world_size(),
        "whole": weights_of(whole_run),
        "resumed": weights_of(resumed),
        "kept": sorted(whole.checkpoints_in(folder / "two").values()),
        "files": whole.names_in(folder / "two" / "checkpoint-3"),
        "damage": whole.damage(folder / "two" / "checkpoint-3"),
        "other rows": refusal_of(make_trainer(folder / "other", own)),
        "fewer rows": refusal_of(make_trainer(folder / "other", fewer)),
        "other batch": refusal_of(make_trainer(folder / "other", batch=BATCH), str(folder / "one" / "checkpoint-3")),
        "no checkpoint": refusal_of(make_trainer(folder / "other"), str(folder / "nowhere")),
    }
    if get_rank() == 0:
        torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()
