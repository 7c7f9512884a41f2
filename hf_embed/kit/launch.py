"""The command `hf-embed launch`, which runs a recipe in several processes by `accelerate launch`.

After a user's mistake, `hf-embed launch` shows only the one line that the recipe prints. `accelerate launch` by itself prints
about thirty more lines below it.
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
from hf_embed.training.stop import SIGNALS

FORWARDED = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT")
GRACE = 300  # seconds that the processes have to save a checkpoint after a signal to stop
# Exit statuses of a process that has already printed why it ended: an error, or a signal that it took as a request to stop.
EXIT_CODES_WITH_A_MESSAGE = {1, 2, *(128 + number for number in SIGNALS)}
LAUNCHERS = ("accelerate", "torch.distributed")  # loggers whose messages and tracebacks only repeat what the recipe has printed


def launch(flags: list[str], recipe: str, arguments: list[str]) -> None:
    """Run a recipe in several processes.

    Args:
        flags: the flags of `accelerate launch`.
        recipe: the name of the recipe's module.
        arguments: the command-line arguments of the recipe.

    Raises:
        InputError: if accelerate does not accept the flags or the configuration.
        SystemExit: if a process fails. The exit status is that of the process that failed first.
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
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(FORWARDED))  # the signals that torch forwards to several processes
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
    except Exception as error:  # the recipe runs in the other processes, so this error is about starting them
        refuse(" ".join(str(error).split()))


@contextlib.contextmanager
def forwarding() -> Iterator[None]:
    """Forward the signals that stop a training to the single process that accelerate starts, and keep waiting for it.

    For several processes, torch forwards the signals with its own handlers.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ValueError):  # on Windows, Ctrl-C itself reaches the child
                child.send_signal(number)

    earlier = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def refuse(message: str) -> NoReturn:
    """Raise an InputError with a message of accelerate."""
    raise InputError(f"{message}; accelerate launch --help lists its flags")


def status_of(failure: ProcessFailure, rank: int) -> int:
    """Return the exit status of a failed process, and print how it ended if the process could not print this itself.

    For a process that was ended by a signal, the exit status is 128 plus the number of the signal.
    """
    if failure.exitcode >= 0:
        if failure.exitcode not in EXIT_CODES_WITH_A_MESSAGE:
            print(f"error: process {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode
    ended = signal.Signals(-failure.exitcode)
    memory = "; the system does this when memory runs out" if ended == signal.SIGKILL else ""
    print(f"error: process {rank} was ended by {ended.name}{memory}", file=sys.stderr)
    return 128 + ended
