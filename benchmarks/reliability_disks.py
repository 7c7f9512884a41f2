"""Trains on disks of many sizes, from too small to large enough, and on disks that become full during the training."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from reliability_runs import CASES, LONGEST, Case, Ended, Runs, fork, wait

SUP = next(case for case in CASES if case.name == "sup_simcse")
BESIDE = replace(SUP, words=SUP.words.replace("--output_dir out", "--output_dir other"), output="other")
OVER = next(case for case in CASES if case.name == "overwrite")
AMPLE = 300  # MB


def mount(folder: Path, megabytes: float) -> None:
    """Mount an in-memory file system of the given size at `folder`, or resize the one that is mounted there."""
    folder.mkdir(parents=True, exist_ok=True)
    there = ["remount"] if os.path.ismount(folder) else []
    options = ",".join([*there, f"size={int(megabytes * 1024)}k"])
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a small disk cannot be made here (mount needs root): {done.stderr.strip()}; run this as root")


@contextlib.contextmanager
def disk(folder: Path, megabytes: float) -> Iterator[Path]:
    mount(folder, megabytes)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path, leave: float = 0) -> Path:
    """Fill a disk until only `leave` MB are free. Return the file to remove afterwards."""
    filler, free = folder / "filler", os.statvfs(folder)
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        file.write(b"\0" * max(0, int(free.f_bavail * free.f_frsize - leave * 2**20)))
    return filler


def size_of(folder: Path) -> float:
    """Return the MB that a folder needs on tmpfs, which rounds each file up to whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()) / 2**20 + 0.3


def start_and_fill(runs: Runs, case: Case, place: Path, leave: float) -> Ended:
    """Run a case on a disk with enough space, and fill the disk when the first checkpoint appears."""
    log = place / "log"
    pid = fork(lambda: runs.main(case, place), place, log)
    started = time.perf_counter()
    while time.perf_counter() - started < LONGEST / 2:
        if list(place.glob("**/checkpoint-[0-9]*")) or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.01)
    fill(place, leave)
    return wait(pid, log)


def one_size(runs: Runs, number: int, megabytes: float, place: Path) -> dict:
    """Train on a disk with an earlier run and `megabytes` of free space, and return what happened.

    With an even number the new run overwrites the earlier one. Two of four disks have space at first, and become full later.
    """
    overwrites, filled_later = number % 2 == 0, number % 4 >= 2
    case = OVER if overwrites else BESIDE
    earlier = size_of(runs.earlier)
    with disk(place, AMPLE if filled_later else earlier + megabytes):
        shutil.copytree(runs.earlier, place / "out")
        before = contents(place / "out")
        ended = start_and_fill(runs, case, place, megabytes / 8) if filled_later else runs.start(case, place)
        whole = contents(place / "out") == before
        wrong = problems(runs, case, place, ended, overwrites, whole)
        (place / "filler").unlink(missing_ok=True)
        mount(place, AMPLE)
        how = "finished"
        if ended.code:
            again, how = runs.go_on(case, place)
            wrong += [f"with room again: exit {again.code}: {again.last}"] if again.code else []
        wrong += [] if wrong else compare(runs, case, place)
        if not overwrites and contents(place / "out") != before:
            wrong.append("the earlier run, in another folder, was changed")
    filled = ", filled after the first checkpoint" if filled_later else ""
    line = f"{megabytes:g} MB, {'over an earlier run' if overwrites else 'beside an earlier run'}{filled}: "
    line += "finished" if not ended.code else f"exit {ended.code} ({ended.message or ended.last}); with room {how}"
    return {"line": line + "".join(f"; WRONG: {problem}" for problem in wrong), "wrong": wrong, "finished": not ended.code}


def problems(runs: Runs, case: Case, place: Path, ended: Ended, overwrites: bool, whole: bool) -> list[str]:
    """Return what is wrong after a run on a small disk has ended, before the disk has space again."""
    wrong = []
    if ended.code == -signal.SIGBUS or (ended.code and not ended.refused):
        wrong.append(f"exit {ended.code} without a one-line error: {ended.last}")
    if ended.hung:
        wrong.append("hung")
    if overwrites and ended.code and not whole:
        wrong += runs.standing(case, place)
    return wrong


def compare(runs: Runs, case: Case, place: Path) -> list[str]:
    """Return which files differ from those of the run on a large disk."""
    old, new = runs.finished(OVER if case is OVER else SUP), place / case.output
    return [f"{name} differs" for name in case.same if (old / name).read_bytes() != (new / name).read_bytes()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def disks(runs: Runs, first: float, last: float, step: float) -> bool:
    """Train with each amount of free space: over and beside an earlier run, on small disks and on disks that fill up."""
    for case in (SUP, OVER):
        runs.calm(case)
    runs.modules()
    sizes, found = [], []
    while first <= last:
        sizes.append(first)
        first += step
    for number, megabytes in enumerate(sizes):
        found.append(one_size(runs, number, megabytes, runs.folder / "disks" / str(number)))
        print(f"[{number + 1}/{len(sizes)}] {found[-1]['line']}", flush=True)
    failures = [entry for entry in found if entry["wrong"]]
    finished = sum(entry["finished"] for entry in found)
    print(
        f"\ndisks: {len(found)} sizes, {finished} finished at once, {len(found) - finished} ended early; "
        f"{len(found) - len(failures)} lost nothing and ended with the right bits"
    )
    print("".join(f"FAILED {entry['line']}\n" for entry in failures), end="")
    return not failures
