"""Stop a training by a signal: save a checkpoint at the end of the current step, and end with a nonzero exit status.

    SIGTERM         sent by clusters and launchers before they kill a process: exit status 143
    SIGUSR1         sent by Slurm before the time limit (--signal=USR1@120): exit status 138
    SIGINT          Ctrl-C: exit status 130. A second Ctrl-C, more than a second later, ends the run at once.

These handlers are active only while a training runs. Before and after it, signals have their usual effect. At the end of each
optimizer step, all ranks agree on whether one of them has received a signal. So all ranks stop after the same step.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.entry import running_recipe
from hf_embed.ranks import PeerError, largest

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
AGAIN = 1.0  # seconds; a SIGINT sooner than this is the same Ctrl-C, which launcher and terminal may both send
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
# The launchers that start the processes of a run, as programs and as modules of `python -m`.
PROGRAMS = ("accelerate", "accelerate-launch", "hf-embed", "torchrun")
MODULES = ("accelerate.commands.", "torch.distributed.")


class Stopped(SystemExit):
    """The exception that ends a training after a signal. `code` is 128 plus the signal number, as in a shell."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class StopRequests(TrainerCallback):
    """Record the signals that arrive while a training runs.

    This is a context manager around the training, and also one of its callbacks. Python can set signal handlers only in the
    main thread, so no signal is recorded if the training runs in another thread.
    """

    def __init__(self) -> None:
        self.saves = True  # whether to save a checkpoint on a signal; False if no run would resume from it
        self.received = 0  # the number of the first signal, 0 before that
        self.since = 0.0  # when the first signal arrived
        self.process = os.getpid()
        self.earlier: dict[int, Any] = {}  # the signal handlers from before the training
        self.saved_step = -1  # the step of the last checkpoint
        self.at_step_end = False  # True at the end of a step, False at the end of an epoch
        self.follows_launcher = False  # whether Linux sends a signal when the launcher ends

    # ---- around a training ----

    def __enter__(self) -> Self:
        self.received, self.saved_step, self.process = 0, -1, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self.earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
            self.follows_launcher = end_with_launcher(signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.earlier = {}
        if self.follows_launcher:
            end_with_launcher(0)
        # Another rank has ended, and the launcher is terminating the remaining ranks: end as SIGTERM does by default.
        if isinstance(error, PeerError) and self.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # in a forked child process, a signal has its default effect
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if number == signal.SIGINT == self.received and now - self.since > AGAIN:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, now

    # ---- in the training loop ----

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record that the training loop is at the end of a step."""
        self.at_step_end = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record that the training loop is at the end of an epoch."""
        self.at_step_end = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record that the current step has a checkpoint."""
        self.saved_step = state.global_step

    def before_epoch_end(self, state: TrainerState) -> bool:
        """Return whether a step has ended that is the last one of an epoch or of the training, and the epoch ends next."""
        last = state.global_step >= state.max_steps or (state.epoch is not None and float(state.epoch).is_integer())
        return self.at_step_end and last

    def due(self, state: TrainerState, control: TrainerControl) -> int:
        """Return the number of the signal to stop for now, or 0. The result is the same on every rank.

        After the last step of an epoch or of the training, the stop waits until the work at the end of the epoch is done. If a
        callback has ended the training early (early stopping), the training is complete and the result is 0: a resumed run
        would train further.
        """
        over = control.should_training_stop and state.global_step < state.max_steps
        if self.before_epoch_end(state) or over:
            return 0
        return largest(self.received)


def how_to_go_on(number: int, step: int, checkpoint: str | None) -> str:
    """Return the message that the training was stopped, and how to resume it."""
    said = f"stopped by {signal.Signals(number).name} after step {step}"
    if checkpoint is None:
        return f"{said}; run the same command again: it restarts this run and keeps the finished runs"
    how = "call trainer.train(resume_from_checkpoint=True)"
    if running_recipe() is not None:
        how = "run the same command with --resume_from_checkpoint"
    return f"{said}; saved {checkpoint}; to resume, {how}"


# ---- launchers ----


def launched_by() -> psutil.Process | None:
    """Return the parent process if it is a launcher: `accelerate launch`, `hf-embed launch` or torchrun."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    launches = any(os.path.basename(word) in PROGRAMS or word.startswith(MODULES) for word in words[:3])
    return parent if launches else None


def end_with_launcher(number: int) -> bool:
    """Ask Linux to send this process a signal when its launcher ends; 0 cancels the request.

    This is needed because `accelerate launch` with one process does not forward the SIGTERM that ends the launcher. A process
    without a launcher, for example under nohup, still outlives its parent.

    Returns:
        Whether the request was made.
    """
    if not sys.platform.startswith("linux"):
        return False
    if number and launched_by() is None:
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0
