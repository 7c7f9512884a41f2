"""Test that checkpoints and folders of an earlier version can still be resumed and loaded. See tests/fixtures/make.py."""

import shutil

import pytest
import torch
from conftest import with_plain_dropout
from fixtures.make import CASES, FIXTURES, OTHER_SEED, STORED_SEED, end_of, make_trainer, vectors_of
from safetensors.torch import load_file

from hf_embed import ContrastiveTrainingArguments, Encoder

TOLERANCE = 1e-6


def difference(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two tensors with the same name, as a fraction of the largest stored number."""
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in stored.items()}
    flat_found, flat_stored = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (found, stored))
    return ((flat_found - flat_stored).abs().max() / flat_stored.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_an_old_checkpoint_resumes(name, tmp_path):
    """A run resumed from an old checkpoint ends where it ended under the version that wrote it.

    It starts with other weights than the old run did, so only the checkpoint can lead to the same end. That version drew the
    masks of PyTorch's dropout.
    """
    stored = load_file(FIXTURES / name / "end.safetensors")
    checkpoint = shutil.copytree(FIXTURES / name / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = with_plain_dropout(make_trainer(name, tmp_path / "resumed", OTHER_SEED))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 5
    assert difference(end_of(resumed), stored) < TOLERANCE
    fresh = with_plain_dropout(make_trainer(name, tmp_path / "fresh", OTHER_SEED))
    fresh.train()
    assert difference(end_of(fresh), stored) > 1e-3  # control: without the checkpoint it ends elsewhere


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training.safetensors"])
def test_an_old_checkpoint_is_needed_as_a_whole(part, tmp_path):
    """Control: the run ends elsewhere if one of the files besides the model's weights is missing."""
    name = "unsup_simcse_mlm"
    checkpoint = shutil.copytree(FIXTURES / name / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / part).unlink()
    resumed = with_plain_dropout(make_trainer(name, tmp_path / "resumed", OTHER_SEED))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert difference(end_of(resumed), load_file(FIXTURES / name / "end.safetensors")) > TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_old_training_arguments_load(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the stored arguments name a relative output folder
    stored = torch.load(FIXTURES / name / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert isinstance(stored, ContrastiveTrainingArguments)
    now = make_trainer(name, "whole", STORED_SEED).args
    for setting in ("output_dir", "max_steps", "learning_rate", "seed", *ContrastiveTrainingArguments.__annotations__):
        assert getattr(stored, setting) == getattr(now, setting), setting


def test_an_old_folder_loads(tmp_path):
    folder = shutil.copytree(FIXTURES / "finished", tmp_path / "finished")
    encoder = Encoder.from_pretrained(str(folder))
    stored = load_file(FIXTURES / "finished.safetensors")
    assert difference(vectors_of(encoder), stored) < TOLERANCE
    assert [encoder.pooling, encoder.max_length, encoder.normalize, encoder.truncate_dim] == ["first_last", 12, True, 5]
    assert [encoder.similarity_fn_name, encoder.default_prompt_name] == ["dot", "title"]
    assert encoder.prompts == {"query": "the ", "document": "some ", "title": "of the "}
    mean = Encoder.from_pretrained(str(folder), pooling="mean")  # control
    assert difference(vectors_of(mean), stored) > 1e-3
    encoder.save_pretrained(str(tmp_path / "again"))  # the files that describe the pooling are written as before
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    of_the_libraries = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    files = [path for path in files if str(path) not in of_the_libraries]
    assert len(files) == 10
    for path in files:
        assert (tmp_path / "again" / path).read_bytes() == (folder / path).read_bytes(), path
