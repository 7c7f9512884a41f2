"""Test that the fingerprint of a model changes with everything that a vector depends on, and with nothing else."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers

from hf_embed import Encoder, apply_tempscale, write_vectors
from hf_embed.fingerprint import fingerprint
from hf_embed.vector_files import read_vectors


def with_adapters(alpha=8):
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["query", "value", "key"], init_lora_weights=False)
    return Encoder(get_peft_model(tiny_model(), settings), small_tokenizer())


def other_normalizer(encoder):
    backend = encoder.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "e"), backend.normalizer])


def one_number(encoder):
    encoder.backbone.embeddings.word_embeddings.weight.data[7, 3] += 1e-3


CHANGES = {
    "weights": one_number,
    "pooling": lambda encoder: setattr(encoder, "pooling", "cls"),
    "maximum length": lambda encoder: setattr(encoder, "max_length", 5),
    "prompts": lambda encoder: setattr(encoder, "prompts", {"query": "find: "}),
    "temperature of attention": lambda encoder: apply_tempscale(encoder.backbone, 0.3),
    "normalizer of the tokenizer": other_normalizer,
    "side of truncation": lambda encoder: setattr(encoder.tokenizer, "truncation_side", "left"),
    "configuration": lambda encoder: setattr(encoder.config, "hidden_act", "relu"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_vectors_changes_the_fingerprint(change, tmp_path):
    """BUG: the temperature, the tokenizer and the configuration had no part in it, so old vectors were taken for new ones."""
    encoder = tiny_encoder()
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    texts, file = ["a cat sleeps on the mat and dreams", "rain"], str(tmp_path / "v.npy")
    write_vectors(encoder, texts, file)
    assert (read_vectors(file, encoder, texts)[0] == encoder.encode(texts)).all()
    before = fingerprint(encoder)
    change(encoder)
    assert fingerprint(encoder) != before
    assert "come from another model, other settings or other texts" in error_of(read_vectors, file, encoder, texts)


def test_the_scale_and_the_choice_of_adapters_count():
    encoder = with_adapters()
    prints = {fingerprint(encoder), fingerprint(with_adapters(alpha=4))}
    with encoder.backbone.disable_adapter():
        prints.add(fingerprint(encoder))
    assert len(prints) == 3 and fingerprint(with_adapters()) == fingerprint(encoder)


def test_what_has_no_effect_does_not_count(tmp_path):
    encoder = tiny_encoder()
    encoder.save_pretrained(str(tmp_path / "model"))
    before = fingerprint(encoder)
    encoder.train()
    encoder.config.hidden_dropout_prob = 0.3
    encoder.encode(["a text"])  # the tokenizer keeps the truncation of its last call
    assert fingerprint(encoder) == fingerprint(Encoder.from_pretrained(str(tmp_path / "model"))) == before


@pytest.mark.slow
def test_it_is_the_same_in_every_process():
    """The target modules of an adapter are a set, whose order depends on the process."""
    command = "from test_fingerprint import *; print(fingerprint(with_adapters()))"
    prints = set()
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
        }
        prints.add(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment).stdout)
    assert prints == {fingerprint(with_adapters()) + "\n"}
