"""Handle ranks that have ended or do not answer, and let only one run at a time write to a folder.

When a rank has ended, the collectives of the other ranks fail with an error from C++ code. The failed rank itself prints the
reason. The other ranks end soon and without a traceback, because waiting would be useless.
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

import psutil
import torch
import torch.distributed as dist

from hf_embed.distributed import gather_objects, get_world_size, is_main_process, on_main
from hf_embed.errors import InputError, RankError
from hf_embed.files.safe_files import key_of, lock_folder, locks, release
from hf_embed.library_internals import set_group_timeout

PATIENCE = 5  # seconds that the main process has to report an error that all ranks have found
SOON = 2  # seconds within which a launcher ends the remaining ranks after one has ended
# Parts of the error messages of gloo, NCCL and the store: for a process that has ended, and for one that does not answer.
DISCONNECTED = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Connection was likely closed",
                "Broken pipe", "Socket closed", "remote process exited")  # fmt: skip
TIMED_OUT = ("Timed out waiting", "timeout caused pair closure", "collective operation timeout", "wait timeout after")


class PeerError(RankError):
    """The error when another process of the run has ended. The message of that process says why."""

    def __init__(self, message: str = "another process of this run has ended; its own error says why") -> None:
        super().__init__(message)


def limit_waiting(seconds: int) -> None:
    """Limit how long a collective waits for another rank to `ddp_timeout`. Accelerate sets this limit for GPU groups only."""
    if get_world_size() > 1:
        set_group_timeout(timedelta(seconds=seconds))


@functools.cache
def cpu_group() -> dist.ProcessGroup | None:
    """Return a group of all ranks that communicates on the CPU, so that collectives do not wait for a GPU.

    None means the default group, which already uses gloo.
    """
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
    """Replace the error of a collective by a one-line error if another rank has ended or does not answer.

    Args:
        seconds: `ddp_timeout`, for the message.

    Raises:
        PeerError: if another rank has ended. It is raised after a delay, within which a launcher ends this process too.
        InputError: if another rank has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if get_world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        if any(words in text for words in TIMED_OUT):
            waited = "" if seconds is None else f" for {seconds} s"
            raise InputError(
                f"another process of this run has not answered{waited}: it hangs, or is slower by more than --ddp_timeout; "
                "check that process, or set a larger --ddp_timeout"
            ) from None
        if not any(words in text for words in DISCONNECTED):
            raise
        time.sleep(SOON)
        raise PeerError from None


class PeerWatch:
    """Kill this process when its launcher sends SIGTERM because another rank on this machine has ended.

    A training treats SIGTERM as a request to stop after the current step. But a rank that waits for an ended rank never reaches
    the end of its step, and while it waits for a GPU, Python does not even run the signal handler. So a thread watches a pipe
    into which Python writes each signal as soon as the system delivers it.
    """

    def __init__(self) -> None:
        self.others: list[int] = []  # process ids of the other ranks on this machine
        self.pipe = (-1, -1)  # file descriptors: read end, write end
        self.earlier = -1  # the wakeup file descriptor that was set before

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
            if number[0] == signal.SIGTERM and not all(map(psutil.pid_exists, self.others)):
                time.sleep(SOON)  # first let this rank report an error of its own
                if self.pipe[0] == pipe:
                    os.kill(os.getpid(), signal.SIGKILL)
        os.close(pipe)


def place_of_process() -> str:
    """Return a text that is equal for processes that can see each other's process ids: host name and PID namespace."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if sys.platform.startswith('linux') and space.is_symlink() else ''}"


# ---- one run at a time ----


def claim_folder(folder: Path) -> list[Path]:
    """Lock a folder so that no other run writes to it, and create it if needed. Return the folders that were created.

    The lock ends when this process ends, or with `safe_files.release`.

    Raises:
        InputError: if another run has locked the folder.
    """
    made = [path for path in [folder, *folder.parents] if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    return made


@contextlib.contextmanager
def writing_alone(*folders: Path) -> Iterator[None]:
    """Claim folders, and release them at the end. Folders that were created for this and are still empty are then removed.

    Every rank of this run must call this. The main process holds the locks. Folders that it had already claimed stay claimed.

    Raises:
        InputError: on every rank, if another run has locked a folder.
    """
    with contextlib.ExitStack() as at_end:
        for folder in folders:
            held = key_of(folder) in locks
            made = on_main(functools.partial(claim_folder, folder))
            if is_main_process():
                at_end.callback(remove_empty, made)
            if not held:
                at_end.callback(release, folder)
        yield


def remove_empty(folders: list[Path]) -> None:
    """Remove folders in the given order, and stop at the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
