"""The average of finished models: its weights, its card, and the refusal of models that differ in more than their weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_recipes import load_recipe

from hf_embed import Encoder
from hf_embed.averaging import average_models
from hf_embed.pooling import Dense

TEXTS = ["the cat", "rain on the river", "a house where nobody has lived for years"]


def layers(seed=0, width=16, activation=None):
    torch.manual_seed(seed)
    return [Dense(torch.nn.Linear(32, width), activation or torch.nn.Tanh())]


def saved(folder, *args, **settings) -> str:
    tiny_encoder(*args, **settings).save_pretrained(folder, verify=False)
    return str(folder)


MERGE = load_recipe("merge")


def merge(*words):
    MERGE.main(list(map(str, words)))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Return the folders of three models that differ only in their weights, those of a layer after the pooling included."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"normalize": True, "prompts": {"query": "find: "}}
    return [saved(folder / f"m{seed}", "bert", "mean", seed, dense=layers(seed), **settings) for seed in range(3)]


def tensors(folder) -> dict[str, torch.Tensor]:
    files = sorted(Path(folder).glob("**/model.safetensors"))
    return {
        f"{file.parent.name if file.parent != Path(folder) else ''}/{k}": t
        for file in files
        for k, t in load_file(file).items()
    }


def test_the_recipe_averages_and_tells_of_what(models, tmp_path, capsys):
    out = tmp_path / "average"
    merge(*models, "--weights", 2, 1, 1, "--output_dir", out)
    parts, average = [tensors(model) for model in models], tensors(out)
    assert len({key.split("/")[0] for key in average}) == 2  # the transformer and the layer after the pooling
    for key, tensor in average.items():
        expected = 0.5 * parts[0][key].double() + 0.25 * parts[1][key].double() + 0.25 * parts[2][key].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    results = json.loads((out / "results.json").read_text())
    assert results["averaged"] == [{"model": f"m{i}", "share": share} for i, share in enumerate((0.5, 0.25, 0.25))]
    card = (out / "README.md").read_text()
    assert "| m0 | 0.5 |" in card and "| m2 | 0.25 |" in card and "- merge\n" in card and str(tmp_path) not in card
    assert "0.5000  " + models[0] in capsys.readouterr().out
    loaded = Encoder.from_pretrained(out)
    assert loaded.normalize and loaded.prompts == {"query": "find: "}
    expected = loaded.encode(TEXTS)
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(average_models(models, [2, 1, 1]).encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert np.abs(average_models(models).encode(TEXTS) - expected).max() > 1e-3  # control: the weights matter


def test_half_precision_is_averaged_in_float32(tmp_path):
    for seed in (0, 1):
        encoder = tiny_encoder(seed=seed)
        encoder.backbone.to((torch.bfloat16, torch.float16)[seed])
        encoder.save_pretrained(tmp_path / str(seed))
    average = average_models([str(tmp_path / "0"), str(tmp_path / "1")], [1, 2])
    parts = [tensors(tmp_path / str(seed)) for seed in (0, 1)]
    assert {tensor.dtype for tensor in parts[0].values()} == {torch.bfloat16}
    for key, tensor in average.backbone.state_dict().items():
        expected = (parts[0][f"/{key}"].double() + 2 * parts[1][f"/{key}"].double()) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_the_average_of_a_model_with_itself_is_the_model(models):
    one, average = Encoder.from_pretrained(models[0]), average_models([models[0]] * 2, [0.5, 0.5])
    assert all(torch.equal(tensor, average.state_dict()[key]) for key, tensor in one.state_dict().items())


OTHERS = {
    "architecture: 'MPNetModel' and 'BertModel'": {"name": "mpnet"},
    "pooling: 'cls' and 'mean'": {"pooling": "cls"},
    "normalize: False and True": {"normalize": False},
    "prompts: {'query': 'look: '} and {'query': 'find: '}": {"prompts": {"query": "look: "}},
    "dense: [] and [(32, 16": {"dense": ()},
    "dense: [(32, 8, True, 'Tanh', 'NoneType')] and ": {"dense": layers(width=8)},
    "dense: [(32, 16, True, 'GELU', 'NoneType')] and ": {"dense": layers(activation=torch.nn.GELU())},
    "max_length: 9 and 66; average models that differ only in their weights, or set max_length": {"max_length": 9},
    "truncate_dim: 4 and None": {"truncate_dim": 4},
    "similarity_fn_name: 'dot' and 'cosine'": {"similarity_fn_name": "dot"},
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_difference_is_refused_by_name(models, tmp_path, message):
    same = {"name": "bert", "pooling": "mean", "normalize": True, "prompts": {"query": "find: "}, "dense": layers()}
    other = saved(tmp_path / "other", **same | OTHERS[message])
    found = error_of(average_models, [models[0], models[1], other])
    assert found.startswith(f"'{other}' and '{models[0]}' cannot be averaged, because they differ in {message}")


def test_different_lengths_are_averaged_at_a_given_length(models, tmp_path):
    shutil.copytree(models[1], tmp_path / "short")
    encoder = Encoder.from_pretrained(models[1], max_length=9)
    encoder.save_pretrained(tmp_path / "short")
    assert average_models([models[0], str(tmp_path / "short")], max_length=20).max_length == 20


def test_other_configs_and_tokenizers_are_refused(tmp_path):
    start = saved(tmp_path / "start")
    Encoder(tiny_model(layer_norm_eps=1e-5), small_tokenizer()).save_pretrained(tmp_path / "config")
    message = error_of(average_models, [start, str(tmp_path / "config")])
    assert "differ in architecture (layer_norm_eps in config.json): 1e-05 and 1e-12" in message
    Encoder(tiny_model(hidden_dropout_prob=0.3), small_tokenizer()).save_pretrained(tmp_path / "dropout")
    average_models([start, str(tmp_path / "dropout")])  # dropout changes no vector
    tokenizer = small_tokenizer()
    for name in ("plain", "added"):
        Encoder(tiny_model(vocab_size=12001), tokenizer).save_pretrained(tmp_path / name)
        tokenizer.add_tokens(["zzzz"])
    message = error_of(average_models, [str(tmp_path / "plain"), str(tmp_path / "added")])
    assert "because they differ in tokenizer; average" in message


def test_wrong_flags_are_refused_before_a_model_is_loaded(models, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    for words, message in (
        ([models[0], *out], "an average needs at least two models"),
        ([*models, "--weights", 1, 2, *out], "weights: there are 2 numbers for 3 models"),
        ([*models[:2], "--weights", 1, 0, *out], "weights: 0 is not a number above 0"),
        ([*models[:2], "--weights", 1, "nan", *out], "weights: nan is not a number above 0"),
        ([*models[:2], "--weights", 1, -1, *out], "weights: -1 is not a number above 0"),
        ([*models[:2], "--output_dir", models[1]], "is the model's own folder"),
        ([*models[:2], "--max_length", 0, *out], "max_length is 0"),
        (out, "missing: FOLDER"),
    ):
        assert message in error_of(merge, *words)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds files" in error_of(merge, *models[:2], *out)
    merge(*models[:2], *out, "--overwrite_output_dir")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert "absent" in error_of(merge, models[0], tmp_path / "absent", "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_scores_of_an_earlier_model_do_not_stay(models, tmp_path):
    shutil.copytree(models[0], tmp_path / "out")
    scored = {"after": {"sts": {"s": 99.0}}, "seed": 1}
    (tmp_path / "out" / "results.json").write_text(json.dumps(scored))
    merge(*models[1:], "--output_dir", tmp_path / "out", "--overwrite_output_dir")
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == {"averaged", "card"}
