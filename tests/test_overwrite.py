"""`--overwrite_output_dir` keeps the earlier run complete until the new run is complete, whatever fails in between."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import error_of
from test_recipes import QUIET, ROOT, SUP, flags, load_recipe, make_files, recipe, sup
from transformers import TrainerCallback

from hf_embed import Encoder, InputError
from hf_embed.checkpoint import save
from hf_embed.checkpoint.card import with_mark
from hf_embed.checkpoint.save import renewed
from hf_embed.files import safe_files
from hf_embed.kit.overwrite import EarlierRun, earlier_files, take_place, working_folder
from hf_embed.kit.report import load_saved
from hf_embed.trainer import ContrastiveTrainer


def digest(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def matches(folder: Path) -> bool:
    """Return True if results.json and the model card have the same number of training steps, so that both are of one run."""
    results = json.loads((folder / "results.json").read_text())
    steps = results["train"]["steps"]
    return f"| Training steps | {steps:,}, with" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a folder with the data files and a finished run in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    sup(
        *flags(make_files(folder)), "--output_dir", folder / "out", "--save_steps", 2, "--learning_rate", 1e-3, "--max_steps", 4
    )
    return folder


@pytest.fixture
def old(tmp_path, finished) -> tuple[Path, list]:
    """Return a copy of the finished run, to which logs, leftovers and the user's own files are added, and its flags."""
    out = tmp_path / "out"
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("runs/old/events", "mteb/results.json", "adapter/adapter_config.json", "notes/mine.txt", "2024_Data/rows.csv",
                 ".saving-killed/model.safetensors", ".removing-checkpoint-2/x", "checkpoint-best/mine",
                 "seed-list/mine"):  # fmt: skip
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text(name)
    files = {"nli": tmp_path / "nli.csv", "sts": tmp_path / "sts.tsv", "model": tmp_path / "model"}
    return out, [*flags(files), "--output_dir", out, "--save_steps", 2, "--learning_rate", 1e-3]


FAILURES = {
    "model": lambda *args, **kwargs: (_ for _ in ()).throw(InputError("no model")),
    "evaluation": lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("evaluation")),
    "first forward": lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("memory")),
    "first optimizer step": lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt),
}


@pytest.mark.parametrize(
    ("failure", "target"),
    [("model", "hf_embed.training.inputs.load_encoder"), ("evaluation", "hf_embed.trainer.score_tasks"),
     ("first forward", "hf_embed.encoder.Encoder.forward"), ("first optimizer step", "torch.optim.AdamW.step")],
)  # fmt: skip
def test_nothing_is_lost_by_a_run_that_fails(old, monkeypatch, failure, target):
    out, argv = old
    before = digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(target, FAILURES[failure])
        with pytest.raises((Exception, KeyboardInterrupt)):  # noqa: B017
            sup(*argv, "--max_steps", 3, "--overwrite_output_dir")
    assert digest(out) == before
    if failure == "evaluation":
        assert sup(*argv, "--max_steps", 6, "--resume_from_checkpoint")["train"]["steps"] == 6  # this resumes the old run
    assert not working_folder(out).exists() or not list(working_folder(out).iterdir())


@pytest.mark.parametrize("more", [["--per_device_train_batch_size", 1], ["--max_length", 2000], ["--pooling", "max"]])
def test_invalid_values_change_no_file(old, more):
    out, argv = old
    before = digest(out)
    error_of(sup, *argv, "--overwrite_output_dir", *more)
    assert digest(out) == before


def test_a_finished_run_takes_the_place_of_the_old_one(old):
    out, argv = old
    sup(*argv, "--max_steps", 1, "--save_steps", 1, "--normalize", "true", "--overwrite_output_dir")
    assert matches(out) and json.loads((out / "results.json").read_text())["train"]["steps"] == 1
    assert [p.name for p in out.glob("checkpoint-[0-9]*")] == ["checkpoint-1"]  # saved in the step that removes the others
    assert not [n for n in ("runs/old", "mteb", "adapter", ".saving-killed", ".removing-checkpoint-2") if (out / n).exists()]
    for name in ("notes/mine.txt", "2024_Data/rows.csv", "checkpoint-best/mine", "seed-list/mine"):
        assert (out / name).exists()  # these files belong to the user
    sup(*argv, "--max_steps", 1, "--overwrite_output_dir")
    assert not (out / "2_Normalize").exists()


def test_a_card_that_someone_has_edited_stays(tmp_path):
    """BUG: `--overwrite_output_dir` replaced it; the guide to publishing says that later runs leave it alone."""
    folder, working = tmp_path / "out", working_folder(tmp_path / "out")
    made = with_mark("made")
    for before, after in ((made, "new"), ("mine", "mine"), (made + "mine", made + "mine")):
        for place, card in ((folder, before), (working, "new")):
            place.mkdir(exist_ok=True)
            (place / "README.md").write_text(card)
        assert take_place(working) == folder and not working.exists()
        assert (folder / "README.md").read_text() == after


def test_killed_after_the_first_step_no_old_checkpoint_is_resumed(old):
    out, argv = old
    before = digest(out)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        train = ContrastiveTrainer.train
        patch.setattr(ContrastiveTrainer, "train", lambda self, **kwargs: (self.add_callback(Kill()), train(self, **kwargs)))
        with pytest.raises(KeyboardInterrupt):
            sup(*argv, "--max_steps", 3, "--overwrite_output_dir")
    assert digest(out) == before
    assert "no checkpoint-N" in error_of(sup, *argv, "--max_steps", 3, "--resume_from_checkpoint")  # the new run has none
    sup(*argv, "--max_steps", 3, "--overwrite_output_dir")
    assert matches(out) and json.loads((out / "results.json").read_text())["train"]["steps"] == 3
    assert not working_folder(out).exists() and not (out / ".unfinished").exists()


def test_the_best_model_is_of_the_new_run(old):
    out, argv = old
    results = sup(*argv, "--max_steps", 2, "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1,
                  "--load_best_model_at_end", "true", "--save_total_limit", 1, "--overwrite_output_dir")  # fmt: skip
    assert results["train"]["steps"] == 2 and matches(out)
    assert {p.name for p in out.glob("checkpoint-[0-9]*")} <= {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("where", ["weights", "modules", "verification"])
def test_a_full_disk_at_the_end_leaves_the_old_model_with_its_scores(old, monkeypatch, where):
    out, argv = old
    before = digest(out)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"weights": "write_checkpoint", "modules": "write_sentence_transformers_files", "verification": "verify_folder"}
    with monkeypatch.context() as patch:
        real = getattr(save, target[where])

        def at_the_end(encoder, folder, *args, **kwargs):
            return (full if Path(folder).parent == working_folder(out) else real)(encoder, folder, *args, **kwargs)

        patch.setattr(save, target[where], at_the_end)
        with pytest.raises(InputError, match="the disk is full"):
            sup(*argv, "--max_steps", 3, "--overwrite_output_dir")
    assert digest(out) == before and matches(out)
    assert Encoder.from_pretrained(out).encode(["a"]).shape == (1, 32)
    assert sup(*argv, "--max_steps", 3, "--resume_from_checkpoint")["train"]["steps"] == 3  # the new run is resumed
    assert matches(out) and json.loads((out / "results.json").read_text())["train"]["steps"] == 3
    assert not working_folder(out).exists() and not list(out.glob(".saving-*"))


@pytest.mark.slow
def test_a_disk_that_is_full_for_scores_and_card_keeps_the_old_ones(tmp_path, old, small_disk):
    """evaluate.py writes its scores and the card into a finished folder. If the disk is full, the old files stay.

    evaluate_mteb.py writes into a finished folder in the same way.
    """
    out = shutil.copytree(old[0], small_disk("size=64m") / "out")
    before = digest(out)
    with contextlib.suppress(OSError):
        (out / "other").write_bytes(b"a" * 64_000_000)
    done = recipe(
        "evaluate.py", "--model_name_or_path", out, "--eval_sts_file", f"s={tmp_path / 'sts.tsv'}", "--output_dir", out
    )
    assert done.returncode == 2 and "the disk is full" in done.stderr
    assert {name: sha for name, sha in digest(out).items() if name in before} == before


class Killed(BaseException):
    """An exception that simulates a kill: no `except Exception` in the code can catch it."""


def kill(*args, **kwargs):
    raise Killed


def test_leftovers_of_a_kill_after_the_exchange_are_removed(old, monkeypatch):
    """The process is killed just after it exchanged the names of the two folders. The next start cleans up.

    BUG: The folder .out.new, which then holds the earlier run, and the file .unfinished stayed for good.
    """
    out, argv = old
    exchange = safe_files.exchange
    with monkeypatch.context() as patch:
        patch.setattr(safe_files, "exchange", lambda new, folder: exchange(new, folder) and (folder != out or kill()))
        with pytest.raises(Killed):
            sup(*argv, "--max_steps", 3, "--overwrite_output_dir")
    assert matches(out) and working_folder(out).is_dir()
    results = json.loads((out / "results.json").read_text())
    assert results["train"]["steps"] == 3
    again = sup(*argv, "--max_steps", 3, "--resume_from_checkpoint")
    assert not working_folder(out).exists() and not (out / ".unfinished").exists()
    assert [again["train"][key] for key in ("steps", "loss", "seconds", "resumed_at_step")] == [3, None, None, 3]


@pytest.mark.parametrize("kind", ["link", "slash", "dots"])
def test_an_output_folder_given_as_a_link_or_with_dots(old, monkeypatch, kind):
    """BUG: If the output folder was a link, the link itself was replaced, and its target stayed as it was."""
    out, argv = old
    (out.parent / "link").symlink_to("out")
    name = {"link": out.parent / "link", "slash": f"{out}/", "dots": out / "notes" / ".."}[kind]
    sup(*argv, "--output_dir", name, "--max_steps", 1, "--overwrite_output_dir")
    assert json.loads((out / "results.json").read_text())["train"]["steps"] == 1 and not out.is_symlink()
    assert (out.parent / "link").is_symlink() and not list(out.parent.glob(".*"))


def test_the_current_folder_and_a_home_as_output(finished, tmp_path, monkeypatch):
    """BUG: The path "." has no name and ended in a ValueError. For "~/out", a folder named ~ was locked."""
    files = {name: finished / file for name, file in (("nli", "nli.csv"), ("sts", "sts.tsv"), ("model", "model"))}
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    locked = []
    lock = safe_files.lock_folder
    monkeypatch.setattr("hf_embed.ranks.lock_folder", lambda folder: (locked.append(folder.resolve()), lock(folder)))
    sup(*flags(files), "--output_dir", "~/out", "--max_steps", 1)
    assert set(locked) == {tmp_path / "out"}
    sup(*flags(files), "--output_dir", ".", "--max_steps", 1)
    assert "the current folder" in error_of(sup, *flags(files), "--output_dir", ".", "--overwrite_output_dir")


def test_an_unfinished_run_is_never_mistaken_for_a_later_one(old, monkeypatch):
    """An unfinished run is resumed in its working folder. If the earlier run's folder is gone, a new run is refused.

    BUG: The new run started in the missing folder, and when it was resumed, the unfinished run was resumed instead.
    """
    out, argv = old
    with monkeypatch.context() as patch:
        patch.setattr("hf_embed.kit.finetune.save_without_push", kill)
        with pytest.raises(Killed):
            sup(*argv, "--max_steps", 2, "--overwrite_output_dir")
    monkeypatch.chdir(out.parent)
    relative = ["--resume_from_checkpoint", ".out.new/checkpoint-2"]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(SUP, "train_each_seed", lambda flags, *rest: seen.append(flags.values["output_dir"]))
        sup(*argv, *relative)  # BUG: it was resumed in the folder of the earlier run
    assert seen == [str(working_folder(out))]
    shutil.rmtree(out)
    assert ".out.new holds another run" in error_of(sup, *argv, "--max_steps", 2)


def test_a_push_uses_the_name_of_the_final_folder(old, monkeypatch):
    """The default name of the repository comes from the final folder. BUG: The repository was named .out.new."""
    out, argv = old
    seen = []
    monkeypatch.setattr(SUP, "train_each_seed", lambda flags, *rest: seen.append(flags.values["hub_model_id"]))
    sup(*argv, "--overwrite_output_dir", "--push_to_hub")
    sup(*argv, "--overwrite_output_dir", "--push_to_hub", "--hub_model_id", "me/mine")
    sup(*argv, "--overwrite_output_dir")
    assert seen == ["out", "me/mine", None]


def test_a_kill_while_the_best_seed_is_copied(old, monkeypatch):
    """The process is killed while the best seed's files are copied. The next start repairs the folder.

    BUG: The weights of the best seed lay beside a results.json of that seed only, and .saving-* folders of a finished seed
    stayed.
    """
    out, argv = old
    shutil.rmtree(out)
    argv = [*argv, "--max_steps", 1, "--save_steps", 1, "--seeds", "1,2"]
    with monkeypatch.context() as patch:
        patch.setattr("hf_embed.kit.seeds.silent_libraries", kill)
        with pytest.raises(Killed):
            sup(*argv)
    assert set(json.loads((out / "results.json").read_text())["seeds"]) == {"1", "2"} and (out / "model.safetensors").exists()
    for left in (out / ".saving-x", out / "seed-1" / ".saving-y"):
        left.mkdir()
    sup(*argv, "--resume_from_checkpoint")
    assert matches(out) and not list(out.rglob(".saving-*"))


@pytest.mark.slow
def test_seeds_keep_the_old_run_until_they_are_complete(old, monkeypatch):
    out, argv = old
    argv = [*argv, "--max_steps", 2, "--save_steps", 1, "--overwrite_output_dir"]
    sup(*argv, "--seeds", "1,2,3")
    before = digest(out)
    assert set(json.loads((out / "results.json").read_text())["seeds"]) == {"1", "2", "3"}
    assert not list(out.glob("checkpoint-[0-9]*")) and not (out / "adapter").exists()
    with monkeypatch.context() as patch:
        patch.setattr("hf_embed.encoder.Encoder.forward", FAILURES["first forward"])
        with pytest.raises(torch.OutOfMemoryError):
            sup(*argv, "--seeds", "1,2", "--learning_rate", 1e-2)
    assert digest(out) == before
    step = torch.optim.AdamW.step
    count = iter(range(100))
    with monkeypatch.context() as patch:  # this run fails in the second step of seed 1
        patch.setattr(
            torch.optim.AdamW, "step", lambda self, *a, **k: FAILURES["first forward"]() if next(count) else step(self)
        )
        with pytest.raises(torch.OutOfMemoryError):
            sup(*argv, "--seeds", "1,2", "--learning_rate", 1e-2)
    assert digest(out) == before
    assert [p.parent.name for p in working_folder(out).glob("seed-*/checkpoint-*")] == ["seed-1"]
    results = sup(*[word for word in argv if word != "--overwrite_output_dir"], "--seeds", "1,2", "--learning_rate", 1e-2,
                  "--resume_from_checkpoint")  # fmt: skip
    assert set(results["seeds"]) == {"1", "2"} and matches(out)
    assert {p.name for p in out.glob("seed-[0-9]*")} == {"seed-1", "seed-2"}


def test_seeds_take_no_path_to_resume_from(old):
    out, argv = old
    assert "remove the path" in error_of(sup, *argv, "--seeds", "1,2", "--resume_from_checkpoint", out / "checkpoint-2")


def test_links_of_the_users_are_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for name in ("out/seed-1/runs/a", "out/checkpoint-1", "elsewhere/run", "elsewhere/checkpoint-9"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs", "seed-2"):
        (folder / name).symlink_to(elsewhere)
    (folder / "checkpoint-2").symlink_to(elsewhere / "checkpoint-9")
    earlier = EarlierRun(earlier_files(folder))
    earlier.on_step_end(type("Args", (), {"process_index": 0}), None, None)
    assert {p.name for p in elsewhere.iterdir()} == {"run", "checkpoint-9"}
    assert not (folder / "checkpoint-1").exists() and not (folder / "seed-1" / "runs" / "a").exists()
    assert earlier.paths == []


def test_scores_and_extras_are_removed_with_their_model(tmp_path):
    folder = tmp_path / "out"
    for name in ("1_Pooling", "2_Dense", "3_Normalize", "4_Things", "mteb"):
        (folder / name).mkdir(parents=True)
    for name in ("results.json", "README.md", "config.json", "model.safetensors"):
        (folder / name).write_text(name)
    with renewed(folder, clear=True) as place:
        assert {p.name for p in place.iterdir()} == {"4_Things", "README.md", "config.json"} and place != folder
        (place / "model.safetensors").write_text("new")
        assert (folder / "model.safetensors").read_text() == "model.safetensors" and (folder / "results.json").exists()
    assert (folder / "model.safetensors").read_text() == "new" and not (folder / "results.json").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_scores_are_removed_even_if_the_folder_cannot_be_replaced(tmp_path, monkeypatch):
    for name in ("1_Pooling", "mteb"):
        (tmp_path / name).mkdir()
    for name in ("results.json", "README.md", "model.safetensors"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)  # the current folder cannot be replaced
    with renewed(tmp_path, clear=True) as place:
        assert place == tmp_path and {path.name for path in place.iterdir()} == {"README.md", "model.safetensors"}


def test_tempscale_that_cannot_save_keeps_what_was_there(old, monkeypatch):
    out, _ = old
    module = load_recipe("tempscale")
    before = digest(out)
    argv = ["tempscale.py", "--temperature", "0.9", "--output_dir", str(out), "--overwrite_output_dir"]
    monkeypatch.setattr("sys.argv", argv)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", FAILURES["evaluation"])
        patch.setattr(save, "verify_folder", FAILURES["evaluation"])
        with pytest.raises(RuntimeError):
            module.main()
    assert digest(out) == before
    module.main()
    assert "temperature 0.9 is folded" in (out / "README.md").read_text() and not (out / "geometry.png").exists()


@pytest.mark.slow
def test_an_ablation_keeps_its_runs_until_the_first_step(old, tmp_path, monkeypatch):
    out = tmp_path / "ablation"
    (tmp_path / "texts.txt").write_text("".join(f"a sentence with the number {i}\n" for i in range(12)))
    argv = [*QUIET, "--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "texts.txt", "--eval_sts_file",
            f"s={tmp_path / 'sts.tsv'}", "--output_dir", out, "--variants", "dropout", "same mask", "--max_steps", 1,
            "--eval_steps", 1, "--per_device_train_batch_size", 4]  # fmt: skip
    run_ablation = load_recipe("simcse_ablation").main
    run_ablation([*map(str, argv)])
    before = digest(out)
    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.AdamW.step", FAILURES["first forward"])
        with pytest.raises(torch.OutOfMemoryError):
            run_ablation([*map(str, argv), "--overwrite_output_dir", "--seeds", "1,2"])
    assert digest(out) == before
    run_ablation([*map(str, argv), "--overwrite_output_dir", "--temperature", "0.1", "--seeds", "2"])
    assert {path.parent.name for path in out.glob("runs/*/path.json")} == {"dropout-seed-2", "same-mask-seed-2"}


@pytest.mark.slow
def test_on_two_processes_the_first_checkpoint_is_the_new_one(old, tmp_path):
    """Both processes save into checkpoint-1 in the step that removes the old checkpoint-1."""
    out, argv = old
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-1")
    (out / "checkpoint-1" / "old").touch()
    words = [*QUIET[1:], *argv, "--max_steps", 1, "--save_steps", 1, "--overwrite_output_dir"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate/cpu_2.yaml"]
    command = [*map(str, [*launch, ROOT / "recipes/sup_simcse.py", *words])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in out.glob("checkpoint-[0-9]*")] == ["checkpoint-1"] and matches(out)
    names = {path.name for path in (out / "checkpoint-1").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} < names and "old" not in names


def test_the_loaded_model_does_not_keep_its_file_open(tmp_path, finished):
    """BUG: on Windows, the scored model kept its file open, so the new run could not take the place of the earlier one."""
    shutil.copytree(finished / "out", tmp_path / "out")
    plan = types.SimpleNamespace(
        model_args=types.SimpleNamespace(trust_remote_code=False),
        folder=tmp_path / "out",
        args=types.SimpleNamespace(device="cpu"),
    )
    encoder = load_saved(plan)
    assert str(tmp_path / "out") not in Path("/proc/self/maps").read_text()
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.backbone.named_parameters())
