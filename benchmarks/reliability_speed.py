"""Compares the training speed with another checkout. Two processes take turns, one step each, under the same conditions."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reliability_runs import ROOT

WARM_UP = 5  # first steps, which are not counted


def train_in_turn(read: int, write: int, steps: int, batch: int, saves: bool) -> None:
    """Train the built-in encoder. Each step waits for its turn, and then the other process has its turn."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModel, AutoTokenizer, TrainerCallback

    from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE
    from hf_embed.kit.plan import QUICKSTART

    torch.set_num_threads(1)
    step_times, save_times = [], []

    class Turns(TrainerCallback):
        began = saving = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step:
                self.give()
            os.read(read, 1)
            self.began, self.saving = time.perf_counter(), 0.0

        def on_train_end(self, args, state, control, **kwargs):
            self.give()

        def give(self):
            step_times.append(time.perf_counter() - self.began - self.saving)
            os.write(write, b".")

    turns = Turns()

    class Timed(ContrastiveTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            started = time.perf_counter()
            super()._save_checkpoint(*args, **kwargs)
            turns.saving += time.perf_counter() - started
            save_times.append(turns.saving)

    with tempfile.TemporaryDirectory() as folder:
        often = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2} if saves else {"save_strategy": "no"}
        trainer = Timed(
            model=AutoModel.from_pretrained(QUICKSTART / "encoder", dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(QUICKSTART / "encoder"),
            args=ContrastiveTrainingArguments(
                folder, pooling="mean", max_length=48, max_steps=steps, per_device_train_batch_size=batch, use_cpu=True,
                report_to="none", disable_tqdm=True, logging_strategy="no", seed=1, **often,
            ),
            objective=SimCSE(temperature=0.05),
            train_dataset=load_dataset("csv", data_files=str(QUICKSTART / "triplets.csv"), split="train"),
            callbacks=[turns],
        )  # fmt: skip
        trainer.train()
    print("RESULT " + json.dumps({"steps": step_times, "saves": save_times}))


def pair(checkouts: list[Path], steps: int, batch: int, saves: bool, folder: Path) -> list[dict]:
    """Train with both checkouts at once, one step each in turn. Return the times of each."""
    pipes = [os.pipe(), os.pipe()]  # to the first process, to the second process
    processes = []
    for number, checkout in enumerate(checkouts):
        read, write = pipes[number][0], pipes[1 - number][1]
        command = [sys.executable, str(Path(__file__)), *map(str, (read, write, steps, batch, int(saves)))]
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, pass_fds=(read, write), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, cwd=folder)
        )  # fmt: skip
    os.write(pipes[0][1], b".")
    found = []
    for process, checkout in zip(processes, checkouts):
        out, errors = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"{checkout}: {errors[-2000:]}")
        found.append(json.loads(out.rpartition("RESULT ")[2]))
    return found


def speed(folder: Path, against: str, steps: int, batch: int, rounds: int) -> bool:
    """Compare the time of a step, without the time of saves, and print the time of a save."""
    checkouts, slower = [ROOT, Path(against).resolve()], []
    for saves in (False, True):
        ratios, times, of_saves = [], [[], []], [[], []]
        for number in range(rounds):
            order = [0, 1] if number % 2 == 0 else [1, 0]  # each side starts first in every second round
            found = pair([checkouts[i] for i in order], steps, batch, saves, folder)
            new, old = (found[order.index(i)] for i in (0, 1))
            ratios += [a / b for a, b in zip(new["steps"][WARM_UP:], old["steps"][WARM_UP:])]
            for i, side in enumerate((new, old)):
                times[i] += side["steps"][WARM_UP:]
                of_saves[i] += side["saves"]
        ratio = statistics.median(ratios)
        slower.append(ratio > 1.02)
        medians = [1000 * statistics.median(side) for side in times]
        print(f"speed, {'a checkpoint every 10 steps' if saves else 'without saving'}: a step takes {ratio:.3f} of the time "
              f"(median of {len(ratios)} pairs; {medians[0]:.1f} and {medians[1]:.1f} ms)"
              + ("; a save {:.0f} ms, before {:.0f} ms".format(*(1000 * statistics.median(side) for side in of_saves))
                 if saves else ""), flush=True)  # fmt: skip
    return not any(slower)


if __name__ == "__main__":
    train_in_turn(*map(int, sys.argv[1:5]), saves=sys.argv[5] == "1")
