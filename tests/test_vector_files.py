"""Vector files: one or two ranks write them, a stopped run is resumed, and files of another model or text are refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import error_of, tiny_encoder
from datasets import Dataset
from worker import WORDS

from hf_embed import Encoder, vector_files, write_vectors
from hf_embed.vector_files import part_size, read_vectors

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "encode.py"
TEXTS = [f"{WORDS[i % 7]} {WORDS[i % 11]} {i} " * (1 + i % 5) for i in range(100)]


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder(prompts={"document": "text: "})


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(vector_files, "SHARD", 16)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "int8", "truncate_dim": 16}, {"precision": "binary"},
     {"precision": "ubinary", "prompt_name": "document"}, {"normalize": True, "prompt_name": "document", "batch_size": 5}],
)  # fmt: skip
def test_rows_are_those_of_encode(encoder, small_shards, tmp_path, options):
    about = write_vectors(encoder, Dataset.from_dict({"a": TEXTS})["a"], tmp_path / "out.npy", **options)
    expected = encoder.encode(TEXTS, **options)
    vectors = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert vectors.shape == expected.shape and vectors.dtype == expected.dtype
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert about["rows"] == 100 and about["width"] == expected.shape[1]
    assert sorted(os.listdir(tmp_path)) == ["out.npy", "out.npy.json"]
    found, used = read_vectors(tmp_path / "out.npy", encoder, TEXTS)
    np.testing.assert_array_equal(found, vectors)
    assert used == {key: value for key, value in options.items() if key != "batch_size"}


def test_no_open_file_is_renamed(encoder, small_shards, tmp_path, monkeypatch):
    """BUG: on Windows, which refuses this, each run ended in "permission denied" when all texts were encoded."""
    move = os.replace

    def replace(old, new):
        if str(old) in [file.path for file in psutil.Process().open_files()]:
            raise PermissionError(errno.EACCES, "in use", str(old))
        move(old, new)

    monkeypatch.setattr(os, "replace", replace)
    write_vectors(encoder, TEXTS, tmp_path / "out.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode(TEXTS), atol=1e-6)


def test_parts_are_larger_on_a_gpu(encoder, small_shards, tmp_path, monkeypatch):
    """BUG: writing a part of 1,024 texts took 47 ms, in which a GPU had nothing to do. It may encode as many in less time."""
    expected, encode, sizes = encoder.encode(TEXTS), Encoder.encode, []

    def stop(encoder, texts, **options):
        sizes.append(len(texts))
        if len(sizes) == 4:
            raise KeyboardInterrupt
        return encode(encoder, texts, **options)

    monkeypatch.setattr(Encoder, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(encoder, TEXTS, tmp_path / "out.npy")
    monkeypatch.setattr(vector_files, "part_size", lambda encoder: 64)
    write_vectors(encoder, TEXTS, tmp_path / "out.npy")  # the parts of the stopped run are not mistaken for these
    assert sizes == [0, 16, 16, 16, 0, 64, 36]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    monkeypatch.undo()
    assert [part_size(SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda")] == [1024, 4096]


@pytest.mark.parametrize("kind", [iter, "".join, np.array, tuple])
def test_texts_of_other_kinds_are_those_of_encode(encoder, tmp_path, kind):
    """BUG: A single text was written letter by letter, and a generator ended in a TypeError."""
    about = write_vectors(encoder, kind(["cat", "dog"]), tmp_path / "out.npy")
    expected = np.atleast_2d(encoder.encode(kind(["cat", "dog"])))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    assert about["rows"] == len(expected)


def test_a_stopped_run_goes_on_with_what_is_missing(encoder, small_shards, tmp_path, monkeypatch):
    encoded = []
    encode = type(encoder).encode

    def stopping(self, texts, *args, **options):
        if len(encoded) % 3 == 2 and len(texts):
            encoded.append([])
            raise KeyboardInterrupt
        if len(texts):
            encoded.append(list(texts))
        return encode(self, texts, *args, **options)

    monkeypatch.setattr(type(encoder), "encode", stopping)
    stops = 0
    while not (tmp_path / "out.npy").exists():
        try:
            write_vectors(encoder, TEXTS, tmp_path / "out.npy")
        except KeyboardInterrupt:
            stops += 1
            assert os.listdir(tmp_path) == ["out.npy.work"]  # no file looks complete
    assert stops == 3 and sorted(text for part in encoded for text in part) == sorted(TEXTS)  # each text once
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encode(encoder, TEXTS), atol=1e-6)


def test_work_of_another_run_is_not_resumed(encoder, small_shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(vector_files, "make_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_vectors(encoder, TEXTS, tmp_path / "out.npy", truncate_dim=8)
    other = tiny_encoder(seed=1, prompts={"document": "text: "})
    changed = [*TEXTS[:50], "changed", *TEXTS[51:]]
    for model, texts, options in [
        (other, TEXTS, {"truncate_dim": 8}), (encoder, changed, {"truncate_dim": 8}), (encoder, TEXTS, {"truncate_dim": 9}),
        (encoder, TEXTS, {"truncate_dim": 8, "prompt_name": "document"}),
        (encoder, TEXTS, {"truncate_dim": 8, "normalize": True}), (encoder, TEXTS[:-1], {"truncate_dim": 8}),
    ]:  # fmt: skip
        assert "belongs to a run with another model" in error_of(write_vectors, model, texts, tmp_path / "out.npy", **options)
    write_vectors(encoder, TEXTS, tmp_path / "out.npy", truncate_dim=8, batch_size=3)  # another batch size changes no vector
    assert "out.npy already exists" in error_of(write_vectors, encoder, TEXTS, tmp_path / "out.npy", truncate_dim=8)
    for model, texts, message in [
        (other, TEXTS, "come from another model"), (encoder, changed, "or other texts"),
        (encoder, TEXTS[1:], "100 vectors but 99 texts"),
    ]:  # fmt: skip
        assert message in error_of(read_vectors, tmp_path / "out.npy", model, texts)
    np.save(tmp_path / "out.npy", np.zeros((100, 9), np.float32))
    assert "the vectors do not match out.npy.json" in error_of(read_vectors, tmp_path / "out.npy", encoder, TEXTS)
    (tmp_path / "out.npy.json").unlink()
    message = error_of(read_vectors, tmp_path / "out.npy", encoder, TEXTS)
    assert "out.npy.json, which describes the vectors, does not exist" in message
    assert "this file does not exist" in error_of(read_vectors, tmp_path / "none.npy", encoder, TEXTS)


@pytest.mark.parametrize("text", ["", "  ", None, 7])
def test_an_empty_text_is_named_by_its_row(encoder, tmp_path, text):
    message = error_of(write_vectors, encoder, [*TEXTS, text], tmp_path / "out.npy", {"file": "mine.csv"})
    assert message.startswith("mine.csv, row 101: the text is ") and not os.listdir(tmp_path)


def test_what_cannot_be_written_is_refused(encoder, tmp_path):
    assert "half of a character" in error_of(write_vectors, encoder, ["a", "\ud83d"], tmp_path / "v.npy")
    assert "name the file" in error_of(write_vectors, encoder, TEXTS, tmp_path / "out.bin")
    assert "truncate_dim" in error_of(write_vectors, encoder, TEXTS, tmp_path / "out.npy", truncate_dim=99)
    assert not os.listdir(tmp_path)
    broken = tiny_encoder()
    broken.backbone.embeddings.word_embeddings.weight.data[:] = float("nan")
    assert "the vector of text 1 (" in error_of(write_vectors, broken, TEXTS, tmp_path / "out.npy")


def test_a_full_disk_is_said_before_anything_is_computed(encoder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vector_files.os, "posix_fallocate", full)
    assert error_of(write_vectors, encoder, TEXTS, tmp_path / "out.npy").startswith("the disk is full (at ")
    monkeypatch.undo()
    write_vectors(encoder, TEXTS, tmp_path / "out.npy")  # the first run's leftovers do not matter
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode(TEXTS), atol=1e-6)


# ---- the recipes ----


@pytest.fixture(scope="module")
def files(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("files")
    encoder.save_pretrained(folder / "model", verify=False)
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS * 4)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def main_of(name, monkeypatch, *words):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__(name)
    module.main()


def test_recipe_writes_a_vector_for_each_row(files, encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.npy"
    main_of(
        "encode", monkeypatch, files / "model", files / "texts.jsonl", out, "--precision", "int8", "--prompt_name", "document"
    )
    assert capsys.readouterr().out.endswith(f"wrote {out}: 400 vectors of 32 numbers, int8\n")
    np.testing.assert_array_equal(np.load(out), encoder.encode_document(TEXTS * 4, precision="int8"))
    about = json.loads((tmp_path / "out.npy.json").read_text())
    assert about["column"] == "text" and about["model"] == str(files / "model") and about["precision"] == "int8"


def test_recipe_says_what_is_wrong(files, tmp_path, monkeypatch):
    model, texts, out = files / "model", files / "texts.jsonl", tmp_path / "out.npy"
    (tmp_path / "gap.txt").write_text("one\n\nthree\n")
    for words, message in [
        ([model, texts], "missing: OUT; usage: python encode.py MODEL FILE OUT [FLAGS]"),
        ([model, "--precision", "int8"], "missing: FILE and OUT; usage: "),
        ([model, texts, out, "--column", "body"], "there is no column 'body'; found id, text"),
        ([model, texts, out, "--column", "id"], "row 1: the text is not a string (0)"),
        ([model, tmp_path / "gap.txt", out], "gap.txt, row 2: the text is empty"),
        ([model, tmp_path / "no.txt", out], "this file does not exist"),
        ([model, texts, out, "--precision", "int4"], "invalid choice"),
        ([model, texts, out, "--truncate_dim", "0"], "truncate_dim is 0"),
        ([model, texts, out, "--prompt_name", "title"], "unknown prompt_name 'title'"),
    ]:
        assert message in error_of(main_of, "encode", monkeypatch, *words)
        assert not out.exists()
    assert "missing: FILE; usage: python search.py MODEL FILE [FLAGS]" in error_of(main_of, "search", monkeypatch, model)


def test_bfloat16(files, encoder, tmp_path, monkeypatch):
    """--bf16 rounds the vectors. They are then not taken for those of the model in float32."""
    model, texts, out = files / "model", files / "texts.jsonl", tmp_path / "out.npy"
    main_of("encode", monkeypatch, model, texts, out, "--bf16", "--prompt_name", "document")
    vectors, expected = np.load(out), encoder.encode_document(TEXTS * 4)
    assert vectors.dtype == np.float32
    cosines = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.999 and np.abs(vectors - expected).max() > 1e-4
    assert json.loads((tmp_path / "out.npy.json").read_text())["bf16"] is True
    words = [model, texts, "--embeddings", out, "--query", "cat"]
    assert "the vectors were encoded with --bf16" in error_of(main_of, "search", monkeypatch, *words)
    main_of("search", monkeypatch, *words, "--bf16")
    out = tmp_path / "float32.npy"
    main_of("encode", monkeypatch, model, texts, out, "--prompt_name", "document")
    words = [model, texts, "--embeddings", out, "--query", "cat", "--bf16"]
    assert "the vectors were encoded without --bf16" in error_of(main_of, "search", monkeypatch, *words)


def test_attention_of_a_recipe_that_encodes(files, tmp_path, monkeypatch):
    model, texts, out = files / "model", files / "texts.jsonl", tmp_path / "out.npy"
    assert "attn_implementation" in error_of(main_of, "encode", monkeypatch, model, texts, out, "--attn_implementation", "no")
    main_of("encode", monkeypatch, model, texts, out, "--attn_implementation", "eager")
    np.testing.assert_allclose(np.load(out), tiny_encoder().encode(TEXTS * 4), atol=1e-5)


def hits_of(output):
    """Return {query: row indices} from the output of the recipe."""
    found = {}
    for block in output.strip().split("\n\n"):
        query, *lines = block.splitlines()
        found[query] = [int(line.split("row ")[1].split()[0]) - 1 for line in lines]
    return found


@pytest.mark.parametrize("options", [[], ["--precision", "int8"], ["--precision", "binary"]])
def test_search_answers_queries(files, encoder, tmp_path, monkeypatch, capsys, options):
    model, texts = files / "model", files / "texts.jsonl"
    main_of("encode", monkeypatch, model, texts, tmp_path / "out.npy", "--prompt_name", "document", *options)
    capsys.readouterr()
    queries = ["cat dog 3", "river", TEXTS[17]]
    words = [model, texts, "--embeddings", tmp_path / "out.npy", "--top_k", "7"]
    main_of("search", monkeypatch, *words, "--query", queries[0], "--query", *queries[1:])
    found = hits_of(capsys.readouterr().out)
    precision = options[1] if options else "float32"
    cosines = encoder.similarity(encoder.encode_query(queries), encoder.encode_document(TEXTS * 4, precision=precision)).numpy()
    for query, row in zip(queries, cosines):
        np.testing.assert_allclose(row[found[query]], np.sort(row)[::-1][:7], atol=1e-6)
    if not options:
        main_of("search", monkeypatch, model, texts, "--top_k", "7", "--query", *queries)  # without a vector file
        output = capsys.readouterr()
        again = hits_of(output.out)
        for query, row in zip(queries, cosines):
            np.testing.assert_allclose(row[again[query]], np.sort(row)[::-1][:7], atol=1e-6)


def test_search_reads_queries_up_to_an_empty_line(files, monkeypatch, capsys):
    lines = iter(["cat", " dog ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main_of("search", monkeypatch, files / "model", files / "texts.jsonl", "--top_k", "1")
    assert list(hits_of(capsys.readouterr().out)) == ["cat", "dog"]

    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    main_of("search", monkeypatch, files / "model", files / "texts.jsonl")


def test_search_takes_only_vectors_of_the_file(files, tmp_path, monkeypatch):
    model, texts, out = files / "model", files / "texts.jsonl", tmp_path / "out.npy"
    main_of("encode", monkeypatch, model, texts, out)
    words = [model, texts, "--embeddings", out, "--query", "cat"]
    assert "encode them again with --prompt_name document" in error_of(main_of, "search", monkeypatch, *words)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(texts.read_text().replace('"id": 7, "text": "', '"id": 7, "text": "new '))
    assert "or other texts" in error_of(main_of, "search", monkeypatch, model, changed, "--embeddings", out, "--query", "cat")


def launch(*words, script=()):
    command = [sys.executable, *(script or [str(RECIPE)]), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_and_a_killed_run_write_the_same(files, encoder, tmp_path):
    expected = encoder.encode(TEXTS * 4)
    small = "import runpy, sys; from hf_embed import vector_files; vector_files.SHARD = 16; sys.argv = sys.argv[1:]; "
    small += "runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "small.py").write_text(small)
    config = str(ROOT / "recipes/accelerate/cpu_2.yaml")
    ranks = ["-m", "accelerate.commands.launch", "--config_file", config, str(tmp_path / "small.py"), str(RECIPE)]
    launch(files / "model", files / "texts.jsonl", tmp_path / "two.npy", script=ranks)
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), expected, atol=1e-6)

    pause = "import time; from numpy import memmap; flush = memmap.flush; "
    pause += "memmap.flush = lambda self: (flush(self), time.sleep(0.05)); "
    words = [str(RECIPE), files / "model", files / "texts.jsonl", tmp_path / "killed.npy"]
    command = [sys.executable, "-c", pause + small, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    done, deadline = tmp_path / "killed.npy.work" / "done", time.time() + 120
    while not (done / "000004").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.npy").exists() and 4 < len(list(done.iterdir())) < 25
    launch(*words, script=("-c", small))
    np.testing.assert_allclose(np.load(tmp_path / "killed.npy"), expected, atol=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["killed.npy", "killed.npy.json", "small.py", "two.npy", "two.npy.json"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("search", ["texts.jsonl"]),
        ("tempscale", ["--temperature", "0.9", "--output_dir", "new"]),
        ("length_collapse", ["--texts", "texts.jsonl", "--output_dir", "new"]),
    ],
)
def test_a_recipe_of_one_process_is_not_started_twice(files, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(files)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = "this recipe runs in a single process, but 2 were started; start it without a launcher"
    assert error_of(main_of, name, monkeypatch, files / "model", *words) == expected
    assert not (files / "new").exists()
