"""No written file contains a token, and no message shows the secrets in a URL."""

import dataclasses
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import error_of, tiny_encoder
from hub_server import LoopbackHub
from test_recipes import files, flags, recipe, sup  # noqa: F401
from test_trainer import trainer

from hf_embed import ContrastiveTrainingArguments, InputError
from hf_embed.checkpoint import hub
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import read_file, read_texts
from hf_embed.errors import RankError, masked, without_secrets
from hf_embed.evaluation.pair_classification import read_pair_classification
from hf_embed.evaluation.reranking import read_reranking
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.evaluation.sts import read_sts
from hf_embed.evaluation.triplets import read_triplets
from hf_embed.evaluation.zero_shot import read_zero_shot
from hf_embed.kit import cli
from hf_embed.kit.code_search import read_code_search
from hf_embed.training.record import publishable

RECIPES = Path(__file__).parent.parent / "recipes"
SECRET = "hf_s3cr3ts3cr3ts3cr3ts3cr3t"


def holds(folder: Path, secret: str = SECRET) -> list[str]:
    """Return the files in `folder` that contain the secret in one of the encodings that pickles and logs use."""
    forms = [secret.encode(code) for code in ("utf-8", "utf-16-le")]
    return [str(p) for p in folder.rglob("*") if p.is_file() and any(form in p.read_bytes() for form in forms)]


# ---- tokens ----


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub() as server:
        server.token = SECRET
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # what transformers 5.9 calls
        yield server


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints", "every_save", "end"])
def test_a_token_is_in_no_file_and_not_on_the_hub(server, tmp_path, strategy, capfd):
    run = trainer(tmp_path / "model", tiny_encoder(), push_to_hub=True, hub_model_id="user/mine", hub_token=SECRET,
                  hub_strategy=strategy, hub_always_push=True, save_strategy="steps", save_steps=1, max_steps=2)  # fmt: skip
    run.train()
    run.push_to_hub()
    assert len(list(tmp_path.rglob("training_args.bin"))) == 3
    assert holds(tmp_path) == [] and SECRET not in "".join(capfd.readouterr())
    for commit in server.commits("user/mine"):
        assert not [name for name in commit["files"] if name.endswith("training_args.bin")]
        assert not [name for name, content in commit["files"].items() if SECRET.encode() in content]
    hub.push_folder(tmp_path / "model", "user/whole", token=SECRET, everything=True)
    assert {"checkpoint-1/optimizer.pt", "checkpoint-2/trainer_state.json"} < set(server.files("user/whole"))
    assert not [name for name in server.files("user/whole") if name.endswith("training_args.bin")]
    assert run.args.hub_token == SECRET  # the run itself still has the token


def test_a_recipe_writes_no_token_and_resumes(tmp_path, files):  # noqa: F811
    argv = [
        *flags(files),
        "--hub_token",
        SECRET,
        "--save_steps",
        2,
        "--output_dir",
        tmp_path / "out",
    ]
    sup(*argv, "--max_steps", 2)
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.max_steps == 2 and saved.chunk_tokens is None
    assert sup(*argv, "--max_steps", 4, "--resume_from_checkpoint")["train"]["steps"] == 4
    sup(*argv[:-1], tmp_path / "seeds", "--max_steps", 2, "--seeds", "1,2")
    assert len(list(tmp_path.rglob("training_args.bin"))) >= 8
    assert holds(tmp_path) == []


def test_fields_named_like_secrets_are_not_saved():
    @dataclasses.dataclass
    class Arguments(ContrastiveTrainingArguments):
        wandb_api_key: str = "secret"
        db_password: str = "secret"
        my_secret: dict = dataclasses.field(default_factory=lambda: {"a": "secret"})
        token: str = "secret"
        max_token: int = 7
        tokenizer_name: str = "mine"

    args = Arguments("out", hub_token="secret", chunk_tokens=64, use_cpu=True)
    clean = without_secrets(args)
    assert not [name for name, value in vars(clean).items() if "secret" in str(value)]
    for logged in (args.to_dict(), args.to_json_string(), args.to_sanitized_dict()):  # TensorBoard and others log these
        assert ": 'secret" not in str(logged) and ': "secret' not in str(logged) and "max_token" in logged
    assert (clean.max_token, clean.tokenizer_name, clean.chunk_tokens, clean.output_dir) == (7, "mine", 64, "out")
    assert (args.hub_token, args.wandb_api_key) == ("secret", "secret") and type(clean) is Arguments


def test_a_token_that_no_header_can_hold_is_not_shown(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    tiny_encoder().save_pretrained(tmp_path / "model", verify=False)
    message = error_of(hub.push_folder, tmp_path / "model", "mine", token=SECRET + "\n")
    assert "push to mine" in message and SECRET not in message


# ---- URLs ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:KEY@host/x.csv?sig=KEY: no such file", "https://host/x.csv: no such file"),
        ("'http://KEY@host:80/a b'", "'http://host:80/a b'"),
        ("see (s3://me:KEY@host/x?a=KEY#KEY), or https://host/y.", "see (s3://host/x), or https://host/y."),
        ("HTTPS://me:K@EY@host/x", "HTTPS://host/x"),
        ("hf://datasets/a/b@main/x.csv", "hf://datasets/a/b@main/x.csv"),
        ("a.csv, row 1: what? me@host", "a.csv, row 1: what? me@host"),
        (f"token {SECRET}, hf_embed", "token ***, hf_embed"),
        ("Illegal header value b'Bearer KEY\\n'", "Illegal header value b'Bearer ***'"),
        ("x=https://me:KEY@host/x?a=1\nhttps://host/y?KEY", "x=https://host/x\nhttps://host/y"),
    ],
)
def test_masked(text, expected):
    assert masked(text) == expected
    assert str(InputError(text)) == str(RankError(text)) == " ".join(expected.splitlines())  # a message is one line


def test_parts_of_an_address_are_masked_one_by_one():
    address = "https://someone:KEY123@host/x.csv?a=1&sig=KEY456"
    assert masked("no port 'KEY123@host', KEY456, x.csv", address) == "no port '***@host', ***, x.csv"


def test_what_is_published_hides_where_a_folder_lies():
    assert publishable("/home/me/model") == "model" and publishable("a/model") == "a/model"
    assert publishable("https://me:KEY@host/x.csv?sig=KEY") == "https://host/x.csv"


class Files(http.server.BaseHTTPRequestHandler):
    """A server that sends a few files to clients that give the password or the token."""

    contents = {
        "/x.csv": b"sent0,sent1\na cat,the cat\na dog,the dog\n",
        "/x.csv.gz": gzip.compress(b"sent0,sent1\na cat,the cat\n"),
        "/x.jsonl": b'{"text": "a cat"}\n',
        "/x.txt": b"a cat\n",
        "/sts.tsv": b"1.5\ta cat\tthe cat\n2\ta\tb\n",
        "/broken.csv": b"sent0,sent1\na,b\nc,d,e,f\n",
    }

    def do_GET(self):  # noqa: N802
        path, _, query = self.path.partition("?")
        known = query == "token=SECRET123" or "Authorization" in self.headers
        content = self.contents.get(path) if known else None
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["query", "user"])
def address(request, host, monkeypatch):
    """Return a function that makes a URL with a secret from the name of a file."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    form = {"query": "http://{}/{}?token=SECRET123", "user": "http://someone:SECRET123@{}/{}"}[request.param]
    return lambda name: form.format(host, name)


@pytest.mark.parametrize(("name", "columns"), [("x.csv", 2), ("x.csv.gz", 2), ("x.jsonl", 1), ("x.txt", 1)])
def test_the_kind_of_a_file_comes_from_the_path_in_its_address(address, name, columns):
    assert len(read_file(address(name))[0]) == columns
    if name != "x.txt":  # `datasets` cannot stream a text file from a URL
        assert len(next(iter(read_file(address(name), streaming=True)))) == columns


def test_other_readers_of_addresses(address, tmp_path):
    assert read_texts(address("x.txt")) == ["a cat"]
    assert read_sts(address("sts.tsv"))["score"][:] == [1.5, 2.0]  # a table without a header
    (tmp_path / "sources.yaml").write_text(json.dumps([{"name": "a", "file": address("x.csv")}]))
    (source,) = read_sources(tmp_path / "sources.yaml")
    assert "SECRET123" not in source.label and "/x.csv" in source.label


@pytest.mark.parametrize("name", ["absent.csv", "absent.jsonl", "broken.csv", "x.docx", "x"])
def test_no_reader_shows_the_secrets_of_an_address(address, name, tmp_path, caplog, capfd):
    given, (yaml_file) = address(name), tmp_path / "sources.yaml"
    yaml_file.write_text(json.dumps([{"name": "a", "file": given}]))
    readers = [
        read_file, read_texts, read_retrieval, read_sts, read_code_search, read_sources, read_triplets,
        read_pair_classification, read_reranking,
        lambda path: read_zero_shot(path, "{label}"), lambda path: read_zero_shot(str(RECIPES), "{label}", path),
        lambda path: list(read_file(path, streaming=True)), lambda path: read_file([path, "b.txt"]),
        lambda path: read_sources(yaml_file), lambda path: cli.parse([], argv=["--config", path]),
        lambda path: cli.parse([], argv=[path]),
    ]  # fmt: skip
    for read in readers:
        message = error_of(read, given)
        assert "SECRET123" not in message and "someone" not in message, message
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_embed")]
    assert "SECRET123" not in "".join([*ours, *capfd.readouterr()])


@pytest.mark.slow
def test_a_recipe_shows_no_secret(tmp_path, host):
    given = f"http://someone:SECRET123@{host}/broken.csv?token=SECRET123"
    done = recipe("sup_simcse.py", "--train_file", given, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "line 3 has 4 cells" in done.stderr and "SECRET123" not in done.stderr + done.stdout


@pytest.mark.slow
def test_unexpected_errors_and_logs_show_no_secret(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import logging\nfrom hf_embed.kit import cli\n\n\ndef main():\n"
        "    logging.getLogger('other').warning('%s', 'https://me:SECRET123@host/x')\n"
        "    raise KeyError('https://me:SECRET123@host/x?a=SECRET123')\n\n\ncli.run(main)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "KeyError: 'https://host/x'" in done.stderr and "Traceback" in done.stderr
    assert done.stderr.startswith("https://host/x\n")
    assert "SECRET123" not in done.stderr


# ---- the launcher ----

SCRIPT = """
import os, sys, time
from hf_embed import InputError
from hf_embed.kit import cli

def main():
    time.sleep({waits}[int(os.environ["LOCAL_RANK"])])
    raise InputError("absent.csv: no such file")

cli.PATIENCE = 30
cli.run(main)
"""


def launched(*words, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | env)


@pytest.mark.slow
@pytest.mark.parametrize("waits", ["[3, 0]", "[0, 3]"])
def test_our_line_stands_above_the_launchers_report(tmp_path, waits):
    """The error line is printed once, whichever of the two processes fails first. The launcher's report shows no token."""
    (tmp_path / "script.py").write_text(SCRIPT.format(waits=waits))
    two = ("--config_file", RECIPES / "accelerate/cpu_2.yaml")
    done = launched(*two, tmp_path / "script.py", "--hub_token", SECRET)
    ours, report = done.stderr.index("error: absent.csv: no such file"), done.stderr.index("ChildFailedError")
    assert done.returncode == 1 and ours < report and done.stderr.count("error: absent.csv") == 1
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.slow
def test_one_process_quietly_launched_ends_in_our_line(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(waits="[0]").replace('"LOCAL_RANK"', '"X"'))
    done = launched("--num_processes", 1, tmp_path / "script.py", "--hub_token", SECRET, X="0")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: absent.csv: no such file"
    assert "--hub_token is visible in the process list" in done.stderr and SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(("rank", "error", "slept"), [("0", InputError, 0), ("1", InputError, 1), ("1", RankError, 0)])
def test_other_processes_let_the_main_one_print_the_error(monkeypatch, capsys, rank, error, slept):
    naps = []
    monkeypatch.setattr("time.sleep", naps.append)
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main():
        raise error("wrong")

    with pytest.raises(SystemExit):
        cli.run(main)
    assert len(naps) == slept and capsys.readouterr().err == "error: wrong\n"


def test_no_shown_command_launches_a_single_process():
    """No command that we show starts a single process with `accelerate launch`.

    After an error, `accelerate launch` prints the whole command line, including tokens.
    """
    for path in [
        *RECIPES.glob("*.py"),
        *RECIPES.parent.glob("docs/*.md"),
        RECIPES.parent / "README.md",
        RECIPES.parent / "Makefile",
    ]:
        assert "accelerate launch recipes" not in path.read_text(encoding="utf-8"), path
