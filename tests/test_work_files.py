"""Work continues where it stopped, even if it was killed before any of its system calls, or if any of its files is damaged."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import error_of, tiny_encoder
from test_mining import PAIRS, embed
from test_safe_files import killed_at

from hf_embed import mining, vector_files, write_vectors
from hf_embed.mining import MiningArguments, write_hard_negatives

TEXTS = [f"a cat {i}" for i in range(40)]


def encode(folder: Path) -> None:
    write_vectors(ENCODERS[0], TEXTS, folder / "out.npy")


def mine(folder: Path) -> None:
    write_hard_negatives(PAIRS, [], embed, folder / "out.jsonl", MiningArguments(num_negatives=2), "model")


ENCODERS = [tiny_encoder()]
JOBS = {"encode": encode, "mine": mine}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(vector_files, "SHARD", 16)
    monkeypatch.setattr(mining, "SHARD", 16)
    monkeypatch.setattr(mining, "BLOCK", 16)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_calmly(job: str, tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "calm").mkdir()
    JOBS[job](tmp_path / "calm")
    return contents(tmp_path / "calm")


def kill_points(job: str, tmp_path: Path, step: int) -> int:
    """Kill a job before every `step`-th system call, and continue it each time. Return the first number it did not reach."""
    expected, number = made_calmly(job, tmp_path), 1
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        if not killed_at(number, partial(JOBS[job], folder)):
            assert contents(folder) == expected
            return number
        output = next(folder.glob("out.???*"), None)
        work = [path for path in folder.iterdir() if path.name.endswith(".work")]
        if work or not contents(folder):
            JOBS[job](folder)  # the same call continues the work
        else:  # it was killed when all work was done
            assert output is not None and "already exists" in error_of(JOBS[job], folder)
        assert contents(folder) == expected, number
        number += step


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_goes_on(job, tmp_path):
    assert kill_points(job, tmp_path, 11) > 30


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_killed_before_any_call_goes_on(job, tmp_path):
    assert kill_points(job, tmp_path, 1) > 30


def stop_before_the_end(job: str, folder: Path, monkeypatch) -> Path:
    """Stop a job when all its pieces are written, but the output is not yet in place. Return its work folder."""
    folder.mkdir()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def stop(new: Path, path: Path) -> None:
            raise KeyboardInterrupt

        patched.setattr(mining, "put", stop)
        patched.setattr(vector_files, "put", stop)
        JOBS[job](folder)
    (work,) = folder.glob("*.work")
    return work


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


SOON = {("encode", "flipped"), ("encode", "truncated"), ("mine", "flipped")}


@pytest.mark.parametrize(
    "job, damage",
    [pytest.param(job, damage, marks=() if (job, damage) in SOON else pytest.mark.slow) for job in JOBS for damage in DAMAGES],
)
def test_a_damaged_piece_is_made_again(job, damage, tmp_path, monkeypatch):
    """After a crash of the machine, any file of the work may be damaged. The output that is made from them is not."""
    expected = made_calmly(job, tmp_path)
    names = sorted(contents(stop_before_the_end(job, tmp_path / "names", monkeypatch)))
    assert len(names) > 6
    for number, name in enumerate(names):
        work = stop_before_the_end(job, tmp_path / str(number), monkeypatch)
        DAMAGES[damage](work / name)
        if name == "identity" and damage != "gone":
            assert "remove it to start again" in error_of(JOBS[job], work.parent)
        else:
            JOBS[job](work.parent)
            assert contents(work.parent) == expected, name
