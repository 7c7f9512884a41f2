"""Tiny random decoders (Qwen3, Llama, Gemma 3): trained with LoRA, merged, averaged, and loaded by every loader.

Pooling the last token reads the end-of-text token, also of a truncated text. A tokenizer that adds none can be told to do so.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import error_of, small_tokenizer
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_export import by_transformers
from test_recipes import QUIET, RECIPES, SUP, load_recipe
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder
from hf_embed.adapters import full_copy
from hf_embed.averaging import average_models
from hf_embed.kit.finetune import make_trainer
from hf_embed.kit.models import four_bits
from hf_embed.kit.plan import QUICKSTART
from hf_embed.library_internals import CHECKPOINTING

SIZE = {"vocab_size": 700, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 0}  # fmt: skip
MODELS = {
    "qwen3": (Qwen3Model, Qwen3Config, {}),
    "llama": (LlamaModel, LlamaConfig, {}),
    "gemma3": (
        Gemma3TextModel,
        Gemma3TextConfig,
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
}
ROWS = [
    {"anchor": f"the {a} " * (1 + i), "positive": f"a {a} by the {b} " * (1 + i)}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:]))
]
PROMPTS = {"query": "Instruct: find the passage\nQuery: ", "document": ""}
LONG = "the cat sat on the mat and the dog ran to the river in the rain " * 4
TEXTS = ["a cat", "rain on the river", LONG]
ENDS = {"qwen3": "<|endoftext|>", "llama": "<|end_of_text|>", "gemma3": "<|endoftext|>"}


def decoder(name, seed=0, **config):
    """Return a random model whose weights are large enough that texts get different vectors."""
    kind, config_kind, settings = MODELS[name]
    torch.manual_seed(seed)
    model = kind(config_kind(**SIZE | settings | config))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trained_tokenizer(**settings):
    lines = (QUICKSTART / "sentences.txt").read_text(encoding="utf-8").splitlines()[:2000]
    return Qwen2Tokenizer(**settings).train_new_from_iterator(lines, 600)


@pytest.fixture(scope="module")
def tokenizers():
    """Return a tokenizer for each decoder: without any special token, with a first one, and with a last one."""
    qwen = trained_tokenizer()
    assert "endoftext" not in str(qwen.tokenize("a")) and qwen.num_special_tokens_to_add() == 0  # as that of Qwen3
    llama = PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer().backend_tokenizer, eos_token="<|end_of_text|>",
                                    bos_token="<|begin_of_text|>")  # fmt: skip
    first = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", llama.bos_token_id)]
    )
    llama.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    gemma = trained_tokenizer()
    gemma.add_eos_token = True  # as the tokenizers of published embedding models
    assert gemma("a")["input_ids"][-1] == gemma.eos_token_id
    return {"qwen3": qwen, "llama": llama, "gemma3": gemma}


def trainer(folder, model, tokenizer, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "learning_rate": 3e-2, "seed": 3, "pooling": "last", "max_length": 30,
                "add_eos_token": True, "chunk_tokens": 64, "prompts": PROMPTS}  # fmt: skip
    return ContrastiveTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(ROWS),
        args=ContrastiveTrainingArguments(str(folder), **(defaults | settings)),
    )  # fmt: skip


def adapted(name, seed=0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(decoder(name), LoraConfig(**{"target_modules": "all-linear", "r": 4} | settings))


def assert_loaders_agree(folder, expected):
    """Check that AutoModel (pooled as the card says), Encoder and SentenceTransformer give these vectors of TEXTS."""
    for vectors in (
        by_transformers(folder, "last", normalize=True),
        Encoder.from_pretrained(folder).encode(TEXTS),
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS),
    ):
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def own_texts(monkeypatch):
    monkeypatch.setattr("test_export.TEXTS", TEXTS)


# ---- the end-of-text token ----


@pytest.mark.parametrize("name", MODELS)
def test_the_end_of_text_token_stays_when_a_text_is_truncated(tmp_path, tokenizers, name):
    """In training, in `encode`, and in the tokenizer that every loader of the saved folder reads."""
    own = tokenizers[name]
    run = trainer(tmp_path, decoder(name), own)
    end = own.convert_tokens_to_ids(ENDS[name])
    batch = next(iter(run.get_train_dataloader()))
    texts = batch["input_ids"].split(batch["lengths"])
    assert max(batch["lengths"]) == 30 and all(ids[-1] == end for ids in texts)
    assert all((ids == end).sum() == 1 for ids in texts)
    if name == "llama":
        assert all(ids[0] == own.bos_token_id for ids in texts)
    run.encoder.save_pretrained(tmp_path / "saved")
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "saved"), SentenceTransformer(str(tmp_path / "saved")).tokenizer):
        for text in TEXTS:
            ids = loaded(text, truncation=True)["input_ids"]
            assert ids[-1] == end and len(ids) <= 30
            assert ids == run.encoder.tokenizer(text, truncation=True, max_length=30)["input_ids"]
    before = own("a cat")["input_ids"]
    assert (before[-1] == end) == (name == "gemma3")  # control; and the user's tokenizer is not changed


def test_without_the_token_there_is_a_warning(tmp_path, tokenizers, caplog):
    for name, warned in (("qwen3", True), ("gemma3", False)):
        caplog.clear()
        run = trainer(tmp_path, decoder(name), tokenizers[name], add_eos_token=False)
        assert ("set add_eos_token=True to end each text with '<|endoftext|>'" in caplog.text) == warned
        assert (run.encoder.tokenizer is tokenizers[name]) or warned
    trainer(tmp_path, decoder("qwen3"), tokenizers["qwen3"], pooling="mean", add_eos_token=False)
    assert "add_eos_token" not in caplog.text


def test_add_eos_token_is_refused_where_it_cannot_be_right(tmp_path, tokenizers):
    assert "already ends each text with '[SEP]'" in error_of(trainer, tmp_path, decoder("qwen3"), with_eos(small_tokenizer()))
    nameless = trained_tokenizer()
    nameless.eos_token = None
    assert "has no end-of-text token" in error_of(trainer, tmp_path, decoder("qwen3"), nameless)


def with_eos(tokenizer):
    tokenizer.eos_token = "[unused1]" if "[unused1]" in tokenizer.get_vocab() else "the"
    return tokenizer


# ---- LoRA: trained, merged, saved ----


@pytest.mark.parametrize("name", MODELS)
def test_lora_is_trained_merged_and_loaded_by_every_loader(tmp_path, tokenizers, name):
    run = trainer(tmp_path, adapted(name), tokenizers[name], normalize=True)
    before = run.encoder.encode(TEXTS)
    run.train()
    run.save_model()
    trained = run.encoder.encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-3  # control: the training changed the model
    assert_loaders_agree(tmp_path, trained)
    assert AutoModel.from_pretrained(tmp_path).state_dict().keys() == decoder(name).state_dict().keys()
    queries = Encoder.from_pretrained(tmp_path).encode(TEXTS, "query")
    np.testing.assert_allclose(queries, SentenceTransformer(str(tmp_path), device="cpu").encode_query(TEXTS), rtol=0, atol=1e-5)
    assert np.abs(queries - trained).max() > 1e-3  # control: the prompt is used


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_caching_together_change_no_adapter(tmp_path, tokenizers, name):
    found = []
    for on in (False, True):
        run = trainer(tmp_path, adapted(name, lora_dropout=0.0), tokenizers[name], gradient_caching=on, **{CHECKPOINTING: on})
        run.train()
        assert getattr(run.encoder.base, f"is_{CHECKPOINTING}") is on
        found.append({key: p.detach().clone() for key, p in run.encoder.named_parameters() if "lora_" in key})
    assert found[0] and all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(tensor.abs().max() > 0 for key, tensor in found[0].items() if "lora_B" in key)  # control: they were trained


# ---- the presets ----


@pytest.mark.parametrize("recipe", ["sup_simcse", "gte_finetune"])
def test_the_preset_of_a_decoder_trains_as_it_says(tmp_path, tokenizers, recipe):
    """Both recipes train with LoRA in bf16, with caching and checkpointing, and save instruction and end-of-text token."""
    preset = RECIPES / "configs" / f"{recipe}_qwen3_0.6b.yaml"
    stated = yaml.safe_load(preset.read_text())
    Encoder(decoder("qwen3", max_position_embeddings=512), tokenizers["qwen3"], "last").save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "sources.yaml").write_text(f"- {{name: rows, file: {tmp_path / 'rows.jsonl'}}}")
    data = ["--train_file", tmp_path / "rows.jsonl"] if recipe == "sup_simcse" else ["--sources", tmp_path / "sources.yaml"]
    words = ["--config", preset, "--model_name_or_path", tmp_path / "base", *data, "--output_dir", tmp_path / "out",
             "--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--save_strategy", "no",
             "--chunk_tokens", 512]  # fmt: skip
    results = load_recipe(recipe).main([*QUIET, *map(str, words)])
    settings = {"pooling", "add_eos_token", "normalize", "prompts", "max_length", "lora_r", "gradient_caching",
                CHECKPOINTING, "bf16"}  # fmt: skip
    stated[CHECKPOINTING] = stated.pop("activation_checkpointing")
    assert {key: results["train"]["settings"][key] for key in settings} == {key: stated[key] for key in settings}
    loaded, base = Encoder.from_pretrained(tmp_path / "out"), Encoder.from_pretrained(tmp_path / "base")
    assert loaded.prompts == {"query": stated["prompts"]["query"]} and loaded.pooling == "last" and loaded.normalize
    assert loaded.tokenizer("a")["input_ids"][-1] == loaded.tokenizer.eos_token_id
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(TEXTS),
                               loaded.encode(TEXTS, "query"), rtol=0, atol=1e-5)  # fmt: skip
    changed = [
        key for key, tensor in base.backbone.state_dict().items() if not torch.equal(tensor, loaded.backbone.state_dict()[key])
    ]
    assert len(changed) == 7 * 3  # the linear layers, of which a layer has seven


# ---- averages ----


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "qwen3")])
def test_the_average_of_two_trainings(tmp_path, tokenizers, name):
    for seed in (1, 2):
        run = trainer(tmp_path / str(seed), adapted(name, seed), tokenizers[name], normalize=True, seed=seed)
        run.train()
        run.save_model()
    parts = [AutoModel.from_pretrained(tmp_path / seed).state_dict() for seed in "12"]
    encoder = average_models([str(tmp_path / seed) for seed in "12"], [3, 1])
    for key, tensor in encoder.backbone.state_dict().items():
        np.testing.assert_allclose(tensor, 0.75 * parts[0][key] + 0.25 * parts[1][key], rtol=0, atol=1e-6)
    encoder.save_pretrained(tmp_path / "average")
    assert_loaders_agree(tmp_path / "average", encoder.encode(TEXTS))
    assert np.abs(Encoder.from_pretrained(tmp_path / "1").encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3  # control


# ---- base weights in 4 bits ----

BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizers) -> Path:
    folder = tmp_path_factory.mktemp("base")
    Encoder(decoder("qwen3", hidden_size=64, head_dim=16), tokenizers["qwen3"], "last").save_pretrained(folder)
    return folder


def sup_of(base, folder, *words):
    """Run the recipe sup_simcse with LoRA on the model in `base`."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    data = ["--model_name_or_path", base, "--train_file", rows, "--output_dir", folder / "out", "--add_eos_token"]
    settings = ["--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--max_length", 30]
    return SUP.main([*QUIET, *map(str, [*data, *settings, *words])])


@BNB
@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_weights_in_4_bits_are_trained_and_saved_in_float32(tmp_path, base, bf16, monkeypatch):
    """The saved weights are the 4-bit weights in float32 plus the adapters, so all loaders give the trained model's vectors."""
    made = []
    monkeypatch.setattr(SUP, "make_trainer", lambda *args: made.append(make_trainer(*args)) or made[0])
    four = ["--lora_r", 4, "--load_in_4bit", "--bf16", bf16, "--gradient_caching", f"--{CHECKPOINTING}"]
    more = ["--normalize", True, "--save_steps", 2, "--eval_file", tmp_path / "rows.jsonl", "--eval_strategy", "steps"]
    results = sup_of(base, tmp_path, *four, *more)
    assert results["train"]["settings"]["load_in_4bit"] is True
    encoder = made[0].encoder
    kinds = {type(p).__name__ for name, p in encoder.named_parameters() if "base_layer.weight" in name}
    assert kinds == {"Params4bit"} and {p.dtype for p in encoder.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.abs().max() > 0 for name, p in encoder.named_parameters() if "lora_B" in name)  # control: all were trained
    assert_loaders_agree(tmp_path / "out", encoder.encode(TEXTS))
    start, saved = Encoder.from_pretrained(base).backbone, Encoder.from_pretrained(tmp_path / "out").backbone
    apart = [(start.get_parameter(name) - tensor).abs().max() for name, tensor in saved.named_parameters() if "proj" in name]
    assert all(1e-3 < difference < 0.5 for difference in apart)  # control: not the original weights plus the adapters
    assert f"| Parameters | {sum(p.numel() for p in saved.parameters()):,} |" in (tmp_path / "out/README.md").read_text()
    assert not hasattr(saved.config, "quantization_config")


@BNB
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_tempscale_on_weights_in_4_bits(tmp_path, tokenizers, name):
    """The temperature is folded into a norm (Qwen3) or into the query weights (Llama), which are then in float32."""
    Encoder(decoder(name), tokenizers[name], "last").save_pretrained(tmp_path / "base")
    sup_of(tmp_path / "base", tmp_path, "--lora_r", 4, "--load_in_4bit", "--temp_scale", 0.6)  # saving compares the vectors
    stated = Encoder.from_pretrained(tmp_path / "out").config.temp_scale
    assert stated["temperature"] == 0.6 and stated["folded"] is True


@BNB
@pytest.mark.slow
def test_gradients_of_adapters_on_4_bits_are_those_on_the_same_weights_in_float32(tmp_path, base, tokenizers):
    """On some CPUs bitsandbytes packs its weights during inference, after which no gradient flows through them."""
    found = []
    settings = {"dtype": torch.float32, "quantization_config": four_bits()}
    for four in (True, False):
        model = AutoModel.from_pretrained(base, **settings)
        model(torch.arange(9).unsqueeze(0))  # packs the weights
        torch.manual_seed(0)
        adapted_model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0))
        if not four:
            plain = full_copy(adapted_model)  # the adapters are zero at the start
            torch.manual_seed(0)
            adapted_model = get_peft_model(plain, LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0))
        run = trainer(tmp_path, adapted_model, tokenizers["qwen3"], optim="sgd", learning_rate=0.1)
        run.train()
        found.append({key: p.detach().clone() for key, p in run.encoder.named_parameters() if "lora_" in key})
    assert len(found[0]) == 2 * 7 * 3
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-6)


@BNB
@pytest.mark.slow
def test_resumed_in_4_bits_bit_for_bit(tmp_path, base):
    words = ["--lora_r", 4, "--load_in_4bit", "--save_steps", 2, "--lr_scheduler_type", "constant"]
    for folder, more in (("whole", []), ("stopped", ["--max_steps", 2]), ("stopped", ["--resume_from_checkpoint"])):
        (tmp_path / folder).mkdir(exist_ok=True)
        sup_of(base, tmp_path / folder, *words, *more)
    whole, resumed = (load_file(tmp_path / folder / "out" / "model.safetensors") for folder in ("whole", "stopped"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@BNB
@pytest.mark.slow
def test_what_cannot_be_merged_into_4_bits_is_refused(tmp_path, base, tokenizers):
    def load():
        return AutoModel.from_pretrained(base, dtype=torch.float32, quantization_config=four_bits())

    assert "quantized weights cannot be trained; add LoRA adapters" in error_of(trainer, tmp_path, load(), tokenizers["qwen3"])
    for config in (LoraConfig(target_modules=["q_proj"], use_dora=True), LoraConfig(target_modules=["q_proj"], lora_bias=True),
                   IA3Config(target_modules=["q_proj"], feedforward_modules=[])):  # fmt: skip
        message = error_of(trainer, tmp_path, get_peft_model(load(), config), tokenizers["qwen3"])
        assert "on weights in 4 bits, only plain LoRA can be merged" in message


def test_4_bits_are_refused_without_lora_or_bitsandbytes(tmp_path, base, monkeypatch):
    assert error_of(sup_of, base, tmp_path, "--load_in_4bit").startswith("--load_in_4bit has no effect without --lora_r; ")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "bitsandbytes" else find(name, *args))
    message = error_of(sup_of, base, tmp_path, "--load_in_4bit", "--lora_r", 4)
    assert message == "--load_in_4bit: the package bitsandbytes is not installed; run pip install bitsandbytes"
    assert not (tmp_path / "out").exists()
