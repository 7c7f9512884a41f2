"""recipes/pretrain_encoder.py on a few sentences: what it saves is whole, and takes the place of an earlier encoder alone."""

import json
from pathlib import Path

import pytest
from conftest import error_of
from test_recipes import load_recipe

from hf_embed import Encoder
from hf_embed.disk import DiskError
from hf_embed.kit.plan import QUICKSTART

SMALL = ["--teacher_layer", 1, "--vocab_size", 500, "--hidden_size", 24, "--num_layers", 1, "--num_heads", 2,
         "--max_length", 64, "--sentence_tokens", 600, "--long_tokens", 300, "--batch_tokens", 256]  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch):
    (tmp_path / "sentences.txt").write_text("".join(f"the cat number {i} sleeps on a warm stone\n" for i in range(120)))
    recipe = load_recipe("pretrain_encoder")

    def run(folder: Path, *more) -> None:
        words = ["--teacher", QUICKSTART / "encoder", "--train_file", tmp_path / "sentences.txt", "--output_dir", folder]
        monkeypatch.setattr("sys.argv", ["pretrain_encoder.py", *map(str, [*words, *SMALL, *more])])
        recipe.main()

    return run


def test_an_encoder_is_saved_as_a_whole(train, tmp_path):
    folder = tmp_path / "new" / "encoder"
    train(folder)
    about = json.loads((folder / "training.json").read_text())
    assert about["hidden_size"] == 24 and about["loss"] > 0 and about["tokens"] > 0
    assert Encoder.from_pretrained(str(folder)).encode(["a cat"]).shape == (1, 24)
    train(folder, "--hidden_size", 12)  # in the place of an earlier one
    assert Encoder.from_pretrained(str(folder)).encode(["a cat"]).shape == (1, 12)
    (folder / "notes.txt").touch()
    assert "holds notes.txt" in error_of(train, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_a_full_disk_keeps_the_earlier_encoder(train, small_disk):
    folder = small_disk("size=400k") / "encoder"
    train(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DiskError, match=rf"the disk is full \(at {folder}"):
        train(folder, "--hidden_size", 120)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    small_disk("size=8m")
    train(folder, "--hidden_size", 120)
    assert json.loads((folder / "training.json").read_text())["hidden_size"] == 120
