"""Tests that any file, rows, YAML or command line gives a result or an InputError, and does so within seconds.

Each area has a strategy that makes hostile cases, and a function that reads one case. By default, a few cases of each area run.
With `-m slow`, 20,000 cases run in total. The cases are the same every time. FOUND holds cases that once ended in another way.
They are tried first.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import fuzz_strategies as hostile
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import small_tokenizer, tiny_encoder, tokenize_rows
from fuzz_strategies import st
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis.strategies import SearchStrategy

from hf_embed import Encoder, InputError, semantic_search
from hf_embed.checkpoint.hub import model_files as model_files_of
from hf_embed.checkpoint.model_files import read_weights
from hf_embed.checkpoint.settings import read_settings
from hf_embed.data.columns import column_names, read_columns
from hf_embed.data.labeled import read_pairs
from hf_embed.data.mixture import Source
from hf_embed.data.python_rows import as_rows
from hf_embed.data.source_files import KEYS, read_sources
from hf_embed.data.sources import read_file, read_texts
from hf_embed.evaluation.pair_classification import PairClassification, read_pair_classification
from hf_embed.evaluation.reranking import Reranking, read_reranking
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval, read_retrieval
from hf_embed.evaluation.sts import STS, check_sts, read_sts
from hf_embed.evaluation.triplets import Triplets, read_triplets
from hf_embed.evaluation.zero_shot import ZeroShot, read_zero_shot
from hf_embed.files.read_files import read_array, read_tensors
from hf_embed.kit import plan
from hf_embed.kit.ablation import AblationArguments, read_variants
from hf_embed.kit.calibrate import halves
from hf_embed.kit.code_search import read_code_search
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.kit.plan import PositiveArguments
from hf_embed.kit.positives import read_synonyms
from hf_embed.mining import MiningArguments
from hf_embed.objectives import ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.tempscale import TempScaleConfig
from hf_embed.vector_files import read_vectors, write_vectors

SECONDS = 10  # the longest time for a case


class Hangs(BaseException):
    """Raised when a case takes too long. It is not an Exception, because the tested code might catch an Exception."""


@contextlib.contextmanager
def soon():
    """Raise Hangs if the block takes longer than SECONDS."""

    def stop(*_):
        raise Hangs(f"no outcome in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def embed(texts: list[str], prompt_name: str | None = None) -> torch.Tensor:
    """Return vectors (N, 4) that depend on the texts."""
    return torch.tensor(
        [[len(text), sum(map(ord, text)) % 7, ord(text[:1] or " ") % 5, 1] for text in texts], dtype=torch.float32
    )


# ---- reading one case: each function writes the case into a folder and reads it ----


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_bytes(content)


def streamed(path: str) -> None:
    column_names(read_file(path, streaming=True))


@cache
def tokenizer():
    return small_tokenizer()


READERS: dict[str, Callable[[str], Any]] = {
    "read_file": read_file,
    "without a header": lambda path: read_file(path, header=False, quoting=False),
    "a stream": streamed,
    "read_texts": read_texts,
    "pairs": lambda path: read_pairs(read_file(path), path),
    "search": lambda path: pairs_to_retrieval(read_pairs(read_file(path), path)).score(embed),
    "read_sts": lambda path: STS(read_sts(path)).score(embed),
    "read_triplets": lambda path: read_triplets(path).score(embed),
    "read_pair_classification": lambda path: read_pair_classification(path).score(embed),
    "read_reranking": lambda path: read_reranking(path).score(embed),
    "read_zero_shot": lambda path: read_zero_shot(path, "a {label}").score(embed),
    "read_code_search": lambda path: read_code_search(path).score(embed),
    "halves": lambda path: halves(read_texts(path), least=2),
}


SCORED = {
    "read_texts": [["text"], ["sentence"]],
    "halves": [["text"]],
    "pairs": [["anchor", "positive"], ["premise", "hypothesis", "label"], ["sentence1", "sentence2", "label"]],
    "search": [["anchor", "positive"], ["question", "answer"]],
    "read_sts": [["sentence1", "sentence2", "score"], ["score", "a", "b"]],
    "read_triplets": [["anchor", "positive", "negative"], ["query", "pos", "neg"], ["query", "positive", "documents"]],
    "read_pair_classification": [["sentence1", "sentence2", "label"], ["question1", "question2", "is_duplicate"]],
    "read_reranking": [["query", "positive", "negatives"], ["query", "document", "label"], ["query", "positive", "documents"]],
    "read_zero_shot": [["label", "text"], ["text", "label"]],
    "read_code_search": [["docstring", "code"]],
}


@st.composite
def tables(draw, *kinds) -> tuple[str, tuple[str, bytes]]:
    reader = draw(st.sampled_from(sorted(READERS)))
    return reader, draw(hostile.table_files(*kinds, layouts=SCORED.get(reader)))


def check_table(case: tuple, folder: Path) -> None:
    reader, (name, content) = case
    write(folder, {name: content})
    named(name, READERS[reader], str(folder / name))


def named(name: str, call: Callable, *args: Any) -> None:
    """Call a reader, and check that the message of its InputError names the file. Messages about all texts are excepted."""
    try:
        call(*args)
    except InputError as error:
        assert name in str(error) or "texts of" in str(error) or "text(s) have" in str(error), (
            f"the message names no file: {error}"
        )
        assert "\n" not in str(error)
        raise


def tokenize(rows: Any, name: str) -> None:
    if isinstance(rows, datasets.Dataset):
        tokenize_rows(rows, tokenizer(), 16, name)


def check_tokenized(case: tuple, folder: Path) -> None:
    name, content = case
    write(folder, {name: content})
    tokenize(read_file(str(folder / name)), name)


def check_rows(case: tuple, folder: Path) -> None:
    reader, rows = case
    if reader == "reranking":
        Reranking(rows).score(embed)
    else:
        table = as_rows(rows, "train_dataset")
        if reader == "tokenize":
            tokenize(table, "train_dataset")


def check_beir(case: dict, folder: Path) -> None:
    write(folder, case)
    named(folder.name, lambda: read_retrieval(str(folder)).score(embed))


SOURCES = """- name: a
  file: rows.csv
  columns: {query: anchor, positive: positive}
  weight: 2.0
"""


def check_sources(case: bytes, folder: Path) -> None:
    rows = b"anchor,positive,negative\na cat,a kitten,a dog\nthe sun,it is hot,rain\n"
    write(folder, {"sources.yaml": case, "rows.csv": rows, "more.jsonl": b'{"anchor": "a", "positive": "b"}\n'})
    sources = read_sources(str(folder / "sources.yaml"))
    for source in sources:
        tokenize(source.rows, source.label)


FLAGS = [
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "temperature",
    "pooling",
    "max_length",
    "train_file",
    "eval_sts_file",
    "seed",
    "prompts",
    "warmup_steps",
    "bf16",
    "logging_steps",
    "eval_strategy",
    "save_steps",
    "positive",
    "columns",
    "fsdp",
    "lr_scheduler_type",
    "optim",
    "report_to",
    "output_dir",
    "dropout",
    "seeds",
    "variants",
    "lora_r",
    "lr_scheduler_kwargs",
    "accelerator_config",
    "model_name_or_path",
    "ignore_columns",
    "torch_compile",
    "metric_for_best_model",
    "load_best_model_at_end",
    "drop_empty_rows",
    "chunk_tokens",
    "optim_args",
    "fsdp_config",
    "gradient_checkpointing_kwargs",
    "logging_dir",
    "save_total_limit",
    "data_seed",
    "mlm_weight",
    "hub_token",
]
KINDS = [SimCSE, PositiveArguments, AblationArguments]


def make_all(argv: list[str], folder: Path) -> None:
    flags = plan.read_flags(KINDS, None, argv=["--output_dir", str(folder / "out"), *argv])
    for kind in flags.parser.kinds:
        made = flags.make(kind)
        if kind is AblationArguments:
            read_variants(made.variants)


def check_config(case: bytes, folder: Path) -> None:
    write(folder, {"config.yaml": case})
    make_all(["--config", str(folder / "config.yaml")], folder)


def check_command_line(case: list[str], folder: Path) -> None:
    with contextlib.suppress(SystemExit):  # --help ends the process
        make_all(case, folder)


EVALUATIONS = [
    "eval_sts_file",
    "eval_retrieval_dir",
    "eval_zero_shot",
    "eval_code_search",
    "eval_triplet_file",
    "eval_pair_file",
    "eval_reranking_file",
    "zero_shot_labels",
]
GOOD = {
    "sts.tsv": b"score\tsentence1\tsentence2\n1\ta cat\ta dog\n2\ta\tb\n",
    "labels.json": b'{"a": "of a", "b": "of b"}',
    "zero.csv": b"label,text\na,a cat\nb,a dog\n",
    "folder/x": b"",
}


def check_evaluation(case: tuple, folder: Path) -> None:
    given_flags, labels = case
    write(folder, GOOD | {"damaged.json": labels})
    args = EvalArguments(eval_zero_shot=[f"z={folder}/zero.csv"])
    for flag, item in given_flags:
        item = item.replace("{folder}", str(folder))
        elsewhere = os.path.isdir(item.partition("=")[2]) and str(folder) not in item
        if flag != "eval_code_search" or not elsewhere:  # other folders differ between machines
            getattr(args, flag).append(item)
    read_tasks(args)


def check_synonyms(case: bytes, folder: Path) -> None:
    write(folder, {"words.tsv": case})
    named("words.tsv", read_synonyms, str(folder / "words.tsv"))


def check_arguments(case: tuple, folder: Path) -> None:
    """Call a public function or class, as a user's script may, with arguments of any type."""
    what, given = case
    CALLS[what](*given)


def source(values: list, name: str, value: Any) -> None:
    rows = datasets.Dataset.from_dict({"anchor": ["a cat", "a dog"], "positive": ["b", "c"], "negative": ["x", "y"]})
    made = Source(**({"name": "a", "rows": rows} | {name if name in SOURCE_FIELDS else "weight": value}))
    tokenize(made.rows, made.label)


def dataclass_of(kind: type, name: str, value: Any) -> None:
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    kind(**{names[sum(map(ord, name)) % len(names)]: value})


CALLS: dict[str, Callable[..., Any]] = {
    "search": lambda values, name, value: semantic_search(value, values, top_k=2),
    "top_k": lambda values, name, value: semantic_search(torch.eye(2), torch.eye(2), top_k=value, similarity=name),
    "encode": lambda values, name, value: encoder().encode(value),
    "encode a list": lambda values, name, value: encoder().encode(values, prompt_name=name),
    "truncate": lambda values, name, value: encoder().encode("a cat", truncate_dim=value, normalize=True),
    "precision": lambda values, name, value: encoder().encode("a cat", precision=value),
    "batch size": lambda values, name, value: encoder().encode("a cat", batch_size=value),
    "similarity": lambda values, name, value: encoder().similarity(value, torch.eye(2)),
    "Triplets": lambda values, name, value: Triplets(values, values, values).score(embed),
    "Triplets of any": lambda values, name, value: Triplets(value, values, values).score(embed),
    "PairClassification": lambda values, name, value: PairClassification(values, values, [0, 1, *values][: len(values)]).score(
        embed
    ),
    "labels": lambda values, name, value: PairClassification(["a", "b"], ["c", "d"], value).score(embed),
    "Retrieval": lambda values, name, value: Retrieval({"q": name}, {"d": "a cat"}, {"q": {"d": value}}).score(embed),
    "Retrieval of any": lambda values, name, value: Retrieval(value, value, value).score(embed),
    "cutoffs": lambda values, name, value: Retrieval({"q": "a"}, {"d": "b", "e": "c"}, {"q": {"d": 1}}, value).score(embed),
    "STS": lambda values, name, value: check_sts(
        datasets.Dataset.from_dict({"sentence1": ["a", "b"], name.replace("\0", "") or "x": ["c", "d"], "score": [0, 1]}), "sts"
    ),
    "ZeroShot": lambda values, name, value: ZeroShot(["a", "b"], value, ["c", "d"]).score(embed),
    "Source": source,
    "columns": lambda values, name, value: source(values, "columns", value),
    "SimCSE": lambda values, name, value: dataclass_of(SimCSE, name, value),
    "ImprovedContrastive": lambda values, name, value: dataclass_of(ImprovedContrastive, name, value),
    "Matryoshka": lambda values, name, value: Matryoshka(SimCSE(), value),
    "MiningArguments": lambda values, name, value: dataclass_of(MiningArguments, name, value),
    "TempScaleConfig": lambda values, name, value: dataclass_of(TempScaleConfig, name, value),
    "read_columns": lambda values, name, value: read_columns([name, f"anchor={name}"]),
    "from_pretrained": lambda values, name, value: Encoder.from_pretrained(name),
    "pooling": lambda values, name, value: Encoder(encoder().backbone, tokenizer(), pooling=value),
    "max_length": lambda values, name, value: Encoder(encoder().backbone, tokenizer(), max_length=value),
    "prompts": lambda values, name, value: Encoder(encoder().backbone, tokenizer(), prompts=value),
    "encoder's truncate_dim": lambda values, name, value: Encoder(encoder().backbone, tokenizer(), truncate_dim=value),
}
SOURCE_FIELDS = ["query_prompt", "max_length", "negatives", "weight", "size", "columns", "rows", "name"]
vectors = st.one_of(hostile.objects, st.lists(st.lists(hostile.numbers, min_size=2, max_size=2), max_size=3), hostile.arrays)
calls = st.tuples(
    st.sampled_from(sorted(CALLS)),
    st.tuples(st.one_of(st.lists(hostile.cells, max_size=3), st.lists(hostile.plain, min_size=2, max_size=3)),
              st.one_of(hostile.texts, st.sampled_from(SOURCE_FIELDS), st.sampled_from(["cosine", "score"])), vectors),
)  # fmt: skip


# ---- models ----


@cache
def model_files() -> dict[str, bytes]:
    """Return the files of a tiny model that has every module, as {name: content}. The model is made once."""
    with tempfile.TemporaryDirectory() as folder:
        dense = hf_dense()
        tiny_encoder(pooling="mean", dense=[dense], normalize=True, prompts={"query": "q: "}).save_pretrained(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def hf_dense():
    from hf_embed.pooling import Dense

    return Dense(torch.nn.Linear(32, 16), torch.nn.Tanh())


@cache
def encoder() -> Encoder:
    return tiny_encoder()


SETTINGS_FILES = {
    "modules.json": ["idx", "name", "path", "type", "kwargs"],
    "1_Pooling/config.json": ["word_embedding_dimension", "pooling_mode", "include_prompt", "pooling_mode_cls_token"],
    "2_Dense/config.json": ["in_features", "out_features", "bias", "activation_function", "use_residual"],
    "sentence_bert_config.json": ["max_seq_length", "do_lower_case", "modality_config", "model_args"],
    "config_sentence_transformers.json": [
        "prompts",
        "default_prompt_name",
        "similarity_fn_name",
        "truncate_dim",
        "requirements",
    ],
}
MODEL_KEYS = [
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "intermediate_size",
    "model_type",
    "dtype",
    "max_position_embeddings",
    "architectures",
    "hidden_act",
    "temp_scale",
    "auto_map",
    "pad_token_id",
    "type_vocab_size",
    "layer_norm_eps",
    "quantization_config",
    "is_decoder",
    "num_labels",
    "transformers_version",
    "torch_dtype",
]


def model_folder(folder: Path, changed: dict[str, bytes]) -> str:
    write(folder, model_files() | changed)
    return str(folder)


def check_settings(case: tuple, folder: Path) -> None:
    name, content = case
    model_folder(folder, {name: content})
    said = read_settings(str(folder), encoder().backbone, tokenizer())
    said.pop("dense", None)
    Encoder(encoder().backbone, tokenizer(), **said)


def check_model(case: tuple, folder: Path) -> None:
    name, content = case
    if isinstance(content, dict):  # new values for some keys of the file
        content = json.dumps(json.loads(model_files()[name]) | content).encode()
    if name == "config.json" and re.search(rb"\d{7}", content):  # transformers would create a model of this size
        return
    model = Encoder.from_pretrained(model_folder(folder, {name: content}))
    model.encode(["a cat"])


def check_push(case: tuple, folder: Path) -> None:
    name, content = case
    model_folder(folder, {name: content})
    model_files_of(folder)


def check_tensors(case: bytes, folder: Path) -> None:
    write(folder, {"model.safetensors": case})
    named("model.safetensors", read_tensors, folder / "model.safetensors")


def check_shards(case: tuple, folder: Path) -> None:
    index, shards = case
    write(folder, {"model.safetensors.index.json": index} | shards)
    read_weights(folder)


def check_pickled(case: bytes, folder: Path) -> None:
    write(folder, {"pytorch_model.bin": case})
    named("pytorch_model.bin", read_tensors, folder / "pytorch_model.bin")


def check_array(case: bytes, folder: Path) -> None:
    write(folder, {"vectors.npy": case})
    named("vectors.npy", lambda path: read_array(path).sum(), folder / "vectors.npy")


@cache
def vector_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(encoder(), ["a cat", "a dog"], Path(folder, "vectors.npy"))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def check_vectors(case: tuple, folder: Path) -> None:
    name, content = case
    write(folder, vector_files() | {name: content})
    named("vectors.npy", lambda: read_vectors(folder / "vectors.npy", encoder(), ["a cat", "a dog"]))


# ---- strategies of whole cases ----


@cache
def small_tensors() -> bytes:
    from safetensors.torch import save

    return save({"linear.weight": torch.eye(4), "linear.bias": torch.zeros(4), "x": torch.ones(2, 3, dtype=torch.int64)})


@cache
def small_pickle() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"linear.weight": torch.eye(4)}, Path(folder, "a.bin"))
        return Path(folder, "a.bin").read_bytes()


@cache
def small_array() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "a.npy"), np.ones((2, 4), np.float32))
        return Path(folder, "a.npy").read_bytes()


@st.composite
def settings_files(draw) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(SETTINGS_FILES)))
    return name, draw(hostile.json_objects(json.loads(model_files()[name]), SETTINGS_FILES[name]))


@st.composite
def pushed_files(draw) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["modules.json", "config.json", "tokenizer_config.json"]))
    keys = {"modules.json": SETTINGS_FILES["modules.json"]}.get(name, ["auto_map"])
    return name, draw(hostile.json_objects(json.loads(model_files()[name]), keys))


@st.composite
def whole_models(draw) -> tuple[str, bytes]:
    name = draw(
        st.sampled_from(
            [
                "config.json",
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "model.safetensors",
                "2_Dense/model.safetensors",
                "adapter_config.json",
                "model.safetensors.index.json",
            ]
        )
    )
    if name.endswith(".safetensors"):
        return name, draw(hostile.damaged_tensors(model_files()[name]))
    base = json.loads(model_files().get(name, b'{"base_model_name_or_path": "x", "weight_map": {}}'))
    keys = (
        MODEL_KEYS
        if name == "config.json"
        else [
            "model_max_length",
            "add_bos_token",
            "chat_template",
            "tokenizer_class",
            "model",
            "normalizer",
            "pre_tokenizer",
            "added_tokens",
            "version",
        ]
    )
    return name, draw(hostile.json_objects(base, keys))


@st.composite
def vector_cases(draw) -> tuple[str, bytes]:
    files = vector_files()
    if draw(st.booleans()):
        return "vectors.npy", draw(hostile.damaged(files["vectors.npy"]))
    about = json.loads(files["vectors.npy.json"])
    keys = ["rows", "width", "dtype", "identity", "prompt_name", "truncate_dim", "normalize", "precision", "file"]
    return "vectors.npy.json", draw(hostile.json_objects(about, keys))


words = st.one_of(hostile.texts, st.sampled_from(FLAGS).map("--{}".format), st.sampled_from(FLAGS).map("--{}".format))
flags = st.lists(
    st.one_of(words, st.tuples(st.sampled_from(FLAGS), hostile.texts).map(lambda pair: f"--{pair[0]}={pair[1]}"),
              st.tuples(st.sampled_from(FLAGS), hostile.values).map(lambda pair: f"--{pair[0]}={json.dumps(pair[1])}")),
    max_size=4,
)  # fmt: skip
paths = st.one_of(
    hostile.texts,
    st.sampled_from(
        [
            "{folder}/sts.tsv",
            "{folder}/zero.csv",
            "{folder}",
            "{folder}/folder",
            "{folder}/absent.csv",
            "/dev/null",
            "/dev/zero",
            "o/d:test",
            "o/d",
            "/",
            ".",
            "a" * 300 + ".csv",
            "{folder}/sts.tsv:test",
            "{folder}/sts.tsv/x",
            "{folder}/damaged.json",
            "file://{folder}/sts.tsv",
            "x://y.csv",
            "http://[.csv",
            "\0.csv",
            "memory://a.csv",
        ]
    ),
)
items = st.one_of(paths.map("z={}".format), paths.map("b={}".format), paths, hostile.texts)
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"linear.weight": "a.safetensors", "x": "a.safetensors"}}


@dataclass
class Area:
    """Hostile cases of one kind.

    Args:
        cases: the strategy that makes the cases.
        check: a function that reads one case, in a folder of its own.
        few: the number of cases that run by default.
        many: the number of cases that run with `-m slow`.
    """

    cases: SearchStrategy
    check: Callable[[Any, Path], None]
    few: int
    many: int


AREAS = {
    "tables": Area(tables(), check_table, 60, 5500),
    "parquet": Area(tables(("parquet",)), check_table, 10, 400),
    "tokenized": Area(
        hostile.table_files(
            layouts=[["text"], ["anchor", "positive"], ["premise", "hypothesis", "label"], ["query", "pos", "neg"]]
        ),
        check_tokenized,
        10,
        800,
    ),
    "rows": Area(
        st.tuples(st.sampled_from(["rows", "rows", "tokenize", "reranking"]), hostile.python_rows()), check_rows, 40, 2500
    ),
    "arguments": Area(calls, check_arguments, 40, 3000),
    "beir": Area(hostile.beir_folders(), check_beir, 30, 1500),
    "sources": Area(hostile.yaml_texts([*sorted(KEYS), "columns"], SOURCES), check_sources, 20, 1500),
    "config": Area(hostile.yaml_texts(FLAGS, "seed: 1\n"), check_config, 15, 1200),
    "command line": Area(flags, check_command_line, 15, 1200),
    "evaluation": Area(
        st.tuples(st.lists(st.tuples(st.sampled_from(EVALUATIONS), items), max_size=3), hostile.json_lines()),
        check_evaluation,
        20,
        1000,
    ),
    "synonyms": Area(hostile.damaged(b"cat\tkitten, tom\ndog\thound\n"), check_synonyms, 10, 300),
    "settings": Area(st.deferred(settings_files), check_settings, 20, 1200),
    "push": Area(st.deferred(pushed_files), check_push, 10, 500),
    "tensors": Area(st.deferred(lambda: hostile.damaged_tensors(small_tensors())), check_tensors, 20, 1000),
    "shards": Area(
        st.deferred(
            lambda: st.tuples(
                hostile.json_objects(INDEX, ["weight_map", "../x"]),
                st.dictionaries(
                    st.sampled_from(["a.safetensors", "b.safetensors"]),
                    st.one_of(st.just(small_tensors()), hostile.damaged_tensors(small_tensors())),
                ),
            )
        ),
        check_shards,
        15,
        500,
    ),
    "pickled": Area(st.deferred(lambda: hostile.damaged(small_pickle())), check_pickled, 10, 500),
    "array": Area(st.deferred(lambda: hostile.damaged(small_array())), check_array, 10, 500),
    "vectors": Area(st.deferred(vector_cases), check_vectors, 5, 200),
    "models": Area(st.deferred(whole_models), check_model, 5, 300),
}


def empty_parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), out)
    return out.getvalue()


def strange_parquet(name: str, cells: pyarrow.Array) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"anchor": ["a", "b"], "positive": ["c", "d"], name: cells}), out)
    return out.getvalue()


# The first date is before the year 1, so Python cannot represent it.
NO_DATE = pyarrow.array([-(10**7), 0], pyarrow.int32()).cast(pyarrow.date32())
YAML_FOUND = [
    b"!!float abc",
    b"!!int abc",
    b"!!bool maybe",
    b"!!timestamp x",
    b"2020-99-99: 1",
    b"!!map [1]",
]
FOUND: dict[str, list[Any]] = {
    "tables": [
        ("search", ("data.csv", b"anchor,positive\n")),
        ("read_texts", ("data.jsonl", b'{"a\\nb": 1, "c": 2}')),
        ("read_file", ("data.json", b"[" * 100_000)),
        ("read_file", ("data.csv", hostile.LFS)),
    ],
    "parquet": [
        ("a stream", ("data.parquet", empty_parquet())),
        ("search", ("data.parquet", strange_parquet("day", NO_DATE))),
        ("read_zero_shot", ("data.parquet", strange_parquet("label", NO_DATE))),
    ],
    "tokenized": [
        ("data.jsonl", b'{"anchor": [1%s], "positive": "a"}\n' % (b"0" * 30)),
        ("data.jsonl", b'{"anchor": [[1%s, 1e999]], "positive": "a"}\n' % (b"0" * 400)),
    ],
    "rows": [("rows", [{}]), ("reranking", [{object(): "a"}]), ("reranking", np.int64(3)), ("reranking", np.array(5))],
    "sources": YAML_FOUND,
    "config": YAML_FOUND,
    "beir": [
        {
            "corpus.jsonl": b'{"_id": "1", "text": "a"}',
            "queries.jsonl": b'{"_id": "1", "text": "b"}',
            "qrels/test.tsv": b"1\t1\t" + b"9" * 400,
        }
    ],
    "arguments": [
        ("columns", ([], "a", [])),
        ("max_length", ([], "a", [])),
        ("cutoffs", ([], "a", math.nan)),
        ("prompts", ([], "a", 3)),
        ("search", ([], "a", None)),
        ("Triplets of any", ([], "a", 1)),
        ("Retrieval of any", ([], "a", 1)),
        ("labels", ([], "a", 1)),
        ("pooling", ([], "a", np.zeros(2))),
        ("Matryoshka", ([], "a", str)),
        ("ZeroShot", ([], "a", None)),
        ("top_k", ([], "cosine", 10**400)),
    ],
    "evaluation": [([(flag, f"a={'a' * 300}.csv")], b"{}") for flag in EVALUATIONS],
    "models": [
        ("config.json", {"temp_scale": 5}),
        ("config.json", {"temp_scale": {"temperature": {"0-99999999999": 0.5}}}),
        ("config.json", {"temp_scale": {"temperature": {"²": 0.5}}}),
        ("2_Dense/config.json", {"in_features": 10**6, "out_features": 10**6}),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.transformer.Transformer"}),
    ],
}


def run(area: Area, cases: int, examples: list[Any]) -> int:
    """Try the examples and the given number of new cases of an area. Return how many cases ran."""
    count = 0

    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(case=area.cases)
    def ends_well(case):
        nonlocal count
        count += 1
        with tempfile.TemporaryDirectory() as folder, soon(), contextlib.suppress(InputError):
            area.check(case, Path(folder))

    for found in examples:
        ends_well = example(case=found)(ends_well)
    ends_well()
    return count


@pytest.fixture(autouse=True, scope="module")
def _models():
    """Make the models before any case is drawn, because initializing a model draws random numbers."""
    model_files(), vector_files(), tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("name", AREAS)
def test_a_few_hostile_cases(name):
    assert run(AREAS[name], AREAS[name].few, FOUND.get(name, [])) >= AREAS[name].few


@pytest.mark.slow
@pytest.mark.parametrize("name", AREAS)
def test_many_hostile_cases(name):
    assert run(AREAS[name], AREAS[name].many, []) >= AREAS[name].many


def test_the_slow_suite_has_twenty_thousand_cases():
    assert sum(area.many for area in AREAS.values()) >= 20_000
