"""Test that incomplete weights and tokenizer files are refused with a message that names them.

A model with random values is never loaded without a message.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from test_adapters import randomised
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, average_models
from hf_embed.adapters import with_saved_adapter
from hf_embed.checkpoint.load import load_model, read_config


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder: Path, change) -> None:
    """Replace each (name, tensor) by the result of `change`. The result None leaves the tensor out."""
    tensors = dict(filter(None, (change(*item) for item in load_file(folder / "model.safetensors").items())))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "attention"), [("bert", "no"), ("bert", "flash_attention_2"), ("mpnet", "flash_attention_2"), ("mpnet", "sdpa")]
)
def test_an_attention_that_cannot_be_used_is_named(kind, attention, tmp_path):
    """BUG: the message asked for a local folder with config.json, which was there."""
    if attention == "flash_attention_2" and kind == "bert" and is_flash_attn_2_available():
        pytest.skip("flash attention is installed")
    tiny_model(kind).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    message = error_of(Encoder.from_pretrained, str(tmp_path), attn_implementation=attention)
    assert f"attn_implementation {attention} cannot be used: " in message and message.endswith("or leave it out")
    assert "local folder" not in message
    missing = error_of(Encoder.from_pretrained, str(tmp_path / "none"), attn_implementation="eager")
    assert "this folder does not exist" in missing
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded: the folder has no config.json. Give" in error_of(Encoder.from_pretrained, str(tmp_path / "empty"))
    file = str(tmp_path / "config.json")
    assert f"model '{file}' cannot be loaded: this is a file. Give a local folder" in error_of(Encoder.from_pretrained, file)


BROKEN_WEIGHTS = {
    "half are missing": (
        lambda name, tensor: None if "layer.1" in name else (name, tensor),
        "lacks 'encoder.layer.1.attention.output.LayerNorm.bias' and 15 more",
    ),
    "renamed": (lambda name, tensor: (f"my.{name}", tensor), "lacks 'embeddings.LayerNorm.bias' and"),
    "queries renamed": (
        lambda name, tensor: (name.replace("query", "q"), tensor),
        "lacks 'encoder.layer.0.attention.self.query.bias'",
    ),
    "one is missing": (
        lambda name, tensor: None if name == "encoder.layer.2.output.dense.bias" else (name, tensor),
        "lacks 'encoder.layer.2.output.dense.bias', which would have random values",
    ),
    "NaN": (
        lambda name, tensor: (name, tensor * float("nan") if name == "encoder.layer.1.output.dense.weight" else tensor),
        "'encoder.layer.1.output.dense.weight' has NaN or infinite values",
    ),
    "one infinite row": (
        lambda name, tensor: (name, tensor.index_fill(0, torch.tensor([1700]), float("inf")) if "word_emb" in name else tensor),
        "'embeddings.word_embeddings.weight' has NaN or infinite values",
    ),
    "int8": (
        lambda name, tensor: (name, (tensor * 20).to(torch.int8) if "dense" in name else tensor),
        "is stored as I8, but config.json names no quantization",
    ),
    "float8": (
        lambda name, tensor: (name, tensor.to(torch.float8_e4m3fn) if "dense" in name else tensor),
        "is stored as F8_E4M3, but config.json names no quantization",
    ),
    "another width": (
        lambda name, tensor: (name, tensor[:, :16].contiguous() if "word_emb" in name else tensor),
        "'embeddings.word_embeddings.weight' has the shape (3000, 16) in the weights file, but (3000, 32) according to "
        "config.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(folder, case):
    change, message = BROKEN_WEIGHTS[case]
    edit_weights(folder, change)
    assert message in error_of(Encoder.from_pretrained, str(folder))


def test_a_mask_that_is_not_read_may_be_of_any_type(folder):
    """BUG: weights of GPT-2 or GPT-NeoX that older releases of transformers saved hold masks in uint8, and were refused."""
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Encoder.from_pretrained(folder)


def test_more_layers_than_the_config_says_are_refused(folder):
    edit_json(folder / "config.json", num_hidden_layers=2)
    message = error_of(Encoder.from_pretrained, str(folder))
    assert (
        "its weights file has 'encoder.layer.2.attention.output.LayerNorm.bias' and 15 more, which does not fit config.json"
        in message
    )


@pytest.mark.parametrize("share", [0.5, 0.0001, 0.999])
def test_truncated_weights_are_refused(folder, share):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert f"model '{folder}' cannot be loaded" in error_of(Encoder.from_pretrained, str(folder))


@pytest.mark.parametrize(("file", "content"), [("config.json", "{bad"), ("config.json", "{}"), ("model.safetensors", "")])
def test_broken_files_are_one_line(folder, file, content):
    (folder / file).write_text(content)
    assert f"model '{folder}' cannot be loaded" in error_of(Encoder.from_pretrained, str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_files_are_one_line(folder, file):
    (folder / file).unlink()
    assert f"model '{folder}' cannot be loaded" in error_of(Encoder.from_pretrained, str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(folder, file, monkeypatch):
    """BUG: safetensors calls it missing. Its version 0.8 saves weights that only their owner may read."""
    access, closed = os.access, str(folder / file)
    (folder / file).write_text("")  # root, who runs many tests, may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != closed and access(path, mode))
    said = error_of(Encoder.from_pretrained, str(folder))
    assert said.endswith(f": {closed}: you have no permission to read it; change its permissions (chmod)")


# ---- weights that may be missing ----


@pytest.mark.parametrize("pooling", ["mean", "cls", "first_last"])
def test_a_pooler_that_nobody_uses_may_be_missing(folder, pooling):
    expected = Encoder.from_pretrained(str(folder), pooling=pooling).encode("rain")
    edit_weights(folder, lambda name, tensor: None if "pooler" in name else (name, tensor))
    assert (Encoder.from_pretrained(str(folder), pooling=pooling).encode("rain") == expected).all()


def test_a_pooler_that_is_the_head_may_not_be_missing(folder):
    edit_weights(folder, lambda name, tensor: None if "pooler" in name else (name, tensor))
    assert "lacks 'pooler.dense.bias' and 1 more" in error_of(Encoder.from_pretrained, str(folder), pooling="cls_mlp")


def test_a_masked_lm_checkpoint_is_an_encoder(tmp_path):
    model = BertForMaskedLM(tiny_model("bert").config)
    model.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    expected = Encoder(model.bert.eval(), small_tokenizer()).encode("rain")
    assert (Encoder.from_pretrained(str(tmp_path)).encode("rain") == expected).all()


def test_an_encoder_is_no_masked_lm_without_its_layers(folder):
    edit_weights(folder, lambda name, tensor: None if "layer.1" in name else (name, tensor))
    _, missing = load_model(str(folder), "AutoModelForMaskedLM")
    assert "bert.encoder.layer.1.output.dense.weight" in missing


# ---- tokenizers ----


def test_a_tokenizer_that_is_missing_is_refused(folder):
    """Without the files, transformers creates a tokenizer of special tokens only, to which every word is unknown."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    message = error_of(Encoder.from_pretrained, str(folder))
    assert "has no vocabulary except 5 special tokens" in message


def byte_pairs(folder: Path, merges: list) -> None:
    """Write a GPT-2 folder whose tokenizer has a vocabulary of letters and words, and these merges."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    for word in [*("".join(pair) for pair in merges), *(f"word{i}" for i in range(400))]:
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def test_byte_pairs_without_merges_are_refused(tmp_path):
    byte_pairs(tmp_path, [("t", "h"), ("th", "e")])
    Encoder.from_pretrained(str(tmp_path))
    byte_pairs(tmp_path, [])
    assert "its tokenizer has a vocabulary but no merges" in error_of(Encoder.from_pretrained, str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<product>"])
    tokenizer.save_pretrained(folder)
    message = error_of(Encoder.from_pretrained, str(folder))
    assert "token ids up to 3000, but the model's embedding table has 3000 rows" in message
    assert "resize_token_embeddings" in message


def test_a_tokenizer_that_loads_as_another_is_refused_before_the_training(tmp_path):
    """AutoTokenizer chooses the class that belongs to the model, whatever tokenizer was saved with the model."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "cat": 2, "rain": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, tiny_model("qwen2"), args, processing_class=tokenizer)
    assert "returns other tokens after it is saved with a Qwen2Model" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.BertNormalizer(strip_accents=False)),
        lambda t: setattr(
            t.backend_tokenizer,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.BertPreTokenizer()]),
        ),
        lambda t: setattr(t, "unk_token", "the"),
        lambda t: setattr(t, "split_special_tokens", True),
    ],
)
def test_a_tokenizer_changed_in_python_is_refused_if_its_files_do_not_hold_the_change(tmp_path, change):
    """BUG: only English texts were compared, on which such tokenizers agree."""
    tokenizer = small_tokenizer()
    change(tokenizer)
    assert "returns other tokens" in error_of(Encoder(tiny_model(), tokenizer).save_pretrained, tmp_path / "model")


def test_the_older_name_of_dtype_is_heeded(folder):
    """BUG: torch_dtype, which transformers still accepts, had no effect."""
    assert Encoder.from_pretrained(folder, torch_dtype=torch.float16).dtype == torch.float16


# ---- folders that do not hold a model ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with settings that no default has."""
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_encoder(pooling="cls", normalize=True).save_pretrained(folder, verify=False)
    return folder


TEXTS = ["a cat", "the dog and the house by the river"]


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["query", "dense"])


def test_an_adapter_that_peft_saved_is_loaded_with_the_settings_of_its_base_model(base, tmp_path, recwarn):
    adapted = randomised(get_peft_model(AutoModel.from_pretrained(base), lora()))
    adapted.save_pretrained(tmp_path)
    expected = Encoder(adapted.eval(), small_tokenizer(), "cls", normalize=True).encode(TEXTS)
    recwarn.clear()
    encoder = Encoder.from_pretrained(tmp_path)
    assert not recwarn.list and all(parameter.requires_grad for parameter in encoder.parameters())
    assert read_config(str(tmp_path)).to_dict() == AutoConfig.from_pretrained(base).to_dict()
    assert (encoder.pooling, encoder.normalize, type(encoder.backbone)) == ("cls", True, type(adapted.get_base_model()))
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    assert np.abs(Encoder.from_pretrained(base).encode(TEXTS) - expected).max() > 0.1  # control: the adapter has an effect
    encoder.save_pretrained(tmp_path / "whole")  # with the check that AutoModel and sentence-transformers give these vectors
    assert Encoder.from_pretrained(tmp_path, pooling="mean").pooling == "mean"
    half = average_models([base, str(tmp_path)]).base.encoder.layer[0].attention.self.query.weight
    ends = [Encoder.from_pretrained(folder).base.encoder.layer[0].attention.self.query.weight for folder in (base, tmp_path)]
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)


def test_an_adapter_with_settings_of_its_own_gives_sentence_transformers_vectors(base, tmp_path):
    """The folder has all files of sentence-transformers but the weights. They state another pooling than the base model's."""
    model = SentenceTransformer(modules=[Transformer(base), Pooling(32)], device="cpu")
    model.add_adapter(lora())
    randomised(model).save(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    encoder = Encoder.from_pretrained(tmp_path)
    assert (encoder.pooling, encoder.normalize) == ("mean", False)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)


def test_an_adapter_that_does_not_fit_its_base_model_is_refused(base, tmp_path):
    """PEFT would compute without its weights: they are those of a model with a head, whose layers have other names."""
    get_peft_model(AutoModelForMaskedLM.from_pretrained(base), lora()).save_pretrained(tmp_path)
    message = error_of(Encoder.from_pretrained, tmp_path)
    assert f"this adapter does not fit BertModel of '{base}': its weights lack 'base_model.model.encoder.layer.0." in message


def test_an_adapter_whose_base_model_is_gone_is_refused(base, tmp_path):
    gone = str(tmp_path / "gone")
    shutil.copytree(base, gone)
    get_peft_model(AutoModel.from_pretrained(gone), lora()).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(gone)
    message = error_of(Encoder.from_pretrained, tmp_path / "adapter")
    assert message.startswith(
        f"model '{tmp_path / 'adapter'}' is an adapter of '{gone}': model '{gone}' cannot be loaded: this fold"
    )


def test_an_adapter_without_weights_is_refused(base, tmp_path):
    get_peft_model(AutoModel.from_pretrained(base), lora()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "the adapter has no weights (adapter_model.safetensors)" in error_of(Encoder.from_pretrained, tmp_path)


def test_an_adapter_of_quantized_weights_is_refused():
    model = tiny_model("bert")
    model.is_quantized = True
    assert "an adapter, which cannot be merged into quantized weights" in error_of(with_saved_adapter, model, "name", "folder")


def test_an_adapter_that_names_no_base_model_is_refused(tmp_path):
    get_peft_model(tiny_model("bert"), lora()).save_pretrained(tmp_path)
    assert "is an adapter, and its adapter_config.json names no base model; write" in error_of(
        Encoder.from_pretrained, tmp_path
    )


def test_an_adapter_that_is_no_weight_is_refused(base, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(tmp_path)
    assert "PEFT adapters of the kind PROMPT_TUNING cannot be merged" in error_of(Encoder.from_pretrained, tmp_path)


def test_a_model_of_another_class_than_automodel_gives_is_refused_before_the_training(tmp_path):
    class Other(torch.nn.Module):
        """A module that computes the same as a BertModel, but is not a BertModel."""

        def __init__(self):
            super().__init__()
            self.inner = tiny_model("bert")
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
            return self.inner(input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, Other(), args, processing_class=small_tokenizer())
    assert message.startswith("Other could not be loaded after it is saved, because AutoModel would make BertModel")


def with_shared_layer():
    model = tiny_model("bert")
    model.encoder.layer[2] = model.encoder.layer[1]
    return model


def with_fewer_layers():
    model = tiny_model("bert")
    model.encoder.layer = model.encoder.layer[:2]
    return model


def with_another_layer():
    model = tiny_model("bert")
    model.projection = torch.nn.Linear(32, 8)
    return model


def with_wider_layer():
    model = tiny_model("bert")
    model.encoder.layer[0].intermediate.dense = torch.nn.Linear(32, 65)
    model.encoder.layer[0].output.dense = torch.nn.Linear(65, 32)
    return model


@pytest.mark.parametrize(
    "make, problem",
    [
        (with_fewer_layers, "its configuration is of a model with 'encoder.layer.2.attention.self.query.weight'"),
        (with_another_layer, "its configuration is of a model without 'projection.weight'"),
        (with_wider_layer, "a model with another shape of 'encoder.layer.0.intermediate.dense.weight'"),
        (with_shared_layer, "layers share weights that its class keeps apart"),
    ],
)
def test_layers_that_were_changed_in_python_are_refused_before_the_training(tmp_path, make, problem):
    """BUG: the run trained to its end, and then the model could not be saved."""
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, make(), args, processing_class=small_tokenizer())
    assert message.startswith("BertModel could not be loaded after it is saved: ") and problem in message
    assert error_of(Encoder(make(), small_tokenizer()).save_pretrained, tmp_path / "model") == message
    fewer = with_fewer_layers()
    fewer.config.num_hidden_layers = 2
    ContrastiveTrainer(fewer, args, processing_class=small_tokenizer())


# ---- texts without a token ----


def test_an_empty_text_that_is_no_token_is_refused(folder):
    """A tokenizer without special tokens returns no tokens for "". Loaders would then give zeros or NaN, or crash."""
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    encoder = Encoder(tiny_model("bert"), tokenizer)
    assert "the tokenizer returns no tokens for text 2," in error_of(encoder.encode, ["rain", ""])
    assert Encoder(tiny_model("bert"), small_tokenizer()).encode(["rain", ""]).shape == (2, 32)


def test_masks_that_are_not_saved_do_not_count_as_weights(tmp_path):
    """BUG: a small GPT-Neo could not be loaded again, because its causal masks hold more numbers than its weights."""
    sizes = {"vocab_size": 3000, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    model = GPTNeoModel(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    tokenizer = small_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    Encoder(model, tokenizer, "last").save_pretrained(str(tmp_path / "out"), verify=False)
    assert Encoder.from_pretrained(str(tmp_path / "out")).encode("a cat").shape == (16,)
