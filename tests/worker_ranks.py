"""Run two ranks, of which one fails or stalls. Record their output, their exit status, and the seconds from failure to end.

python tests/worker_ranks.py FOLDER CASE ...

A case is KIND:PLACE. This process imports everything once and forks the ranks of each case. When one rank ends with an error,
this process sends SIGTERM to the other rank, as a launcher does.
FOLDER/found.json has {case: {"status": [...], "said": [...], "seconds": ...}}.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from transformers import TrainerCallback
from worker import ROWS, STS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, InputError, SimCSE
from hf_embed.errors import RankError
from hf_embed.evaluation.sts import STS as StsTask
from hf_embed.kit import cli

MESSAGE = "this is what went wrong"


def fail(kind: str, folder: Path) -> None:
    (folder / "failed").write_text(str(time.time()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        sys.exit(3)
    if kind == "stall":
        time.sleep(60)
        return
    errors = {"InputError": InputError, "RankError": RankError, "RuntimeError": RuntimeError, "MemoryError": MemoryError}
    raise errors[kind](MESSAGE)


class Failing(TrainerCallback):
    def __init__(self, fails, place: str):
        self.fails, self.place = fails, place

    def on_substep_end(self, args, state, control, **kwargs):
        if self.place == "step" and state.global_step == 0:
            self.fails()

    def on_save(self, args, state, control, **kwargs):
        if self.place == "saving":
            self.fails()


class FailingTask(StsTask):
    fails = None

    def score(self, embed):
        if self.fails is not None:
            self.fails()
        return super().score(embed)


class FailingObjective(SimCSE):
    fails = None

    def check_width(self, width):
        if self.fails is not None:
            self.fails()
        return super().check_width(width)


def train(kind: str, place: str, folder: Path) -> None:
    args = ContrastiveTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=4, max_steps=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        ddp_timeout=5 if kind == "stall" else 1800,
    )  # fmt: skip

    def fails() -> None:
        if args.process_index == 1:
            fail(kind, folder)

    if place == "reading":
        fails()
    objective, task = FailingObjective(), FailingTask(Dataset.from_list(STS))
    objective.fails, task.fails = fails if place == "construction" else None, fails if place == "evaluation" else None
    ContrastiveTrainer(
        model=tiny_model(), processing_class=small_tokenizer(), args=args, objective=objective,
        train_dataset=Dataset.from_list(ROWS), eval_dataset={"sts": task}, callbacks=[Failing(fails, place)],
    ).train()  # fmt: skip


def start(rank: int, port: int, case: str, folder: Path) -> int:
    """Fork a rank and return its process id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    file = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 0
    try:
        cli.run(lambda: train(*case.split(":"), folder))
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait_as_launcher(ranks: list[int]) -> list[int]:
    """Wait for all ranks, and end the others when one ends with an error. Return exit statuses in the form of subprocess."""
    statuses: dict[int, int] = {}
    deadline, told = time.time() + 100, False
    while len(statuses) < len(ranks):
        for rank in ranks:
            if rank not in statuses:
                ended, status = os.waitpid(rank, os.WNOHANG)
                if ended:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) and not told:
            told = True
            for rank in set(ranks) - set(statuses):
                os.kill(rank, signal.SIGTERM)
        if time.time() > deadline:
            for rank in set(ranks) - set(statuses):
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.05)
    return [statuses[rank] for rank in ranks]


def run_case(case: str, folder: Path) -> dict:
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    statuses = wait_as_launcher([start(rank, port, case, folder) for rank in range(2)])
    failed = float((folder / "failed").read_text())
    said = [(folder / f"said-{rank}").read_text() for rank in range(2)]
    return {"status": statuses, "said": said, "seconds": time.time() - failed}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {case: run_case(case, out / case.replace(":", "-")) for case in sys.argv[2:]}
    (out / "found.json").write_text(json.dumps(found))
