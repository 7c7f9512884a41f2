"""Kills runs at random times or at chosen file writes, and resumes them."""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability_runs import CASES, RESUME, Case, Ended, Runs, call, each

WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def report(title: str, found: list[dict], counted: str) -> bool:
    """Print a summary and the failures. Return True if there is no failure."""
    failures = [entry for entry in found if entry["wrong"]]
    hows = sorted({entry["how"] for entry in found})
    print()
    print(f"{title}: {len(found)} {counted}, {len(found) - len(failures)} ended bit for bit like the run without interruption; "
          + ", ".join(f"{how}: {sum(entry['how'] == how for entry in found)}" for how in hows))  # fmt: skip
    for entry in failures:
        print(f"FAILED {entry['line']}")
    return not failures


def finish(runs: Runs, case: Case, folder: Path, where: str, rng: random.Random | None = None) -> dict:
    """Resume a killed run, in some cases after a second kill, and return what happened."""
    wrong = runs.standing(case, folder)
    if rng is not None and rng.random() < 0.25:
        more = RESUME if case.checkpoints and runs.saved(case, folder) else ""
        again = runs.start(case, folder, more, kill_after=rng.uniform(0, runs.calm(case).seconds))
        if again.killed:
            where += f" and again at {again.seconds:.2f} s"
            wrong += [f"after the second kill: {problem}" for problem in runs.standing(case, folder)]
    ended, how = runs.go_on(case, folder)
    if ended.hung:
        wrong.append("hung")
    elif ended.code:
        wrong.append(f"{how}, exit {ended.code}: {ended.last}")
    else:
        wrong += runs.check(case, folder)
    line = f"{case.name}, killed {where}: {how}{''.join(f'; WRONG: {problem}' for problem in wrong)}"
    return {"how": how.split(" although")[0], "wrong": wrong, "line": line}


def kills(runs: Runs, count: int, seed: int, jobs: int, names: list[str]) -> bool:
    """Kill each run at a random time within the duration of the same run without a kill (the calm run)."""
    cases = [case for case in CASES if not names or case.name in names]
    for case in cases:
        runs.calm(case)
    runs.modules()

    def work(number: int, folder: Path) -> dict:
        case, rng = cases[number % len(cases)], random.Random(f"{seed} {number}")
        seconds = runs.calm(case).seconds
        for attempt in range(5):  # a run may finish before it is killed
            own = folder / str(attempt)
            runs.prepare(case, own)
            at = rng.uniform(0, seconds)
            ended = runs.start(case, own, kill_after=at)
            if ended.killed:
                return finish(runs, case, own, f"at {at:.2f} of {seconds:.2f} s", rng)
            seconds = ended.seconds  # the calm run may have been on a busier machine
        return {"how": "was never killed", "wrong": [ended.last], "line": f"{case.name}: ends before it is killed"}

    return report("kills", each(list(range(count)), work, runs.folder / "kills", jobs), "runs killed at a random time")


# ---- inside saves ----


class Writes:
    """Counts the changes that a process makes to the files in a folder, and kills the process at one of them.

    It counts the changes that Python's audit events report (open a file for writing, rename, remove, make a folder), and calls
    of os.fsync, torch.save and safetensors' writer. Point (n, "before") is just before the n-th change. Point (n, "half")
    leaves the file of the n-th change at half its length, like a kill in the middle of writing.
    """

    def __init__(self, folder: Path, point: tuple[int, str] | None = None):
        self.folder, self.point, self.seen, self.inside = str(folder), point, [], False

    def watch(self) -> None:
        """Start to count, in the process whose changes are counted."""
        import safetensors.torch
        import torch

        sys.addaudithook(self.event)
        os.fsync = self.wrapped(os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}"))
        torch.save = self.wrapped(torch.save, lambda content, file, *rest: file, halves=True)
        safetensors.torch.serialize_file = self.wrapped(
            safetensors.torch.serialize_file, lambda tensors, file, *rest: file, halves=True
        )

    def event(self, name: str, args: tuple) -> None:
        if self.inside or name not in WRITES or not args:
            return
        path, folder = args[0], None
        if name == "open":
            mode, flags = args[1], args[2]
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)) and not (mode and set(mode) & set("wax+")):
                return
        elif name in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(args[-1], int) and args[-1] >= 0:
            folder = args[-1]
        self.count(name, path, folder, halves=name == "open" and bool(args[2] & os.O_TRUNC))

    def wrapped(self, function: Callable, path_of: Callable[..., Any], halves: bool = False) -> Callable:
        def counting(*args: Any, **kwargs: Any) -> Any:
            number = self.count(function.__name__, path_of(*args), None, halves=False, more=halves)
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                self.inside = False
            if number is not None and self.point == (number, "half"):
                os.truncate(path_of(*args), os.path.getsize(path_of(*args)) // 2)
                self.kill()
            return result

        return counting

    def count(self, name: str, path: Any, folder: int | None, halves: bool, more: bool = False) -> int | None:
        """Record an event in the folder, and kill the process if it is the chosen point. Return the number of the event."""
        if self.inside or not isinstance(path, str | bytes | os.PathLike):
            return None
        self.inside = True
        try:
            text = os.fsdecode(path)
            if folder is not None:
                text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
            text = os.path.abspath(text)
            inside = os.path.relpath(text, self.folder)
            if inside.startswith("..") or inside.split(os.sep)[0] in ("cache", "log", "events"):
                return None
            number = len(self.seen)
            self.seen.append(f"{name} {inside}")
            if self.point == (number, "before"):
                self.kill()
            if halves and self.point == (number, "half"):  # leave an empty file, as after open() and before any write
                os.close(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
                self.kill()
            with open(os.path.join(self.folder, "events"), "a") as file:
                file.write(f"{name}\t{inside}\t{int(halves or more)}\n")
            return number
        finally:
            self.inside = False

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def points_of(runs: Runs, case: Case, folder: Path) -> list[tuple[int, str, str]]:
    """Return all points at which a run of the case can be killed."""
    runs.prepare(case, folder)
    ended = start_counted(runs, case, folder, None)
    if ended.code:
        raise SystemExit(f"{case.name} failed while its writes were counted:\n{ended.log[-2000:]}")
    points = []
    for number, line in enumerate((folder / "events").read_text().splitlines()):
        name, path, halves = line.split("\t")
        points.append((number, "before", f"{name} {path}"))
        if halves == "1":
            points.append((number, "half", f"{name} {path}"))
    return points


def start_counted(runs: Runs, case: Case, folder: Path, point: tuple[int, str] | None) -> Ended:
    def work() -> None:
        Writes(folder, point).watch()
        runs.main(case, folder)

    return call(work, folder)


def saves(runs: Runs, count: int, seed: int, jobs: int, names: list[str]) -> bool:
    """Kill each run at one of its writes. The points are spread evenly over all cases and over the length of a run."""
    cases = [case for case in CASES if not names or case.name in names]
    every = []
    for case in cases:
        runs.calm(case)
        runs.modules()
        points = points_of(runs, case, runs.folder / "counted" / case.name)
        print(f"{case.name}: {len(points)} points in its writes", flush=True)
        every.append((case, points))
    rng, chosen = random.Random(seed), []
    for number in range(count):  # the cases take turns; each turn uses the next part of the run
        case, points = every[number % len(every)]
        stretches = -(-count // len(every))
        stretch = number // len(every)
        place = int((stretch + rng.random()) * len(points) / stretches)
        chosen.append((case, points[min(place, len(points) - 1)]))

    def work(item: tuple[Case, tuple[int, str, str]], folder: Path) -> dict:
        case, (number, variant, what) = item
        runs.prepare(case, folder)
        ended = start_counted(runs, case, folder, (number, variant))
        where = f"{'just before' if variant == 'before' else 'in the middle of'} {what}"
        if not ended.killed:
            line = f"{case.name}: {where} was not reached: {ended.last}"
            return {"how": "not reached", "wrong": [] if ended.code == 0 else [ended.last], "line": line}
        return finish(runs, case, folder, where)

    total = sum(len(points) for _, points in every)
    return report("saves", each(chosen, work, runs.folder / "saves", jobs), f"of {total:,} points inside writes")
