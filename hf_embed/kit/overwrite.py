"""The replacement of an earlier run: the new run trains in a folder beside it, and takes its place when it is complete.

outputs/mine        the earlier run; it stays complete, and loaders find it, until the new run is complete
outputs/.mine.new   the new run, with its checkpoints; the file UNFINISHED in it marks it as incomplete
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

from hf_embed.checkpoint.card import is_edited
from hf_embed.checkpoint.hub import COPY
from hf_embed.checkpoint.model_files import FILES, RESULTS, is_old
from hf_embed.errors import InputError
from hf_embed.files.safe_files import (
    can_be_replaced,
    flush_one,
    link_tree,
    lock_folder,
    release,
    remove,
    replace_folder,
    replaced_name,
)

# What a run writes while it trains, and the temporary files of a killed run.
RUNNING = re.compile(rf"checkpoint-\d+|runs|{COPY}|\.(removing|saving)-.+")
SEED = re.compile(r"seed-\d+")
UNFINISHED = ".unfinished"


def working_folder(folder: Path) -> Path:
    """Return the working folder, in which the run that will replace `folder` trains.

    The working folder lies beside `folder`. If `folder` is a symbolic link, it lies beside the target of the link.
    """
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.new"


def is_working(folder: Path) -> bool:
    """Return True if a folder has the name of a working folder, `.NAME.new`."""
    return folder.name.startswith(".") and folder.name.endswith(".new")


def place_of(folder: Path) -> Path:
    """Return the final folder of a run that trains in `folder`."""
    return folder.with_name(folder.name[1:].removesuffix(".new")) if is_working(folder) else folder


def is_unfinished(folder: Path) -> bool:
    """Return True if a run that will replace `folder` has begun but is not complete."""
    return (working_folder(folder) / UNFINISHED).is_file()


def check_replaceable(folder: Path) -> None:
    """Raise InputError if a new folder cannot take the place of `folder`."""
    if not can_be_replaced(folder):
        raise InputError(
            f"--output_dir {folder}: this folder cannot be replaced, because it is the current folder, a mount point, or in a "
            "folder without write permission; give another folder"
        )


def begin(folder: Path) -> None:
    """Prepare the folder in which a run is about to train. Only one rank calls this.

    A working folder without the file UNFINISHED is emptied. It may hold an earlier run, if a process was killed just after it
    exchanged the two folders. Any other folder keeps its files, and leftovers of such an exchange beside it are removed.
    """
    if not is_working(folder):
        if (folder / UNFINISHED).is_file():  # a run removes this file last, after it has taken its place
            clear_replaced(folder)
        return
    print(f"{place_of(folder)} holds an earlier run; the new run trains in {folder} and replaces it when it is complete")
    if folder.is_dir() and not (folder / UNFINISHED).is_file():
        release(folder)
        remove(folder)
        folder.mkdir()
        lock_folder(folder)
    (place_of(folder) / UNFINISHED).unlink(missing_ok=True)  # from a run that was killed after it had taken its place


def take_place(folder: Path) -> Path:
    """Move a complete run to its final folder, and return that folder. Only one rank calls this.

    Files in the folder of the earlier run that do not belong to a run are kept, and so is a card that someone has edited.
    """
    place = place_of(folder)
    if place == folder:
        return place
    for path in list(place.iterdir()) if place.is_dir() else []:
        new = folder / path.name
        if is_edited(path) if path.name == "README.md" else is_the_users(path) and not new.exists():
            new.unlink(missing_ok=True)
            link_tree(path, new)
    replace_folder(folder, place)
    clear_replaced(place)
    return place


def clear_replaced(place: Path) -> None:
    """Remove the replaced run, and then the file that marks the run in `place` as unfinished."""
    for left in (working_folder(place), replaced_name(place)):
        shutil.rmtree(left, ignore_errors=True)
    (place / UNFINISHED).unlink(missing_ok=True)


def is_the_users(path: Path) -> bool:
    """Return True if a file or folder in a run's folder belongs neither to a run nor to a model."""
    of_model = path.name in FILES or is_old(path.name)
    return not of_model and not any(kind.fullmatch(path.name) for kind in (RUNNING, SEED, RESULTS))


class EarlierRun(TrainerCallback):
    """Remove the files `paths` of an earlier run after the first step of the new run. Before that, the new run may still fail.

    If `folder` is a working folder, the callback also marks it as an unfinished run. From then on, this run can be resumed.
    """

    def __init__(self, paths: Iterable[Path], folder: Path | None = None):
        self.paths, self.folder, self.waiting = list(paths), folder, True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the paths on one rank, while the other ranks wait."""
        if self.waiting and args.process_index == 0:
            if self.folder is not None and is_working(self.folder):
                (self.folder / UNFINISHED).touch()
                flush_one(self.folder)
            for path in self.paths:
                remove(path)
            for folder in sorted({path.parent for path in self.paths}, reverse=True):
                with contextlib.suppress(OSError):  # the folder is not empty
                    folder.rmdir()
        if self.waiting:  # otherwise another rank might save into a folder that is about to be removed
            PartialState().wait_for_everyone()
        self.paths, self.waiting = [], False


def earlier_files(folder: Path) -> list[Path]:
    """List the checkpoints, logs and runs of single seeds. If the new run is resumed, it could mistake them for its own."""
    there = sorted(folder.glob("*"))
    paths = [path for path in there if RUNNING.fullmatch(path.name)]
    for seed in there:
        if SEED.fullmatch(seed.name) and not seed.is_symlink():
            paths += sorted(seed.glob("*"))
    logs = [path for path in paths if path.name == "runs" and not path.is_symlink()]  # the new run writes there too
    return [path for path in paths if path.name != "runs"] + [path for parent in logs for path in sorted(parent.glob("*"))]
