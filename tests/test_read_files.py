"""The readers of text, JSON, tensors and arrays report every damage in one line that names the file.

No other module reads files, except for the calls in OTHERS.
"""

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of
from safetensors.torch import save, save_file

from hf_embed.checkpoint.model_files import read_weights
from hf_embed.data.sources import read_file
from hf_embed.data.yaml_files import read_yaml
from hf_embed.files.read_files import read_array, read_json, read_tensors, read_text, tensor_dtypes

ROOT = Path(__file__).parent.parent
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TENSORS = save({"weight": torch.eye(3)})
EVERY = [read_text, read_json, read_tensors, tensor_dtypes, read_array, read_file, lambda path: read_yaml(path, path)]
# Modules that read or parse without the readers of `read_files`: the call and, where it is not obvious, the reason.
OTHERS = {
    "files.read_files": "the readers themselves",
    "data.text_files": "open: rows of any size, a line at a time",
    "data.yaml_files": "YAML, from the text of read_text",
    "kit.ablation": "json.loads: what json.dumps has made a moment before",
    "training.resume": "the same",
    "kit.pretraining": "torch.load, of weights and numbers alone",
    "kit.mteb_runs": "read_text: what cannot be read is measured anew",
    "kit.command": "read_text: the recipes' own code",
    "mining": "open: the rows that were written a moment before",
    "vector_files": "np.load, read_text: what cannot be read is made anew",
    "files.work_files": "read_bytes: they are only compared, and what differs is refused",
    "files.safe_files": "open, for writing",
    "kit.cli": "open: the null device, for writing",
    "kit.distill": "json.loads: a tokenizer in memory",
}


@pytest.mark.parametrize("read", EVERY)
def test_a_path_that_is_no_file(read, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")  # opening a pipe would block forever
    expected = {
        "absent.csv": "this file does not exist; check the path",
        "folder.csv": "this is a folder; name a file in it",
        "pipe.csv": "a pipe or a device",
        "a" * 300 + ".csv": "File name too long",
        "a\0.csv": "no file can have this path",
    }
    for name, words in expected.items():
        message = error_of(read, str(tmp_path / name))
        assert words in message and name[:1] in message


@pytest.mark.parametrize("read", EVERY)
def test_a_pointer_of_git_lfs_is_named(read, tmp_path):
    for name in ("a.safetensors", "a.csv"):
        (tmp_path / name).write_bytes(LFS)
    file = "a.safetensors" if read in (read_tensors, tensor_dtypes) else "a.csv"
    assert f"{file} is a Git LFS pointer, not the file itself; run git lfs pull" in error_of(read, str(tmp_path / file))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0)
    assert "a.json: you have no permission to read it; change its permissions" in error_of(read_json, path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{bad", "a.json is not JSON (line 1: Expecting property name"),
        (b"", "a.json is not JSON (line 1: Expecting value)"),
        (b'{"a": NaN}', "NaN is not valid in JSON"),
        (b'{"a": -Infinity}', "-Infinity is not valid in JSON"),
        (b"[" * 100_000, "a.json is not JSON (line 1: maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\\ud800"}', "a.json is not JSON (line 1: '\\ud800' is only half of a character)"),
        (b"[1]", "a.json does not hold a dict at the top level"),
        (b'{"a": "\xe9"}', "a.json is not UTF-8 (byte 0xe9 in line 1)"),
        ('{"a": 1}'.encode("utf-16"), "a.json holds NUL bytes"),
    ],
)
def test_damaged_json(content, expected, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    assert expected in error_of(read_json, tmp_path / "a.json")


def test_whole_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": NaN}')
    found = read_json(tmp_path / "a.json", with_nan=True)
    assert found["a"] == "😀" and np.isnan(found["b"])


@pytest.mark.parametrize(
    "content",
    [b"", TENSORS[:-1], TENSORS[:20], TENSORS[:4], (2**60).to_bytes(8, "little") + TENSORS[8:], b"\0" * 50, b"<html>" * 10,
     TENSORS.replace(b"F32", b"F99"), TENSORS.replace(b"[3,3]", b"[3,4]"), (2).to_bytes(8, "little") + b"{}"],
)  # fmt: skip
def test_damaged_tensors(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    message = error_of(read_tensors, tmp_path / "model.safetensors")
    assert "model.safetensors" in message and "copy it again" in message


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"PK\x03\x04 no zip", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."]
)
def test_damaged_pickles(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin: the weights file is incomplete or damaged" in error_of(
        read_tensors, tmp_path / "pytorch_model.bin"
    )


def test_pickles_of_something_else(tmp_path):
    torch.save([torch.eye(2)], tmp_path / "a.bin")
    assert "a.bin holds other values than named tensors" in error_of(read_tensors, tmp_path / "a.bin")


def test_damaged_arrays(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.ones((4, 3), np.float32))
    assert read_array(path).shape == (4, 3)
    path.write_bytes(path.read_bytes()[:-4])
    assert "a.npy: the .npy file is incomplete or damaged" in error_of(read_array, path)
    for array, expected in (
        (np.array([{}, "a"]), "Python objects in dtype"), (np.ones(3), "of shape (3,), not numbers in 2 dimensions"),
        (np.array([["a"]]), "holds <U1 of shape (1, 1)"),
    ):  # fmt: skip
        np.save(path, array, allow_pickle=True)
        assert expected in error_of(read_array, path)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', which is not a file in the folder"),
        ({"weight_map": {"a": "/model.safetensors"}}, "which is not a file in the folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors: this file does not exist"),
        ({"weight_map": {"b": "one.safetensors"}}, "'b' is not in one.safetensors"),
        ({"weight_map": {}}, "has no weight_map"), ({}, "has no weight_map"), ({"weight_map": {"a": 1}}, "has no weight_map"),
    ],
)  # fmt: skip
def test_a_wrong_index_of_shards(index, expected, tmp_path):
    save_file({"a": torch.eye(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert expected in error_of(read_weights, tmp_path)


def test_shards_that_no_index_names_are_not_read(tmp_path):
    save_file({"a": torch.eye(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")  # left by an earlier save
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_weights(tmp_path)["a"], torch.eye(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- " * 3000, "maximum recursion depth exceeded"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("2020-99-99: 1", "month must be in 1..12"),
        ("x" * 1_000_001, "it has 1,000,001 characters"),
        ("!!bool maybe", "put texts in quotes"),
        ("!!int abc", "put texts in quotes"),
    ],
)
def test_hostile_yaml(text, expected, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    message = error_of(read_yaml, str(tmp_path / "a.yaml"), "a.yaml")
    assert message.startswith("a.yaml: ") and expected in message


READS = re.compile(
    r"(json\.loads?|load_file|safe_open|torch\.load|(np|numpy)\.load|yaml\.\w*load\w*|UniqueKeys|(\w+\.)*open|.*\.read_text|.*\.read_bytes)"
)


def test_nobody_else_reads_files():
    """All modules read files through `read_files`, except for the calls in OTHERS.

    Damage is then always reported in the same way, and a damaged file never ends in an error of another library.
    """
    found = set()
    for path in sorted([*(ROOT / "hf_embed").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "recipes" else parts[1:])
        calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if any(READS.fullmatch(ast.unparse(call)) for call in calls):
            found.add(name)
    assert sorted(found - set(OTHERS)) == [], "read these files by hf_embed.files.read_files"
    assert sorted(set(OTHERS) - found) == []  # every entry of OTHERS is still needed
