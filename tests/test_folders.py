"""Test folders that sentence-transformers or its users wrote: the vectors are the same, or a message names what is refused.

The vectors are also the same after such a folder is loaded and saved again. Each case builds a folder, with
sentence-transformers if possible, otherwise by editing the JSON files.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentence_transformers.sentence_transformer.modules as st
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoTokenizer

import hf_embed
from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, InputError, SimCSE
from hf_embed.evaluation.mteb import model_meta
from hf_embed.kit.models import load_model
from hf_embed.kit.mteb_runs import run_mteb
from hf_embed.kit.plan import ModelArguments

LONG = "the committee postponed the vote once more and went home " * 12  # 133 tokens: more than a tiny model accepts by default
TEXTS = ["rain", "A cat sleeps on the warm windowsill.", LONG, "", "  Two Dogs ran  across the field, barking.\n"]
CONFIG = "config_sentence_transformers.json"
BERT = "sentence_bert_config.json"
CHAT = "{% for message in messages %}user: {{ message['content'] }} end{% endfor %}"


def assert_same(got, expected):
    """Check that each row of vectors agrees to within 1e-5 of its norm."""
    assert got.shape == expected.shape
    assert (np.linalg.norm(got - expected, axis=-1) <= 1e-5 * np.linalg.norm(expected, axis=-1)).all()


def load_st(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def edit(path: Path, **changes) -> None:
    """Set keys of a JSON file. The value `...` removes a key."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))


def edit_modules(folder: Path, change) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(change(modules) or modules))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Return tiny folders in the older format, by name.

    bert truncates texts to 20 tokens and has 66 positions; long has 700 positions; layers returns the hidden states of all
    layers.
    """
    root = tmp_path_factory.mktemp("bases")
    tiny_encoder(max_length=20).save_pretrained(root / "bert", verify=False)
    long = Encoder(tiny_model(max_position_embeddings=700), small_tokenizer(), max_length=700)
    long.save_pretrained(root / "long", verify=False)
    shutil.copytree(root / "bert", root / "layers")
    edit(root / "layers" / "config.json", output_hidden_states=True)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def make(bases, tmp_path):
    """Return a function that writes a folder.

    make() copies a base. make(module, ...) lets sentence-transformers save the transformer of the base, followed by these
    modules.
    """

    def make(*modules, base: str = "bert", safe: bool = True, **settings) -> Path:
        folder = tmp_path / "theirs"
        if modules:
            model = SentenceTransformer(modules=[load_st(bases[base])[0], *modules], device="cpu", **settings)
            model.save(str(folder), create_model_card=False, safe_serialization=safe)
        else:
            shutil.copytree(bases[base], folder)
        return folder

    return make


def dense(*widths, activation=torch.nn.Tanh, seed: int = 1, **settings) -> st.Dense:
    torch.manual_seed(seed)
    return st.Dense(*widths, activation_function=activation(), **settings)


def pooler(shift: float = 0, **settings) -> st.Dense:
    """Return a Dense with the weight of the base's own pooler, and with the bias of the pooler plus `shift`."""
    layer = dense(32, 32, **settings)
    layer.linear.load_state_dict(tiny_model().pooler.dense.state_dict())
    layer.linear.bias.data += shift
    return layer


def layer_weights(*weights: float) -> st.WeightedLayerPooling:
    weights = torch.nn.Parameter(torch.tensor(weights))
    return st.WeightedLayerPooling(32, num_hidden_layers=3, layer_start=1, layer_weights=weights)


def layers(*weights: float, mode: str = "mean", base: str = "layers"):
    return lambda make: make(layer_weights(*weights), st.Pooling(32, mode), base=base)


# ---- the same vectors, after loading and after saving again ----


def pooling_without_a_flag(make):
    folder = make()
    edit(folder / "1_Pooling" / "config.json", **{f"pooling_mode_{mode}": ... for mode in ("mean_tokens", "cls_token")})
    return folder


def older_name_of_the_config(name):
    def build(make):
        folder = make()
        (folder / BERT).rename(folder / name)
        edit(folder / name, max_seq_length=9)
        return folder

    return build


def transformer_in_a_folder(make):
    """Put the transformer into 0_Transformer, as older releases do, and another model of the same width at the root."""
    folder = make()
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", BERT):
        (folder / name).rename(folder / "0_Transformer" / name)
    root = Encoder(tiny_model(seed=5, num_attention_heads=2), small_tokenizer(), "cls", max_length=6)
    root.save_pretrained(folder.with_name("root"), verify=False)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", BERT):
        shutil.copy(folder.with_name("root") / name, folder)
    edit_modules(folder, lambda modules: modules[0].update(path="0_Transformer"))
    return folder


def keys(file, **changes):
    def build(make):
        folder = make()
        edit(folder / file, **changes)
        return folder

    return build


def length_in_the_tokenizer_only(make):
    folder = make()
    edit(folder / BERT, max_seq_length=...)
    edit(folder / "tokenizer_config.json", model_max_length=11)
    return folder


def no_length(make, base="bert"):
    folder = make(base=base)
    edit(folder / BERT, max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=...)
    return folder


def chat_template_that_is_not_used(make):
    folder = make()
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def other_weight_files(make):
    folder = make(layer_weights(1.0, 0.0, 1.0), st.Pooling(32), dense(32, 8), base="layers", safe=False)
    for path in [*folder.glob("*/model.safetensors"), folder / "model.safetensors"]:
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    return folder


SAME = {
    "pooling cls": lambda make: make(st.Pooling(32, "cls")),
    "pooling lasttoken": lambda make: make(st.Pooling(32, "lasttoken")),
    "pooling weightedmean": lambda make: make(st.Pooling(32, "weightedmean")),
    "pooling mean, Normalize": lambda make: make(st.Pooling(32, "mean"), st.Normalize()),
    "pooling without a flag": pooling_without_a_flag,
    "Normalize twice": lambda make: make(st.Pooling(32), st.Normalize(), st.Normalize()),
    "Dropout": lambda make: make(st.Pooling(32), st.Dropout(0.5), dense(32, 8)),
    "Dense": lambda make: make(st.Pooling(32), dense(32, 8)),
    "Dense with ReLU, no bias": lambda make: make(st.Pooling(32), dense(32, 8, activation=torch.nn.ReLU, bias=False)),
    "Dense with GELU, by its short name": lambda make: dense_config(activation_function="torch.nn.GELU")(make),
    "Dense with a residual": lambda make: make(st.Pooling(32), dense(32, 32, use_residual=True), st.Normalize()),
    "Dense with a narrower residual": lambda make: make(st.Pooling(32, "cls"), dense(32, 8, use_residual=True)),
    "Dense is the pooler": lambda make: make(st.Pooling(32, "cls"), pooler()),
    "Dense is the pooler, and another": lambda make: make(st.Pooling(32, "cls"), pooler(), dense(32, 8)),
    "Dense is the pooler but for the bias": lambda make: make(st.Pooling(32, "cls"), pooler(shift=0.5)),
    "Dense is the pooler behind a mean": lambda make: make(st.Pooling(32, "mean"), pooler()),
    "Dense is the pooler but for the tanh": lambda make: make(st.Pooling(32, "cls"), pooler(activation=torch.nn.Identity)),
    "two Dense": lambda make: make(
        st.Pooling(32), dense(32, 48, bias=False, activation=torch.nn.GELU), dense(48, 4), st.Normalize()
    ),
    "layers, first and last": layers(1.0, 0.0, 1.0),
    "layers, last two": layers(0.0, 0.5, 0.5),
    "layers, last alone, cls": layers(0.0, 0.0, 2.0, mode="cls"),
    "weights in pytorch_model.bin": other_weight_files,
    "truncate_dim": lambda make: make(st.Pooling(32), truncate_dim=5),
    "truncate_dim behind Normalize": lambda make: make(st.Pooling(32), dense(32, 12), st.Normalize(), truncate_dim=5),
    "truncate_dim above the width": lambda make: make(st.Pooling(32), truncate_dim=500),
    "length in the tokenizer only, as release 6 writes it": length_in_the_tokenizer_only,
    "no length": no_length,
    "no length, 700 positions": lambda make: no_length(make, "long"),
    "length above the tokenizer's": keys("tokenizer_config.json", model_max_length=7),
    "transformer in 0_Transformer, another model at the root": transformer_in_a_folder,
    **{
        f"sentence_{kind}_config.json": older_name_of_the_config(f"sentence_{kind}_config.json")
        for kind in ("roberta", "xlnet")
    },
    "do_lower_case of an uncased tokenizer": keys(BERT, do_lower_case=True),
    "a chat template that older folders do not use": chat_template_that_is_not_used,
    "trust_remote_code alone": keys(BERT, model_args={"trust_remote_code": True}, tokenizer_args={}, config_args={}),
    "unknown keys that are empty": keys(CONFIG, something=None, another={}, third=False),
    "attentions, and outputs as a tuple": keys("config.json", output_attentions=True, return_dict=False),
    "unpad_inputs": keys(BERT, unpad_inputs=False, transformer_task="feature-extraction"),
    "a default prompt": lambda make: make(st.Pooling(32), prompts={"query": "search: "}, default_prompt_name="query"),
    "a default prompt by another name": lambda make: make(
        st.Pooling(32), prompts={"sts": "`like` {x}\n", "no": ""}, default_prompt_name="sts"
    ),
    "a default prompt that is empty": lambda make: make(st.Pooling(32), default_prompt_name="document"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_vectors_there_and_back(make, tmp_path, name):
    folder, texts = SAME[name](make), TEXTS
    if "700 positions" in name:
        texts = [*TEXTS, LONG * 5]
        assert len(small_tokenizer()(LONG * 5)["input_ids"]) > 600  # by default, the encoder keeps 512 of them
    expected = load_st(folder).encode(texts)
    encoder = Encoder.from_pretrained(folder)
    assert_same(encoder.encode(texts), expected)
    assert encoder.dimension == expected.shape[1]
    encoder.save_pretrained(tmp_path / "ours", verify=False)  # because the loaders are compared here
    assert_same(load_st(tmp_path / "ours").encode(texts), expected)
    assert_same(Encoder.from_pretrained(tmp_path / "ours").encode(texts), expected)


@pytest.mark.parametrize(
    "name",
    [
        "Dense with a narrower residual",
        "Dense is the pooler, and another",
        "truncate_dim behind Normalize",
        "a default prompt by another name",
    ],
)
def test_the_cards_code_gives_the_vectors(make, tmp_path, name):
    encoder = Encoder.from_pretrained(SAME[name](make))
    encoder.save_pretrained(tmp_path / "ours")
    code = (tmp_path / "ours" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace('"FOLDER"', repr(str(tmp_path / "ours"))), names)
    assert_same(names["vectors"].detach().numpy(), encoder.encode(["a cat", "a dog sleeping by the fire"]))


# ---- refused ----


def without(file):
    """Save a folder with a Dense, and remove a file of it."""

    def build(make):
        folder = make(st.Pooling(32), dense(32, 8))
        (folder / file).unlink()
        return folder

    return build


def other_module(kind, **about):
    """Replace the module after the pooling by a module of another kind."""

    def build(make):
        folder = make(st.Pooling(32), st.Normalize())
        edit_modules(folder, lambda modules: modules[2].update({"type": kind, **about}))
        return folder

    return build


def first_module(kind):
    def build(make):
        folder = make()
        edit_modules(folder, lambda modules: modules[0].update(type=kind))
        return folder

    return build


def pooling_type(kind):
    def build(make):
        folder = make()
        edit_modules(folder, lambda modules: modules[1].update(type=kind))
        return folder

    return build


def without_modules_json(make):
    folder = make()
    (folder / "modules.json").unlink()
    return folder


def without_pooling(make):
    folder = make()
    edit_modules(folder, lambda modules: modules[:1])
    return folder


def broken_json(make):
    folder = make()
    (folder / CONFIG).write_text('{"prompts": ')
    return folder


def no_list(make):
    folder = make()
    (folder / "modules.json").write_text("{}")
    return folder


def cased_tokenizer(make):
    folder = make()
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    edit(folder / BERT, do_lower_case=True)
    return folder


def plain_with_chat_template(make):
    folder = make()
    for path in [*folder.glob("*sentence*.json"), folder / "modules.json"]:
        path.unlink()
    shutil.rmtree(folder / "1_Pooling")
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def saved_with_chat_template(make):
    """Let release 6 of sentence-transformers save a folder that applies the chat template to texts."""
    plain = plain_with_chat_template(make)
    load_st(plain).save(str(plain.with_name("saved")), create_model_card=False)
    return plain.with_name("saved")


def plain(architecture):
    """Return what writes a checkpoint without files of sentence-transformers, whose config names this architecture."""

    def build(make):
        folder = plain_with_chat_template(make)
        (folder / "chat_template.jinja").unlink()
        edit(folder / "config.json", architectures=[architecture])
        return folder

    return build


def cross_encoder(make):
    """Let release 6 of sentence-transformers save a cross-encoder."""
    folder = plain("BertForSequenceClassification")(make)
    CrossEncoder(str(folder), num_labels=1, device="cpu").save_pretrained(str(folder.with_name("saved")))
    return folder.with_name("saved")


def dense_config(**changes):
    def build(make):
        folder = make(st.Pooling(32), dense(32, 8))
        edit(folder / "2_Dense" / "config.json", **changes)
        return folder

    return build


def dense_tensors(make):
    folder = make(st.Pooling(32), dense(32, 8))
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    save_file(weights | {"activation_function.weight": torch.ones(1)}, folder / "2_Dense" / "model.safetensors")
    return folder


MODULES = "sentence_transformers.models."
FIRST_MODULES = ["BoW", "WordEmbeddings", "StaticEmbedding", "CLIPModel", "Asym"]
OTHER_OUTPUT = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
REFUSED = {  # name -> (function that builds the folder, a part of the error message)
    "two Poolings": (lambda make: make(st.Pooling(32), st.Pooling(32)), "the module Pooling ('2_Pooling') after Pooling"),
    "Normalize in the middle": (
        lambda make: make(st.Pooling(32), st.Normalize(), dense(32, 8)), "the module Dense ('3_Dense') after Normalize",
    ),
    "layer pooling behind the pooling": (lambda make: make(st.Pooling(32), layer_weights(1.0, 0.0, 1.0)), "after Pooling"),
    "pooling max": (lambda make: make(st.Pooling(32, "max")), "pooling max"),
    "pooling mean_sqrt_len": (lambda make: make(st.Pooling(32, "mean_sqrt_len_tokens")), "pooling mean_sqrt_len_tokens"),
    "two modes": (lambda make: make(st.Pooling(32, ("cls", "mean"))), "pooling cls + mean"),
    "two flags": (keys("1_Pooling/config.json", pooling_mode_cls_token=True), "pooling cls_token + mean_tokens"),
    "include_prompt": (lambda make: make(st.Pooling(32, include_prompt=False), prompts={"query": "x: "}), "include_prompt"),
    "an unknown key of Pooling": (keys("1_Pooling/config.json", temperature=2), "temperature 2 in 1_Pooling/config.json"),
    "no Pooling": (without_pooling, "a modules.json without Pooling"),
    "layers, first and last, cls": (layers(1.0, 0.0, 1.0, mode="cls"), "pooling cls of the layers"),
    "layers, last two, last": (layers(0.0, 1.0, 1.0, mode="lasttoken"), "pooling last of the layers"),
    "layers, others": (layers(1.0, 1.0, 1.0), "layer weights [1.0, 1.0, 1.0]"),
    "layers, unequal": (layers(1.0, 0.0, 2.0), "layer weights [1.0, 0.0, 2.0]"),
    "layers without effect": (
        layers(1.0, 0.0, 1.0, base="bert"), "has no effect, because config.json does not set output_hidden_states",
    ),
    "LSTM": (lambda make: make(st.LSTM(32, 16), st.Pooling(32)), "the module LSTM"),
    "CNN": (lambda make: make(st.CNN(32), st.Pooling(96)), "the module CNN"),
    "LayerNorm": (lambda make: make(st.Pooling(32), st.LayerNorm(32)), "the module LayerNorm"),
    "WordWeights": (other_module(MODULES + "WordWeights"), "the module WordWeights"),
    **{kind: (first_module(MODULES + kind), f"the module {kind} ('')") for kind in FIRST_MODULES},
    "Router": (first_module("sentence_transformers.base.modules.router.Router"), "the module Router ('')"),
    "custom transformer": (first_module("custom_st.Transformer"), "the module custom_st.Transformer ('')"),
    "custom pooling": (pooling_type("my_code.Pooling"), "the module my_code.Pooling ('1_Pooling')"),
    "custom normalize": (other_module("sentence_transformers_extra.Normalize"), "sentence_transformers_extra.Normalize ('2"),
    "no package": (pooling_type("Pooling"), "the module Pooling ('1_Pooling'), which is the model's own code"),
    "path outside": (other_module(MODULES + "Normalize", path="../elsewhere"), "'../elsewhere', which is outside"),
    "one name twice": (other_module(MODULES + "Normalize", name="1"), "with the name '1' of another module"),
    "a module without a type": (other_module(None), "which lacks a path or a type"),
    "a length of zero": (keys(BERT, max_seq_length=0), "max_length is 0; it must be at least 1"),  # BUG: it was ignored
    "a length that is text": (keys(BERT, max_seq_length="64"), 'max_seq_length "64" in sentence_bert_config.json'),
    "a length of the tokenizer that is text": (keys("tokenizer_config.json", model_max_length="x"), "model_max_length 'x' in"),
    "a mode that is a number": (keys("1_Pooling/config.json", pooling_mode=3), "pooling_mode 3 in 1_Pooling/config.json"),
    "an activation that is a list": (dense_config(activation_function=["Tanh"]), 'activation_function ["Tanh"]'),
    "modules.json that is no list": (no_list, "modules.json does not hold a list at the top level"),
    "SparseEncoder": (keys(CONFIG, model_type="SparseEncoder"), 'model_type "SparseEncoder"'),
    "similarity maxsim": (keys(CONFIG, similarity_fn_name="maxsim"), "'maxsim'; use one of cosine, dot, euclidean, manhattan"),
    "truncate_dim below 1": (keys(CONFIG, truncate_dim=-3), "truncate_dim is -3"),
    "truncate_dim that is text": (keys(CONFIG, truncate_dim="8"), 'truncate_dim "8"'),
    "an unknown key of the model": (keys(CONFIG, query_prefix="Q"), 'query_prefix "Q" in config_sentence_transformers.json'),
    "default prompt that is not there": (keys(CONFIG, default_prompt_name="passage"), "'passage'"),
    "prompts that are no texts": (keys(CONFIG, prompts={"query": 3}), "the prompts {'query': 3} are not all texts"),
    "broken JSON": (broken_json, "config_sentence_transformers.json is not JSON"),
    "processing_kwargs": (
        keys(BERT, processing_kwargs={"text": {"max_length": 5}}),
        'processing_kwargs {"text": {"max_length": 5}} in sentence_bert_config.json',
    ),
    "tokenizer_args": (keys(BERT, tokenizer_args={"do_lower_case": True}), "tokenizer_args"),
    "processor_kwargs": (keys(BERT, processor_kwargs={"add_eos_token": True}), "processor_kwargs"),
    "config_args": (keys(BERT, config_args={"num_hidden_layers": 2}), "config_args"),
    "config_kwargs": (keys(BERT, config_kwargs={"num_hidden_layers": 2}), "config_kwargs"),
    "model_args": (keys(BERT, model_args={"dtype": "float64"}), "model_args"),
    "model_kwargs": (keys(BERT, model_kwargs={"dtype": "float64"}), "model_kwargs"),
    "tokenizer_name_or_path": (keys(BERT, tokenizer_name_or_path="other"), "tokenizer_name_or_path"),
    "query_length": (keys(BERT, query_length=8), "query_length 8"),
    "another task": (keys(BERT, transformer_task="fill-mask"), "transformer_task"),
    "another output": (keys(BERT, modality_config=OTHER_OUTPUT, module_output_name="sentence_embedding"), "modality_config"),
    "chat template": (saved_with_chat_template, "the chat template"),
    "chat template of a plain checkpoint": (
        plain_with_chat_template, "chat template to texts, which hf_embed does not support; set pooling",
    ),
    # BUG: a cross-encoder was loaded as an embedding model, with mean pooling, and without a word.
    "cross-encoder": (plain("BertForSequenceClassification"), "it is a BertForSequenceClassification (a cross-encoder,"),
    "cross-encoder of release 6": (cross_encoder, 'model_type "CrossEncoder" in config_sentence_transformers.json; load it'),
    "ColBERT": (plain("HF_ColBERT"), "it is a HF_ColBERT (a cross-encoder, classifier or multi-vector model)"),
    "1_Pooling without modules.json": (without_modules_json, "1_Pooling/config.json exists, but modules.json does not"),
    "do_lower_case of a cased tokenizer": (
        cased_tokenizer, "do_lower_case in sentence_bert_config.json; set it in tokenizer_config.json",
    ),
    "Dense with an activation of its own": (dense_config(activation_function="my.Doubled"), "the module Dense ('2_Dense')"),
    "Dense that reads the tokens": (dense_config(module_input_name="token_embeddings"), 'module_input_name "token_embeddings"'),
    "Dense that writes elsewhere": (dense_config(module_output_name="logits"), 'module_output_name "logits"'),
    "Dense with an unknown key": (dense_config(scale=2.0), "scale 2.0 in 2_Dense/config.json"),
    "Dense with weights beyond its layer": (dense_tensors, "activation_function.weight"),
    # BUG: without this file, the pooling was mean, and no message said so.
    "no config of Pooling": (without("1_Pooling/config.json"), "1_Pooling/config.json is missing"),
    "no config of Dense": (without("2_Dense/config.json"), "2_Dense/config.json is missing"),
    "no weights of Dense": (without("2_Dense/model.safetensors"), "'2_Dense' has no weights"),
    "Dense of another width": (lambda make: make(st.Pooling(32, ("cls", "mean")), dense(64, 8)), "pooling cls + mean"),
    "Normalize of the tokens": (
        lambda make: make(st.Pooling(32), st.Normalize("token_embeddings")), 'module_input_name "token_embeddings"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(make, name):
    build, says = REFUSED[name]
    message = error_of(Encoder.from_pretrained, build(make))
    assert says in message
    assert message.startswith("model '") or "; " in message  # the message names the model, or says what to change


def test_a_revision_counts_for_every_file(tmp_path):
    for commit, settings in (("a" * 40, {"pooling": "cls", "max_length": 9}), ("b" * 40, {"normalize": True, "seed": 1})):
        folder = tmp_path / "models--user--mine" / "snapshots" / commit
        folder.parent.mkdir(parents=True, exist_ok=True)
        tiny_encoder(**settings).save_pretrained(folder, verify=False)
    (tmp_path / "models--user--mine" / "refs").mkdir()
    for branch, commit in (("main", "a" * 40), ("other", "b" * 40)):
        (tmp_path / "models--user--mine" / "refs" / branch).write_text(commit)
        encoder = Encoder.from_pretrained("user/mine", revision=branch, cache_dir=str(tmp_path))
        theirs = SentenceTransformer("user/mine", revision=branch, cache_folder=str(tmp_path), device="cpu")
        assert_same(encoder.encode(TEXTS), theirs.encode(TEXTS))


def test_a_subfolder_is_refused(bases):
    assert "subfolder" in error_of(Encoder.from_pretrained, bases["bert"], subfolder="1_Pooling")


@pytest.mark.parametrize(
    ("option", "mend"),
    [({"device": "cpu"}, ".to(device)"), ({"truncate_dim": 8}, "set the attribute"),
     ({"backend": "onnx"}, "export_onnx"), ({"processor_kwargs": {}}, "Encoder(model, tokenizer)")],
)  # fmt: skip
def test_options_of_sentence_transformers_are_refused_with_the_mend(bases, option, mend):
    message = error_of(Encoder.from_pretrained, bases["bert"], **option)  # BUG: it said that the model cannot be loaded
    assert f"does not support {next(iter(option))}; " in message and mend in message


def test_the_attributes_that_the_mend_names_count(bases, tmp_path):
    encoder = Encoder.from_pretrained(bases["bert"])
    encoder.prompts, encoder.truncate_dim, encoder.similarity_fn_name = {"query": "search: "}, 8, "dot"
    encoder.default_prompt_name = "query"
    encoder.save_pretrained(tmp_path / "ours")
    theirs = load_st(tmp_path / "ours")
    assert (theirs.similarity_fn_name, theirs.default_prompt_name) == ("dot", "query")
    expected = SentenceTransformer(str(bases["bert"]), device="cpu", truncate_dim=8).encode(TEXTS, prompt="search: ")
    assert_same(encoder.encode(TEXTS), expected)
    assert_same(theirs.encode(TEXTS), expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("truncate_dim", -1, "truncate_dim is -1"), ("max_length", 67, "max_length 67 is above the 66 positions"),
     ("similarity_fn_name", "cos_sim", "unknown similarity_fn_name 'cos_sim'; use one of cosine"),
     ("prompts", "query: ", "prompts are 'query: '"), ("normalize", "l2", "normalize is 'l2'"),
     ("pooling", "max", "unknown pooling 'max'")],
)  # fmt: skip
def test_a_setting_that_no_encoder_can_have_is_refused_when_it_is_set(name, value, message):
    """BUG: truncate_dim=-1 removed the last number of each vector; others ended in a KeyError or an index error in `encode`."""
    encoder = tiny_encoder()
    before = getattr(encoder, name)
    assert message in error_of(setattr, encoder, name, value)
    assert getattr(encoder, name) == before


@pytest.mark.parametrize(
    ("name", "mend"),
    [("max_seq_length", "max_length"), ("get_sentence_embedding_dimension", "dimension"), ("tokenize", "tokenizer"),
     ("start_multi_process_pool", "encode(device=[...])"), ("save", "save_pretrained"), ("fit", "ContrastiveTrainer")],
)  # fmt: skip
def test_attributes_of_sentence_transformers_are_refused_with_ours(name, mend):
    """BUG: `encoder.max_seq_length = 8` had no effect, and no message said so."""
    encoder = tiny_encoder()
    for use in (lambda: getattr(encoder, name), lambda: setattr(encoder, name, 8)):
        with pytest.raises(AttributeError, match=re.escape(f"Encoder has no attribute '{name}'; use {mend}")):
            use()
    assert not hasattr(encoder, name)


def test_what_is_no_encoder_is_refused_with_the_mend(tmp_path):
    """BUG: the functions ended in errors such as "'str' object has no attribute 'config'"."""
    rows = [("a cat", "cats"), ("a dog", "dogs")]
    for model in (tiny_model(), "NAME"):
        for call in (
            lambda model: hf_embed.mine_hard_negatives(rows, model),
            lambda model: hf_embed.write_vectors(model, ["a"], tmp_path / "out.npy"),
            lambda model: hf_embed.write_card(model, tmp_path),
            lambda model: hf_embed.export_onnx(model, tmp_path / "out"),
        ):
            message = f"the model is a {type(model).__name__}; give an Encoder, for example Encoder.from_pretrained(NAME)"
            assert message in error_of(call, model)


# ---- a pooling that the caller gives ----


@pytest.mark.parametrize("name", ["pooling max", "two modes", "no Pooling", "layers, others", "an unknown key of Pooling"])
def test_a_pooling_that_is_given_replaces_one_that_cannot_be_read(make, name, caplog):
    folder = REFUSED[name][0](make)
    edit(folder / CONFIG, prompts={"query": "x: "}, truncate_dim=7, similarity_fn_name="dot")
    encoder = Encoder.from_pretrained(folder, pooling="cls")
    assert "using pooling cls as given, because the folder's own pooling is not supported" in caplog.text
    assert (encoder.prompts, encoder.dimension, encoder.similarity_fn_name) == ({"query": "x: "}, 7, "dot")
    assert_same(encoder.encode(TEXTS), tiny_encoder(pooling="cls", max_length=20).encode(TEXTS)[:, :7])


def test_layers_behind_it_stay_or_are_refused(make, caplog):
    folder = make(st.Pooling(32, "max"), dense(32, 8), st.Normalize())
    encoder = Encoder.from_pretrained(folder, pooling="cls")
    edit(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    assert_same(encoder.encode(TEXTS), load_st(folder).encode(TEXTS))


def test_layers_that_do_not_fit_it_are_refused(make):
    folder = REFUSED["Dense of another width"][0](make)
    assert "'2_Dense') with 64 inputs instead of 32" in error_of(Encoder.from_pretrained, folder, pooling="cls")


def test_it_says_that_the_head_is_left_out(make, caplog):
    encoder = Encoder.from_pretrained(SAME["Dense is the pooler, and another"](make), pooling="mean")
    assert "pooling mean does not use the layer '2_Dense', which belongs to the model's own pooling" in caplog.text
    assert len(encoder.dense) == 1


@pytest.mark.parametrize("name", ["chat template of a plain checkpoint", "1_Pooling without modules.json", "cross-encoder"])
def test_a_plain_checkpoint_with_a_pooling_given(make, name, caplog):
    encoder = Encoder.from_pretrained(REFUSED[name][0](make), pooling="cls")
    assert ("because modules.json does not exist" in caplog.text) == ("1_Pooling" in name)
    assert_same(encoder.encode(TEXTS), tiny_encoder(pooling="cls", max_length=20).encode(TEXTS))


# ---- plain checkpoints ----


def test_a_causal_language_model_is_pooled_as_sentence_transformers_does(make, caplog):
    folder = plain("BertForCausalLM")(make)
    assert_same(Encoder.from_pretrained(folder).encode(TEXTS), load_st(folder).encode(TEXTS))
    assert "pooling is last" in caplog.text


# ---- lengths ----


def test_a_plain_checkpoint_says_that_it_is_cut_earlier(make, caplog):
    folder = make(base="long")
    for name in ("modules.json", CONFIG, "1_Pooling/config.json"):
        (folder / name).unlink()
    assert Encoder.from_pretrained(folder).max_length == 512
    assert "texts are truncated to 512 tokens, but the model accepts up to 700; set max_length to use more" in caplog.text
    caplog.clear()
    assert Encoder.from_pretrained(folder, max_length=600).max_length == 600
    assert "truncated to" not in caplog.text


def test_a_length_above_the_positions_is_cut_there_and_says_so(make, caplog):
    """sentence-transformers fails on texts longer than the positions, so only short texts are compared."""
    folder = make()
    edit(folder / BERT, max_seq_length=80)
    encoder = Encoder.from_pretrained(folder)
    assert encoder.max_length == 66
    assert "texts are truncated to 66 tokens, not to 80, as it has only 66 positions" in caplog.text
    short = [text for text in TEXTS if text != LONG]
    assert_same(encoder.encode(short), load_st(folder).encode(short))
    assert "max_length 80 is above the 66 positions" in error_of(Encoder.from_pretrained, folder, max_length=80)


def test_requirements_are_named(make, caplog):
    folder = keys(CONFIG, requirements={"transformers": ">=5"})(make)
    assert_same(Encoder.from_pretrained(folder).encode(TEXTS), load_st(folder).encode(TEXTS))
    assert 'requires {"transformers": ">=5"}; hf_embed does not check this' in caplog.text


# ---- prompts, similarities ----


def test_prompts_are_kept_and_saved_again(make, tmp_path):
    prompts = {"query": "search: ", "document": "", "passage": "", "STS": "like: "}
    folder = make(st.Pooling(32), prompts=prompts, default_prompt_name="STS")
    encoder = Encoder.from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "ours")
    theirs = load_st(folder)
    for model in (encoder, load_st(tmp_path / "ours"), Encoder.from_pretrained(tmp_path / "ours")):
        for name in (None, *prompts):
            assert_same(model.encode(TEXTS, prompt_name=name), theirs.encode(TEXTS, prompt_name=name))
    assert "STS       'like: ' (the default)" in (tmp_path / "ours" / "README.md").read_text()


def test_control_prompts_count(make):
    model = load_st(make(st.Pooling(32), prompts={"query": "search: "}, default_prompt_name="query"))
    assert np.abs(model.encode(TEXTS) - model.encode(TEXTS, prompt_name="document")).max() > 1e-2


@pytest.mark.parametrize(
    ("prompts", "unused"),
    [
        # BUG: these trained without a prompt before documents, or before queries too, and no message said so.
        ({"query": "search_query: ", "passage": "search_document: ", "STS": "like: "}, "STS, passage"),  # nomic-embed-text-v2
        ({"web_search_query": "find: ", "sts_query": "like: "}, "sts_query, web_search_query"),  # e5-mistral
        ({"query": "search: ", "passage": "", "STS": "like: "}, None),
        ({"query": "search: ", "document": "text: ", "passage": "text: "}, None),
    ],
)
def test_prompts_of_other_names_are_named(make, prompts, unused, caplog):
    folder = make(st.Pooling(32), prompts=prompts)
    encoder = Encoder.from_pretrained(folder)
    for text, kind in ((encoder.encode_query(TEXTS), "query"), (encoder.encode_document(TEXTS), "document")):
        assert_same(text, encoder.encode([prompts.get(kind, "") + each for each in TEXTS]))
    assert (f"not those named {unused}; rename" in caplog.text) is (unused is not None)
    assert ("use only the prompts named" in caplog.text) is (unused is not None)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(make, tmp_path, name, caplog):
    folder = make(st.Pooling(32), similarity_fn_name=name)
    theirs, encoder = load_st(folder), Encoder.from_pretrained(folder)
    assert (f"compare its vectors by {name}" in caplog.text) == (name != "cosine")
    encoder.save_pretrained(tmp_path / "ours", verify=False)
    a, b = theirs.encode(TEXTS), theirs.encode(TEXTS[::-1])
    for model in (encoder, Encoder.from_pretrained(tmp_path / "ours"), load_st(tmp_path / "ours")):
        assert model.similarity_fn_name == name
        for function in ("similarity", "similarity_pairwise"):
            pairs = [(a, b), (torch.tensor(a), torch.tensor(b)), (a[0], b[1])]
            for left, right in pairs if function == "similarity" else pairs[:2]:
                expected = getattr(theirs, function)(left, right)
                torch.testing.assert_close(getattr(model, function)(left, right), expected, rtol=1e-5, atol=1e-5)
    pytest.importorskip("mteb")
    assert model_meta(encoder).similarity_fn_name.value == name


# ---- training such a folder ----


def test_training_keeps_what_the_folder_says(make, tmp_path, caplog):
    """Settings of the run replace those of the folder. The other settings stay."""
    folder = make(
        st.Pooling(32), dense(32, 8, use_residual=True), truncate_dim=5, similarity_fn_name="dot",
        prompts={"query": "q: ", "STS": "like: "}, default_prompt_name="STS",
    )  # fmt: skip
    args = ContrastiveTrainingArguments(
        str(tmp_path / "out"), report_to=[], use_cpu=True, max_length=12, prompts={"document": "d: "}
    )
    trainer = ContrastiveTrainer(model=Encoder.from_pretrained(folder), args=args)
    encoder = trainer.encoder
    assert "encode puts the model's default prompt 'STS' before texts" in caplog.text
    assert "training uses all 8 dimensions, but encode returns only the first 5 (truncate_dim)" in caplog.text
    assert (encoder.max_length, encoder.prompts) == (12, {"STS": "like: ", "document": "d: "})
    assert (encoder.truncate_dim, encoder.similarity_fn_name, encoder.default_prompt_name) == (5, "dot", "STS")
    assert (encoder.full_dimension, encoder.dimension) == (8, 5)
    with torch.no_grad():
        evaluated = trainer._embed(TEXTS)
    assert_same(evaluated.numpy(), encoder.encode(TEXTS))
    trainer.save_model()
    assert_same(load_st(tmp_path / "out").encode(TEXTS), encoder.encode(TEXTS))


def test_a_bare_model_says_which_settings_of_its_folder_are_not_used(make, tmp_path, caplog):
    """BUG: without a word, Qwen3-Embedding was trained with mean pooling, and EmbeddingGemma without its dense layers."""
    folder = make(st.Pooling(32, "cls"), dense(32, 8), st.Normalize(), prompts={"query": "q: "})
    args = {"output_dir": str(tmp_path / "out"), "report_to": [], "use_cpu": True}
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def said(model, **settings) -> str:
        caplog.clear()
        ContrastiveTrainer(model, ContrastiveTrainingArguments(**args, **settings), processing_class=tokenizer)
        found = [message for message in caplog.messages if "AutoModel does not load" in message]
        return found[0].partition(": ")[2].partition(" (")[0] if found else ""

    names = ["pooling", "normalize", "prompts", "layers after the pooling"]
    model = AutoModel.from_pretrained(folder)
    assert said(model) == ", ".join(names)
    assert said(model, pooling="mean", normalize=False, prompts={"query": "x: "}) == names[-1]
    assert said(get_peft_model(model, LoraConfig(target_modules=["query"])), pooling="cls") == ", ".join(names[1:])
    assert "with the adapters around encoder.backbone" in caplog.text
    assert said(str(folder)) == said(Encoder.from_pretrained(folder)) == said(tiny_model()) == ""


def load_for_a_recipe(folder, tmp_path, masked_lm=False, dropout=None):
    args = ContrastiveTrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    flags = ModelArguments(model_name_or_path=str(folder), dropout=dropout)
    model, _, args = load_model(SimpleNamespace(model_args=flags, args=args, objective=SimCSE(mlm_weight=0.1 * masked_lm)))
    return model, args


def test_a_recipe_takes_the_transformer_that_the_folder_names(make, tmp_path):
    folder = transformer_in_a_folder(make)
    encoder, _ = load_for_a_recipe(folder, tmp_path, dropout=0.3)
    assert encoder.config.hidden_dropout_prob == 0.3
    assert_same(encoder.eval().encode(TEXTS), load_st(folder).encode(TEXTS))
    model, args = load_for_a_recipe(folder, tmp_path, masked_lm=True)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, encoder.backbone.embeddings.word_embeddings.weight)
    assert (args.pooling, args.max_length) == ("mean", 20)


def test_a_masked_lm_recipe_keeps_the_prompts_and_refuses_what_it_cannot_keep(make, tmp_path):
    folder = make(st.Pooling(32), prompts={"query": "q: "})
    assert load_for_a_recipe(folder, tmp_path, masked_lm=True)[1].prompts == {"query": "q: "}
    edit(folder / CONFIG, truncate_dim=4, default_prompt_name="query")
    assert "the settings default_prompt_name, truncate_dim of" in error_of(load_for_a_recipe, folder, tmp_path, masked_lm=True)


def test_mteb_takes_the_prompts_that_it_takes_with_sentence_transformers(make, tmp_path):
    pytest.importorskip("mteb")
    from test_mteb import LocalSearch, LocalSTS

    prompts = {"STS": "like: ", "Retrieval-query": "find: ", "query": "q: ", "document": "d: "}
    for i, default in enumerate((None, "query")):
        folder = make(st.Pooling(32), prompts=prompts, default_prompt_name=default)
        ours, theirs = Encoder.from_pretrained(folder), load_st(folder)
        scores = run_mteb(ours, [LocalSTS(), LocalSearch()], tmp_path / f"ours {i}")
        assert scores == run_mteb(theirs, [LocalSTS(), LocalSearch()], tmp_path / f"theirs {i}")
        ours.prompts = {}
        ours.default_prompt_name = None
        without = run_mteb(ours, [LocalSTS(), LocalSearch()], tmp_path / f"without {i}")
        assert [a["score"] != b["score"] for a, b in zip(scores, without)] == [True, True]  # the prompts change the scores
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"truncate_dim": 0}, "truncate_dim is 0"), ({"similarity_fn_name": "max"}, "'max'; use one of cosine"),
     ({"truncate_dim": True}, "truncate_dim is True"), ({"normalize": "no"}, "normalize is 'no'; it must be True or False"),
     ({"prompts": {"query": "a\ud800"}}, r"'a\ud800' holds half of a character"),
     ({"default_prompt_name": "x"}, "unknown prompt_name 'x'")],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(InputError) as error:
        tiny_encoder(**settings)
    assert says in str(error.value)
