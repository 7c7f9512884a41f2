"""Tests that a training checkpoint is either complete or absent.

They kill a process before each write of its saves, damage every file of a checkpoint, and check which checkpoints are kept.
"""

import json
import math
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch
from conftest import error_of
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_resume import SAVING, same, trainer, weights
from test_trainer import STS
from transformers.trainer_utils import get_last_checkpoint

from hf_embed import InputError
from hf_embed.checkpoint import whole
from hf_embed.training.record import last_scores

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


# ---- kills ----


def in_a_child(act) -> int:
    """Call `act` in a child process and return its exit code. The child is a fork, so all modules are already imported."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before_write(number: int, folder: Path) -> list[int]:
    """End this process, as SIGKILL does, just before it makes write `number` below `folder`.

    The start and the end of each torch.save, and each fsync, count as writes too. The number 0 kills nothing.

    Returns:
        A list of one number, the count of the writes so far.
    """
    count = [0]

    def write() -> None:
        count[0] += 1
        if count[0] == number:
            os._exit(137)

    def see(event, arguments):
        writes = event in WRITES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"))
        if writes and str(folder) in str(arguments[0]):
            write()

    fsync, save = os.fsync, torch.save
    os.fsync = lambda file: (write(), fsync(file))[1]
    torch.save = lambda *args, **kwargs: (write(), save(*args, **kwargs), write())[1]
    sys.addaudithook(see)
    return count


class Runs:
    """A trainer that is made once. Each of its runs takes place in a child process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.trainer = trainer(folder / "unused", save_steps=1, max_steps=4, save_total_limit=2)
        self.end = self.train("calm")
        self.writes = json.loads((folder / "writes.json").read_text())

    def train(self, name: str, killed_at: int = 0) -> dict | None:
        """Train in a folder, from its newest checkpoint if there is one.

        Args:
            name: the name of the folder.
            killed_at: the write before which the process is killed. With 0, it is not killed.

        Returns:
            The weights at the end, or None if the process was killed.
        """
        folder = self.folder / name

        def act():
            self.trainer.args.output_dir = str(folder)
            there = folder.is_dir() and whole.checkpoints_in(folder)
            count = kill_before_write(killed_at, folder)
            self.trainer.train(resume_from_checkpoint=bool(there))
            (self.folder / "writes.json").write_text(json.dumps(count[0]))
            save_file(weights(self.trainer), self.folder / "end.safetensors")

        code = in_a_child(act)
        assert code == (137 if killed_at else 0)
        return None if killed_at else load_file(self.folder / "end.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def check_resuming_after_a_kill(runs: Runs, number: int) -> None:
    """Kill a run before one write, resume it, and check its weights and its folder."""
    name = f"killed-{number}"
    runs.train(name, killed_at=number)
    assert all(whole.damage(path) is None for path in whole.checkpoints_in(runs.folder / name))  # all are complete
    assert same(runs.train(name), runs.end), number
    assert not list((runs.folder / name).glob(".*"))  # no temporary files are left
    left = {path.name for path in (runs.folder / name).iterdir()}
    # A kill between writing the last checkpoint and removing the oldest one leaves the oldest, and no later save removes it.
    late = number > runs.writes - 5
    assert left == {"checkpoint-3", "checkpoint-4"} | (left & {"checkpoint-2"} if late else set())
    shutil.rmtree(runs.folder / name)


def test_killed_inside_saves(runs):
    assert runs.writes > 150
    draw = random.Random(0)
    for number in draw.sample(range(1, runs.writes + 1), 3):
        check_resuming_after_a_kill(runs, number)


@pytest.mark.slow
def test_killed_at_every_write(runs):
    for number in range(1, runs.writes + 1):
        check_resuming_after_a_kill(runs, number)


@pytest.mark.slow
def test_killed_twice(runs):
    draw = random.Random(1)
    for number in draw.sample(range(1, runs.writes + 1), 10):
        runs.train("twice", killed_at=number)
        if number < runs.writes // 2:
            runs.train("twice", killed_at=20)
        assert same(runs.train("twice"), runs.end)
        shutil.rmtree(runs.folder / "twice")


def test_a_failed_save_leaves_no_incomplete_checkpoint(tmp_path, monkeypatch):
    made = trainer(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    made.store_flos = lambda: monkeypatch.setattr(torch, "save", full) if made.state.global_step == 4 else None
    with pytest.raises((OSError, InputError)):
        made.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert whole.damage(tmp_path / "checkpoint-2") is None


# ---- damage ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of 4 steps that has checkpoints of steps 2 and 4.

    The model has a training head, so that the checkpoints hold every kind of file.
    """
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, pooling="cls_mlp_train").train()
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_shapes(path: Path) -> None:
    if path.suffix == ".safetensors":
        tensors = {name: torch.zeros(*tensor.shape, 2) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
    else:
        flip(path)


DAMAGE = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "gone": lambda path: path.unlink(),
    "other shapes": other_shapes,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}


def with_damage(folder: Path, name: str, kind: str):
    """Damage a file of a checkpoint, yield, and restore the file."""
    path = folder / name
    content = path.read_bytes()
    DAMAGE[kind](path)
    yield
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_found(run, kind, caplog):
    """A damaged checkpoint is found, whichever file is damaged.

    If the user gives its path, the message names the file and says what to do. `latest` skips the checkpoint with a warning.
    """
    checkpoint = run / "checkpoint-4"
    names = [*whole.names_in(checkpoint), whole.MANIFEST]
    assert {"model.safetensors", "training.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json",
            "trainer_state.json", "1_Pooling/config.json", "manifest.json"} <= set(names)  # fmt: skip
    for name in names:
        caplog.clear()
        damaged = with_damage(checkpoint, name, kind)
        next(damaged)
        assert whole.newest_whole(run) == run / "checkpoint-2", name
        assert f"checkpoint-4: {name}" in caplog.text
        assert "resuming from checkpoint-2" in caplog.text
        message = error_of(whole.check_whole, checkpoint)
        assert name in message and message.endswith("resume with --resume_from_checkpoint latest (checkpoint-2)")
        next(damaged, None)
        assert whole.damage(checkpoint) is None  # control: the restored checkpoint is complete


def test_a_checkpoint_of_another_trainer_is_named_as_a_model(run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / whole.MANIFEST).unlink()
    assert f"to train further what another trainer wrote, give model='{checkpoint}'" in whole.damage(checkpoint)


def test_the_message_names_both_sizes(run):
    damaged = with_damage(run / "checkpoint-4", "scheduler.pt", "half")
    size = (run / "checkpoint-4" / "scheduler.pt").stat().st_size
    next(damaged)
    assert whole.damage(run / "checkpoint-4") == f"scheduler.pt has {size // 2:,} bytes instead of {size:,}"
    next(damaged, None)


@pytest.mark.parametrize("name", ["model-2.safetensors", "model.safetensors.index.json", "optimizer.bin", "rng_state_1.pth"])
def test_an_unexpected_file_that_a_run_would_read_is_damage(run, name):
    extra = run / "checkpoint-4" / name
    extra.write_bytes((run / "checkpoint-4" / "model.safetensors").read_bytes())
    assert whole.damage(run / "checkpoint-4") == f"unexpected file {name}"
    extra.unlink()


def test_files_that_users_edit_or_add_are_not_damage(run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / "training_args.bin").unlink()  # a push to the Hub leaves it out
    assert whole.damage(checkpoint) is None


def test_no_checkpoint_is_whole(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    message = error_of(whole.newest_whole, tmp_path / "run")
    assert "checkpoint-4: optimizer.pt is missing; checkpoint-2: optimizer.pt is missing" in message
    assert whole.newest_whole(tmp_path) is None


@pytest.mark.slow
def test_a_trainer_falls_back_and_ends_with_the_same_weights(run, tmp_path, caplog):
    settings = {"pooling": "cls_mlp_train", "max_steps": 5, "save_steps": 4}
    shutil.copytree(run, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    ends = []
    for folder, resume in ((tmp_path / "calm", str(run / "checkpoint-2")), (tmp_path / "run", True)):
        made = trainer(folder, **settings)
        made.train(resume_from_checkpoint=resume)
        ends.append(weights(made))
    assert same(*ends) and "checkpoint-4: optimizer.pt has changed since it was written: skipped" in caplog.text
    assert whole.damage(tmp_path / "run" / "checkpoint-4") is None  # the resumed run has written it again
    flip(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    message = error_of(trainer(tmp_path, **settings).train, str(tmp_path / "run" / "checkpoint-4"))
    assert "resume with --resume_from_checkpoint latest (checkpoint-5)" in message


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    assert "No valid checkpoint found in output directory" in error_of(trainer(tmp_path / "new").train, True)
    assert "there is no checkpoint" in error_of(trainer(tmp_path / "new").train, str(tmp_path))


def test_a_machine_with_a_damaged_copy_is_refused(run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    flip(checkpoint / "optimizer.pt")
    message = error_of(trainer(tmp_path, save_on_each_node=True).check_on_each_node, str(checkpoint))
    assert "checkpoint-4, on the machine of rank 0: optimizer.pt has changed since it was written" in message
    trainer(tmp_path).check_on_each_node(str(checkpoint))  # control: without its own copy, a machine does not read it


# ---- files that are whole and do not fit ----


def fewer_groups(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "optimizer.pt")
    state["param_groups"].pop()
    torch.save(state, checkpoint / "optimizer.pt")


def other_object(name: str):
    return lambda checkpoint: torch.save([1, 2], checkpoint / name)


WRONG = {
    "groups of the optimizer": (fewer_groups, "optimizer.pt and scheduler.pt do not fit this run"),
    "another object": (other_object("scheduler.pt"), "optimizer.pt and scheduler.pt do not fit this run"),
    "weights": (lambda c: other_shapes(c / "model.safetensors"), "the checkpoint belongs to another model"),
    "training weights": (lambda c: other_shapes(c / "training.safetensors"), "the checkpoint belongs to another model"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors: this file does not exist"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_error_of_a_file_that_does_not_fit_names_it(run, tmp_path, case):
    change, message = WRONG[case]
    checkpoint = shutil.copytree(run, tmp_path / "run") / "checkpoint-4"
    facts = whole.read_manifest(checkpoint)["run"]
    change(checkpoint)
    whole.seal(checkpoint, facts)
    made = trainer(tmp_path / "new", pooling="cls_mlp_train", max_steps=5)
    assert message in error_of(made.train, str(checkpoint))


# ---- which checkpoints are kept ----


def folder_with(folder: Path, steps: list[int]) -> Path:
    for number, step in enumerate(steps):
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text("{}")
        os.utime(path, (1e9 - 100 * number, 1e9 - 100 * number))  # a later step has an older modification time
    return folder


@pytest.mark.parametrize(
    ("limit", "keep", "step", "left"),
    [
        (None, {100}, 100, [9, 10, 20, 100]),
        (2, {100}, 100, [20, 100]),
        (1, {100}, 100, [100]),
        (1, {100, 9}, 100, [9, 100]),
        (2, {100, 9}, 100, [9, 100]),
        (3, {100, 9}, 100, [9, 20, 100]),
        (2, {20}, 20, [10, 20]),  # resumed before step 100, so checkpoint-100 is removed first
    ],
)
def test_rotation_goes_by_the_step(tmp_path, limit, keep, step, left):
    folder_with(tmp_path, [9, 10, 20, 100])
    whole.rotate(tmp_path, limit, {f"checkpoint-{number}" for number in keep}, step)
    assert sorted(whole.checkpoints_in(tmp_path).values()) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_run_keeps_the_newest_by_its_step(tmp_path):
    folder_with(tmp_path, [1])
    os.utime(tmp_path / "checkpoint-1", (4e9, 4e9))
    trainer(tmp_path, save_total_limit=2).train()
    assert sorted(whole.checkpoints_in(tmp_path).values()) == [2, 4]


BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "s_spearman"}


class Scores:
    """Replaces the `evaluate` of a trainer. Each call returns the next of the given scores."""

    def __init__(self, run, scores: list[float]):
        self.run, self.scores = run, iter(scores)
        run.evaluate = self

    def __call__(self, *args, **kwargs):
        metrics = {"eval_s_spearman": next(self.scores)}
        self.run.log(metrics)
        self.run.control = self.run.callback_handler.on_evaluate(self.run.args, self.run.state, self.run.control, metrics)
        return metrics


def with_best(folder, scores, **settings):
    run = trainer(folder, eval_dataset={"s": Dataset.from_list(STS)}, **BEST | settings)
    Scores(run, scores)
    return run


def test_only_the_best_stays_at_the_end(tmp_path):
    run = with_best(tmp_path, [2.0, 1.0], save_total_limit=1)
    run.train()
    assert list(whole.checkpoints_in(tmp_path).values()) == [2]
    assert all(torch.equal(p, load_file(tmp_path / "checkpoint-2" / "model.safetensors")[n]) for n, p in
               run.encoder.backbone.named_parameters())  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "best"),
    [([90, 50, 40, 30], 4), ([10, 50, 90, 30], 4), ([1, 2, 3, 4], 8), ([9, 2, 8, 2], 4), ([5, math.nan, 7, 1], 8)],
)
@pytest.mark.parametrize("greater", [True, False])
def test_the_best_of_the_saved_checkpoints_is_loaded(scores, best, greater, tmp_path, caplog):
    """BUG: the best score was at a step without a checkpoint. The last weights were saved, with the score of that step."""
    scores = [float(score) if greater else -float(score) for score in scores]
    run = with_best(tmp_path, scores, save_steps=4, max_steps=8, greater_is_better=greater)
    run.train()
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in run.encoder.backbone.named_parameters())
    assert last_scores(run) == ({"eval_s_spearman": scores[best // 2 - 1]}, None)


def test_a_resumed_run_compares_with_the_best_checkpoint_so_far(tmp_path):
    with_best(tmp_path, [1.0, 6.0], save_steps=4, max_steps=4).train()
    for score, best in ((5.0, 4), (7.0, 8)):
        run = with_best(tmp_path, [9.0, score], save_steps=4, max_steps=8)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path, caplog):
    run = with_best(tmp_path, [2.0, 1.0])
    save = run._save_checkpoint

    def save_and_damage(*args):
        save(*args)
        if run.state.global_step == 4:
            flip(tmp_path / "checkpoint-2" / "model.safetensors")

    run._save_checkpoint = save_and_damage
    run.train()
    assert "checkpoint-2: the best checkpoint is damaged (model.safetensors has changed since" in caplog.text
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(parameter, last[name]) for name, parameter in run.encoder.backbone.named_parameters())
    assert run.state.best_model_checkpoint is None


def test_a_damaged_best_checkpoint_is_forgotten_by_a_resumed_run(tmp_path, caplog):
    with_best(tmp_path, [2.0, 1.0]).train()
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    run = with_best(tmp_path, [0.5], max_steps=6)
    run.train(resume_from_checkpoint=True)
    assert "checkpoint-2: the best checkpoint is damaged" in caplog.text
    assert run.state.best_global_step == 6 and run.state.best_metric == 0.5


def test_transformers_sees_no_checkpoint_that_is_being_written(tmp_path):
    (tmp_path / f"{whole.ASIDE}5").mkdir()
    (tmp_path / f"{whole.ASIDE}5" / "trainer_state.json").write_text("{}")
    assert get_last_checkpoint(str(tmp_path)) is None and not whole.checkpoints_in(tmp_path)


def test_the_manifest_describes_its_run(run):
    facts = whole.read_manifest(run / "checkpoint-4")["run"]
    assert facts["settings"]["seed"] == SAVING["seed"] and facts["encoder"]["pooling"] == "cls_mlp_train"
    assert facts["parameters"]["train_head.0.bias"] == [32] and facts["data"]["the rows"]["number of rows"] == 12
