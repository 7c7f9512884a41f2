"""Test that a name which cannot be reached is reported within seconds, once, and in one line."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import error_of, tiny_encoder
from hub_server import LoopbackHub
from peft import LoraConfig, get_peft_model
from test_adapters import randomised

from hf_embed import Encoder, hub_access
from hf_embed.data.sources import read_hub
from hf_embed.hub_access import find_model
from hf_embed.kit.positives import MaskFill

ROOT = Path(__file__).parent.parent
MEND = "Give a local folder with config.json, weights and tokenizer; a recipe without arguments runs offline"


def at(monkeypatch, address: str) -> None:
    """Use `address` as the address of the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_answered", set())


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub() as server:
        at(monkeypatch, server.url)
        yield server


@pytest.fixture
def nobody(monkeypatch):
    """Set the address of the Hub to one where nothing listens, and return it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    at(monkeypatch, address)
    return address


def test_a_model_in_place_of_its_name():
    """Without this check, the message would show all layers of the model as its name."""
    encoder = tiny_encoder()
    for model in (encoder, encoder.backbone, None):
        said = f"the model is given as an object of the type {type(model).__name__}; give its name or its folder"
        assert error_of(Encoder.from_pretrained, model) == said


@pytest.mark.parametrize("load", [Encoder.from_pretrained, MaskFill, find_model])
def test_nothing_listens(nobody, load):
    started = time.monotonic()
    message = error_of(load, "no-such/model")
    assert time.monotonic() - started < 5
    assert (
        f"model 'no-such/model' cannot be loaded: there is no such local folder, and the Hub ({nobody}) cannot be reached ("
        in message
    )
    assert "check the network, or set HF_HUB_OFFLINE=1 to use the cache" in message and MEND in message


def test_nothing_listens_for_a_dataset(nobody):
    message = error_of(read_hub, "no-such/data")
    assert message.startswith(
        f"dataset 'no-such/data' cannot be loaded: there is no such local folder, and the Hub ({nobody}) cannot be"
    )
    assert message.endswith("; or give a local file")


def test_nothing_answers(monkeypatch):
    monkeypatch.setattr(hub_access, "TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached (" in error_of(find_model, "no-such/model")
        assert 0.5 < time.monotonic() - started < 5  # two attempts
    assert hub_access.ATTEMPTS * 4.0 < 10  # the rest of the 15 seconds is left for the imports


def test_a_repository_that_is_not_there(server):
    message = error_of(find_model, "no-such/model")
    assert (
        "the Hub has no such model that you can read; check the spelling, or run `hf auth login` for a private one" in message
    )
    assert len(server.requests) == 1


def test_a_repository_that_is_there_is_asked_for_once(server):
    server.repos["user/name"] = {"private": False, "branches": {"main": [{"oid": "0" * 40, "files": {}}]}, "pulls": []}
    assert find_model("user/name") == find_model("user/name") == {}  # the repository exists, although this file is missing
    assert len(server.requests) == 1


def test_a_hub_in_trouble_is_left_to_the_libraries(server):
    server.fail(number=0, how=503, times=1)
    assert find_model("user/name") == {}


def test_offline_and_folders_ask_nobody(monkeypatch, nobody, tmp_path):
    (tmp_path / "model").mkdir()
    assert find_model(str(tmp_path / "model")) == {} == find_model("user/name", local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_model("user/name") == {}


def test_a_path_that_is_mistyped_is_said_at_once(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/model").mkdir(parents=True)
    for name in ("./out/modle", "../x/y", "~/model", f"{tmp_path}/out/modle", "a/b/c", "out\\modle", "out/"):
        if not Path(name).exists():
            assert f"model '{name}' cannot be loaded: this folder does not exist" in error_of(find_model, name)
    assert error_of(find_model, "./out/modle").count("(did you mean 'out/model'?)") == 1
    assert "this folder does not exist" in error_of(read_hub, "./out/dataa") and server.requests == []
    assert "there is no such local folder (did you mean 'out/model'?), and the Hub has no such model" in error_of(
        find_model, "out/modle"
    )
    assert "it is not a valid name on the Hub; use OWNER/NAME" in error_of(find_model, "a model")


def test_a_model_in_the_cache_is_taken_without_the_hub(nobody, tmp_path, monkeypatch, caplog):
    snapshot = tmp_path / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_encoder().save_pretrained(str(snapshot), verify=False)
    (tmp_path / "models--user--name" / "refs").mkdir()
    (tmp_path / "models--user--name" / "refs" / "main").write_text("0" * 40)
    started = time.monotonic()
    encoder = Encoder.from_pretrained("user/name", cache_dir=str(tmp_path))
    assert encoder.encode(["a cat"]).shape == (1, 32) and time.monotonic() - started < 10
    assert f"the Hub ({nobody}) cannot be reached" in caplog.text and "using model 'user/name' from the cache" in caplog.text


def test_an_adapter_in_the_cache_is_taken_without_the_hub(nobody, tmp_path):
    """Its repository has no config.json. The base model is in the cache too."""
    start = tiny_encoder(pooling="cls")
    adapted = randomised(get_peft_model(tiny_encoder().backbone, LoraConfig(r=4, target_modules=["query"])))
    for name, save in (("base", start.save_pretrained), ("adapter", adapted.save_pretrained)):
        repository = tmp_path / f"models--user--{name}"
        (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        save(str(repository / "snapshots" / ("0" * 40)))
    config = tmp_path / "models--user--adapter" / "snapshots" / ("0" * 40) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "user/base"}))
    encoder = Encoder.from_pretrained("user/adapter", cache_dir=str(tmp_path))
    expected = Encoder(adapted.eval(), start.tokenizer, "cls").encode(["a cat"])
    np.testing.assert_allclose(encoder.encode(["a cat"]), expected, atol=1e-5)


@pytest.mark.slow
def test_two_processes_say_it_once(nobody, tmp_path):
    (tmp_path / "pairs.csv").write_text("anchor,positive\na,b\nc,d\n")
    environment = os.environ | {"HF_ENDPOINT": nobody, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        ROOT / "recipes/accelerate/cpu_2.yaml",
    ]
    command = [*launch, ROOT / "recipes/sup_simcse.py", "--model_name_or_path", "no-such/model", "--train_file", "pairs.csv"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("cannot be reached") == 1 and "Retrying" not in done.stderr
    assert done.stderr.count("loading PyTorch") == 1
