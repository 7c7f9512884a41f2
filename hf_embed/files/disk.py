"""Errors of a file system in one line: it is full or read-only, a quota is used up, a name is too long.

Libraries report a full disk in different ways: by an error number, by a text, or by a wrong position in the file. `disk_errors`
turns all of them into one message. `check_folder` and `lack_of_room` check before anything is computed.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub

from hf_embed.errors import InputError, RankError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file exceeds the size limit for files (ulimit -f shows a limit)",
}
REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EACCES: "permission denied" if os.name != "nt" else "permission denied, or another program has it open",
    errno.EPERM: "permission denied",
}
# The texts of libraries that do not give the error number: safetensors, PyTorch's workers and writer, NumPy.
TEXTS = {
    r"No space left on device": errno.ENOSPC,
    r"Disk quota exceeded": errno.EDQUOT,
    r"File too large": errno.EFBIG,
    r"inline_container\.cc\S* \. unexpected pos|PytorchStreamWriter failed|^\d+ requested and \d+ written": errno.ENOSPC,
    r"out of shared memory": errno.ENOSPC,
}
SHARED_MEMORY = Path("/dev/shm")
OF_WORKERS = r"out of shared memory|</torch_"
ANOTHER_FOLDER = "give another output folder"
AGAIN = "free some space there and run it again"
SAVING = ".saving-"  # prefix of the names of files and folders that are incomplete or about to be removed


class DiskError(RankError):
    """A write failed. The message says which file system refused it, how much room it has, and how to go on."""


# ---- while something is written ----


@contextlib.contextmanager
def disk_errors(*places: str | Path) -> Iterator[None]:
    """Turn the errors of a file system into a `DiskError`.

    Args:
        places: where files are written, the most likely place first. Many errors do not name their file.

    Raises:
        DiskError: if the disk is full, if a quota is used up, if a file or its name is too large, or if a file cannot be
            written.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        message = disk_message(error, [Path(place) for place in places])
        if message is None:
            raise
        raise DiskError(message) from error


def disk_message(error: BaseException, places: list[Path]) -> str | None:
    """Return one line about what a file system has refused, or None if the error has another cause."""
    for cause in causes(error):
        code = code_of(cause)
        if code in FULL:
            return full_message(FULL[code], place_of(cause, places))
        if code in REFUSED and not isinstance(error, InputError) and file_of(cause):
            return refusal(REFUSED[code], place_of(cause, places), places)
        if "No usable temporary directory" in str(cause):
            return "no temporary folder can be written to; set TMPDIR to a writable folder with free space"
    return None


def refusal(reason: str, file: Path, places: list[Path]) -> str:
    """Return the line about a file that was refused.

    A file in one of `places` or in a cache was refused for writing. Any other file was perhaps refused for reading. If
    permission is denied for such a file, the message does not suggest another output folder.
    """
    mend = another_place(file)
    written = mend != ANOTHER_FOLDER or any(Path(os.path.abspath(file)).is_relative_to(os.path.abspath(p)) for p in places)
    if reason == REFUSED[errno.EACCES]:
        mend = f"give this user access to it{f', or {mend}' if written else ''}"
    return f"{short_path(file)}: {reason}; {mend}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of the cause, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def code_of(error: BaseException) -> int | None:
    """Return the error number of an error, from its attribute or from its text, or None."""
    if isinstance(error, OSError) and (error.errno in FULL or error.errno in REFUSED):
        return error.errno
    return next((code for text, code in TEXTS.items() if re.search(text, str(error), re.MULTILINE)), None)


def file_of(error: BaseException) -> Path | None:
    """Return the file that an error names, or None."""
    name = getattr(error, "filename", None)
    if isinstance(name, str | bytes | os.PathLike):
        return Path(os.fsdecode(name))
    quoted = re.search(r"(?:No space left on device|Disk quota exceeded)\S*: '(/[^']+)'", str(error))
    return Path(quoted[1]) if quoted else None


def place_of(error: BaseException, places: list[Path]) -> Path:
    """Return where an error occurred: the file that it names, else the first of `places`, else where least is free."""
    if re.search(OF_WORKERS, str(error)):
        return SHARED_MEMORY
    file = file_of(error)
    if file is not None and not (places and any(part.startswith(SAVING) for part in file.parts)):
        return file
    if places:
        return places[0]
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HOME)]
    return min([*caches, temporary_folder(), Path.cwd()], key=lambda place: shutil.disk_usage(mount_of(place)).free)


def full_message(reason: str, place: Path) -> str:
    """Return the line about a file system that has no room for a file."""
    mount = mount_of(place)
    free = free_of(mount)
    return f"{reason} (at {short_path(place)}): the file system {mount} has {free}; {AGAIN}, or {another_place(place)}"


def free_of(mount: Path) -> str:
    """Say how much is free on a file system: the bytes, and the number of files if no more files can be created."""
    usage = shutil.disk_usage(mount)
    said = f"{size(usage.free)} of {size(usage.total)} free"
    if hasattr(os, "statvfs"):
        files = os.statvfs(mount)
        if files.f_files and not files.f_favail:
            said += f", and it cannot hold more than its {files.f_files:,} files"
    return said


def another_place(place: Path) -> str:
    """Return the end of a message that says how to write a file to another place."""
    path = Path(os.path.abspath(place))
    for folder, mend in (
        (SHARED_MEMORY, "set dataloader_num_workers to 0, or give more with docker run --shm-size 2g"),
        (Path(datasets.config.HF_DATASETS_CACHE), "set HF_DATASETS_CACHE to another folder"),
        (Path(huggingface_hub.constants.HF_HOME), "set HF_HOME to another folder"),
    ):
        if path.is_relative_to(os.path.abspath(folder)):
            return mend
    temporary = Path(os.path.abspath(temporary_folder()))
    if any(part.parent == temporary and part.name.startswith("tmp") for part in (path, *path.parents)):  # made by `tempfile`
        return "set TMPDIR to another folder"
    return ANOTHER_FOLDER


def temporary_folder() -> Path:
    """Return the system's folder for temporary files. `tempfile` does not name it if the disk is full."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get("TMPDIR", "/tmp"))


def mount_of(place: Path) -> Path:
    """Return the mount point of the file system that holds a path. The path need not exist."""
    path = Path(os.path.realpath(nearest(place)))
    while not os.path.ismount(path):
        path = path.parent
    return path


def nearest(place: Path) -> Path:
    """Return the absolute path of a file or folder. If it does not exist, return its nearest parent that exists."""
    path = Path(os.path.abspath(place))
    while not os.path.lexists(path) and path != path.parent:  # Windows may lack the drive, too
        path = path.parent
    return path


def size(count: float) -> str:
    """Return a number of bytes in a readable form.

    >>> size(2_300_000)
    '2.3 MB'
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.0f} kB"


def short_path(path: str | Path) -> str:
    """Return a path for a message, without its middle if it is long."""
    name = str(path)
    return name if len(name) <= 200 else f"{name[:80]} ... {name[-80:]}"


# ---- before anything is computed ----


def check_folder(folder: str | Path, name: str = "output_dir") -> None:
    """Check that a folder can be written to, or created. The check leaves nothing behind.

    Args:
        folder: the folder where files will be written.
        name: what messages call it.

    Raises:
        InputError: if files cannot be written there.
    """
    said = f"{name} {short_path(folder)}"
    if "\0" in str(folder):
        raise InputError(f"{name} {str(folder)!r}: a name cannot contain a NUL byte; give another folder")
    found = nearest(Path(folder))
    if not found.is_dir():
        what = "this" if found == Path(os.path.abspath(folder)) else str(found)
        kind = "a file" if found.exists() else "a broken link" if found.is_symlink() else "a drive that does not exist"
        raise InputError(f"{said}: {what} is {kind}; give a folder")
    try:
        with tempfile.TemporaryFile(dir=found) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        if error.errno in FULL:
            raise InputError(full_message(FULL[error.errno], Path(folder))) from error
        reason = REFUSED.get(error.errno or 0, str(error.strerror or error))
        raise InputError(f"{said}: files cannot be written to {found} ({reason}); give another folder") from error


def check_output_file(file: str | Path, name: str) -> None:
    """Check that a file can be written. The check leaves nothing behind. `name` is what messages call the file.

    Raises:
        InputError: if it cannot be written.
    """
    path = Path(file)
    if path.exists() and not path.is_file():
        raise InputError(f"{name} {short_path(file)}: this is a {'folder' if path.is_dir() else 'device'}; name a file")
    check_folder(path.parent, f"the folder of {name}")


def lack_of_room(folder: str | Path, needed: int, what: str) -> str | None:
    """Return one line about why a folder has no room for `needed` bytes, or None if it has room.

    `what` names the content in the message, for example "a checkpoint needs". Incomplete files that killed processes left in
    the folder count as free room.
    """
    mount = mount_of(Path(folder))
    left = [path for path in Path(folder).glob(f"{SAVING}*/**/*") if path.is_file() and not path.is_symlink()]
    if shutil.disk_usage(mount).free + sum(path.stat().st_size for path in left) >= needed:
        return None
    return f"{short_path(folder)}: {what} about {size(needed)}, but the file system {mount} has {free_of(mount)}"
