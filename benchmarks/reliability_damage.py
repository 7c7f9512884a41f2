"""Damages files of checkpoints, of model folders, and of the unfinished work from which an interrupted run resumes."""

import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from reliability_kills import points_of, start_counted
from reliability_runs import CASES, RESUME, Case, Ended, Runs, call, each

TRAINED = next(case for case in CASES if case.name == "mlm")  # its checkpoints also have training.safetensors
Outcome = tuple[Ended, str, bool]  # how the run ended, the effect of the damage in words, and whether that is right
KILLED_AT, NEWEST, EARLIER = 18, "checkpoint-16", "checkpoint-12"


# ---- kinds of damage ----


def cut(path: Path, size: int) -> None:
    os.truncate(path, max(0, size))


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def huge_header(path: Path) -> None:
    """Write an enormous header length into the first eight bytes, where safetensors stores it."""
    content = path.read_bytes()
    path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])


def swap(path: Path, rng: random.Random) -> None:
    """Swap a file with another file in its folder. If there is no other file, empty the file."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if not others:
        path.write_bytes(b"")
        return
    other, aside = rng.choice(others), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


KINDS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "cut in half": lambda path, other, rng: cut(path, path.stat().st_size // 2),
    "without its last byte": lambda path, other, rng: cut(path, path.stat().st_size - 1),
    "emptied": lambda path, other, rng: cut(path, 0),
    "deleted": lambda path, other, rng: path.unlink(),
    "of another": lambda path, other, rng: shutil.copyfile(other, path),
    "with a huge header": lambda path, other, rng: huge_header(path),
    "with a bit flipped": lambda path, other, rng: flip(path, rng),
    "swapped with another file": lambda path, other, rng: swap(path, rng),
}
SEEN_WITHOUT_MANIFEST = list(KINDS)[:6]  # without a manifest, a flipped bit of a weight cannot be found
OF_WORK = list(KINDS)[:4]


def choose(files: list[str], kinds: list[str], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Choose pairs of a file and a kind of damage, so that each file and each kind occurs about equally often."""
    left = [(file, kind) for file in files for kind in kinds]
    rng.shuffle(left)
    chosen: list[tuple[str, str]] = []
    used: Counter[str] = Counter()
    while len(chosen) < count:
        pool = left or [(file, "with a bit flipped") for file in files]
        pair = min(pool, key=lambda pair: used[pair[0]] + used[pair[1]])
        if left:
            left.remove(pair)
        used.update(pair)
        chosen.append(pair)
    return chosen


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# ---- what is damaged ----


def interrupted(runs: Runs, folder: Path) -> None:
    """Make a run that was killed at a step between two checkpoints."""

    def work() -> None:
        from accelerate.optimizer import AcceleratedOptimizer

        steps, step = [], AcceleratedOptimizer.step

        def counted(self: AcceleratedOptimizer, *args: object, **kwargs: object) -> None:
            steps.append(1)
            if len(steps) == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, *args, **kwargs)

        AcceleratedOptimizer.step = counted
        runs.main(TRAINED, folder)

    runs.prepare(TRAINED, folder)
    ended = call(work, folder)
    if not ended.killed or not (folder / "out" / NEWEST).is_dir():
        raise SystemExit(f"the run was not killed after {NEWEST}: {ended.last}")


def stopped_work(runs: Runs, case: Case, at: str, folder: Path) -> None:
    """Make a run that was killed at the last write whose description contains `at`."""
    points = points_of(runs, case, folder / "counted")
    number = [number for number, _, what in points if at in what][-1]
    runs.prepare(case, folder / "stopped")
    if not start_counted(runs, case, folder / "stopped", (number, "before")).killed:
        raise SystemExit(f"{case.name} was not killed at {at}")


WORKS = {"encode": "done/.saving", "mine_negatives": "documents/.saving", "ablation": "mkdir out/runs"}


def warned(ended: Ended, *names: str) -> bool:
    """Return True if a line of output warns about one of the names. That a run resumes from it is not a warning."""
    lines = [line for line in ended.log.splitlines() if any(name in line for name in names)]
    return any(re.search(r"skipped|damaged|changed since|incomplete|again|missing|cannot be read", line) for line in lines)


def judge(ended: Ended, wrong: list[str], spoken: bool) -> tuple[str, bool]:
    """Return the effect of the damage in words, and whether that is right."""
    if ended.hung:
        return "HUNG", False
    if ended.refused:
        return "refused", True
    if ended.code:
        return f"CRASHED: {ended.last}", False
    if not wrong:
        return ("continued without it, with a warning" if spoken else "made no difference"), True
    return (f"WRONG, with a warning: {wrong}" if spoken else f"SILENT: {wrong}"), False


def damaged_checkpoint(runs: Runs, made: Path, file: str, kind: str, folder: Path, rng: random.Random) -> Outcome:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    KINDS[kind](folder / "out" / NEWEST / file, folder / "out" / EARLIER / file, rng)
    ended = runs.start(TRAINED, folder, RESUME)
    wrong = runs.check(TRAINED, folder) if ended.code == 0 else []
    return ended, *judge(ended, wrong, warned(ended, NEWEST, Path(file).name))


def damaged_cache(runs: Runs, made: Path, file: str, kind: str, folder: Path, rng: random.Random) -> Outcome:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    KINDS[kind](folder / file, folder / file, rng)
    ended = runs.start(TRAINED, folder, RESUME)
    return ended, *judge(ended, runs.check(TRAINED, folder) if ended.code == 0 else [], warned(ended, Path(file).name))


def damaged_work(runs: Runs, case: Case, made: Path, file: str, kind: str, folder: Path, rng: random.Random) -> Outcome:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    path = folder / file
    KINDS[kind](path, path, rng)
    ended, _ = runs.go_on(case, folder)
    wrong = runs.check(case, folder) if ended.code == 0 else []
    return ended, *judge(ended, wrong, warned(ended, path.name))


def vectors_of(runs: Runs, model: Path, folder: Path) -> Ended:
    """Load a model folder and write the vectors of two texts."""

    def work() -> None:
        import numpy as np

        from hf_embed import Encoder, InputError

        try:
            vectors = Encoder.from_pretrained(str(model)).encode(["a cat sleeps", "Trains are late in winter."])
        except InputError as error:
            print(f"error: {error}")
            raise SystemExit(2) from None
        np.save(folder / "vectors.npy", vectors)

    return call(work, folder)


def damaged_model(runs: Runs, made: Path, right: bytes, file: str, kind: str, folder: Path, rng: random.Random) -> Outcome:
    shutil.copytree(made, folder / "model")
    other = runs.earlier / file
    KINDS[kind](folder / "model" / file, other if other.is_file() else runs.earlier / "config.json", rng)
    ended = vectors_of(runs, folder / "model", folder)
    wrong = [] if ended.code or (folder / "vectors.npy").read_bytes() == right else ["other vectors"]
    return ended, *judge(ended, wrong, warned(ended, Path(file).name))


# ---- the command ----


def damage(runs: Runs, count: int, seed: int, jobs: int) -> bool:
    """Damage one file in each of `count` runs, and check whether the run refuses it, does without it, or uses it."""
    rng, base = random.Random(seed), runs.folder / "made"
    runs.calm(TRAINED)
    interrupted(runs, base / "interrupted")
    model = runs.finished(TRAINED)
    (base / "vectors").mkdir()
    if (ended := vectors_of(runs, model, base / "vectors")).code:
        raise SystemExit(ended.log)
    right = (base / "vectors" / "vectors.npy").read_bytes()
    of_works, of_model, of_cache = count // 8, count // 5, count // 12
    of_checkpoint, files = count - of_works - of_model - of_cache, files_in(base / "interrupted" / "out" / NEWEST)
    items = [("checkpoint", *pair) for pair in choose(files, list(KINDS), of_checkpoint, rng)]
    tables = [name for name in files_in(base / "interrupted") if name.startswith("cache/") and name.endswith(".arrow")]
    items += [("cache of tables", *pair) for pair in choose(tables, OF_WORK, of_cache, rng)]
    loaded = [name for name in files_in(model) if "/" not in name or name.startswith("1_")]
    loaded = [name for name in loaded if name not in ("README.md", "results.json", "geometry.png", "training_args.bin")]
    items += [("model folder", *pair) for pair in choose(loaded, SEEN_WITHOUT_MANIFEST, of_model, rng)]
    works = {case.name: case for case in CASES if case.name in WORKS}
    for number, (name, case) in enumerate(works.items()):
        runs.calm(case)
        stopped_work(runs, case, WORKS[name], base / name)
        files = [f for f in files_in(base / name / "stopped") if f.startswith("out")]
        items += [(name, *pair) for pair in choose(files, OF_WORK, len(range(number, of_works, len(works))), rng)]

    def work(item: tuple[str, str, str], folder: Path) -> dict:
        what, file, kind = item
        rng = random.Random(f"{seed} {item}")
        if what == "checkpoint":
            ended, how, fine = damaged_checkpoint(runs, base / "interrupted", file, kind, folder, rng)
        elif what == "cache of tables":
            ended, how, fine = damaged_cache(runs, base / "interrupted", file, kind, folder, rng)
        elif what == "model folder":
            ended, how, fine = damaged_model(runs, model, right, file, kind, folder, rng)
        else:
            ended, how, fine = damaged_work(runs, works[what], base / what / "stopped", file, kind, folder, rng)
        line = f"{what}: {file} {kind}: {how}{f' ({ended.message})' if ended.refused else ''}"
        return {"how": how.split(":")[0].split(",")[0], "fine": fine, "line": line}

    found = each(items, work, runs.folder / "damage", jobs)
    hows = Counter(entry["how"] for entry in found)
    print(f"\ndamage: {len(found)} damaged files, {hows['SILENT']} used silently; "
          + ", ".join(f"{how}: {number}" for how, number in sorted(hows.items())))  # fmt: skip
    failures = [entry for entry in found if not entry["fine"]]
    print("".join(f"FAILED {entry['line']}\n" for entry in failures), end="")
    return not failures
