"""Files and folders that are whole or not there: how everything in this package is written.

What is new is written beside its place under a name that begins with `.saving-`, is flushed to the disk, and takes its place at
one rename. Whatever ends the process, the old one or the new one is there as a whole.

    with writing(Path("results.npy")) as aside:
        numpy.save(aside, vectors)

    with new_folder(Path("model")) as new:  # at the end it takes the place of an old one
        ...
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from hf_embed.disk import ASIDE, disk_errors
from hf_embed.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAVING = ASIDE  # begins the name of what is not whole yet, or is about to go
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2, Linux
numbers = itertools.count()
locks: dict[str, int] = {}  # of this process: the open folders


# ---- a file ----


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield the name under which to write a file, of the same ending; at the end the file is flushed and takes its place.

    After an exception the file at `path`, or its absence, is as it was.

    Raises:
        DiskError: the disk is full, or the file may not be written.
    """
    path = Path(path)
    aside = path.with_name(f"{SAVING}{os.getpid()}-{next(numbers)}{path.suffix}")
    try:
        with disk_errors(path):
            yield aside
            flush_one(aside)
            aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    flush_one(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file."""
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def put(new: Path, path: Path) -> None:
    """Put the file `new`, which is complete, in the place of `path`, on the same file system."""
    flush_one(new)
    new.replace(path)
    flush_one(path.parent)


def seal(path: Path) -> None:
    """Flush a file that is complete, and write its size and hash beside it, by which `is_sealed` knows it."""
    flush_one(path)
    write_text(seal_of(path), content_of(path))


def is_sealed(path: Path) -> bool:
    """Return whether a file is byte for byte as it was when it was sealed."""
    try:
        return seal_of(path).read_bytes() == content_of(path).encode()
    except FileNotFoundError:
        return False


def seal_of(path: Path) -> Path:
    """Return where the seal of a file lies."""
    return path.with_name(f"{path.name}.xxh3")


def content_of(path: Path) -> str:
    """Return what the seal of a file says."""
    return f"{path.stat().st_size} bytes, xxh3_128 {hash_of(path)}\n"


def hash_of(path: Path) -> str:
    """Return a hash of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def flush_one(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which opens no folders, and flushes only what is open for writing
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(opened)


# ---- a folder ----


def flush(folder: Path) -> None:
    """Wait until all files of a folder, and of the folders in it, are on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                flush_one(path)
        flush_one(Path(place))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end it takes the place of `folder`, whether that is there or not.

    After an exception `folder`, or its absence, is as it was.

    Raises:
        DiskError: the disk is full, or something may not be written.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it leads to is replaced
    new = new_folder_beside(folder)
    try:
        with disk_errors(folder):
            yield new
            replace_folder(new, folder)
    except BaseException:
        release(new)
        shutil.rmtree(new, ignore_errors=True)
        raise


def new_folder_beside(folder: Path) -> Path:
    """Make an empty folder beside `folder`, locked by this process; those that killed processes have left are removed."""
    prefix = f"{SAVING}{folder.name[:100]}-"
    for left in folder.parent.glob(f"{escaped(prefix)}*"):
        if left.is_dir() and take_lock(left):
            release(left)
            shutil.rmtree(left, ignore_errors=True)
    new = folder.with_name(f"{prefix}{os.getpid()}-{next(numbers)}")
    new.mkdir()
    take_lock(new)
    return new


def escaped(name: str) -> str:
    """Return a pattern of `Path.glob` that matches nothing but `name`."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder `new`, which is complete, in the place of `folder`, which goes; at every moment one of them stands there.

    Where the system cannot exchange two names, there is a moment with neither; `restore_folder` then brings the old one back.
    A lock that this process holds on `folder` is one on the new folder afterwards.
    """
    flush(new)
    was_locked = key_of(folder) in locks
    if was_locked:
        take_lock(new)
    old = None
    if not folder.exists():
        new.rename(folder)
    elif exchange(new, folder):
        old = new
    else:
        old = replaced_name(folder)
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed when the new one stood in its place
        folder.rename(old)
        new.rename(folder)
    flush_one(folder.parent)
    lock_of_new = locks.pop(key_of(new), None)
    release(folder)
    if lock_of_new is not None and was_locked:
        locks[key_of(folder)] = lock_of_new
    elif lock_of_new is not None:
        os.close(lock_of_new)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # what stays begins with .saving-


def replaced_name(folder: Path) -> Path:
    """Return the name of a folder while another one takes its place."""
    return folder.with_name(f"{SAVING}replaced-{folder.name[:100]}")


def restore_folder(folder: Path) -> None:
    """Bring back a folder that was to be replaced when the process was killed, if neither it nor a new one is there."""
    if folder.name and not folder.exists() and replaced_name(folder).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another rank has done it
            replaced_name(folder).rename(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; return False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    status = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    if status and ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EPERM):
        return False
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return True


def can_be_replaced(folder: Path) -> bool:
    """Return whether another folder can take the place of one that is there: not of a mount point, or the current folder."""
    folder = Path(os.path.realpath(folder))
    in_use = os.path.ismount(folder) or Path.cwd().is_relative_to(folder)
    return os.name != "nt" and not in_use and os.access(folder.parent, os.W_OK)


def link_tree(source: Path, target: Path) -> None:
    """Give a file, a folder or a link a second name; a copy is made only where the file system has no second names."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            link_tree(path, target / path.name)
        shutil.copystat(source, target)
    elif source.is_file():
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            shutil.copy2(source, target)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it gets another name first, so that no half of it is ever taken for the whole."""
    going = folder if folder.name.startswith(SAVING) else folder.with_name(f"{SAVING}{os.getpid()}-{next(numbers)}")
    if going != folder:
        folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half-written in a folder; only whoever holds its lock may call this."""
    for path in folder.glob(f"{SAVING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half-written in a folder, unless another process has its lock."""
    if not folder.is_dir():
        return
    held = key_of(folder) in locks
    if take_lock(folder):
        remove_leftovers(folder)
        if not held:
            release(folder)


# ---- one process at a time ----


def lock_folder(folder: Path) -> None:
    """Keep other processes from writing to a folder, until this one ends or releases it.

    The lock is one of the system on the folder itself: however a process ends, nothing of it stays behind. On file systems
    without such locks there is none.

    Raises:
        InputError: another process has the lock.
    """
    if not take_lock(folder):
        raise InputError(f"{folder}: another process writes there; wait until it has ended, or name another folder")


def take_lock(folder: Path) -> bool:
    """Lock a folder that is there; return whether this process has the lock now. Once more does no harm."""
    if fcntl is None or key_of(folder) in locks:
        return True
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    locks[key_of(folder)] = opened
    return True


def release(folder: Path) -> None:
    """Release the lock on a folder, if this process has it."""
    opened = locks.pop(key_of(folder), None)
    if opened is not None:
        os.close(opened)


def key_of(folder: Path) -> str:
    """Return the one name of a folder, under which this process knows its lock."""
    return os.path.realpath(folder)


def forget_locks() -> None:
    """Close the locked folders in a child process, which would keep the lock when this process is gone."""
    for opened in locks.values():
        os.close(opened)
    locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_locks)
