"""A file or folder is always the complete old one or the complete new one, at whichever system call the writer is killed."""

import contextlib
import errno
import io
import os
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import error_of
from safetensors.torch import save_file

from hf_embed.errors import InputError
from hf_embed.files import disk, safe_files
from hf_embed.files.safe_files import (
    can_be_replaced,
    is_sealed,
    link_tree,
    lock_folder,
    new_folder,
    new_folder_beside,
    release,
    remove_leftovers,
    replace_folder,
    restore_folder,
    seal,
    take_lock,
    write_json,
    write_text,
    writing,
)

CALLS = ["rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "link", "symlink"]


def fork(work: Callable[[], object], before_call: Callable[[int], None]) -> int:
    """Run `work` in a child process, which calls `before_call` with the number of each system call. Return the child's id."""
    child = os.fork()
    if child:
        return child
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            before_call(calls)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    safe_files.exchange = counted(safe_files.exchange)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child process that is killed before its `number`-th system call. Return True if it was killed."""
    child = fork(work, lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == number else None)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def stops(work: Callable[[], object]) -> Iterator[int]:
    """Run `work` in a child process that stops before each system call, and yield the number of the call.

    What is on the disk then is what a kill at this call would leave. This is much faster than one process for each call.
    """
    child = fork(work, lambda call: os.kill(os.getpid(), signal.SIGSTOP))
    number, status = 0, os.waitpid(child, os.WUNTRACED)[1]
    try:
        while os.WIFSTOPPED(status):
            number += 1
            yield number
            os.kill(child, signal.SIGCONT)
            status = os.waitpid(child, os.WUNTRACED)[1]
    finally:
        if os.WIFSTOPPED(status):  # a check has failed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == 0


def test_a_written_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    number = 1
    while killed_at(number, lambda: write_json(path, {"new": 1})):
        assert path.read_text() in ("old", '{\n  "new": 1\n}\n')
        number += 1
    assert number > 2 and path.read_text() == '{\n  "new": 1\n}\n'
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"]


def test_only_files_are_replaced(tmp_path):
    """BUG: for root, `--output_file /dev/null` put a file in the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: this is not a file; name a file" in error_of(write_text, tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_after_an_exception_nothing_has_changed(tmp_path):
    path = tmp_path / "a.npy"
    path.write_text("old")
    with pytest.raises(KeyError), writing(path) as aside:
        assert aside.suffix == ".npy" and aside.parent == tmp_path
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.npy"]


def make(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("config", "weights"):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path, monkeypatch, exchanges):
    folder = make(tmp_path / "model", "old")
    if not exchanges:
        monkeypatch.setattr(safe_files, "exchange", lambda one, other: False)
    number = 1
    while killed_at(number, lambda: replace_folder(make(new_folder_beside(folder), "new"), folder)):
        restore_folder(folder)
        assert {(folder / name).read_text() for name in ("config", "weights")} in ({"old"}, {"new"})
        number += 1
    assert number > 5 and (folder / "config").read_text() == (folder / "weights").read_text() == "new"
    left = new_folder_beside(folder)  # this also removes what killed processes left
    release(left)
    left.rmdir()
    assert {path.name for path in tmp_path.iterdir()} <= {"model", safe_files.replaced_name(folder).name}


def test_a_folder_of_a_container_s_image_is_replaced(tmp_path, monkeypatch):
    """BUG: overlayfs refuses to rename such a folder (EXDEV), so a run that replaced one failed after its training."""
    folder, move = make(tmp_path / "model", "old"), os.replace
    (folder / "sub").mkdir()

    def replace(old, new):
        if Path(old).is_dir() and not Path(old).name.startswith(disk.SAVING):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(old))
        move(old, new)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(safe_files, "exchange", lambda one, other: False)
    safe_files.remove(folder / "sub")
    assert sorted(os.listdir(folder)) == ["config", "weights"]
    with new_folder(folder) as new:
        make(new, "new")
    assert (folder / "config").read_text() == "new" and os.listdir(tmp_path) == ["model"]


def test_weights_have_the_permissions_of_other_new_files(tmp_path):
    """BUG: safetensors 0.8 lets only the owner read them, so another user of a cluster, or a server, could not load a model."""
    private = tmp_path / "private.safetensors"
    private.touch(0o600)
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "model") as new:
            save_file({"a": torch.zeros(1)}, new / "model.safetensors")
            (new / "config.json").touch()
            link_tree(private, new / "private.safetensors")  # a file of the user that stood in the replaced folder
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {"model.safetensors": 0o640, "config.json": 0o640, "private.safetensors": 0o600}


def test_a_folder_can_be_exchanged_here(tmp_path):
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    if not safe_files.exchange(one, other):
        pytest.skip("the file system cannot")
    assert (one / "config").read_text() == "2" and (other / "config").read_text() == "1"


def test_a_link_is_of_the_same_file(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "log").write_text("1")
    (tmp_path / "a" / "link").symlink_to("b/log")
    link_tree(tmp_path / "a", tmp_path / "c")
    link_tree(tmp_path / "a", tmp_path / "copy", copy=True)
    with open(tmp_path / "a" / "b" / "log", "a") as file:
        file.write("2")
    assert (tmp_path / "c" / "b" / "log").read_text() == (tmp_path / "c" / "link").read_text() == "12"
    assert os.readlink(tmp_path / "c" / "link") == "b/log"
    assert (tmp_path / "copy" / "b" / "log").read_text() == (tmp_path / "copy" / "link").read_text() == "1"


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    """BUG: on some file systems (exFAT on Windows, Android), the error number was another one, and saving failed."""

    def refuse(*paths):
        raise OSError(errno.EINVAL, "Incorrect function")

    def refuse_mode(*paths, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path / "a", "text")
    for copied in ("b", "c"):
        link_tree(tmp_path / "a", tmp_path / copied)
        assert (tmp_path / copied / "config").read_text() == (tmp_path / copied / "weights").read_text() == "text"
        monkeypatch.setattr(os, "chmod", refuse_mode)  # BUG: where WSL mounts Windows' folders, no model could be replaced


# ---- Windows ----


def test_a_text_file_has_the_same_bytes_on_windows(tmp_path, monkeypatch):
    """BUG: on Windows, no sealed file counted as whole, so cached tables and finished parts were made again in each run."""
    opened = io.open

    def as_windows(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **more):
        newline = "\r\n" if newline is None and set("wax+") & set(mode) and "b" not in mode else newline
        return opened(file, mode, buffering, encoding, errors, newline, *rest, **more)

    monkeypatch.setattr(io, "open", as_windows)
    (tmp_path / "plain").write_text("a\n")
    assert (tmp_path / "plain").read_bytes() == b"a\r\n"
    seal(tmp_path / "plain")
    assert is_sealed(tmp_path / "plain")
    write_text(tmp_path / "b", "a\nb\n")
    assert (tmp_path / "b").read_bytes() == b"a\nb\n"


def test_a_folder_can_be_replaced_on_windows(tmp_path, monkeypatch):
    """BUG: the second run of the recipe without arguments was refused there, and a failed save removed the earlier model."""
    folder = make(tmp_path / "model", "old")
    monkeypatch.setattr(safe_files, "os", types.SimpleNamespace(**vars(os) | {"name": "nt"}))
    monkeypatch.setattr(safe_files, "exchange", lambda one, other: False)
    assert can_be_replaced(folder)
    monkeypatch.chdir(folder)
    assert not can_be_replaced(folder)
    monkeypatch.chdir(tmp_path)
    with new_folder(folder) as new:
        make(new, "new")
    assert (folder / "config").read_text() == "new" and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("busy", [2, 3])
def test_a_rename_waits_until_a_virus_scanner_has_closed_the_folder(tmp_path, monkeypatch, busy):
    """After too many attempts, the old folder is in its place again."""
    folder, move, refused = make(tmp_path / "model", "old"), os.replace, []

    def replace(old, new):
        if Path(new) == folder and len(refused) < busy and (Path(old) / "config").read_text() == "new":
            refused.append(old)
            raise PermissionError(errno.EACCES, "in use", str(old))
        move(old, new)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(safe_files, "exchange", lambda one, other: False)
    monkeypatch.setattr(safe_files, "WAITS", (0, 0))
    with contextlib.nullcontext() if busy == 2 else pytest.raises(disk.DiskError, match="permission denied"):  # noqa: SIM117
        with new_folder(folder) as new:
            make(new, "new")
    assert (folder / "config").read_text() == ("new" if busy == 2 else "old") and os.listdir(tmp_path) == ["model"]


HOLD = """
import os, sys, time
from pathlib import Path
from hf_embed.files.safe_files import lock_folder
lock_folder(Path(sys.argv[1]))
if os.fork() == 0:  # a worker, which outlives this process
    time.sleep(5)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_is_of_one_process_and_goes_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="another process"):
        lock_folder(tmp_path)
    holder.kill()
    holder.wait()
    time.sleep(0.1)
    lock_folder(tmp_path)
    lock_folder(Path(os.path.relpath(tmp_path)))  # the same folder again, as a relative path
    release(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_lock_stays_on_a_folder_that_is_replaced(tmp_path):
    folder, before = make(tmp_path / "model", "old"), dict(safe_files.locks)
    lock_folder(folder)
    replace_folder(make(new_folder_beside(folder), "new"), folder)
    child = os.fork()
    if child == 0:
        os._exit(0 if take_lock(folder) else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    release(folder)
    assert safe_files.locks == before
