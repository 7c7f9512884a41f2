"""Trains on two ranks. The training is killed, stopped, or given a full disk many times, and resumes each time."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from reliability_disks import AMPLE, disk, fill
from reliability_runs import MODEL, ROOT

LONGEST_END = 120  # seconds that a run may take to end after an event
STOPS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}
EVENTS = ["one rank killed", "SIGTERM", "all killed", "SIGUSR1", "full disk", "SIGINT"]
MOST_EVENTS = 8  # of one training, which then finishes without events
HF_EMBED = "import sys; sys.argv[0] = 'hf-embed'; from hf_embed.kit.command import main; main()"


class Training:
    """One training on two ranks in `folder`, which can be started several times."""

    def __init__(self, data: Path, folder: Path, steps: int):
        self.folder, self.out = folder, folder / "out"
        words = (
            f"launch --num_processes 2 sup-simcse --train_file {data}/more.jsonl --model_name_or_path {data}/model "
            f"--pooling cls_mlp --max_steps {steps} --per_device_train_batch_size 8 --learning_rate 1e-3 --max_length 24 "
            f"--logging_steps {steps} --save_strategy steps --save_steps {max(5, steps // 20)} --save_total_limit 2 --seed 3 "
            "--use_cpu --report_to none --disable_tqdm true --output_dir out"
        )
        self.command = [sys.executable, "-c", HF_EMBED, *words.split()]
        self.log = folder.parent / f"{folder.name}.log"  # outside of the disk that becomes full
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the processes. They resume from a checkpoint if there is one."""
        resume = ["--resume_from_checkpoint"] if self.newest() else []
        if not resume and self.out.exists():
            resume = ["--overwrite_output_dir"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(self.folder / "hf_home")}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*self.command, *resume], cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def newest(self) -> int:
        """Return the step of the newest checkpoint, or 0 if there is none."""
        names = [path.name.split("-")[1] for path in self.out.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait for a checkpoint after `step`, or for the end of the training."""
        until = time.monotonic() + 10 * LONGEST_END
        while self.newest() <= step and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Return the launcher and all processes that it has started."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in self.processes()[1:]:
            try:
                if "LOCAL_RANK" in process.environ():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self, seconds: float, processes: list[psutil.Process]) -> tuple[int | None, list[str]]:
        """Wait for the end of all processes. Return the launcher's exit status, and what is wrong with the end."""
        wrong, until = [], time.monotonic() + seconds
        while time.monotonic() < until and (self.process.poll() is None or any(map(running, processes))):
            time.sleep(0.1)
        if self.process.poll() is None or any(map(running, processes)):
            left = [str(process.pid) for process in processes if running(process)]
            wrong.append(f"not ended after {seconds:.0f} s: {len(left)} processes are left ({last_line(self.log)})")
            for process in [*processes, *self.processes()]:
                send(process, signal.SIGKILL)
        return self.process.wait(), wrong

    @property
    def finished(self) -> bool:
        return (self.out / "results.json").is_file()


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def send(process: psutil.Process, what: int) -> None:
    try:
        process.send_signal(what)
    except psutil.Error:
        return


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing printed"])[-1][:200]


def happen(event: str, training: Training, rng: random.Random) -> tuple[int | None, list[str]]:
    """Make an event happen to the training, and wait for its end. Return its exit status, and what is wrong."""
    processes, ranks = training.processes(), training.ranks()
    filler = None
    if event == "one rank killed" and ranks:
        send(rng.choice(ranks), signal.SIGKILL)
    elif event == "SIGTERM":  # to the launcher, as `kill` and service managers do
        send(processes[0], signal.SIGTERM)
    elif event in STOPS:  # to every process, as Slurm and a terminal do
        for process in processes:
            send(process, STOPS[event])
    elif event == "full disk":
        filler = fill(training.folder)
    else:
        for process in reversed(processes):
            send(process, signal.SIGKILL)
    code, wrong = training.end(LONGEST_END, processes)
    if filler is not None:
        filler.unlink()
    if code == 0 and not training.finished:
        wrong.append("exit 0, though the training is not finished")
    if not training.finished and (training.out / "model.safetensors").exists():
        wrong.append("a half-trained model stands where the finished one goes")
    return code, wrong


def one_training(training: Training, calm: float, until: float, rng: random.Random, counts: Counter) -> list[str]:
    """Train until the training is finished, with events on the way. Return what went wrong."""
    wrong: list[str] = []
    for _ in range(4 * MOST_EVENTS):
        events = time.monotonic() < until and counts["of this training"] < MOST_EVENTS
        before = training.newest()
        training.start()
        if not events:
            code, late = training.end(10 * calm + LONGEST_END, training.processes())
            if code or not training.finished:
                late.append(f"exit {code}: {last_line(training.log)}")
            return wrong + late
        if rng.random() > 0.25:  # otherwise, the event may happen while the processes start
            training.wait_for_checkpoint(before)
        try:
            training.process.wait(rng.uniform(0, calm / 4))
        except subprocess.TimeoutExpired:
            event = EVENTS[counts["events"] % len(EVENTS)]
            code, problems = happen(event, training, rng)
            counts.update([event, "events", "of this training"])
            gained = training.newest() - before
            print(f"{event}: exit {code}, {gained} more steps, now at {training.newest()}: {last_line(training.log)}"
                  + "".join(f"; WRONG: {problem}" for problem in problems), flush=True)  # fmt: skip
            wrong += [f"{event}: {problem}" for problem in problems]
        if training.finished:
            return wrong
        if training.process.returncode == 0:
            return [*wrong, "ended with exit 0 but without results"]
    return [*wrong, "never finished"]


def soak(folder: Path, minutes: float, seed: int) -> bool:
    """Train repeatedly for `minutes`. Each training must end with the same weights as the calm run, which has no events."""
    began, rng = time.monotonic(), random.Random(seed)
    until, steps = began + 60 * minutes, int(min(1200, max(60, 60 * minutes)))
    prepared = subprocess.run(
        [sys.executable, "-c", f"from reliability_runs import write_data, Path; write_data(Path({str(folder / 'data')!r}))"],
        cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if prepared.returncode:
        raise SystemExit(prepared.stderr)
    (folder / "calm").mkdir()
    calm = Training(folder / "data", folder / "calm", steps)
    started = time.monotonic()
    calm.start()
    code, wrong = calm.end(60 * 60, calm.processes())
    if code or wrong:
        raise SystemExit(f"the training fails even without an interruption: exit {code}, {calm.log.read_text()[-2000:]}")
    seconds = time.monotonic() - started
    print(f"{steps} steps on two ranks take {seconds:.0f} s without interruption", flush=True)
    counts: Counter[str] = Counter()
    failures, trainings = [], 0
    while not trainings or time.monotonic() < until:
        trainings += 1
        counts["of this training"] = 0
        with disk(folder / f"training-{trainings}", AMPLE) as place:
            training = Training(folder / "data", place, steps)
            found = one_training(training, seconds, until, rng, counts)
            if training.finished:
                names = [name for name in MODEL if (training.out / name).read_bytes() != (calm.out / name).read_bytes()]
                found += [f"{name} differs from the run without interruption" for name in names]
            print(f"training {trainings}: {found or 'bit for bit like the run without interruption'}", flush=True)
            failures += [f"training {trainings}: {problem}" for problem in found]
        shutil.rmtree(folder / f"training-{trainings}", ignore_errors=True)
    happened = ", ".join(f"{event}: {counts[event]}" for event in EVENTS)
    print(f"\nsoak: {(time.monotonic() - began) / 60:.0f} minutes, {trainings} trainings of {steps} steps on 2 ranks, "
          f"{counts['events']} events ({happened}); {len(failures)} failures")  # fmt: skip
    print("".join(f"FAILED {problem}\n" for problem in failures), end="")
    return not failures
