"""Models with their own code: the code runs only if the user allows it on the command line or in the call.

It is then saved with the model, and the model card mentions it.
"""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from test_recipes import flags, make_files, sup
from test_trainer import trainer
from transformers import AutoModel, AutoTokenizer, BertConfig

from hf_embed import Encoder
from hf_embed.checkpoint.hub import model_files
from hf_embed.kit import cli
from hf_embed.kit.ablation import read_variants
from hf_embed.kit.plan import ModelArguments
from hf_embed.kit.positives import add_positives

ROOT = Path(__file__).parent.parent
TEXTS = ["a cat", "the dog sleeps by the fire", "rain"]

CONFIGURATION = """
from pathlib import Path

from transformers import BertConfig

Path({ran!r}).touch()


class ToyConfig(BertConfig):
    model_type = "toy-of-the-tests"

    def __init__(self, max_length=64, temperature=1.0, **settings):
        self.max_length, self.temperature = max_length, temperature
        super().__init__(**settings)
"""
MODELING = """
from transformers import BertForMaskedLM, BertModel

from .configuration_toy import ToyConfig
from .parts_toy import doubled


class ToyModel(BertModel):
    config_class = ToyConfig

    def forward(self, *args, **kwargs):
        return doubled(super().forward(*args, **kwargs))


class ToyForMaskedLM(BertForMaskedLM):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = ToyModel(config, add_pooling_layer=False)
        self.post_init()
"""
PARTS = """
def doubled(output):
    output.last_hidden_state = output.last_hidden_state * 2 + 1
    return output
"""
# A model that computes numbers when it is made, and does not save them.
ROTARY = """
import torch
from transformers import BertModel


def frequencies():
    return 100.0 ** -(torch.arange(32) / 32)


class Frequencies(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("values", frequencies(), persistent=False)


class Rotary(BertModel):
    def __init__(self, config, **more):
        super().__init__(config, **more)
        self.rotary = Frequencies()
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if {again} and isinstance(module, Frequencies):
            module.values.copy_(frequencies())
"""
CODE = {"configuration_toy.py", "modeling_toy.py", "parts_toy.py"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Return a model folder with an architecture that transformers does not know. Its code writes `ran` beside the folder."""
    folder = tmp_path_factory.mktemp("remote") / "toy"
    tiny_encoder("bert").save_pretrained(folder, verify=False)
    for name, code in {"configuration": CONFIGURATION.format(ran=str(folder.parent / "ran")), "modeling": MODELING}.items():
        (folder / f"{name}_toy.py").write_text(code)
    (folder / "parts_toy.py").write_text(PARTS)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "toy-of-the-tests"}
    names = {"AutoModel": "modeling_toy.ToyModel", "AutoModelForMaskedLM": "modeling_toy.ToyForMaskedLM"}
    config["auto_map"] = {"AutoConfig": "configuration_toy.ToyConfig"} | names
    config.pop("architectures", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def ran(toy):
    (toy.parent / "ran").unlink(missing_ok=True)
    return toy.parent / "ran"


def argv(toy: Path, tmp_path: Path, *more) -> list:
    files = make_files(tmp_path) | {"model": toy}
    return [*flags(files), "--output_dir", tmp_path / "out", "--max_steps", 2, "--save_steps", 1, *more]


def test_without_permission_nothing_runs(toy, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    assert "needs its own Python code" in error_of(Encoder.from_pretrained, toy)
    for more in ([], ["--dropout", 0.1], ["--mlm_weight", 0.1], ["--lora_r", 4]):
        message = error_of(sup, *argv(toy, tmp_path, *more))
        assert "set --trust_remote_code on the command line" in message
    message = error_of(add_positives, Dataset.from_dict({"text": TEXTS}), "mask_fill:0.2", model=str(toy))
    assert "set --trust_remote_code on the command line" in message
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sup_simcse.py", "evaluate.py"])
def test_a_y_on_standard_input_is_no_permission(toy, ran, tmp_path, recipe):
    files = make_files(tmp_path)
    more = ["--train_file", files["nli"], "--report_to", "none"] if recipe == "sup_simcse.py" else []
    command = [sys.executable, ROOT / "recipes" / recipe, "--model_name_or_path", toy, "--eval_sts_file", f"s={files['sts']}"]
    done = subprocess.run([*map(str, [*command, *more])], input="y\ny\ny\n", cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 2 and "set --trust_remote_code" in done.stderr.splitlines()[-1]
    assert not ran.exists() and "y/N" not in done.stdout + done.stderr


def test_trained_saved_and_loaded_by_all(toy, ran, tmp_path):
    """The code of the model is saved with the model, and every loader gives the embeddings of the trained model."""
    results = sup(*argv(toy, tmp_path, "--trust_remote_code", "--eval_strategy", "steps", "--eval_steps", 1,
                        "--load_best_model_at_end", "true"))  # fmt: skip
    out = tmp_path / "out"
    assert ran.exists() and results["train"]["steps"] == 2
    for folder in (out, out / "checkpoint-2"):
        assert {path.name for path in folder.glob("*.py")} == CODE
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_toy.ToyModel"
        # BUG: transformers does not save settings of these names (NeoBERT, Llama Nemotron), so a training ended in an error.
        assert (config["max_length"], config["temperature"]) == (64, 1.0)
    assert {path.name for path in model_files(out)} > CODE
    vectors = Encoder.from_pretrained(out, trust_remote_code=True).encode(TEXTS)
    np.testing.assert_allclose(SentenceTransformer(str(out), trust_remote_code=True).encode(TEXTS), vectors, atol=1e-5)
    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    batch = AutoTokenizer.from_pretrained(out)(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.mean(1)
    np.testing.assert_allclose(states.numpy(), vectors[:1], atol=1e-5)
    assert type(model).__module__.startswith("transformers_modules") and states.mean() > 0.5  # the code of the model
    assert "needs its own Python code" in error_of(Encoder.from_pretrained, out)
    card = (out / "README.md").read_text()
    assert card.count("trust_remote_code=True)") == 4 and "Read the code before you run it" in card
    sup(*argv(toy, tmp_path, "--trust_remote_code", "--max_steps", 3, "--resume_from_checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--lora_r", 2], ["--mlm_weight", 0.1], ["--seeds", "1,2"], ["--dropout", 0.2]], ids=str)
def test_permission_reaches_every_way_of_training(toy, tmp_path, more):
    sup(*argv(toy, tmp_path, "--trust_remote_code", "--max_steps", 1, *more))
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == CODE
    assert Encoder.from_pretrained(tmp_path / "out", trust_remote_code=True).encode(TEXTS).shape == (3, 32)


@pytest.mark.parametrize("computed_again", [False, True])
def test_a_model_that_transformers_loads_without_its_buffers_is_refused(toy, tmp_path, computed_again, monkeypatch):
    """BUG: gte-large-en-v1.5 and others were loaded with random rotary frequencies, as they are by sentence-transformers."""
    folder = shutil.copytree(toy, tmp_path / f"buffers_{computed_again}")  # its name is that of the module
    like = torch.full_like  # memory without values could hold the right ones by chance
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: like(tensor, 7, **options))
    code = ROTARY.format(again=computed_again) + MODELING.replace("ToyModel(BertModel):", "ToyModel(Rotary):")
    (folder / "modeling_toy.py").write_text(code.replace("**kwargs))", "**kwargs), self.rotary.values)"))
    (folder / "parts_toy.py").write_text(PARTS.replace("(output)", "(output, by)").replace("* 2 + 1", "* by"))
    if not computed_again:
        message = error_of(Encoder.from_pretrained, folder, trust_remote_code=True)
        assert "loads it without the values of 'rotary.values', which its own code computes" in message
        bare = Encoder(AutoModel.from_pretrained(folder, trust_remote_code=True), small_tokenizer())
        assert "loads it without the values of 'rotary.values'" in error_of(trainer, tmp_path / "out", bare)
        return
    encoder = Encoder.from_pretrained(folder, trust_remote_code=True)
    plain = Encoder.from_pretrained(toy, trust_remote_code=True)  # its states are twice those of BERT, plus 1
    expected = (plain.encode(TEXTS) - 1) / 2 * (100.0 ** -(np.arange(32) / 32))
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)


def test_code_with_a_loader_of_its_own_is_refused(toy, tmp_path):
    """BUG: the code of nomic-embed-text-v1.5 ended in "cannot unpack non-iterable NomicBertModel object"."""
    folder = shutil.copytree(toy, tmp_path / "own_loader")
    loader = "    @classmethod\n    def from_pretrained(cls, name, *args, config, **options):\n        return cls(config)\n\n"
    code = MODELING.replace("    def forward", loader + "    def forward", 1)
    (folder / "modeling_toy.py").write_text(code)
    message = error_of(Encoder.from_pretrained, folder, trust_remote_code=True)
    assert "its own code replaces from_pretrained" in message and "leave out trust_remote_code" in message


def test_a_model_that_is_loaded_already_has_its_permission(toy, tmp_path):
    model = AutoModel.from_pretrained(toy, trust_remote_code=True)
    run = trainer(tmp_path / "out", Encoder(model, small_tokenizer()), max_steps=1)
    run.train()
    run.save_model()
    saved = Encoder.from_pretrained(tmp_path / "out", trust_remote_code=True)
    np.testing.assert_allclose(saved.encode(TEXTS), run.encoder.encode(TEXTS), atol=1e-5)
    assert saved.remote_code and not tiny_encoder().remote_code


def test_an_architecture_that_transformers_knows_is_taken_from_there(tmp_path, ran):
    """If transformers knows the architecture, the code of the model does not run, and the saved folder does not mention it."""
    folder = tmp_path / "bert"
    tiny_encoder("bert").save_pretrained(folder, verify=False)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"auto_map": {"AutoTokenizer": ["x.X", None]}}))
    encoder = Encoder.from_pretrained(folder)
    assert type(encoder.config) is BertConfig and not encoder.remote_code
    encoder.save_pretrained(tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "out" / name).read_text())
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()
    vectors = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True).encode(TEXTS)
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "text", ["trust_remote_code: true", "trust-remote-code: true", "trust_remote_code: false",
             'lora_target_modules: [query, "--trust_remote_code"]'],
)  # fmt: skip
def test_no_file_gives_permission(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert "give it on the command line" in error_of(cli.parse, [ModelArguments], argv=["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("key", ["trust_remote_code", "trust-remote-code"])
def test_no_variant_gives_permission(key):
    assert "variant 'a': trust_remote_code" in error_of(read_variants, [json.dumps({"a": {key: True}})])


def test_every_load_gives_trust_remote_code():
    """Every load through transformers or sentence-transformers gives trust_remote_code. Without it, they ask on stdin."""
    asking, loads = [], 0
    for path in [*ROOT.glob("hf_embed/**/*.py"), *ROOT.glob("recipes/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name == "SentenceTransformer" or re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name):
                loads += 1
                if not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}:  # None: **settings
                    asking.append(f"{path.name}:{node.lineno}")
    assert asking == [] and loads >= 9


@pytest.mark.parametrize(
    "name", ["encode", "evaluate", "push", "search", "tempscale", "length_collapse", "merge", "mine_hard_negatives"]
)
def test_recipes_hand_the_permission_on(toy, tmp_path, monkeypatch, name):
    """Each recipe loads the model if the flag is given, and refuses it without the flag."""
    files, spec = make_files(tmp_path), importlib.util.spec_from_file_location(name, ROOT / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    (tmp_path / "texts.txt").write_text("\n".join(f"{TEXTS[1]} {i} and so on for a while" for i in range(8)))
    model, out = ["--model_name_or_path", toy], ["--output_dir", tmp_path / "out"]
    words = {
        "encode": [toy, tmp_path / "texts.txt", tmp_path / "out.npy"],
        "search": [toy, tmp_path / "texts.txt", "--query", "the dog"],
        "evaluate": [*model, "--eval_sts_file", f"s={files['sts']}", *out],
        "push": [shutil.copytree(toy, tmp_path / "toy"), "mine", "--new_card"],
        "tempscale": [*model, "--temperature", 0.9, *out],
        "length_collapse": [*model, "--texts", tmp_path / "texts.txt", "--lengths", 4, 8, *out],
        "merge": [toy, toy, *out],
        "mine_hard_negatives": [*model, "--train_file", files["nli"], "--output_file", tmp_path / "mined.jsonl"],
    }[name]
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    assert "needs its own Python code" in error_of(module.main)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--trust_remote_code"])
    if name == "push":
        monkeypatch.setattr(module, "push_folder", lambda folder, repo, **settings: sorted(settings))
    module.main()
    saved = {"push": "toy/README.md", "tempscale": "out/modeling_toy.py", "merge": "out/modeling_toy.py"}.get(name)
    assert saved is None or (tmp_path / saved).is_file()


def test_a_model_with_its_own_code_is_copied_to_several_devices(toy):
    encoder = Encoder.from_pretrained(str(toy), trust_remote_code=True)
    expected = encoder.encode(TEXTS * 5, batch_size=4)
    assert (encoder.encode(TEXTS * 5, batch_size=4, device=["cpu", "cpu"]) == expected).all()
