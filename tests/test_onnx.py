"""The export to ONNX: the graph gives the encoder's vectors for any batch, and what cannot be exported is refused by name."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, get_peft_model
from test_recipes import load_recipe
from tokenizers import Tokenizer
from torch import nn

from hf_embed import Encoder, InputError, TempScaleConfig, apply_tempscale, export_onnx
from hf_embed.checkpoint import onnx
from hf_embed.checkpoint.card import write_results
from hf_embed.checkpoint.hub import model_files
from hf_embed.pooling import POOLINGS, Dense

ROOT = Path(__file__).parent.parent
SENTENCE = "the old keeper of the lighthouse wrote about ships and storms while rain fell on the sea"
WORDS = SENTENCE.split()
# Other numbers of texts and other lengths than those of the traced batch, from a single token to the longest text.
BATCHES = [
    ["rain"],
    [SENTENCE],
    [" ".join(WORDS[:n]) for n in (1, 17, 3, 9, 12, 2, 5)],
    ["a", " ".join(WORDS * 9)],
    ["storms and ships"] * 4,
]


def small_encoder(pooling: str = "mean", **settings) -> Encoder:
    """Return an encoder of one layer, which is exported in seconds."""
    return Encoder(tiny_model("bert", num_hidden_layers=1), small_tokenizer(), pooling, **settings).eval()


def run_graph(folder: Path, texts: list[str], output: str = "sentence_embedding", name: str = "model.onnx") -> np.ndarray:
    """Run a graph as a server does: with onnxruntime and tokenizers, from the files of the folder alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"])
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(texts)
    inputs = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    session = onnxruntime.InferenceSession(folder / "onnx" / name)
    feed = {one.name: np.array([getattr(row, inputs[one.name]) for row in rows]) for one in session.get_inputs()}
    return session.run([output], feed)[0]


def check_vectors(encoder: Encoder, folder: Path) -> None:
    """Check that the graph in a folder gives the encoder's vectors, to 1e-5 of their norm, and not the same for every text."""
    for texts in BATCHES:
        expected = encoder.encode(texts)
        difference = np.linalg.norm(run_graph(folder, texts) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert difference.max() < 1e-5
    vectors = run_graph(folder, BATCHES[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(1)
    dense = [Dense(nn.Linear(32, 24), nn.Tanh(), residual=True), Dense(nn.Linear(24, 16), nn.Identity())]
    return small_encoder(normalize=True, dense=dense, prompts={"query": "search: "}, default_prompt_name="query", max_length=48)


@pytest.fixture(scope="module")
def done(encoder, tmp_path_factory) -> onnx.Exported:
    return export_onnx(encoder, tmp_path_factory.mktemp("onnx") / "model", int8=True, results={"card": {"title": "Cats"}})


@pytest.fixture
def folder(done, tmp_path) -> Path:
    """A folder with the files of the exported model, which a test may change."""
    copy = tmp_path / "model"
    subprocess.run(["cp", "-r", done.path.parent.parent, copy], check=True)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def untraced(monkeypatch) -> None:
    """The slow tracing is replaced: the files are placeholders, and the vectors are the encoder's own."""
    monkeypatch.setattr(onnx, "write_graph", lambda encoder, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx, "through_onnx", lambda encoder, path: lambda texts: encoder.encode(texts, prompt=""))


# ---- the graph ----


def test_any_batch_has_the_encoders_vectors(encoder, done):
    assert done.difference < 1e-5 and done.path.is_file()
    folder = done.path.parent.parent
    for texts in BATCHES:
        expected = encoder.encode(texts, prompt="")
        np.testing.assert_allclose(run_graph(folder, texts), expected, atol=1e-5)
        assert np.abs(np.linalg.norm(expected, axis=-1) - 1).max() < 1e-5
    prompted = encoder.encode(BATCHES[2])  # prompts are put before the texts by the caller
    np.testing.assert_allclose(run_graph(folder, ["search: " + text for text in BATCHES[2]]), prompted, atol=1e-5)


def test_inputs_outputs_and_their_axes(done):
    session = onnxruntime.InferenceSession(done.path)
    both = ["batch_size", "sequence_length"]
    assert {one.name: one.shape for one in session.get_inputs()} == dict.fromkeys(
        ["input_ids", "attention_mask", "token_type_ids"], both
    )
    assert {one.name: one.shape for one in session.get_outputs()} == {
        "last_hidden_state": [*both, 32],
        "sentence_embedding": ["batch_size", 16],
    }


def test_hidden_states_are_those_of_the_model(encoder, done):
    folder = done.path.parent.parent
    text = SENTENCE
    batch = encoder.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.backbone(**batch).last_hidden_state
    np.testing.assert_allclose(run_graph(folder, [text], "last_hidden_state"), expected, atol=1e-5)


def test_int8_is_smaller_and_its_loss_is_reported(encoder, done):
    assert done.int8_path == done.path.with_name("model_quantized.onnx")
    assert done.int8_path.stat().st_size < 0.5 * done.path.stat().st_size
    texts = BATCHES[2]
    vectors = run_graph(done.path.parent.parent, texts, name="model_quantized.onnx")
    cosines = (vectors * encoder.encode(texts, prompt="")).sum(-1) / np.linalg.norm(vectors, axis=-1)
    assert 0.9 < cosines.min() < 1 - 1e-6 and 0.9 < done.cosine < 1 - 1e-6


def test_the_folder_is_a_whole_model(encoder, done):
    folder = done.path.parent.parent
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "model.safetensors"} < set(
        os.listdir(folder)
    )
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []
    np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(BATCHES[2]), encoder.encode(BATCHES[2]), atol=1e-6)
    assert "# Cats" in (folder / "README.md").read_text()


def test_sentence_transformers_finds_the_files(done):
    """Its ONNX backend itself needs another package, which does not install beside transformers 5."""
    from sentence_transformers.backend.utils import backend_should_export

    find = {"target_file_name": "model.onnx", "target_file_glob": "*.onnx", "backend_name": "ONNX"}
    folder = done.path.parent.parent
    export, found = backend_should_export(folder, True, {}, **find)
    assert not export and found == {"subfolder": "onnx", "file_name": "model.onnx"}
    export, found = backend_should_export(folder, True, {"file_name": "onnx/model_quantized.onnx"}, **find)
    assert not export and found == {"subfolder": "onnx", "file_name": "model_quantized.onnx"}


def test_a_push_uploads_the_graphs(folder):
    (folder / "onnx" / "notes.txt").write_text("private")
    pushed = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    assert {name for name in pushed if name.startswith("onnx")} == {"onnx/model.onnx", "onnx/model_quantized.onnx"}
    (folder / "onnx").rename(folder / "elsewhere")
    (folder / "onnx").symlink_to(folder / "elsewhere")
    assert "onnx is a link" in error_of(model_files, folder)


# ---- refusals ----


def test_a_missing_extra_is_named(encoder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    message = error_of(export_onnx, encoder, tmp_path / "new")
    assert message == 'the export to ONNX needs onnx, onnxscript, onnxruntime; run pip install "hf_embed[onnx]"'
    assert not (tmp_path / "new").exists()


def test_earlier_graphs_are_replaced_only_on_demand(encoder, folder, untraced):
    before = contents(folder)
    assert "model.onnx exists; replace it with --overwrite_output_dir" in error_of(export_onnx, encoder, folder)
    (folder / "onnx" / "model.onnx").unlink()
    assert "model_quantized.onnx exists; replace it" in error_of(export_onnx, encoder, folder)
    export_onnx(encoder, folder, overwrite=True)
    assert contents(folder) == before | {"onnx/model.onnx": b"graph"}


def test_only_the_same_model_gets_a_graph(encoder, tmp_path, untraced):
    encoder.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    for other in (tiny_encoder(seed=1), small_encoder(normalize=True), small_encoder("cls")):
        assert "holds another model than the exported one" in error_of(export_onnx, other, tmp_path / "model")
        assert contents(tmp_path / "model") == before
    export_onnx(encoder, tmp_path / "model")
    assert contents(tmp_path / "model") == before | {"onnx/model.onnx": b"graph"}


def test_another_model_is_replaced_as_a_whole_on_demand(encoder, folder, untraced):
    (folder / "mine.txt").write_text("mine")
    other = tiny_encoder("distilbert", "cls")
    export_onnx(other, folder, overwrite=True)
    assert os.listdir(folder / "onnx") == ["model.onnx"] and (folder / "mine.txt").read_text() == "mine"
    np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(BATCHES[2]), other.encode(BATCHES[2]), atol=1e-6)


def test_a_folder_with_other_files_is_refused(encoder, tmp_path, untraced):
    (tmp_path / "mine.txt").write_text("mine")
    assert "holds files but no model; give another folder" in error_of(export_onnx, encoder, tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
    (tmp_path / "mine.txt").rename(tmp_path / "modules.json")
    assert "has its transformer in a subfolder" in error_of(export_onnx, encoder, tmp_path)


def test_a_new_save_removes_the_graphs_of_earlier_weights(folder, caplog):
    """Otherwise loaders of ONNX files would find the vectors of another model."""
    small_encoder().save_pretrained(folder)
    assert not (folder / "onnx").exists() and "have been removed; export the model again" in caplog.text


def refused(tmp_path: Path, encoder: Encoder) -> str:
    """Return the message of the refused export, and check that nothing remains: no graph, and no new folder."""
    for name in ("new", "model"):
        if name == "model":
            encoder.save_pretrained(tmp_path / "model")
            before = contents(tmp_path / "model")
        message = error_of(export_onnx, encoder, tmp_path / name)
    assert os.listdir(tmp_path) == ["model"] and contents(tmp_path / "model") == before
    assert len(message) < 400
    return message


def test_wrong_vectors_are_refused(tmp_path, untraced, monkeypatch):
    monkeypatch.setattr(onnx, "through_onnx", lambda encoder, path: lambda texts: encoder.encode(texts) * (1 + 1e-4))
    message = refused(tmp_path, small_encoder())
    assert "BertModel (pooling mean) cannot be exported to ONNX" in message and "vectors differ by 1.0e-04" in message


def test_vectors_that_are_no_numbers_are_refused(tmp_path, untraced, monkeypatch):
    monkeypatch.setattr(onnx, "through_onnx", lambda encoder, path: lambda texts: encoder.encode(texts) * np.nan)
    assert "differ by nan" in refused(tmp_path, small_encoder())


def test_a_graph_that_does_not_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "write_graph", lambda encoder, path: path.write_bytes(b"graph"))
    assert "BertModel (pooling cls) cannot be exported to ONNX" in refused(tmp_path, small_encoder("cls"))


def test_what_cannot_be_traced_is_refused(tmp_path, monkeypatch, capsys):
    class Branching(onnx.Graph):
        def forward(self, input_ids, attention_mask, token_type_ids=None):
            states, vectors = super().forward(input_ids, attention_mask, token_type_ids)
            return states, vectors if vectors.sum() > 0 else -vectors  # a branch that depends on the data

    monkeypatch.setattr(onnx, "Graph", Branching)
    capsys.readouterr()
    message = refused(tmp_path, small_encoder())
    assert "BertModel (pooling mean) cannot be exported to ONNX with PyTorch" in message
    assert "def forward" not in "".join(capsys.readouterr())  # PyTorch prints the whole graph


def test_a_graph_of_fixed_shape_is_refused(tmp_path, monkeypatch):
    """The tracer must not put the number of texts of its own batch into the graph."""

    class Fixed(onnx.Graph):
        def forward(self, input_ids, attention_mask, token_type_ids=None):
            states, vectors = super().forward(input_ids, attention_mask, token_type_ids)
            return states, vectors[torch.arange(len(input_ids))]  # len() is a number and not a variable

    monkeypatch.setattr(onnx, "Graph", Fixed)
    message = refused(tmp_path, small_encoder())
    assert "BertModel (pooling mean) cannot be exported to ONNX with PyTorch" in message


# ---- everything that can be exported ----


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [name for name in POOLINGS if name != "mean"])
def test_every_pooling(tmp_path, pooling):
    encoder = tiny_encoder(pooling=pooling, normalize=pooling == "top2")
    export_onnx(encoder, tmp_path / "model")
    check_vectors(encoder, tmp_path / "model")
    if POOLINGS[pooling].layers is not None:  # their mean is what transformers.js then pools
        batch = encoder.tokenizer("rain and snow", return_tensors="pt")
        with torch.no_grad():
            layers = encoder.backbone(**batch, output_hidden_states=True).hidden_states
        expected = sum(layers[layer] for layer in POOLINGS[pooling].layers) / 2
        np.testing.assert_allclose(run_graph(tmp_path / "model", ["rain and snow"], "token_embeddings"), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilbert", "xlm-roberta", "mpnet", "modernbert"])
def test_encoders(tmp_path, name):
    encoder = tiny_encoder(name)
    export_onnx(encoder, tmp_path / "model")
    check_vectors(encoder, tmp_path / "model")


@pytest.mark.slow
def test_a_decoder_with_the_last_token(tmp_path):
    encoder = tiny_encoder("qwen3", "last", truncate_dim=12)
    encoder.tokenizer.padding_side = "left"  # as for many decoders; the graph and the saved tokenizer pad on the right
    export_onnx(encoder, tmp_path / "model")
    check_vectors(encoder, tmp_path / "model")
    assert run_graph(tmp_path / "model", ["rain"]).shape == (1, 12)


@pytest.mark.slow
def test_tempscale_is_in_the_graph(tmp_path):
    plain = small_encoder()
    encoder = small_encoder()
    apply_tempscale(encoder.backbone, 0.7)
    export_onnx(encoder, tmp_path / "folded")
    check_vectors(encoder, tmp_path / "folded")
    assert np.abs(plain.encode(BATCHES[2]) - run_graph(tmp_path / "folded", BATCHES[2])).max() > 1e-3


@pytest.mark.slow
def test_tempscale_that_grows_with_the_length_is_right_or_refused(tmp_path):
    """It cannot be folded, so it is not in the weights of the folder."""
    encoder = small_encoder()
    apply_tempscale(encoder.backbone, TempScaleConfig(0.7, growth="log", reference_length=4))
    with pytest.raises(InputError, match="allow_runtime"):
        export_onnx(encoder, tmp_path / "new")
    encoder.save_pretrained(tmp_path / "model", allow_runtime=True)
    try:
        export_onnx(encoder, tmp_path / "model")
    except InputError as error:
        assert "BertModel (pooling mean) cannot be exported" in str(error)
    else:
        check_vectors(encoder, tmp_path / "model")


@pytest.mark.slow
def test_adapters_are_merged(tmp_path):
    model = get_peft_model(
        tiny_model("bert", num_hidden_layers=1), LoraConfig(target_modules=["query"], init_lora_weights=False)
    )
    encoder = Encoder(model, small_tokenizer()).eval()
    export_onnx(encoder, tmp_path / "model")
    check_vectors(encoder, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exported_in_float32(tmp_path, dtype):
    encoder = small_encoder()
    encoder.backbone.to(dtype)
    encoder.train()
    export_onnx(encoder, tmp_path / "model")
    assert Encoder.from_pretrained(tmp_path / "model").dtype is dtype and encoder.training
    check_vectors(Encoder.from_pretrained(tmp_path / "model", dtype=torch.float32), tmp_path / "model")


@pytest.mark.slow
def test_large_weights_are_beside_the_graph(tmp_path, monkeypatch):
    """A file of this format holds less than 2 GB. Loaders expect the weights in a file of this name."""
    monkeypatch.setattr(onnx, "MOST_BYTES", 1000)
    encoder = small_encoder()
    done = export_onnx(encoder, tmp_path / "model", int8=True)
    files = {path.name: path.stat().st_size for path in done.path.parent.iterdir()}
    assert files["model.onnx"] < 200_000 < files["model.onnx_data"]
    check_vectors(encoder, tmp_path / "model")
    assert np.isfinite(run_graph(tmp_path / "model", ["rain"], name="model_quantized.onnx")).all()
    assert {path.name for path in model_files(tmp_path / "model")} > set(files)


# ---- the recipe ----


def recipe(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "recipes" / "export_onnx.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_recipe_exports_beside_the_model_or_elsewhere(tmp_path):
    encoder = small_encoder("cls", normalize=True)
    encoder.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    done = recipe(tmp_path / "model", "--output_dir", tmp_path / "served", "--int8")
    assert done.returncode == 0, done.stderr
    assert "differ from the model's by at most" in done.stdout and "the smallest cosine" in done.stdout
    assert contents(tmp_path / "model") == before
    check_vectors(encoder, tmp_path / "served")
    assert recipe(tmp_path / "model").returncode == 0
    assert set(contents(tmp_path / "model")) == set(before) | {"onnx/model.onnx"}
    again = recipe(tmp_path / "model")
    assert again.returncode == 2 and "onnx/model.onnx exists" in again.stderr and "Traceback" not in again.stderr


def test_the_recipe_refuses_a_name_without_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", "BAAI/bge-base-en-v1.5"])
    message = "BAAI/bge-base-en-v1.5 is not a folder here; give a folder for the export with --output_dir"
    assert message in error_of(load_recipe("export_onnx").main)
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(tmp_path)])  # BUG: --overwrite_output_dir was advised
    message = f"{tmp_path} holds no model (config.json); give the folder of a finished run"
    assert error_of(load_recipe("export_onnx").main) == message


def test_scores_of_other_settings_are_left_out(tmp_path, untraced, monkeypatch):
    small_encoder().save_pretrained(tmp_path / "model")
    results = {"after": {"sts": {"s": 77.77}}, "mteb": [], "card": {"title": "Cats"}}
    write_results(tmp_path / "model", results)
    for number, words in enumerate(([], ["--pooling", "cls"], ["--max_length", "9"])):
        argv = ["export_onnx.py", tmp_path / "model", "--output_dir", tmp_path / str(number), *words]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        load_recipe("export_onnx").main()
        assert ("77.77" in (tmp_path / str(number) / "README.md").read_text()) == (not words)
