"""Test pushes of finished folders to a Hub on loopback, through the real client.

A push uploads the complete model once and nothing else, whatever fails on the way.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import transformers
from conftest import error_of, tiny_encoder
from hub_server import LoopbackHub
from test_recipes import files, flags, sup  # noqa: F401
from test_trainer import trainer

from hf_embed import Encoder, InputError
from hf_embed.checkpoint import hub
from hf_embed.checkpoint.card import write_card
from hf_embed.checkpoint.hub import push_folder
from hf_embed.kit import overwrite

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "get_token", lambda: server.token)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # what transformers 5.9 calls
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    tiny_encoder(pooling="cls", normalize=True).save_pretrained(folder)
    (folder / "results.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"secret")
    (folder / "run.log").write_text("log")
    (folder / "train.jsonl").write_text("data")
    for stray in ("data/private/scan.png", "vocab_src/customers.jsonl", "1_data/rows.jsonl", "models/old/x.safetensors"):
        (folder / stray).parent.mkdir(parents=True)
        (folder / stray).write_text("private")
    for inner in ("checkpoint-2", "runs", "seed-1"):
        (folder / inner).mkdir()
        (folder / inner / "geometry.png").write_bytes(b"picture")
        (folder / inner / "optimizer.pt").write_bytes(b"state")
        (folder / inner / "model.safetensors").write_bytes(b"other weights")
    return folder


OF_THE_MODEL = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json",
                "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
                "2_Normalize/config.json", "results.json"}  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_complete(server: LoopbackHub, model: Path) -> bool:
    stored = server.files("user/mine")
    same = all(stored.get(name) == (model / name).read_bytes() for name in OF_THE_MODEL - {"README.md"})
    return set(stored) == OF_THE_MODEL and same


def test_push_is_the_model_and_nothing_else(server, model):
    address = push_folder(model, "mine")
    assert address == f"{server.url}/user/mine/commit/{server.commits('user/mine')[0]['oid']}"
    assert is_complete(server, model) and not server.repos["user/mine"]["private"]
    assert 'AutoModel.from_pretrained("user/mine")' in server.files("user/mine")["README.md"].decode()
    push_folder(model, "user/mine")  # the second push has nothing to commit
    assert len(server.commits("user/mine")) == 1


def test_the_card_has_the_name_of_each_repository(server, model):
    before = digest(model)
    push_folder(model, "mine")
    push_folder(model, "other")
    for name in ("user/mine", "user/other"):
        card = server.files(name)["README.md"].decode()
        assert f'AutoModel.from_pretrained("{name}")' in card and "FOLDER" not in card
        assert f"\n# {name.removeprefix('user/')}\n" in card  # the card has no title of its own
    assert digest(model) == before


def test_a_title_that_is_given_stays_on_the_hub(server, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "named")
    write_card(Encoder.from_pretrained(str(folder)), folder, title="named")  # equal to the default title
    push_folder(folder, "mine")
    assert "\n# named\n" in server.files("user/mine")["README.md"].decode()


@pytest.mark.parametrize("revision", [None, "v2"])
def test_files_of_an_earlier_model_do_not_stay(server, model, tmp_path, revision, caplog):
    """BUG: weights, adapters and graphs of an earlier push stayed, and loaders preferred them to the new model."""
    earlier = shutil.copytree(model, tmp_path / "earlier")
    for name in ("adapter_config.json", "added_tokens.json", "onnx/model.onnx", "model-00001-of-00001.safetensors"):
        (earlier / name).parent.mkdir(exist_ok=True)
        (earlier / name).write_text("{}")
    push_folder(earlier, "mine", revision=revision)
    server.files("user/mine", revision or "main")["LICENSE"] = b"mine"
    push_folder(model, "mine", revision=revision)
    assert set(server.files("user/mine", revision or "main")) == OF_THE_MODEL | {"LICENSE"}
    assert "belong to an earlier model and are removed" in caplog.text


def test_branch_pull_request_and_private(server, model):
    push_folder(model, "mine", private=True, revision="v2", commit_message="May's clicks")
    stored = server.repos["user/mine"]
    assert stored["private"] and stored["branches"]["main"] == []
    assert [commit["message"] for commit in stored["branches"]["v2"]] == ["May's clicks"]
    assert "/discussions/1" in push_folder(model, "mine", create_pr=True) and len(stored["pulls"]) == 1
    assert stored["branches"]["main"] == []


def test_adapters(server, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    push_folder(tmp_path, "mine")
    assert set(server.files("user/mine")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_everything_on_demand(server, model):
    push_folder(model, "mine", everything=True)
    assert OF_THE_MODEL | {"train.jsonl", "checkpoint-2/optimizer.pt"} < set(server.files("user/mine"))
    assert "training_args.bin" not in server.files("user/mine")


@pytest.fixture
def strays(model, tmp_path) -> Path:
    """Return a copy of the model's folder with files that look like parts of the model but are not."""
    folder, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(model, folder)
    outside.mkdir()
    (outside / "customers.txt").write_text("private")
    (folder / "linked").symlink_to(outside)
    for name in ("1_Pooling/.env", "1_Pooling/notes.txt", ".env", "vocab_customers.csv", "tokenizer_corpus.txt", "x.spm",
                 "sentencepiece_corpus.txt", "chat_templates.zip", "model-of-may.safetensors", "helper.py", "merges.txt.bak",
                 ".git/config", "checkpoint-2/training_args.bin", "checkpoint-2/.env", "checkpoint-2/.metadata"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    return folder


def test_names_that_only_look_like_a_models_stay(server, strays, caplog):
    push_folder(strays, "mine")
    assert is_complete(server, strays)
    assert "1_Pooling: not uploaded, because they do not belong to the module: .env, notes.txt" in caplog.text


def test_everything_takes_no_links_no_dotfiles_and_no_training_args(server, strays, caplog):
    push_folder(strays, "mine", everything=True)
    stored = set(server.files("user/mine"))
    assert OF_THE_MODEL | {"helper.py", "vocab_customers.csv", "checkpoint-2/.metadata"} < stored
    assert not [name for name in stored if ".env" in name or ".git" in name or "linked" in name or "training_args" in name]
    assert "1 links are not uploaded" in caplog.text


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "model.safetensors", "1_Pooling/config.json"])
def test_a_link_in_the_place_of_a_file_is_refused(server, strays, name, everything):
    (strays / name).unlink(missing_ok=True)
    (strays / name).symlink_to(strays.parent / "outside" / "customers.txt")
    assert f"{name} is a link" in error_of(push_folder, strays, "mine", everything=everything)
    (strays / name).unlink()
    (strays / name).symlink_to("nowhere")  # a link that leads nowhere is refused too
    assert f"{name} is a link" in error_of(push_folder, strays, "mine", everything=everything)
    assert not server.repos.get("user/mine", {"branches": {"main": []}})["branches"]["main"]


@pytest.mark.parametrize("path", ["../outside", "linked", "checkpoint-2", "{outside}", "data/private", "3_Absent", "9_Linked"])
def test_a_module_is_a_folder_of_its_kind(server, strays, path):
    outside = str(strays.parent / "outside")
    (strays / "9_Linked").symlink_to(outside)
    modules = json.loads((strays / "modules.json").read_text())
    modules[1]["path"] = path.format(outside=outside)
    (strays / "modules.json").write_text(json.dumps(modules))
    reason = "is outside the folder" if "outside" in path else "is not a subfolder such as 1_Pooling"
    assert f"modules.json names '{modules[1]['path']}', which {reason}" in error_of(push_folder, strays, "mine")


def test_modules_that_would_arrive_without_their_weights_are_refused(server, strays):
    modules = json.loads((strays / "modules.json").read_text())
    (strays / "1_Pooling" / "pytorch_model.bin").write_bytes(b"")
    assert "the weights are not in model.safetensors" in error_of(push_folder, strays, "mine")
    (strays / "0_Transformer").mkdir()
    (strays / "modules.json").write_text(json.dumps([modules[0] | {"path": "0_Transformer"}]))
    assert "the transformer is in '0_Transformer'" in error_of(push_folder, strays, "mine")
    (strays / "modules.json").write_text("[")
    assert "modules.json is not JSON" in error_of(push_folder, strays, "mine")


def test_code_goes_up_where_the_configs_name_it(server, strays):
    config = json.loads((strays / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModel": "modeling_toy.Toy",
        "AutoModelForMaskedLM": "a/b--c.D",
    }
    (strays / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    tokens = json.loads((strays / "tokenizer_config.json").read_text())
    (strays / "tokenizer_config.json").write_text(json.dumps(tokens | {"auto_map": {"AutoTokenizer": ["tokenize.Toy", None]}}))
    (strays / "modeling_toy.py").write_text("import helper\nfrom .parts import part\n")
    for name in ("configuration_toy.py", "parts.py", "tokenize.py", "c.py", "secrets.py"):
        (strays / name).write_text("pass\n")
    push_folder(strays, "mine")
    code = {name for name in server.files("user/mine") if name.endswith(".py")}
    assert code == {"configuration_toy.py", "modeling_toy.py", "parts.py", "tokenize.py"}
    (strays / "parts.py").unlink()
    (strays / "parts.py").symlink_to(strays / "secrets.py")
    assert "parts.py is a link" in error_of(push_folder, strays, "mine")
    (strays / "parts.py").unlink()
    assert "parts.py, which cannot be read" in error_of(push_folder, strays, "mine")


def test_shards_are_known_by_their_numbers(server, strays):
    (strays / "model.safetensors").unlink()
    assert "holds no model" in error_of(push_folder, strays, "mine")  # model-of-may.safetensors does not count
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (strays / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    (strays / shards[0]).touch()
    assert f"{shards[1]}, which model.safetensors.index.json names, does not exist" in error_of(push_folder, strays, "mine")
    (strays / shards[1]).touch()
    push_folder(strays, "mine")
    uploaded = {name for name in server.files("user/mine") if name.startswith("model")}
    assert uploaded == {*shards, "model.safetensors.index.json"}


def test_every_tokenizers_files_are_known():
    """Compare with the file names in the source code of the installed transformers."""
    named = set()
    for path in Path(transformers.__file__).parent.rglob("*token*.py"):
        source = path.read_text(encoding="utf-8")
        constants = dict(re.findall(r'^([A-Z_]+) = "([^"]+)"', source, re.MULTILINE))
        for names in re.findall(r"VOCAB_FILES_NAMES = (\{.*?\})", source, re.DOTALL):
            named |= {constants.get(value.strip('"'), value.strip('"')) for value in re.findall(r": *([^,}\n]+)", names)}
    assert {"vocab.txt", "bpe.codes", "word_shape.json"} < named <= hub.FILES


def requests_of_a_push(model) -> list[str]:
    with LoopbackHub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        push_folder(model, "mine", token=server.token)
        return server.requests


@pytest.mark.parametrize(
    "how", [500, "cut", pytest.param(429, marks=pytest.mark.slow), pytest.param(503, marks=pytest.mark.slow)]
)
def test_broken_at_every_request_in_turn(server, model, how, monkeypatch):
    """After one failure the push recovers. The folder and the repository end as if nothing had failed."""
    count, before = len(requests_of_a_push(model)), digest(model)
    assert count >= 6
    for number in range(count):
        server.repos.clear()
        server.objects.clear()
        server.fail(number, how)
        push_folder(model, "mine")
        assert is_complete(server, model) and len(server.commits("user/mine")) == 1, server.requests[-count:]
    assert digest(model) == before


@pytest.mark.parametrize("how", [500, pytest.param("cut", marks=pytest.mark.slow)])
def test_a_push_that_fails_is_finished_by_the_same_command(server, model, how, monkeypatch, caplog):
    """The Hub fails from one request on, for each request in turn. Later it works again, and a second push finishes."""
    monkeypatch.setattr(hub, "TRIES", 1)
    count, before = len(requests_of_a_push(model)), digest(model)
    for number in range(count):
        server.repos.clear()
        server.objects.clear()
        server.fail(number, how, times=50)
        message = error_of(push_folder, model, "mine")
        assert f"the folder is complete, finish the push with: hf-embed push {model} mine" in message
        assert not server.repos.get("user/mine", {}).get("branches", {}).get("main")  # no partial upload is visible
        server.faults.clear()
        push_folder(model, "mine")
        assert is_complete(server, model) and len(server.commits("user/mine")) == 1
    assert digest(model) == before


def test_a_large_file_is_not_sent_twice(server, model, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    commit = next(i for i, request in enumerate(requests_of_a_push(model)) if "/commit/" in request)
    server.fail(commit, 500, times=50)
    error_of(push_folder, model, "mine")
    server.faults.clear()
    server.requests.clear()
    push_folder(model, "mine")
    assert not any(request.startswith("PUT") for request in server.requests) and is_complete(server, model)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "rejected this token"), (403, "has no write access there"), (404, "the repository or branch does not exist")],
)
def test_refusals_are_not_tried_again(server, model, status, message):
    server.fail(0, status, times=50)
    assert message in error_of(push_folder, model, "mine")
    assert len(server.requests) <= 2  # if the repository cannot be created, the client asks whether it exists


def test_wrong_token_and_foreign_namespace(server, model):
    assert "rejected this token (401)" in error_of(push_folder, model, "mine", token="hf_bad")
    assert "has no write access there (403)" in error_of(push_folder, model, "someone/mine")


def test_a_conflict_is_tried_again(server, model, caplog):
    caplog.set_level(logging.WARNING)
    commit = next(i for i, request in enumerate(requests_of_a_push(model)) if "/commit/" in request)
    server.fail(commit, 409)
    push_folder(model, "mine")
    assert "the Hub answered 409" in caplog.text and is_complete(server, model)


def test_bad_input(server, model, tmp_path, monkeypatch):
    assert "holds no model" in error_of(push_folder, tmp_path, "mine")
    assert "holds no model" in error_of(push_folder, tmp_path / "absent", "mine")
    for name in ("a/b/c", "-x", "a b", "x" * 200, "a--b"):
        assert f"'{name}' is not a valid name of a repository" in error_of(push_folder, model, name)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "no Hub token was found; run `hf auth login`" in error_of(push_folder, model, "mine")
    assert server.requests == []


def test_no_network(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_good")
    assert "the connection failed (ConnectError" in error_of(push_folder, model, "mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (
        "push to mine: " in error_of(push_folder, model, "mine") and "offline" in error_of(push_folder, model, "mine").lower()
    )


# ---- from training ----


# With "checkpoint", everything is pushed that "every_save" pushes, and more.
@pytest.mark.parametrize("strategy", [pytest.param("every_save", marks=pytest.mark.slow), "checkpoint", "end"])
def test_training_pushes(server, tmp_path, strategy):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3, "hub_always_push": True}
    run = trainer(tmp_path / "model", tiny_encoder(pooling="cls"), push_to_hub=True, hub_model_id="user/mine",
                  hub_token=server.token, hub_private_repo=True, hub_strategy=strategy, **settings)  # fmt: skip
    assert server.repos["user/mine"]["private"]  # the repository is created before the first step
    run.train()
    address = run.push_to_hub(commit_message="Finished")
    commits = server.commits("user/mine")
    assert address.endswith(commits[-1]["oid"])  # the last checkpoint's commit, if nothing has changed since
    assert strategy != "end" or commits[-1]["message"] == "Finished"
    steps = [f"Training in progress, step {i}" for i in (1, 2, 3)]
    started = {"every_save": steps, "checkpoint": steps, "end": []}[strategy]
    assert [c["message"] for c in commits if c["message"] in steps] == started
    for commit in commits:
        plain = {name for name in commit["files"] if not name.startswith("last-checkpoint/")}
        assert plain <= OF_THE_MODEL | {"results.json"} and {"1_Pooling/config.json", "model.safetensors"} <= plain
    resumable = {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(commits[-1]["files"])
    assert resumable is (strategy == "checkpoint")
    assert commits[-1]["files"]["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert not (tmp_path / "model" / "_pushing").exists()


def test_a_recipe_pushes_its_results_too(server, tmp_path, files):  # noqa: F811
    argv = [*flags(files), "--max_steps", 2, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "user/mine",
            "--hub_token", server.token, "--language", "en", "--license", "mit"]  # fmt: skip
    results = sup(*argv)
    stored = server.files("user/mine")
    assert json.loads(stored["results.json"]) == results and "geometry.png" in stored
    card = stored["README.md"].decode()
    assert "## Results" in card and "license: mit" in card and "geometry.png" in card and "training_args.bin" not in stored
    assert server.token not in json.dumps(results) + card and str(tmp_path) not in json.dumps(results) + card


def test_a_name_or_token_that_the_hub_refuses_is_known_before_the_first_step(server, tmp_path):
    for settings, message in (
        ({"hub_token": "hf_bad"}, "rejected this token"),
        ({"hub_token": server.token, "hub_model_id": "someone/mine"}, "has no write access there"),
    ):
        with pytest.raises(InputError, match=message):
            trainer(tmp_path / "model", push_to_hub=True, **settings)


def test_a_checkpoint_that_does_not_arrive_does_not_end_the_training(server, tmp_path, caplog):
    run = trainer(tmp_path / "model", push_to_hub=True, hub_model_id="mine", hub_token=server.token, save_strategy="steps",
                  save_steps=2, max_steps=4, hub_always_push=True)  # fmt: skip
    server.fail(0, 403, times=1000)
    run.train()
    server.faults.clear()
    run.push_to_hub()
    assert "a checkpoint was not uploaded to the Hub: this token has no write access there" in caplog.text
    assert set(server.files("user/mine")) == OF_THE_MODEL - {"2_Normalize/config.json"}


def test_the_copy_that_a_killed_run_was_uploading_is_removed(tmp_path):
    """BUG: it stayed in the folder of the run, and in that of every run that replaced it."""
    copy = tmp_path / "model" / hub.COPY
    copy.mkdir(parents=True)
    trainer(tmp_path / "model", max_steps=1).train()
    assert not copy.exists() and overwrite.RUNNING.fullmatch(copy.name)


@pytest.mark.slow
def test_recipe_and_download_in_processes_of_their_own(server, model, tmp_path):
    """After push.py, AutoModel and Encoder load OWNER/NAME from the Hub and give the vectors of the folder."""
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                        "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    push = [sys.executable, str(RECIPES / "push.py"), str(model), "mine", "--private", "--new_card"]
    (model / "README.md").write_text("mine")
    done = subprocess.run(push, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{server.url}/user/mine/commit/") and server.repos["user/mine"]["private"]
    code = f"""
import numpy, torch
from transformers import AutoModel, AutoTokenizer
from hf_embed import Encoder
texts = ["a cat", "a dog sleeping by the fire"]
numpy.save({str(tmp_path / "encoder.npy")!r}, Encoder.from_pretrained("user/mine").encode(texts))
batch = AutoTokenizer.from_pretrained("user/mine")(texts, padding=True, return_tensors="pt")
states = AutoModel.from_pretrained("user/mine")(**batch).last_hidden_state[:, 0]
numpy.save({str(tmp_path / "auto.npy")!r}, torch.nn.functional.normalize(states, dim=-1).detach().numpy())
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = Encoder.from_pretrained(model).encode(["a cat", "a dog sleeping by the fire"])
    for name in ("encoder", "auto"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-6)
    wrong = subprocess.run(push, env=env | {"HF_TOKEN": "hf_bad"}, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and wrong.stderr.strip().splitlines()[-1].startswith("error: push to mine: the Hub rejected")
