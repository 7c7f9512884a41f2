"""A new run in the place of an earlier one: what goes, and when. Nothing goes before the new run has done its first step."""

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.read_files import read_json

# What a run leaves on its way, and what is left where one was killed in the middle of it.
RUNNING = re.compile(r"checkpoint-\d+|runs|\.(removing|saving)-.+")
# What belongs to the weights in a folder: scores, pictures, card, extras and the modules behind the transformer.
RESULTS = re.compile(
    r"results\.json|(geometry|tempscale)\.png|README\.md|trainer_state\.json|adapter|mteb|\d_(Layer)?Pooling|\d_Dense|\d_Normalize"
)


class EarlierRun(TrainerCallback):
    """Remove what an earlier run left, `paths`, once the first step of the new one is done: until then that may still fail.

    The earlier weights stay, with the scores and the card that are theirs, until new ones take their place (`clear_results`).
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths, self.waiting = list(paths), True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the paths, on one rank, while the others wait."""
        if args.process_index == 0:
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
        if re.fullmatch(r"seed-\d+", seed.name) and not seed.is_symlink():
            paths += sorted(seed.glob("*"))
    logs = [path for path in paths if path.name == "runs" and not path.is_symlink()]  # the new run's logs will be in there too
    return [path for path in paths if path.name != "runs"] + [path for parent in logs for path in sorted(parent.glob("*"))]


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder gets another name first, so that no half of a checkpoint is ever taken for one."""
    if path.is_dir() and not path.is_symlink():
        going = path if path.name.startswith(".removing-") else path.rename(path.with_name(f".removing-{path.name}"))
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def clear_results(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove the scores, extras and modules that an earlier run left in `folder`, where other weights lie now."""
    keep = {*keep, *(module["path"] for module in read_json(folder / "modules.json", list))}
    for path in list(folder.iterdir()):
        if RESULTS.fullmatch(path.name) and path.name not in keep:
            remove(path)
