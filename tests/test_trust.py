"""Files are read as data only: no pickle, YAML file, array or cell can run code. SECURITY.md names these tests."""

import ast
import json
import pickle
import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from test_recipes import load_recipe
from test_trainer import arguments

from hf_embed import ContrastiveTrainer, Encoder
from hf_embed.checkpoint import whole
from hf_embed.data.source_files import read_sources
from hf_embed.data.yaml_files import UniqueKeys, read_yaml
from hf_embed.pooling import Dense
from hf_embed.vector_files import read_vectors

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "hf_embed").rglob("*.py")), *sorted((ROOT / "recipes").glob("*.py"))]


class Evil:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(path: Path, ran: Path) -> None:
    """Replace a file by such a pickle, in the format of torch.save."""
    torch.save({"state": Evil(ran)}, path)


def test_the_planted_pickle_runs_where_pickles_are_loaded(tmp_path):
    """Control: the planted pickle can run code. Otherwise the tests below could not fail."""
    plant(tmp_path / "file.pt", tmp_path / "ran")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]


def calls(name: str) -> list[ast.Call]:
    """Return all calls of a function, for example 'torch.load', in the package and the recipes."""
    module, _, function = name.rpartition(".")
    return [
        node for tree in trees() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == function
        and ast.unparse(node.func.value) == module
    ]  # fmt: skip


def test_no_reader_of_ours_unpickles():
    loads = calls("torch.load")
    assert loads and all(
        any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords) for node in loads
    )
    pickles = [key for node in calls("np.load") for key in node.keywords if key.arg == "allow_pickle"]
    assert calls("np.load") and all(ast.unparse(key.value) == "False" for key in pickles)
    (load,) = calls("yaml.load")
    assert ast.unparse(load.args[1]) == "UniqueKeys" and issubclass(UniqueKeys, yaml.SafeLoader)
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|cloudpickle|marshal|shelve)\b", text, re.MULTILINE), path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        assert not re.search(r"\b(os\.system|os\.popen|shell=True)", text), path


@pytest.mark.parametrize("place", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_weights_that_are_pickles_run_nothing(tmp_path, place):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tiny_encoder(dense=[Dense(torch.nn.Linear(32, 8), torch.nn.Tanh())] if "/" in place else []).save_pretrained(
        folder, verify=False
    )
    (folder / place).with_name("model.safetensors").unlink()
    plant(folder / place, ran)
    with pytest.raises(Exception):  # noqa: B017 (of PyTorch, or an InputError)
        Encoder.from_pretrained(str(folder))
    assert not ran.exists()


def make_trainer(folder: Path, steps: int) -> ContrastiveTrainer:
    rows = Dataset.from_list([{"text": f"text {number}"} for number in range(8)])
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2)
    return ContrastiveTrainer(model=tiny_model(), processing_class=small_tokenizer(), args=args, train_dataset=rows)


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_that_holds_pickles_runs_nothing(tmp_path, part):
    """Files of a checkpoint are loaded as tensors and numbers only. training_args.bin is written but never read."""
    make_trainer(tmp_path / "out", 2).train()
    checkpoint, ran = tmp_path / "out" / "checkpoint-2", tmp_path / "ran"
    facts = whole.read_manifest(checkpoint)["run"]
    assert (checkpoint / part).is_file()
    plant(checkpoint / part, ran)
    whole.seal(checkpoint, facts)  # as an attacker would
    trainer = make_trainer(tmp_path / "resumed", 5)
    if part == "training_args.bin":
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 5
    else:
        with pytest.raises(Exception):  # noqa: B017 (of PyTorch, or an InputError)
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not ran.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path", "!!python/name:os.system"]
)
def test_yaml_makes_no_objects(tmp_path, tag):
    path, ran = tmp_path / "run.yaml", tmp_path / "ran"
    path.write_text(f"learning_rate: {tag} ['{ran}']\n")
    assert "not YAML" in error_of(read_yaml, str(path), "run.yaml")
    path.write_text(f"- name: {tag} ['{ran}']\n  file: x.csv\n")
    assert "not YAML" in error_of(read_sources, str(path))
    assert "not YAML" in error_of(load_recipe("sup_simcse").main, ["--config", str(path)])
    assert not ran.exists()


def test_vectors_hold_numbers_alone(tmp_path):
    ran, path, encoder = tmp_path / "ran", tmp_path / "vectors.npy", tiny_encoder()
    np.save(path, np.array([Evil(ran)], dtype=object), allow_pickle=True)
    path.with_name("vectors.npy.json").write_text(json.dumps({"rows": 1, "width": 32}))
    with pytest.raises(ValueError):  # noqa: PT011 (an InputError is one)
        read_vectors(str(path), encoder, ["a"])
    assert not ran.exists()


def test_cells_are_texts(tmp_path):
    """A cell that holds Python code, a pickle or a formula is an ordinary training text."""
    evil = pickle.dumps(Evil(tmp_path / "ran"), protocol=0).decode("latin-1")
    rows = [
        {"anchor": "__import__('os').system('touch ran')", "positive": "=HYPERLINK(1)"},
        {"anchor": "${HOME}", "positive": evil},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = load_recipe("preflight").main([str(tmp_path / "rows.jsonl"), "--batch_size", "2"])
    assert report["total"]["texts"] == 4 and not (tmp_path / "ran").exists()


def test_no_metric_is_downloaded():
    """`evaluate.load` runs a script from the Hub. Our metrics are classes in this package."""
    assert calls("evaluate.load") == [] and calls("load_metric") == []
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "evaluate" for tree in trees() for node in ast.walk(tree)
                   for name in getattr(node, "names", []) if name.name == "load")  # fmt: skip


def test_the_page_names_tests_that_there_are():
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 8
    for path, test in named:
        assert f"def {test or 'test_'}" in (ROOT / path).read_text(encoding="utf-8"), (path, test)


# ---- make audit ----

PACKAGE = {"name": "some", "version": "1.0"}
KNOWN = PACKAGE | {"vulns": [{"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}, {"id": "CVE-2", "fix_versions": []}]}
SKIPPED = {"name": "other", "skip_reason": "Dependency not found on PyPI and could not be audited: other (2.0)"}


@pytest.mark.parametrize(
    ("found", "pinned", "status", "lines"),
    [
        ([PACKAGE | {"vulns": []}], 1, 0, ["0 known vulnerabilities; 1 of 1 pinned versions were checked"]),
        ([KNOWN], 1, 1, ["some 1.0: CVE-1; fixed in: 1.1, 2.0", "some 1.0: CVE-2; fixed in: none yet",
                         "2 known vulnerabilities; 1 of 1 pinned versions were checked"]),
        ([KNOWN, SKIPPED], 2, 1, ["some 1.0: CVE-1; fixed in: 1.1, 2.0", "some 1.0: CVE-2; fixed in: none yet",
                                  "2 known vulnerabilities; 1 of 2 pinned versions were checked",
                                  f"not checked: 1; the reason for the first one: {SKIPPED['skip_reason']}"]),
        ([SKIPPED], 1, 3, ["0 known vulnerabilities; 0 of 1 pinned versions were checked",
                           f"not checked: 1; the reason for the first one: {SKIPPED['skip_reason']}"]),
        ([], 7, 3, ["0 known vulnerabilities; 0 of 7 pinned versions were checked",
                    "not checked: 7; the reason for the first one: no network"]),
    ],
)  # fmt: skip
def test_an_audit_that_could_not_check_all_versions_is_no_success(found, pinned, status, lines):
    """The audit ends with exit status 3 if it found no vulnerability, but could not check all versions.

    pip-audit itself ends with 0 and prints 'No known vulnerabilities found' even if it could not check any version.
    """
    judge = runpy.run_path(str(ROOT / "benchmarks" / "audit.py"))["judge"]
    assert judge(found, pinned, "no network") == (status, lines)
