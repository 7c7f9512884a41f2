"""What becomes of a rank when another one has ended, or does not answer; and one run at a time in a folder.

A collective then fails with some lines of the library's C++ code. The rank that has failed says why; the others end without a
traceback of their own, and soon, for they would wait in vain.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from hf_embed.distributed import gather_objects, get_world_size, is_main_process
from hf_embed.errors import InputError, RankError
from hf_embed.library_internals import set_group_timeout
from hf_embed.safe_files import key_of, lock_folder, locks, release

PATIENCE = 5  # seconds that the main process has to say what all ranks have found
SOON = 2  # seconds in which a launcher ends the ranks that are left when one has ended
# What gloo, NCCL and the store say of a process that is gone, and of one that does not answer.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process exited",
        "Connection was likely closed", "Connection refused")  # fmt: skip
SILENT = ("Timed out waiting", "timeout caused pair closure", "collective operation timeout", "wait timeout after")


class PeerError(RankError):
    """Another process of the run has ended. Its own error says why."""

    def __init__(self, message: str = "another process of this run has ended; its own error says why") -> None:
        super().__init__(message)


def limit_waiting(seconds: int) -> None:
    """Let no collective wait longer than this for another rank: `ddp_timeout`, which accelerate gives to GPUs' groups alone."""
    if get_world_size() > 1:
        set_group_timeout(timedelta(seconds=seconds))


@functools.cache
def cpu_group() -> dist.ProcessGroup | None:
    """Return a group of all ranks that exchanges numbers on the CPU, so that no GPU is waited for; None is the default one."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers, on every rank."""
    if get_world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=cpu_group())
    return int(numbers)


@contextlib.contextmanager
def peers_in_one_line(seconds: int | None = None) -> Iterator[None]:
    """Turn the error of a collective with a rank that is gone, or does not answer, into one of a single line.

    Args:
        seconds: `ddp_timeout`, for the message.

    Raises:
        PeerError: another rank is gone. It is raised after a while, in which a launcher ends this process too.
        InputError: another rank has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if get_world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        if any(words in text for words in SILENT):
            waited = "" if seconds is None else f" for {seconds} s"
            raise InputError(
                f"another process of this run has not answered{waited}: it stalls, or is slower by more than --ddp_timeout; "
                "look at what it does, or give a larger --ddp_timeout"
            ) from None
        if not any(words in text for words in GONE):
            raise
        time.sleep(SOON)
        raise PeerError from None


class PeerWatch:
    """End this process where a launcher tells it to, for another rank of this machine is gone.

    Where a training takes SIGTERM for a wish to stop, a rank that waits for one that is gone would never come to the end of its
    step, and on a GPU would not even get to hear of the signal. A thread does, as soon as the system delivers it.
    """

    def __init__(self) -> None:
        self.others: list[int] = []
        self.pipe = (-1, -1)
        self.earlier = -1

    def __enter__(self) -> Self:
        if get_world_size() > 1:
            ranks = gather_objects((place_of_process(), os.getpid()))
            self.others = [pid for place, pid in ranks if place == place_of_process() and pid != os.getpid()]
        if self.others and threading.current_thread() is threading.main_thread():
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.earlier = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self.pipe[0],), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pipe[1] >= 0:
            signal.set_wakeup_fd(self.earlier)
            os.close(self.pipe[1])  # which ends the thread
            self.pipe = (-1, -1)

    def _watch(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM and not all(map(exists, self.others)):
                time.sleep(SOON)  # for an error that this rank has found itself
                if self.pipe[0] == pipe:
                    os.kill(os.getpid(), signal.SIGKILL)
        os.close(pipe)


def place_of_process() -> str:
    """Return what is the same for processes that see each other's numbers."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if sys.platform.startswith('linux') and space.is_symlink() else ''}"


def exists(process: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---- one run at a time ----


def claim_folder(folder: Path) -> list[Path]:
    """Keep other runs from writing to a folder, which is made if it is not there; every rank of this run calls this.

    The lock is the main process's. It goes with that, however it ends, or by `safe_files.release`.

    Returns:
        The folders that were made, on the main process.

    Raises:
        InputError: on every rank, where another run has the folder.
    """
    problem: Exception | None = None
    made: list[Path] = []
    if is_main_process():
        try:
            made = [path for path in [folder, *folder.parents] if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder)
        except (InputError, OSError) as error:
            problem = error
    reason = gather_objects(None if problem is None else str(problem))[0]
    if reason is not None:
        raise problem or InputError(reason)
    return made


@contextlib.contextmanager
def writing_alone(*folders: Path) -> Iterator[None]:
    """Claim folders, and release them at the end; what was made for that and is still empty then goes.

    Folders that this process has claimed before stay claimed.

    Raises:
        InputError: see `claim_folder`.
    """
    with contextlib.ExitStack() as at_end:
        for folder in folders:
            held = key_of(folder) in locks
            made = claim_folder(folder)
            at_end.callback(remove_empty, made)
            if not held:
                at_end.callback(release, folder)
        yield


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that are empty, the first one first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
