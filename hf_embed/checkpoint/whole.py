"""A training checkpoint is either complete or absent. A manifest seals it, and the functions here verify it.

A checkpoint is written under a temporary name, sealed with manifest.json (`seal`), flushed to the disk and renamed to
checkpoint-N. The manifest holds the size and hash of each file that a resumed run reads, and describes the run that the
checkpoint belongs to (`hf_embed.training.resume`). A hash of its own protects the manifest.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import xxhash
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_embed.errors import InputError
from hf_embed.files.read_files import read_json
from hf_embed.files.safe_files import SAVING, hash_of, remove

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VERSION = 1  # format version of the manifest
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
ASIDE = f"{SAVING}{PREFIX_CHECKPOINT_DIR}-"  # prefix of a checkpoint that is being written
# Files that are not in the manifest: no resumed run reads them, and users edit them or a push leaves them out.
LEFT_OUT = {MANIFEST, "README.md", TRAINING_ARGS_NAME}
# Files that a resumed run would read, even if the manifest does not list them.
READ = re.compile(r"(model|pytorch_model|training\.safetensors|optimizer|scheduler|scaler|rng_state)[._-]?.*")


# ---- writing ----


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint after all its files are written.

    Args:
        folder: the checkpoint folder, still under a temporary name.
        run: a description of the run that the checkpoint belongs to, as JSON values.
    """
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3_128": hash_of(folder / name)} for name in names_in(folder)}
    content: dict[str, Any] = {"version": VERSION, "files": files, "run": run}
    content["xxh3_128"] = hash_of_content(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def names_in(folder: Path) -> list[str]:
    """Return the files of a checkpoint that the manifest lists, also those in subfolders, as paths with slashes."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.as_posix() not in LEFT_OUT and not path.name.startswith(SAVING))


def hash_of_content(content: dict[str, Any]) -> str:
    """Return the hash of a manifest, without the entry that stores this hash."""
    told = {key: value for key, value in content.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())


def rotate(folder: Path, limit: int | None, keep: set[str], step: int) -> None:
    """Remove the oldest checkpoints of a run, by step, until `limit` are left.

    Checkpoints with later steps than the current one are removed first, because the run was resumed from an earlier checkpoint.
    Each checkpoint is renamed before it is removed, so that an incomplete one is never taken for a checkpoint.

    Args:
        folder: the folder of the run.
        limit: the number of checkpoints to keep. None keeps all.
        keep: the names of checkpoints that stay in any case.
        step: the current step.
    """
    found = checkpoints_in(folder)
    surplus = 0 if limit is None else len(found) - max(limit, len(keep))
    for path in sorted(found, key=lambda path: (found[path] <= step, found[path])):
        if surplus > 0 and path.name not in keep:
            remove(path)
            surplus -= 1


# ---- reading ----


def checkpoints_in(folder: Path) -> dict[Path, int]:
    """Return the checkpoint-N folders of a run and the step of each, the latest step first."""
    found = [(step, path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := step_of(path)) is not None]
    return {path: step for step, path in sorted(found, reverse=True) if path.is_dir()}


def step_of(checkpoint: str | Path) -> int | None:
    """Return the step N of a folder with the name checkpoint-N, or None for another name."""
    match = CHECKPOINT.fullmatch(Path(checkpoint).name)
    return int(match[1]) if match else None


def newest_whole(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there are no checkpoints. Warn about each skipped one.

    Raises:
        InputError: if there are checkpoints and none is complete.
    """
    skipped: list[str] = []
    for path in checkpoints_in(folder):
        reason = damage(path)
        if reason is None:
            for line in skipped:
                logger.warning(f"{line}: skipped; resuming from {path.name}")
            return path
        skipped.append(f"{path.name}: {reason}")
    if skipped:
        raise InputError(f"{folder}: all checkpoints are damaged ({'; '.join(skipped)}); start again in another folder")
    return None


def last_good(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there is none."""
    return next((path for path in checkpoints_in(folder) if damage(path) is None), None)


def check_whole(folder: Path) -> None:
    """Raise InputError if a checkpoint is damaged. The message names a complete checkpoint beside it, if there is one."""
    reason = damage(folder)
    if reason is None:
        return
    whole = last_good(folder.parent)
    mend = "start again in another folder" if whole is None else f"resume with --resume_from_checkpoint latest ({whole.name})"
    raise InputError(f"{folder}: the checkpoint is damaged ({reason}); {mend}")


def damage(folder: Path) -> str | None:
    """Return a short description of what is wrong with a checkpoint, or None if it is complete."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} does not exist"
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} does not exist; to train further what another trainer wrote, give model='{folder}'"
    try:
        return difference(folder, read_manifest(folder)["files"])
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{Path(str(error.filename or '')).name} cannot be read: {error.strerror or error}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        InputError: if there is none, or if it was changed after it was written, or has another format version.
    """
    manifest = read_json(folder / MANIFEST, name=MANIFEST, with_nan=True)
    if manifest.get("xxh3_128") != hash_of_content(manifest):
        raise InputError(f"{MANIFEST} has changed since it was written")
    if manifest.get("version") != VERSION:
        raise InputError(f"{MANIFEST} has the unknown format version {manifest.get('version')}")
    return manifest


def difference(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """Return how the files of a checkpoint differ from its manifest, or None. Sizes are compared first, which is fast."""
    for name, file in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != file["bytes"]:
            return f"{name} has {size:,} bytes instead of {file['bytes']:,}"
    if more := sorted({name for name in names_in(folder) if READ.fullmatch(name)} - set(files)):
        return f"unexpected file {more[0]}"
    for name, file in files.items():
        if hash_of(folder / name) != file["xxh3_128"]:
            return f"{name} has changed since it was written"
    return None
