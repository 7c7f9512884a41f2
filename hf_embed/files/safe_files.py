"""Files and folders that are either complete or absent. All code in this package writes files in this way.

New content is written beside its final place under a name that begins with `.saving-`, flushed to the disk, and put in place by
one atomic rename. However the process ends, either the complete old or the complete new content is there.

    with writing(Path("results.npy")) as aside:
        numpy.save(aside, vectors)

    with new_folder(Path("model")) as new:  # at the end, it replaces an old folder of that name
        ...
"""

import contextlib
import ctypes
import errno
import gc
import glob
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from hf_embed.errors import InputError
from hf_embed.files.disk import SAVING, disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUSY = "another process is writing to this folder"  # part of an error message
WAITS = (0.1, 0.5, 2) if os.name == "nt" else ()  # seconds between attempts to rename
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of renameat2 on Linux
numbers = itertools.count()
locks: dict[str, int] = {}  # of this process: real path -> file descriptor of the open folder


# ---- a file ----


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix. At the end, the file is flushed and renamed to `path`.

    After an exception, the file at `path` is unchanged or still absent.

    Raises:
        DiskError: if the disk is full, or if the file cannot be written.
        InputError: if `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device would be gone after the rename
        raise InputError(f"{path}: this is not a file; name a file")
    aside = path.with_name(f"{SAVING}{os.getpid()}-{next(numbers)}{path.suffix}")
    try:
        with disk_errors(path):
            yield aside
            put(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8 and with the same bytes on every system."""
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def put(new: Path, path: Path) -> None:
    """Move the complete file `new` to `path`, on the same file system."""
    flush_one(new)
    rename(new, path)
    flush_one(path.parent)


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder. On Windows, wait a moment while another program has it open, for example a virus scanner."""
    for seconds in WAITS:
        with contextlib.suppress(PermissionError):
            old.replace(new)
            return
        gc.collect()  # models that are no longer used, but whose weights lie in the file
        time.sleep(seconds)
    try:
        old.replace(new)
    except OSError as error:
        if error.errno != errno.EXDEV or not old.is_dir():
            raise
        shutil.copytree(old, new, symlinks=True)  # overlayfs renames no folder that came with a container's image
        shutil.rmtree(old)


def seal(path: Path) -> None:
    """Flush a complete file and write its size and hash to a file beside it, which `is_sealed` compares."""
    flush_one(path)
    write_text(seal_of(path), content_of(path))


def is_sealed(path: Path) -> bool:
    """Return whether a file is byte for byte the same as when it was sealed."""
    try:
        return seal_of(path).read_bytes() == content_of(path).encode()
    except FileNotFoundError:
        return False


def seal_of(path: Path) -> Path:
    """Return the path of the seal of a file."""
    return path.with_name(f"{path.name}.xxh3")


def content_of(path: Path) -> str:
    """Return the text that the seal of a file holds."""
    return f"{path.stat().st_size} bytes, xxh3_128 {hash_of(path)}\n"


def hash_of(path: Path) -> str:
    """Return the hash of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def flush_one(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt":  # Windows cannot open folders, and flushes only files open for writing
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(opened)


# ---- a folder ----


def flush(folder: Path) -> None:
    """Wait until all files in a folder and its subfolders are on the disk. New weights get the permissions of any new file."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                if path.suffix == ".safetensors" and path.stat().st_nlink == 1:  # not a link to a file of the user
                    with contextlib.suppress(OSError):  # some network file systems have no permissions
                        path.chmod(mode_of_new_files())  # safetensors 0.8 lets only the owner read them
                flush_one(path)
        flush_one(Path(place))


def mode_of_new_files() -> int:
    """Return the permissions that a new file has in this process."""
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    return 0o666 & ~umask


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. At the end, it is renamed to `folder` and replaces an existing folder there.

    After an exception, `folder` is unchanged or still absent.

    Raises:
        DiskError: if the disk is full, or if something cannot be written.
    """
    folder = Path(os.path.realpath(folder))  # the target of a link is replaced, not the link
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
    """Create an empty folder beside `folder` and lock it. Remove such folders that killed processes have left."""
    prefix = f"{SAVING}{folder.name[:100]}-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if left.is_dir() and take_lock(left):
            release(left)
            shutil.rmtree(left, ignore_errors=True)
    new = folder.with_name(f"{prefix}{os.getpid()}-{next(numbers)}")
    new.mkdir()
    take_lock(new)
    return new


def replace_folder(new: Path, folder: Path) -> None:
    """Replace `folder` by the complete folder `new`. At every moment, one of the two is in place.

    If the system cannot exchange two names, neither is in place for a moment. If the process is killed then, `restore_folder`
    brings the old one back. If this process holds a lock on `folder`, it holds the lock on the new folder afterwards.
    """
    flush(new)
    was_locked = key_of(folder) in locks
    if was_locked:
        take_lock(new)
    old = None
    if not folder.exists():
        rename(new, folder)
    elif exchange(new, folder):
        old = new
    else:
        old = replaced_name(folder)
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed after the new folder was in place
        rename(folder, old)
        try:
            rename(new, folder)
        except OSError:
            rename(old, folder)
            raise
    flush_one(folder.parent)
    lock_of_new = locks.pop(key_of(new), None)
    release(folder)
    if lock_of_new is not None and was_locked:
        locks[key_of(folder)] = lock_of_new
    elif lock_of_new is not None:
        os.close(lock_of_new)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # what remains after an error still begins with .saving-


def replaced_name(folder: Path) -> Path:
    """Return the temporary name of a folder while another one replaces it."""
    return folder.with_name(f"{SAVING}replaced-{folder.name[:100]}")


def restore_folder(folder: Path) -> None:
    """Bring back a folder if a process was killed while replacing it, and neither the old nor the new folder is in place."""
    if folder.name and not folder.exists() and replaced_name(folder).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another rank has done it
            replaced_name(folder).rename(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically. Return False if the system or the file system does not support this."""
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
    """Return whether another folder can replace an existing one.

    This is not possible for a mount point, for the current folder and the folders around it, and for a folder whose parent is
    not writable.
    """
    folder = Path(os.path.realpath(folder))
    in_use = os.path.ismount(folder) or Path.cwd().is_relative_to(folder)
    return not in_use and os.access(folder.parent, os.W_OK)


def link_tree(source: Path, target: Path, copy: bool = False) -> None:
    """Give a file, a folder or a link a second name. Files are copied if `copy`, or if the file system has no hard links."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            link_tree(path, target / path.name, copy)
        copy_permissions(source, target)
    elif source.is_file():
        try:
            (shutil.copyfile if copy else os.link)(source, target)
        except OSError:  # file systems give many reasons
            shutil.copyfile(source, target)
            copy_permissions(source, target)


def copy_permissions(source: Path, target: Path) -> None:
    """Give `target` the permissions and times of `source`, unless the file system has none (WSL's /mnt/c, network shares)."""
    with contextlib.suppress(PermissionError):
        shutil.copystat(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. A folder is renamed first, so that a part of it is never taken for the whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    going = path if path.name.startswith(SAVING) else path.with_name(f"{SAVING}{os.getpid()}-{next(numbers)}")
    if going != path:
        rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete files that killed processes left in a folder. Only the process that holds its lock may call this."""
    for path in folder.glob(f"{SAVING}*"):
        remove(path)


def clear_leftovers(folder: Path) -> None:
    """Remove incomplete files that killed processes left in a folder, unless another process has locked the folder."""
    if not folder.is_dir():
        return
    held = key_of(folder) in locks
    if take_lock(folder):
        remove_leftovers(folder)
        if not held:
            release(folder)


# ---- one process at a time ----


def lock_folder(folder: Path) -> None:
    """Keep other processes from writing to a folder, until this process ends or releases the lock.

    The operating system keeps the lock, on the folder itself. However the process ends, nothing of the lock remains. File
    systems without such locks give no protection.

    Raises:
        InputError: if another process holds the lock.
    """
    if not take_lock(folder):
        raise InputError(f"{folder}: {BUSY}; wait until it ends, or give another folder")


def take_lock(folder: Path) -> bool:
    """Lock an existing folder, and return False if another process holds the lock. Locking it twice does no harm."""
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
    """Release the lock on a folder, if this process holds it."""
    opened = locks.pop(key_of(folder), None)
    if opened is not None:
        os.close(opened)


def key_of(folder: Path) -> str:
    """Return the real path of a folder, under which this process stores its lock."""
    return os.path.realpath(folder)


def forget_locks() -> None:
    """Close the locked folders in a forked child, which would otherwise keep the locks after this process has ended."""
    for opened in locks.values():
        os.close(opened)
    locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_locks)
