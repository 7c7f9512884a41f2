"""A new run in the place of an earlier one: it trains beside it, and takes its place when it is complete.

outputs/mine        the earlier run: whole, and what loaders find, until the new one is complete
outputs/.mine.new   the new run, with its checkpoints; UNFINISHED in it says that it is not complete
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.checkpoint.hub import FILES
from hf_embed.checkpoint.save import RESULTS, WEIGHTS
from hf_embed.errors import InputError
from hf_embed.safe_files import (
    can_be_replaced,
    flush_one,
    link_tree,
    lock_folder,
    release,
    remove_folder,
    replace_folder,
    replaced_name,
)

# What a run leaves on its way, and what is left where one was killed in the middle of it.
RUNNING = re.compile(r"checkpoint-\d+|runs|\.(removing|saving)-.+")
SEED = re.compile(r"seed-\d+")
UNFINISHED = ".unfinished"


def working_folder(folder: Path) -> Path:
    """Return where a run trains that is to take the place of `folder`: beside it or, of a link, beside what it leads to."""
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.new"


def is_working(folder: Path) -> bool:
    """Return whether a folder is named as a working folder is."""
    return folder.name.startswith(".") and folder.name.endswith(".new")


def place_of(folder: Path) -> Path:
    """Return where a run that trains in `folder` stands when it is complete."""
    return folder.with_name(folder.name[1:].removesuffix(".new")) if is_working(folder) else folder


def is_unfinished(folder: Path) -> bool:
    """Return whether a run that is to take the place of `folder` has begun, and is not complete."""
    return (working_folder(folder) / UNFINISHED).is_file()


def check_replaceable(folder: Path) -> None:
    """Raise InputError for a folder whose place another one cannot take."""
    if not can_be_replaced(folder):
        raise InputError(
            f"--overwrite_output_dir: another folder cannot take the place of {folder}, which is the current folder, a mount "
            "point, or in a folder that cannot be written to; name another --output_dir"
        )


def begin(folder: Path) -> None:
    """Prepare the folder where a run is about to train. One rank calls this.

    A working folder without the mark of an unfinished run is emptied: an earlier run lies there if a process was killed after
    the exchange of the two folders. Any other folder keeps its files; what such an exchange has left beside it is removed.
    """
    if not is_working(folder):
        if (folder / UNFINISHED).is_file():  # the last thing that a run removes when it has taken its place
            clear_replaced(folder)
        return
    print(
        f"{place_of(folder)} holds an earlier run, which stays until this one is complete; until then this one is in {folder}"
    )
    if folder.is_dir() and not (folder / UNFINISHED).is_file():
        release(folder)
        remove_folder(folder)
        folder.mkdir()
        lock_folder(folder)
    (place_of(folder) / UNFINISHED).unlink(missing_ok=True)  # of a run that was killed when it had taken its place


def take_place(folder: Path) -> Path:
    """Put a complete run in its place, and return that. On one rank.

    Of the earlier run's folder, files that are not of a run stay.
    """
    place = place_of(folder)
    if place == folder:
        return place
    for path in list(place.iterdir()) if place.is_dir() else []:
        if is_the_users(path) and not (folder / path.name).exists():
            link_tree(path, folder / path.name)
    replace_folder(folder, place)
    clear_replaced(place)
    return place


def clear_replaced(place: Path) -> None:
    """Remove the files of the replaced run, then the mark that says that the run in `place` is unfinished."""
    for left in (working_folder(place), replaced_name(place)):
        shutil.rmtree(left, ignore_errors=True)
    (place / UNFINISHED).unlink(missing_ok=True)


def is_the_users(path: Path) -> bool:
    """Return whether a file or folder in a run's folder is of no run and no model."""
    return path.name not in FILES and not any(kind.fullmatch(path.name) for kind in (RUNNING, SEED, RESULTS, WEIGHTS))


class EarlierRun(TrainerCallback):
    """Remove what an earlier run left, `paths`, once the first step of the new one is done: until then that may still fail.

    From then on the run in `folder`, if that is a working folder, is one that can be gone on with.
    """

    def __init__(self, paths: Iterable[Path], folder: Path | None = None):
        self.paths, self.folder, self.waiting = list(paths), folder, True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the paths, on one rank, while the others wait."""
        if self.waiting and args.process_index == 0:
            if self.folder is not None and is_working(self.folder):
                (self.folder / UNFINISHED).touch()
                flush_one(self.folder)
            for path in self.paths:
                remove(path)
            for folder in sorted({path.parent for path in self.paths}, reverse=True):
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
        if self.waiting:  # else another rank might save into a folder that is about to go
            PartialState().wait_for_everyone()
        self.paths, self.waiting = [], False


def earlier_files(folder: Path) -> list[Path]:
    """List checkpoints, logs and runs of single seeds, which the new run, if it is resumed, might take for its own."""
    there = sorted(folder.glob("*"))
    paths = [path for path in there if RUNNING.fullmatch(path.name)]
    for seed in there:
        if SEED.fullmatch(seed.name) and not seed.is_symlink():
            paths += sorted(seed.glob("*"))
    logs = [path for path in paths if path.name == "runs" and not path.is_symlink()]  # the new run's logs will be in there too
    return [path for path in paths if path.name != "runs"] + [path for parent in logs for path in sorted(parent.glob("*"))]


def remove(path: Path) -> None:
    """Remove a file or a folder; of a link, nothing but the link."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)
