"""Full disks, folders that are not writable and names that are too long: the error is one line, and old files stay intact."""

import errno
import importlib
import ntpath
import os
import re
import resource
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path, PureWindowsPath

import matplotlib
import numpy as np
import pyarrow
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_model
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from safetensors.torch import save_file
from test_recipes import ROOT, flags, load_recipe, make_files, sup
from test_safe_files import killed_at
from torch.utils.data import DataLoader

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, InputError
from hf_embed.data import cache
from hf_embed.data.sources import read_file, unformatted
from hf_embed.files import disk
from hf_embed.files.disk import DiskError, check_folder, check_output_file, disk_errors, lack_of_room
from hf_embed.files.safe_files import is_sealed, seal_of, write_text, writing

matplotlib.use("Agg")


def write_buffered(path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(torch.zeros(200_000), file)


def write_table(path: Path) -> None:
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, pyarrow.schema({"a": pyarrow.int64()})) as stream,
    ):
        stream.write_table(pyarrow.table({"a": np.arange(200_000)}))


def write_picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500), np.uint8)).save(path, "png")


WRITERS = {  # the last word is the file extension
    "torch.save pt": lambda path: torch.save(torch.zeros(200_000), path),
    "torch.save of many tensors pt": lambda path: torch.save([torch.zeros(1000) for _ in range(200)], path),
    "torch.save into a file pt": write_buffered,
    "safetensors": lambda path: save_file({"a": torch.zeros(200_000)}, path),
    "numpy.save npy": lambda path: np.save(path, np.zeros(100_000)),
    "txt": lambda path: path.write_text("a" * 1_000_000),
    "arrow": write_table,
    "png": write_picture,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_library_s_full_disk_is_the_same_line(small_disk, kind):
    folder = small_disk("size=256k")
    (folder / "other").write_bytes(b"a" * 50_000)
    out = folder / f"out.{kind.split()[-1]}"
    out.write_text("old")
    with pytest.raises(DiskError) as error, writing(out) as aside:
        WRITERS[kind](aside)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"the disk is full (at {out})")
    assert re.search(
        rf"the file system {folder} has [\d.]+ kB of 262 kB free; free some space there and run it again, or ", message
    )
    assert out.read_text() == "old" and {path.name for path in folder.iterdir()} == {"other", out.name}
    small_disk("size=8m")
    with writing(out) as aside:
        WRITERS[kind](aside)
    assert out.stat().st_size > 200_000


def test_a_file_system_without_room_for_more_files_says_so(small_disk):
    folder = small_disk("size=1m,nr_inodes=4")
    with pytest.raises(DiskError, match="and it cannot hold more than its 4 files"):
        for number in range(5):
            write_text(folder / str(number), "a")
    assert "cannot hold more than its 4 files" in error_of(check_folder, folder / "new")


@pytest.mark.parametrize(
    "code, text",
    [
        (errno.EDQUOT, "the disk quota is used up (at "),
        (errno.EFBIG, "the file exceeds the size limit for files (ulimit -f"),
        (errno.EROFS, "the file system is read-only; give another output folder"),
        (errno.EACCES, "permission denied; give this user access to it, or give another output folder"),
    ],
)
def test_other_refusals_of_a_file_system(tmp_path, code, text):
    with pytest.raises(DiskError) as error, writing(tmp_path / "out"):
        raise OSError(code, os.strerror(code), str(tmp_path / "out"))
    assert text in str(error.value) and str(tmp_path / "out") in str(error.value)


def test_a_file_that_may_not_be_read_is_not_taken_for_an_output(tmp_path):
    with pytest.raises(DiskError) as error, disk_errors(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model" / "config.json"))
    assert str(error.value) == f"{tmp_path}/model/config.json: permission denied; give this user access to it"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.ENOENT, "no"), RuntimeError("shapes differ"), KeyError("a"), InputError("wrong")):
        with pytest.raises(type(error)) as found, disk_errors(tmp_path):
            raise error
        assert found.value is error
    with pytest.raises(InputError) as reading, disk_errors(tmp_path):  # the InputError says more than the PermissionError
        raise InputError("nli.csv: cannot be read") from PermissionError(errno.EACCES, "Permission denied", "nli.csv")
    assert not isinstance(reading.value, DiskError)
    with pytest.raises(DiskError, match="the disk is full"), disk_errors(tmp_path):
        raise InputError("the rows cannot be loaded") from OSError(errno.ENOSPC, "No space left on device")


class FailingRows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/rows.arrow")


def test_a_worker_s_full_disk_and_full_shared_memory(tmp_path):
    rows = iter(DataLoader(FailingRows(), num_workers=1))
    with pytest.raises(DiskError, match=r"the disk is full \(at /tmp/rows.arrow\)"), disk_errors(tmp_path):
        next(rows)
    rows._shutdown_workers()  # garbage collection would wait for the worker for five seconds
    for text in ("unable to write to file </torch_12_34>: No space left on device (28)",
                 "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
                 "of shared memory. Please try to raise your shared memory limit."):  # fmt: skip
        with pytest.raises(DiskError, match=r"at /dev/shm\).*set dataloader_num_workers to 0"), disk_errors(tmp_path):
            raise RuntimeError(text)


def test_advice_is_for_the_folder_itself_and_not_for_its_neighbors(tmp_path, monkeypatch):
    """BUG: A folder whose name only begins like that of a cache got the advice to move the cache."""
    for folder in ("cache", "cache2"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert disk.another_place(tmp_path / "cache" / "a") == "set HF_DATASETS_CACHE to another folder"
    assert disk.another_place(tmp_path / "cache2" / "a") == disk.ANOTHER_FOLDER
    assert disk.another_place(tmp_path / "tmpabc" / "a") == "set TMPDIR to another folder"  # as `tempfile` names folders
    assert disk.another_place(tmp_path / "mine" / "tmp") == disk.ANOTHER_FOLDER


def in_child(work: Callable[[], None]) -> str:
    """Run `work` in a child process and return the message of its InputError."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            work()
        except InputError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        message = said.read()
    os.waitpid(child, 0)
    return message


def test_a_limit_of_file_sizes_is_one_line(tmp_path):
    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_text(tmp_path / "out", "a" * 2000)

    assert "the file exceeds the size limit for files (ulimit -f shows a limit)" in in_child(write)
    assert os.listdir(tmp_path) == []


# ---- checks before anything is computed ----


def test_folders_that_can_be_written_leave_no_trace(tmp_path):
    check_folder(tmp_path / "a" / "b")
    check_folder(tmp_path)
    check_output_file(tmp_path / "a" / "b.npy", "OUT")
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, said in {
        tmp_path / "file": "this is a file; give a folder",
        tmp_path / "file" / "out": f"{tmp_path}/file is a file; give a folder",
        tmp_path / "lost": "this is a broken link; give a folder",
        tmp_path / "loop" / "out": "is a broken link",
        tmp_path / "a\0b": "a name cannot contain a NUL byte",
    }.items():
        message = error_of(check_folder, folder, "--output_dir")
        assert message.startswith("--output_dir ") and said in message and len(message) < 500
    assert "this is a folder; name a file" in error_of(check_output_file, tmp_path, "OUT")
    assert "this is a device; name a file" in error_of(check_output_file, "/dev/null", "OUT")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "lost"]


def test_a_drive_that_windows_does_not_have_is_refused(monkeypatch):
    """BUG: `--output_dir Z:\\out` never ended, because the search for a folder that exists went on at the drive's root."""

    class Missing(PureWindowsPath):
        def is_dir(self) -> bool:
            return False

        exists = is_symlink = is_dir

    monkeypatch.setattr(disk, "os", types.SimpleNamespace(path=ntpath))
    monkeypatch.setattr(disk, "Path", Missing)
    said = error_of(check_folder, "Z:\\models\\out")
    assert said == r"output_dir Z:\models\out: Z:\ is a drive that does not exist; give a folder"


def test_a_read_only_file_system_is_refused(small_disk):
    folder = small_disk("size=1m")
    (folder / "old").write_text("old")
    small_disk("ro")
    message = error_of(check_folder, folder / "out")
    assert (
        message
        == f"output_dir {folder}/out: files cannot be written to {folder} (the file system is read-only); give another folder"
    )  # noqa: E501
    with pytest.raises(DiskError, match="the file system is read-only"):
        write_text(folder / "old", "new")
    assert (folder / "old").read_text() == "old"


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root becomes another user")
def test_a_folder_and_a_cache_of_someone_else_are_refused(tmp_path, monkeypatch):
    """This happens in a container whose user has no home folder."""
    (tmp_path / "own").mkdir()
    os.chmod(tmp_path, 0o755)

    def as_nobody(work: Callable[[], None]) -> str:
        def become() -> None:
            os.setgid(65534)
            os.setuid(65534)
            work()

        return in_child(become)

    said = as_nobody(lambda: check_folder(tmp_path / "own" / "out"))
    assert "output_dir" in said and "files cannot be written to" in said and "(permission denied)" in said
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/nonexistent/datasets")
    said = as_nobody(cache.check_cache)
    assert said.startswith(
        "the cache folder of datasets (HF_DATASETS_CACHE) /nonexistent/datasets/hf_embed: files cannot be written to"
    )


def test_room_is_counted_with_what_killed_processes_left(small_disk):
    folder = small_disk("size=2m")
    (folder / ".saving-1").mkdir()
    (folder / ".saving-1" / "weights").write_bytes(b"a" * 1_500_000)
    (folder / "other").write_bytes(b"a" * 300_000)
    assert lack_of_room(folder, 1_700_000, "it takes") is None
    assert lack_of_room(folder / "new" / "out", 1_700_000, "it takes").startswith(
        f"{folder}/new/out: it takes about 1.7 MB, but"
    )


# ---- the cache of Arrow tables ----


STORED = {"anchor": [f"a cat {i}" for i in range(50)], "positive": [f"one cat {i}" for i in range(50)]}


def stored(folder: Path) -> Dataset:
    """Return rows that are memory-mapped from files in a folder."""
    if not folder.is_dir():
        Dataset.from_dict(STORED).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


COMPUTED: list[str] = []


def lengths(batch: dict[str, list]) -> dict[str, list]:
    COMPUTED.extend(batch["anchor"])
    return {"length": [len(text) for text in batch["anchor"]]}


def count_of(rows: Dataset, made: list[str]) -> list[int]:
    """Return the lengths of the rows. Append the rows that were computed, not read from the cache, to `made`."""
    COMPUTED.clear()  # the hash of `lengths` includes this list, so it must be empty
    table = cache.cached_map(rows, lengths, batched=True, remove_columns=rows.column_names)
    made += COMPUTED
    return table["length"][:]


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-200] + bytes([path.read_bytes()[-200] ^ 1]) + path.read_bytes()[-199:]
    ),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no schema": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8 + path.read_bytes()[16:]),
    "without a seal": lambda path: seal_of(path).unlink(),
    "with half a seal": lambda path: os.truncate(seal_of(path), 5),
}


def test_another_version_makes_its_own_tables(tmp_path, monkeypatch):
    """BUG: after an upgrade, the tokens and the rows that the earlier version had stored were used."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("a\n")
    rows, made, tables = stored(tmp_path / "rows"), [], []
    for version in ("0.1.0", "0.1.0", "0.2.0"):
        monkeypatch.setattr(cache, "__version__", version)
        count_of(rows, made)
        tables += cache.files_of(read_file(str(tmp_path / "a.txt")))
    assert len(made) == 100 and tables[0] == tables[1] != tables[2]


def test_a_transform_is_applied_anew(tmp_path, monkeypatch, caplog):
    """BUG: if the code of an imported transform had changed, the rows that the earlier code had made were used.

    And nothing said that a transform is not applied again in each epoch.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prepared_rows.py").write_text(
        "def mark(batch):\n    return {'text': [f'{WORD} {t}' for t in batch['anchor']]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("prepared_rows")
    rows, made = stored(tmp_path / "rows"), []
    for word in ("one", "one", "two"):
        module.WORD = word
        made.append(unformatted(rows.with_transform(module.mark)))
        assert made[-1]["text"][:] == [f"{word} {text}" for text in STORED["anchor"]]
    assert cache.content_of(made[0]) == cache.content_of(made[1]) != cache.content_of(made[2])  # so cached tokens are found
    assert caplog.text.count("gives the same texts in every epoch") == 3


@pytest.mark.parametrize("change", ["rename_column", "select", "in memory"])
def test_the_content_of_the_rows_decides_what_is_used_again(tmp_path, monkeypatch, change):
    """BUG: rows of an imported function that had changed had the fingerprint of the earlier rows, and got their tokens."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FEW_ROWS", 1)
    found = []
    for words in (["a", "b"], ["a", "b"], ["a", "bbb"]):
        if change == "in memory":
            rows = Dataset(pyarrow.table({"anchor": words}), fingerprint="same")
        else:
            (tmp_path / "rows.arrow").unlink(missing_ok=True)
            with ArrowWriter(path=str(tmp_path / "rows.arrow"), features=Features({"text": Value("string")})) as writer:
                writer.write_batch({"text": words})
                writer.finalize()
            os.utime(tmp_path / "rows.arrow", (1, 1))
            rows = Dataset.from_file(str(tmp_path / "rows.arrow")).rename_column("text", "anchor")
        if change == "select":
            rows = rows.select([1], new_fingerprint="same")
        found.append((count_of(rows, made := []), len(made)))
    expected = {"select": [([1], 1), ([1], 0), ([3], 1)]}.get(change, [([1, 1], 2), ([1, 1], 0), ([1, 3], 2)])
    assert found == expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path, damage, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, made, expected = stored(tmp_path / "rows"), [], [len(text) for text in STORED["anchor"]]
    assert count_of(rows, made) == expected and len(made) == 50
    assert count_of(rows, made) == expected and len(made) == 50  # control: an intact cache is used
    (path,) = (tmp_path / "cache").rglob("*.arrow")
    DAMAGES[damage](path)
    assert count_of(rows, made) == expected and len(made) == 100
    assert is_sealed(path) and ("has changed since it was written" in caplog.text) == (damage != "without a seal")
    assert not list(path.parent.glob("tmp*")) and not list(path.parent.glob(".saving-*"))


def test_the_rows_of_a_damaged_text_file_s_cache_are_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("".join(f"text {i}\n" for i in range(100)))
    expected = read_file(str(tmp_path / "a.txt"))["text"][:]
    (path,) = (tmp_path / "cache" / "hf_embed").glob("*.arrow")
    whole = path.read_bytes()
    for damage in (whole[:-300], whole.replace(b"text 7", b"text 8"), b""):
        path.write_bytes(damage)
        assert read_file(str(tmp_path / "a.txt"))["text"][:] == expected
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "zeros", "no schema"])
def test_the_rows_of_a_damaged_parquet_file_s_cache_are_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = [f"text {i}" for i in range(3000)]
    Dataset.from_dict({"text": expected}).to_parquet(tmp_path / "a.parquet")
    assert read_file(str(tmp_path / "a.parquet"))["text"][:] == expected
    (path,) = (tmp_path / "cache").rglob("*.arrow")
    whole = path.read_bytes()
    for _ in range(2):
        DAMAGES[damage](path)
        assert path.read_bytes() != whole
        assert read_file(str(tmp_path / "a.parquet"))["text"][:] == expected
        assert path.read_bytes() == whole and is_sealed(path)


def test_a_full_cache_is_one_line_and_goes_on_with_room(small_disk, monkeypatch):
    folder = small_disk("size=64k")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    file = folder.parent / "a.txt"
    file.write_text("".join(f"text {i}\n" for i in range(20_000)))
    message = error_of(read_file, str(file))
    assert (
        message.startswith(f"the disk is full (at {folder}/hf_embed/") and "set HF_DATASETS_CACHE to another folder" in message
    )
    assert not list((folder / "hf_embed").iterdir())
    small_disk("size=600k")
    rows, made = read_file(str(file)).rename_column("text", "anchor"), []
    with pytest.raises(DiskError, match="set HF_DATASETS_CACHE"):
        cache.cached_map(rows, lambda batch: {"length": [text * 4 for text in batch["anchor"]]}, batched=True)
    assert not list((folder / "hf_embed").glob("tmp*")) and not list((folder / "hf_embed").glob(".saving-*"))
    small_disk("size=8m")
    assert len(count_of(rows, made)) == len(made) == 20_000


def test_a_cache_whose_writer_is_killed_is_made_anew(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"text {i}\n" for i in range(100)))
    number, killed = 1, True
    while killed:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / str(number)))

        def lengths_of_file() -> list[int]:
            return count_of(read_file(str(tmp_path / "a.txt")).rename_column("text", "anchor"), [])

        killed = killed_at(number, lengths_of_file)
        assert lengths_of_file() == [len(f"text {i}") for i in range(100)]
        tables = [path for path in (tmp_path / str(number)).rglob("*.arrow") if ".saving-" not in str(path)]
        assert len(tables) == 2 and all(map(is_sealed, tables))
        number += 3
    assert number > 15


def test_a_full_cache_of_parquet_rows_is_one_line(small_disk, monkeypatch):
    folder = small_disk("size=64k")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    file = folder.parent / "a.parquet"
    Dataset.from_dict({"text": [f"text {i}" for i in range(20_000)]}).to_parquet(file)
    message = error_of(read_file, str(file))
    assert message.startswith(f"the disk is full (at {folder}") and "set HF_DATASETS_CACHE to another folder" in message
    small_disk("size=8m")
    assert len(read_file(str(file))) == 20_000


def test_a_saved_dataset_stays_as_it_is(tmp_path, monkeypatch):
    """BUG: its tokens were written into its folder, which `load_dataset` could then no longer read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, files = stored(tmp_path / "rows"), sorted((tmp_path / "rows").iterdir())
    assert len(count_of(rows, [])) == 50 and sorted((tmp_path / "rows").iterdir()) == files


# ---- training ----

ROWS = Dataset.from_dict({"anchor": [f"a cat {i}" for i in range(8)], "positive": [f"one cat {i}" for i in range(8)]})


def encoder_of_megabytes(name: str = "bert", seed: int = 0) -> Encoder:
    """Return an encoder with 1.6 MB of weights."""
    return Encoder(tiny_model(name, seed, vocab_size=12_000), small_tokenizer())


def trainer_in(folder: Path, **settings) -> ContrastiveTrainer:
    defaults = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    args = ContrastiveTrainingArguments(str(folder), disable_tqdm=True, **(defaults | settings))
    return ContrastiveTrainer(encoder_of_megabytes(), args, train_dataset=ROWS)


def test_a_script_s_output_is_checked_before_the_data(small_disk, caplog):
    folder = small_disk("size=3m")  # a checkpoint has 1.6 MB of weights and 3.2 MB of Adam state
    message = error_of(trainer_in, folder / "out")
    assert re.fullmatch(
        rf"output_dir {folder}/out: a checkpoint needs about 4.9 MB, but the file system {folder} has 3.1 MB of 3.1 MB free; "
        "free some space there, or give another output folder", message,
    )  # fmt: skip
    assert os.listdir(folder) == []
    trainer_in(folder / "out", save_strategy="no")
    small_disk("size=8m")
    caplog.clear()
    trainer_in(folder / "out")
    assert "two checkpoints and the model need about 11.5 MB" in caplog.text
    caplog.clear()
    small_disk("size=16m")
    trainer_in(folder / "out")
    assert "checkpoint" not in caplog.text
    assert "is a file; give a folder" in error_of(trainer_in, ROOT / "setup.cfg" / "out")
    small_disk("size=1m", "tiny")
    ContrastiveTrainer(  # a trainer that only evaluates writes nothing
        tiny_model(), ContrastiveTrainingArguments(str(folder.parent / "tiny"), use_cpu=True, report_to="none"),
        processing_class=small_tokenizer(),
    )  # fmt: skip


def test_an_encoder_that_does_not_fit_leaves_the_old_one(small_disk):
    folder = small_disk("size=4m")
    encoder, other = encoder_of_megabytes(), encoder_of_megabytes(seed=1)
    encoder.save_pretrained(str(folder / "model"))
    before = {path: path.read_bytes() for path in (folder / "model").rglob("*") if path.is_file()}
    (folder / "data").write_bytes(b"a" * 1_000_000)
    with pytest.raises(DiskError, match=rf"the disk is full \(at {folder}/model\)"):
        other.save_pretrained(str(folder / "model"))
    assert {path: path.read_bytes() for path in (folder / "model").rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(folder)) == ["data", "model"]
    small_disk("size=16m")
    other.save_pretrained(str(folder / "model"))
    assert (folder / "model" / "model.safetensors").read_bytes() != before[folder / "model" / "model.safetensors"]


def test_a_script_s_full_disk_is_our_error(small_disk, caplog):
    folder = small_disk("size=6m")
    trainer = trainer_in(folder / "out")
    with pytest.raises(DiskError, match=rf"the disk is full \(at {folder}/out.*the file system {folder} has "):
        trainer.train()


# ---- a disk of every size ----


FILES = {"nli": "nli.csv", "sts": "sts.tsv", "model": "model"}


def train_into(folder: Path, data: Path) -> dict | str:
    """Run a recipe and return its results, or its error line. It resumes from the newest checkpoint if there is one."""
    words = ["--max_steps", 4, "--save_steps", 1, "--save_total_limit", 1, "--output_dir", folder]
    words += ["--resume_from_checkpoint"] if list(folder.glob("checkpoint-[0-9]*")) else []
    try:
        return sup(*flags({name: data / file for name, file in FILES.items()}), *words)
    except InputError as error:
        return str(error)


def train_on_disks(small_disk, data: Path, sizes: list[int]) -> dict[int, str]:
    """Train on disks of several sizes, in MB, that hold another model. Return how each training ended.

    A training that fails is resumed on the same disk after the disk has become larger.
    """
    make_files(data)
    encoder_of_megabytes().save_pretrained(data / "model", verify=False)
    calm = train_into(data / "calm", data)
    ended = {}
    for size in sizes:
        disk_of = partial(small_disk, name=str(size))
        folder = disk_of(f"size={size}m") / "out"
        encoder_of_megabytes("distilbert", seed=7).save_pretrained(folder.parent / "other", verify=False)
        before = {path: path.read_bytes() for path in (folder.parent / "other").rglob("*") if path.is_file()}
        first = train_into(folder, data)
        assert {path: path.read_bytes() for path in (folder.parent / "other").rglob("*") if path.is_file()} == before
        ended[size] = first if isinstance(first, str) else "trained"
        if isinstance(first, str):
            assert "\n" not in first and str(folder.parent) in first
            assert first.startswith("the disk is full (at ") or "needs about" in first
            assert not list(folder.glob(".saving-*")), "what is half-written goes"
            disk_of("size=64m")
            again = train_into(folder, data)
            assert again["train"]["steps"] == 4 and again["after"] == calm["after"]
        assert (folder / "model.safetensors").read_bytes() == (data / "calm" / "model.safetensors").read_bytes()
    return ended


def test_a_run_on_a_small_disk_ends_in_one_line_and_goes_on_with_room(small_disk, tmp_path):
    ended = train_on_disks(small_disk, tmp_path, [5, 10])
    assert "a checkpoint needs about" in ended[5] and ended[10].startswith("the disk is full (at ")


@pytest.mark.slow
def test_a_run_on_a_disk_of_every_size_ends_in_one_line_and_goes_on_with_room(small_disk, tmp_path):
    ended = train_on_disks(small_disk, tmp_path, list(range(3, 21)))
    kinds = [line if line == "trained" else line.startswith("the disk") for line in ended.values()]
    assert {kinds.count(kind) > 1 for kind in ("trained", True, False)} == {True}, ended


# ---- the recipes ----

OUTPUTS = {
    "encode": lambda files, out: [files["model"], files["nli"], out / "a.npy"],
    "mine_hard_negatives": lambda files, out: [files["model"], "--train_file", files["nli"], "--output_file", out / "a.jsonl"],
    "evaluate": lambda files, out: [files["model"], "--eval_sts_file", f"a={files['sts']}", "--output_dir", out / "a"],
    "evaluate_mteb": lambda files, out: [files["model"], "--tasks", "STSBenchmark", "--output_dir", out / "a"],
    "length_collapse": lambda files, out: [files["model"], "--output_dir", out / "a"],
    "merge": lambda files, out: [files["model"], files["model"], "--output_dir", out / "a"],
    "tempscale": lambda files, out: [files["model"], "--temperature", 0.9, "--output_dir", out / "a"],
    "pretrain_encoder": lambda files, out: [
        "--teacher",
        files["model"],
        "--train_file",
        files["nli"],
        "--output_dir",
        out / "a",
    ],
    "sup_simcse": lambda files, out: [*flags(files), "--output_dir", out / "a"],
    "simcse_ablation": lambda files, out: [*flags(files), "--output_dir", out / "a"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_recipe_refuses_an_output_that_cannot_be_written(name, small_disk, tmp_path, monkeypatch):
    """The refusal comes before the model and the data are read: the model folder is empty, and there are no data files."""
    files = {file: tmp_path / file for file in ("model", "nli", "sts")}
    (tmp_path / "model").mkdir()
    out = small_disk("size=1m")
    small_disk("ro")
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, OUTPUTS[name](files, out))])
    message = error_of(load_recipe(name).main)
    assert f"files cannot be written to {out} (the file system is read-only)" in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]


@pytest.mark.slow
def test_a_full_disk_of_two_ranks_is_said_once(small_disk, tmp_path):
    files = make_files(tmp_path)
    encoder_of_megabytes().save_pretrained(files["model"], verify=False)
    out = small_disk("size=8m") / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate/cpu_2.yaml"]
    words = ["--report_to", "none", "--max_steps", 4, "--save_steps", 1, "--save_total_limit", 1, "--output_dir", out]
    command = [*map(str, [*launch, ROOT / "recipes/sup_simcse.py", *flags(files), *words])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "the disk is full (at " in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: the disk is full (at {out}/checkpoint-"), done.stderr[-3000:]
    assert done.returncode
    assert not list(out.glob(".saving-*"))
    small_disk("size=64m")
    done = subprocess.run([*command, "--resume_from_checkpoint"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
