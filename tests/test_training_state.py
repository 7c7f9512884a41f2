"""The tensors that a checkpoint stores beside the plain model."""

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_embed import Encoder, apply_tempscale
from hf_embed.checkpoint.training_state import TRAINING_TENSORS, load_training_state, save_training_tensors
from hf_embed.pooling import Dense
from hf_embed.step import TrainingStep


def step_of(encoder: Encoder) -> TrainingStep:
    """Return a module to train: the encoder, and parts that exist only during the training."""
    return TrainingStep(encoder, nn.Sequential(nn.Linear(32, 32), nn.Tanh()), temperature=torch.rand(1).item())


def encoder_of(kind: str, seed: int = 0) -> Encoder:
    if kind == "lora":
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["query"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return Encoder(model, small_tokenizer())
    encoder = tiny_encoder(seed=seed, dense=[Dense(nn.Linear(32, 8), nn.Tanh())])
    if kind == "tempscale":
        apply_tempscale(encoder.backbone, 0.8)
    return encoder


def expected_names(kind: str) -> set[str]:
    """Return the names in the file."""
    names = {"train_head.0.weight", "train_head.0.bias", "log_temperature"}
    if kind == "lora":
        layers = [f"encoder.backbone.base_model.model.encoder.layer.{i}.attention.self.query.lora_" for i in range(3)]
        return names | {f"{layer}{part}.default.weight" for layer in layers for part in "AB"}
    names |= {"encoder.dense.0.linear.weight", "encoder.dense.0.linear.bias"}
    if kind == "tempscale":
        queries = [f"encoder.backbone.encoder.layer.{i}.attention.self.query." for i in range(3)]
        names |= {query + part for query in queries for part in ("weight", "bias")}
    return names


@pytest.mark.parametrize("kind", ["plain", "lora", "tempscale"])
def test_there_and_back(tmp_path, kind):
    saved, other = step_of(encoder_of(kind)), step_of(encoder_of(kind, seed=1))
    saved.encoder.save_pretrained(tmp_path, verify=False)
    save_training_tensors(tmp_path, saved, saved.state_dict())
    assert load_file(tmp_path / TRAINING_TENSORS).keys() == expected_names(kind)
    state = saved.state_dict()
    assert not all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())  # control
    load_training_state(tmp_path, other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_nothing_more_than_the_plain_checkpoint_makes_no_file(tmp_path):
    step = TrainingStep(tiny_encoder())
    save_training_tensors(tmp_path, step, step.state_dict())
    assert not list(tmp_path.iterdir())


def test_no_checkpoint_and_one_of_another_model(tmp_path):
    step = TrainingStep(tiny_encoder())
    assert "there is no checkpoint (config.json does not exist)" in error_of(load_training_state, tmp_path, step)
    tiny_encoder("distilbert").save_pretrained(tmp_path, verify=False)
    assert "the checkpoint belongs to another model" in error_of(load_training_state, tmp_path, step)
