"""Several processes: `hf-embed launch`, which is `accelerate launch` of a recipe.

`hf-embed launch` ends a user's error in the one line that the recipe prints. `accelerate launch` prints some thirty lines of
its own beneath it.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from subprocess import CalledProcessError
from types import FrameType
from typing import NoReturn

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_embed.entry import CPU_CONFIG, PACKAGE, shipped
from hf_embed.errors import InputError
from hf_embed.stop import SIGNALS

FORWARDED = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT")
GRACE = 300  # seconds that processes have to save a checkpoint when they are told to stop
# Statuses of a process that has said why it ends: by an error, or a signal that it has taken for a wish to stop.
SPOKEN = {1, 2, *(128 + number for number in SIGNALS)}
LAUNCHERS = ("accelerate", "torch.distributed")  # whose messages and tracebacks say nothing that the recipe has not said


def launch(flags: list[str], recipe: str, arguments: list[str]) -> None:
    """Run a recipe in several processes.

    Args:
        flags: those of `accelerate launch`.
        recipe: the name of the recipe's module.
        arguments: of the recipe.

    Raises:
        InputError: flags or a configuration that accelerate does not take.
        SystemExit: with the exit status of the process that failed first.
    """
    parser = launch_command_parser()
    parser.error = refuse
    args = parser.parse_args([*flags, "-m", f"{PACKAGE}.{recipe}", *arguments])
    if args.config_file is not None:
        args.config_file = shipped(args.config_file)
    elif (args.num_processes or 0) > 1 and (args.cpu or not torch.accelerator.is_available()):
        args.config_file, args.cpu = shipped(CPU_CONFIG), False
    for name in LAUNCHERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(FORWARDED))  # which torch hands on to several processes
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(GRACE))
    try:
        with forwarding():
            launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(status_of(failure, rank)) from None
    except CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode >= 0 else 128 - error.returncode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:  # the recipe runs in other processes: this is about how to start them
        refuse(" ".join(str(error).split()))


@contextlib.contextmanager
def forwarding() -> Iterator[None]:
    """Hand the signals that end a training on to the one process that accelerate starts, and wait until it has ended.

    Of several processes torch does this, with handlers of its own.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    earlier = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def refuse(message: str) -> NoReturn:
    """Raise what accelerate finds wrong."""
    raise InputError(f"{message}; accelerate launch --help lists its flags")


def status_of(failure: ProcessFailure, rank: int) -> int:
    """Return the exit status of a process that failed; print the signal that has ended it, which it could not say itself."""
    if failure.exitcode >= 0:
        if failure.exitcode not in SPOKEN:
            print(f"error: process {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode
    ended = signal.Signals(-failure.exitcode)
    memory = ", as the system does where memory runs out" if ended == signal.SIGKILL else ""
    print(f"error: process {rank} was ended by {ended.name}{memory}", file=sys.stderr)
    return 128 + ended
