"""The recipes as a user runs them: files, tables, error messages, a killed run that is resumed, and every shipped YAML file."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import error_of, tiny_encoder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from worker import WORDS

from hf_embed import ContrastiveTrainingArguments, Encoder, InputError, SimCSE
from hf_embed.checkpoint.card import read_results, write_results
from hf_embed.kit import cli
from hf_embed.kit.ablation import VARIANTS, AblationArguments, read_variants
from hf_embed.kit.eval_flags import EvalArguments
from hf_embed.kit.finetune import save_adapter
from hf_embed.kit.plan import QUICKSTART, DataArguments, ModelArguments, RunArguments

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


def load_recipe(name: str) -> ModuleType:
    """Load a recipe as a module without adding its folder to `sys.path`."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types there
    spec.loader.exec_module(module)
    return module


SUP, UNSUP = load_recipe("sup_simcse"), load_recipe("unsup_simcse")


def sup(*argv) -> dict:
    return SUP.main([*QUIET, *map(str, argv)])


def recipe(name: str, *argv, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def make_files(tmp_path: Path) -> dict[str, Path]:
    """Write a training file, an STS file and the folder of a tiny model, and return their paths."""
    with open(tmp_path / "nli.csv", "w", newline="") as file:
        rows = [[f"the {a}", f"a {a}, here", f"no {b}"] for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]
        csv.writer(file).writerows([["sent0", "sent1", "hard_neg"], *rows])
    sts = "".join(f"{i % 6}\tthe {a}\tsome {a} and {b}\n" for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1])))
    (tmp_path / "sts.tsv").write_text(sts)
    tiny_encoder().save_pretrained(tmp_path / "model", verify=False)
    return {"nli": tmp_path / "nli.csv", "sts": tmp_path / "sts.tsv", "model": tmp_path / "model"}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return make_files(tmp_path)


def flags(files, *more) -> list:
    return ["--train_file", files["nli"], "--eval_sts_file", f"s={files['sts']}", "--model_name_or_path", files["model"],
            "--per_device_train_batch_size", 4, *more]  # fmt: skip


@pytest.mark.parametrize("setup", [SUP, pytest.param(UNSUP, marks=pytest.mark.slow)], ids=["sup", "unsup"])
def test_quickstart_without_data(tmp_path, monkeypatch, capsys, setup):
    monkeypatch.chdir(tmp_path)
    argv = [
        *QUIET,
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--per_device_train_batch_size",
        "8",
        "--max_steps",
    ]
    results = setup.main([*argv, "2"])
    folder = tmp_path / "outputs" / "quickstart"
    assert json.loads((folder / "results.json").read_text()) == results
    for part in ("before", "after"):
        assert set(results[part]) == {"sts", "alignment", "uniformity"}
        assert set(results[part]["sts"]) == {"quickstart"}
    assert results["train"]["steps"] == 2
    assert (folder / "geometry.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "before" in out and "STS quickstart" in out
    assert "## Results" in (folder / "README.md").read_text()
    setup.main([*argv, "1"])  # the quickstart's own folder is overwritten


@pytest.mark.slow
def test_after_is_what_the_saved_folder_scores(tmp_path, files):
    out = tmp_path / "out"
    results = sup(*flags(files, "--output_dir", out, "--max_steps", 3, "--learning_rate", 1e-3))
    sts = f"s={files['sts']}"
    done = recipe("evaluate.py", "--model_name_or_path", out, "--eval_sts_file", sts, "--output_dir", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    scored = json.loads((tmp_path / "e" / "results.json").read_text())
    assert scored["sts"]["s"] == pytest.approx(results["after"]["sts"]["s"], abs=0.01)
    assert "spearman" in done.stdout and "x 100" in done.stdout


def test_scores_keep_the_record_of_the_training(tmp_path, files, monkeypatch):
    folder, train = tmp_path / "model", {"train": {"rows": 3}}
    tiny_encoder().save_pretrained(folder)
    write_results(folder, train)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", str(folder), "--eval_sts_file", f"a={files['sts']}", "--output_dir", str(folder)]
    )
    for _ in range(2):
        load_recipe("evaluate").main()
        results = read_results(folder)
        assert set(results) == {"train", "evaluated"} and results["train"] == train["train"]
        assert set(results["evaluated"]["sts"]) == {"a"}
    (folder / "results.json").unlink()
    load_recipe("evaluate").main()  # BUG: without results of a training, the file was one that evaluate-mteb refuses
    assert set(read_results(folder)) == {"evaluated"}
    earlier = {"model": "m", "pooling": "cls", "max_length": 9, "sts": {"old": 1.0}}  # the new evaluation replaces it
    write_results(folder, earlier)
    load_recipe("evaluate").main()
    assert set(read_results(folder)) == {"evaluated"} and set(read_results(folder)["evaluated"]["sts"]) == {"a"}
    for content in ('{"of": "someone"}', "[1]", "not JSON"):
        (folder / "results.json").write_text(content)
        assert "would be lost; give another folder" in error_of(load_recipe("evaluate").main)
        assert (folder / "results.json").read_text() == content


@pytest.mark.parametrize(
    ("more", "chose"),
    [
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1], True),
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 5, "--save_steps", 5], False),  # one score
        (["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "no"], False),
        (["--save_strategy", "no"], False),
    ],
    ids=["of several steps", "of one step", "evaluates only", "no evaluation"],
)  # fmt: skip
def test_results_and_card_tell_which_score_chose_the_model(tmp_path, files, more, chose):
    out = tmp_path / "out"
    train = sup(*flags(files, "--output_dir", out, "--max_steps", 2, *more))["train"]
    assert (train["score"]["metric"], train["score"]["greater_is_better"]) == ("spearman", True)
    assert train["chosen_by"] == (train["score"] if chose else None)
    assert ("slightly too optimistic" in (out / "README.md").read_text()) is chose
    assert "num_train_epochs" not in train["settings"] and train["settings"]["max_steps"] == 2


def test_two_processes_train_evaluate_and_save(tmp_path, files):
    settings = [*QUIET, *flags(files), "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2,
                "--load_best_model_at_end", "true", "--output_dir", tmp_path / "out"]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / "cpu_2.yaml"]
    command = [sys.executable, *launch, RECIPES / "sup_simcse.py", *(s for s in settings if s != "--use_cpu")]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["train"]["processes"] == 2
    assert results["train"]["batch_size"] == 8
    assert done.stdout.count("saved to") == 1
    assert set(results["after"]["sts"]) == {"s"}


def test_lora_and_mlp_head_export(tmp_path, files, recwarn):
    out = tmp_path / "out"
    sup(*flags(files, "--output_dir", out, "--max_steps", 2, "--lora_r", 4, "--pooling", "cls_mlp", "--save_adapter"))
    # BUG: PEFT reads a name that transformers has renamed, and a warning of that appeared in every run with LoRA.
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    merged = Encoder.from_pretrained(out)
    assert merged.pooling == "cls_mlp" and not list(out.glob("adapter_*"))
    base = Encoder.from_pretrained(files["model"])
    adapted = Encoder(PeftModel.from_pretrained(base.backbone, out / "adapter"), base.tokenizer, "cls_mlp")
    for file in (out / "adapter").glob("*.*"):
        assert file.suffix == ".safetensors" or str(tmp_path) not in file.read_text()  # the local path of the base model
    # BUG: the name of the folder stood for a model on the Hub, which PEFT looked for, and the card was PEFT's empty template.
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert not [str(warning.message) for warning in recwarn if "config" in str(warning.message)]
    card = (out / "adapter" / "README.md").read_text()
    assert (
        "LoRA adapters of the model in the folder model" in card and "base_model" not in card and "More Information" not in card
    )
    for wrong in (["--temp_scale", "0.9"], ["--lora_r", 0]):
        argv = flags(files, "--output_dir", tmp_path / "no", "--max_steps", 1, "--lora_r", 4, "--save_adapter", *wrong)
        assert "--save_adapter: " in error_of(sup, *argv)
    argv = flags(files, "--output_dir", tmp_path / "no", "--lora_r", 4, "--mlm_weight", 0.1)
    assert "trains all weights; remove one of them" in error_of(sup, *argv)
    texts = ["the cat", "a house by the river"]
    np.testing.assert_allclose(adapted.encode(texts), merged.encode(texts), atol=1e-5)
    # The folder of the adapters is loaded like a whole model, with the pooling of the run, if it names its base model.
    config = out / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(files["model"])}))
    np.testing.assert_allclose(Encoder.from_pretrained(out / "adapter").encode(texts), merged.encode(texts), atol=1e-5)
    argv = flags(files, "--output_dir", tmp_path / "no", "--model_name_or_path", out / "adapter", "--mlm_weight", 0.1)
    assert f"is an adapter of '{files['model']}', and has no head for masked words; give" in error_of(sup, *argv)
    loaded = SentenceTransformer(str(out / "adapter"), device="cpu")
    np.testing.assert_allclose(loaded.encode(texts), merged.encode(texts), atol=1e-5)


def test_adapters_of_a_model_on_the_hub_name_it(tmp_path):
    base = tiny_encoder().backbone
    base.config.name_or_path = "owner/base"
    encoder = Encoder(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])), tiny_encoder().tokenizer)
    tiny_encoder(pooling="cls").save_pretrained(tmp_path, verify=False)
    save_adapter(encoder, tmp_path / "adapter", tmp_path)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: owner/base\n---\n") and '"owner/base"' in card


@pytest.mark.parametrize("pooling", ["mean", "cls_mlp"])
def test_mlm_auxiliary_from_the_command_line(tmp_path, files, pooling):
    results = sup(*flags(files, "--output_dir", tmp_path / "out", "--max_steps", 2, "--mlm_weight", 0.1, "--pooling", pooling))
    assert results["train"]["objective"]["mlm_weight"] == 0.1
    assert Encoder.from_pretrained(tmp_path / "out").pooling == pooling


def test_sigkill_and_resume_end_bit_for_bit(tmp_path, files):
    """The run is killed in the middle of an epoch by a signal that no process can catch."""
    settings = [*flags(files), "--num_train_epochs", 5, "--save_steps", 4, "--logging_steps", 1, "--output_dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, RECIPES / "sup_simcse.py", *QUIET, *settings, killed]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the process of the tests: sums are rounded in the same way
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    deadline = time.time() + 120
    while not (killed / "checkpoint-4" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for later in killed.glob("checkpoint-*"):  # remove what the process wrote after step 4, before the signal arrived
        if later.name != "checkpoint-4":
            shutil.rmtree(later)
    assert not (killed / "model.safetensors").exists()
    sup(*settings, killed, "--resume_from_checkpoint")
    sup(*settings, whole)
    a, b = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    start = load_file(files["model"] / "model.safetensors")
    assert not all(np.array_equal(a[name], start[name]) for name in a)  # the training changed the weights


BAD = {
    "missing file": (["--train_file", "absent.csv"], "absent.csv: this file does not exist"),
    "wrong kind": (["--train_file", "{model}/config.toml"], "this file does not exist"),
    "both sources": (["--train_file", "{nli}", "--dataset_name", "a/b"], "give one"),
    "a split of a file": (["--train_file", "{nli}", "--dataset_split", "dev"], "--dataset_split has no effect without"),
    # BUG: these two did nothing, without a message.
    "not pushed": (["--train_file", "{nli}", "--hub_model_id", "me/a"], "--hub_model_id has no effect without --push_to_hub"),
    "searches of nothing": (["--train_file", "{nli}", "--show_searches", "3"], "--show_searches has no effect without a retr"),
    "model without data": (["--model_name_or_path", "{model}"], "--train_file FILE, --dataset_name NAME or --sources FILE"),
    "unreachable model": (["--train_file", "{nli}", "--model_name_or_path", "no/such-model"], "without arguments runs offline"),
    "unreachable dataset": (
        ["--dataset_name", "no/such-data"],
        "no/such-data.* cannot be loaded: .*; check the name, or give a local file",
    ),
    "unknown pooling": (["--train_file", "{nli}", "--pooling", "max"], "unknown pooling 'max'; use one of cls"),
    "too long": (["--train_file", "{nli}", "--max_length", "513"], "512 positions"),
    "batch of one": (["--train_file", "{nli}", "--per_device_train_batch_size", "1"], "no negatives"),
    "sts without name": (["--train_file", "{nli}", "--eval_sts_file", "{sts}"], "give NAME=PATH"),
    "not sts": (["--train_file", "{nli}", "--eval_sts_file", "x={nli}"], "nli.csv: the first row does not name score"),
    "unknown flag": (["--learning_rat", "1"], "--help lists the flags"),
    "dropout": (["--train_file", "{nli}", "--dropout", "1.5"], "below 1"),
    "occupied folder": (["--train_file", "{nli}", "--output_dir", "{model}"], "--resume_from_c.*--overwrite_o"),
    "occupied folder, quickstart": (["--output_dir", "{model}"], "--overwrite_o"),
    "nothing to resume": (["--train_file", "{nli}", "--output_dir", "new", "--resume_from_checkpoint"], "no checkpoint-N"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_loses_nothing(tmp_path, monkeypatch, files, case):
    argv, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=message) as caught:
        sup(*(word.format(**files) for word in argv))
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_a_recipe_prints_the_line_and_exits_2(tmp_path):
    done = recipe("sup_simcse.py", "--train_file", "absent.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: absent.csv: this file does not exist")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path, files, small_disk):
    out = small_disk("size=8k")
    (out / "other").write_bytes(b"a" * 8192)
    argv = ["--model_name_or_path", files["model"], "--eval_sts_file", f"s={files['sts']}", "--output_dir", out]
    done = recipe("evaluate.py", *argv)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: the disk is full (at ")


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*simcse*.yaml")), ids=lambda p: p.stem)
def test_presets_parse(path):
    kinds = [ModelArguments, DataArguments, EvalArguments, RunArguments, AblationArguments, SimCSE]
    *_, ablation, simcse, args = cli.parse([*kinds, ContrastiveTrainingArguments], argv=["--config", str(path), "--use_cpu"])
    assert simcse.temperature == 0.05
    stored = yaml.safe_load(path.read_text())
    assert args.learning_rate == stored["learning_rate"]
    assert args.pooling == stored.get("pooling")
    assert list(read_variants(ablation.variants)) == list(stored.get("variants", list(VARIANTS)[:4]))


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").rglob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_files_parse(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"single": 1, "cpu_2": 2, "ddp_2nodes": 16}.get(path.stem, 8)


def test_quickstart_texts_do_not_overlap():
    triplets = list(csv.reader((QUICKSTART / "triplets.csv").read_text(encoding="utf-8").splitlines()))[1:]
    pairs = [line.split("\t") for line in (QUICKSTART / "sts.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    trained = {text.lower() for row in triplets for text in row}
    scored = {text.lower() for _, *texts in pairs for text in texts}
    assert len(triplets) >= 1000 and len(pairs) >= 300
    assert not trained & scored
    assert len(trained) == 3 * len(triplets)  # no text occurs twice
    assert {round(float(score)) for score, *_ in pairs} == {0, 1, 2, 3, 4, 5}
