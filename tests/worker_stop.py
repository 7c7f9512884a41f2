"""Stop trainings by a signal and resume them: the cases of tests/test_stop.py, in this process or on several ranks.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker_stop.py FOLDER CASE ...
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
import torch
from accelerate import PartialState
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from worker import ROWS, STS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments
from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.training.stop import Stopped

# 24 rows in batches of 8 make three steps per epoch. A case has its settings, the event and the step of the signal, and the
# step after which the training then ends.
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True}
# The first step has the best score, but only the checkpoint of a stop.
EARLY = EVERY_STEP | {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "sts_uniformity",
                      "greater_is_better": False}  # fmt: skip
CASES = {
    "a step": ({"save_strategy": "no"}, ("on_step_begin", 3), 4),
    "the first step": ({"save_strategy": "no"}, ("on_step_begin", 0), 1),
    "the end of an epoch": (EPOCHS, ("on_step_begin", 2), 3),
    "a step of epochs": (EPOCHS, ("on_step_begin", 3), 4),
    "an evaluation": (EVERY_STEP, ("on_evaluate", 4), 4),
    "a save": (EVERY_STEP | {"eval_strategy": "no"}, ("on_save", 2), 2),
    "the best": (BEST, ("on_step_begin", 4), 5),
    "a better step": (EARLY, ("on_step_begin", 0), 1),
    "an accumulated step": (EVERY_STEP | {"gradient_accumulation_steps": 2, "num_train_epochs": 4}, ("on_substep_end", 2), 3),
    "the last step": ({"save_strategy": "no"}, ("on_step_begin", 6), 7),
    "the last step of epochs": (EPOCHS, ("on_step_begin", 6), 7),
    "an evaluation at the start": (EVERY_STEP | {"eval_on_start": True}, ("on_step_begin", 2), 3),
    "the last step of all epochs": ({"save_strategy": "no", "max_steps": -1, "num_train_epochs": 2}, ("on_step_begin", 5), 6),
    "workers": ({"save_strategy": "no", "dataloader_num_workers": 1}, ("on_step_begin", 3), 4),
}


class Sender(TrainerCallback):
    """A callback that sends a signal to its own process at an event of a step."""

    def __init__(self, event: str, step: int, number: int, rank: int):
        self.event, self.step, self.number, self.rank = event, step, number, rank

    def send(self, event: str, step: int) -> None:
        if (event, step) == (self.event, self.step) and get_rank() == self.rank:
            os.kill(os.getpid(), self.number)


for event in ("on_step_begin", "on_substep_end", "on_evaluate", "on_save"):
    setattr(Sender, event, lambda self, args, state, control, event=event, **kw: self.send(event, state.global_step))


def make_trainer(folder: Path, settings: dict, callbacks: list | None = None) -> ContrastiveTrainer:
    defaults = {"per_device_train_batch_size": 8 // get_world_size(), "max_steps": 7, "learning_rate": 1e-3, "use_cpu": True,
                "report_to": [], "disable_tqdm": True, "logging_steps": 2}  # fmt: skip
    if "num_train_epochs" in settings:
        defaults["max_steps"] = -1
    return ContrastiveTrainer(
        model=tiny_model(), processing_class=small_tokenizer(),
        args=ContrastiveTrainingArguments(str(folder), **(defaults | settings)), train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(STS) if settings.get("eval_strategy", "no") != "no" else None, callbacks=callbacks,
    )  # fmt: skip


def weights(trainer: ContrastiveTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.step.state_dict().items()}


def evaluations(trainer: ContrastiveTrainer) -> list[dict]:
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history
            if any(key.startswith("eval_") for key in entry)]  # fmt: skip


def stop_and_go_on(folder: Path, case: str, number: int = signal.SIGTERM, rank: int = 0) -> dict:
    """Run a case without a signal, then stop it by a signal and resume it. Return how the two runs compare."""
    settings, (event, step), _ = CASES[case]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    calm = make_trainer(folder / "calm", settings)
    calm.train()
    broken = make_trainer(folder / "run", settings, [Sender(event, step, number, rank)])
    code = None
    try:
        broken.train()
    except Stopped as stopped:
        code = stopped.code
    restored = all(signal.getsignal(number) == handler for number, handler in before.items())
    checkpoint = get_last_checkpoint(str(folder / "run"))
    files = sorted(path.name for path in (folder / "run").iterdir())
    resumed = make_trainer(folder / "run", settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    ended, expected = weights(resumed), weights(calm)
    same = all(torch.equal(ended[name], tensor) for name, tensor in expected.items())
    return {
        "code": code, "restored": restored, "checkpoint": Path(checkpoint or "none").name, "files": files, "same": same,
        "steps": [calm.state.global_step, resumed.state.global_step], "stopped at": broken.state.global_step,
        "evaluations": evaluations(calm) == evaluations(resumed),
    }  # fmt: skip


if __name__ == "__main__":
    PartialState(cpu=True)  # the number of ranks is known from here on
    found = {}
    for case in sys.argv[2:]:
        result = stop_and_go_on(Path(sys.argv[1], case), case, rank=get_world_size() - 1)
        found[case] = gather_objects(result)
    if get_rank() == 0:
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))
