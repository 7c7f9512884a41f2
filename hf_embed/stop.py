"""Signals that end a training: it saves a checkpoint at the end of its step, and ends with a status that is never 0.

    SIGTERM         what clusters and launchers send before they kill: status 143
    SIGUSR1         Slurm's warning of the end of the time (--signal=USR1@120): status 138
    SIGINT          Ctrl-C: status 130; once more, a second later or after that, ends the run at once

They count while a training runs. Before and after they do what they do in any program. All ranks agree, at the end of each
optimizer step, on whether one of them was told to stop: a step that one rank has done is one that all have done.
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
AGAIN = 1.0  # seconds: a launcher and the terminal may both send the same Ctrl-C
PR_SET_PDEATHSIG = 1  # of Linux' prctl
# What starts the processes of a run, as a program and by `python -m`.
PROGRAMS = ("accelerate", "accelerate-launch", "hf-embed", "torchrun")
MODULES = ("accelerate.commands.", "torch.distributed.")


class Stopped(SystemExit):
    """The end of a training that was told to stop; `code` is 128 and the number of the signal, as a shell has it."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class StopRequests(TrainerCallback):
    """Note the signals that come while a training runs; a context manager around the training, and one of its callbacks.

    Outside the main thread, where Python takes no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.saves = True  # a checkpoint; not where nobody would go on from one
        self.received = 0  # the first signal's number
        self.since = 0.0
        self.process = os.getpid()
        self.earlier: dict[int, Any] = {}  # handlers
        self.saved_step = -1  # the step of the last checkpoint
        self.at_step_end = False  # and not at the end of an epoch
        self.follows_launcher = False

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
        if isinstance(error, PeerError) and self.received == signal.SIGTERM:  # a launcher ends what is left of the run
            signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a fork of the training, which neither saves nor speaks
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if number == signal.SIGINT == self.received and now - self.since > AGAIN:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, now

    # ---- in the training's loop ----

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note where in the loop the training is."""
        self.at_step_end = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note where in the loop the training is."""
        self.at_step_end = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note which step has a checkpoint."""
        self.saved_step = state.global_step

    def due(self, state: TrainerState, control: TrainerControl) -> int:
        """Return the signal to stop for now, at the end of a step or of an epoch, or 0; the same on every rank.

        The last step of an epoch is over when what is due at the end of the epoch is done. A training that a callback has ended
        (early stopping) is complete: one that is resumed would go on.
        """
        of_epoch = self.at_step_end and state.epoch is not None and float(state.epoch).is_integer()
        over = control.should_training_stop and state.global_step < state.max_steps
        if of_epoch or over:
            return 0
        return largest(self.received)


def how_to_go_on(number: int, step: int, checkpoint: str | None) -> str:
    """Return the line that says that the training has stopped, and how it goes on."""
    said = f"stopped by {signal.Signals(number).name} after step {step}"
    if checkpoint is None:
        return f"{said}; the same command begins this run again, and keeps those that are finished"
    how = "trainer.train(resume_from_checkpoint=True)"
    if running_recipe() is not None:
        how = "the same command with --resume_from_checkpoint"
    return f"{said}; {checkpoint} is saved: {how} goes on"


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
    """Ask Linux to send this process a signal when its launcher ends; 0: no signal any more.

    `accelerate launch` of one process does not hand on the SIGTERM that ends it. A process without a launcher, under nohup for
    example, outlives its parent as before.

    Returns:
        Whether this was asked for.
    """
    if not sys.platform.startswith("linux"):
        return False
    if number and launched_by() is None:
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0
