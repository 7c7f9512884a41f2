"""Shared helpers: tiny random models of every architecture, with a tokenizer of few tokens."""

import copy
import functools
import gc
import importlib.util
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

if "hf_embed_tests_" not in os.environ.get("HF_HOME", ""):  # pytest's workers and the ranks of a test inherit the variable
    CACHES = TemporaryDirectory(prefix="hf_embed_tests_")  # tables of the tests do not stay in the user's caches
    os.environ["HF_HOME"] = CACHES.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_embed import ContrastiveTrainer, Encoder, InputError
from hf_embed.data.labeled import as_pairs
from hf_embed.data.python_rows import as_rows
from hf_embed.data.tokenization import RowTokenizer, tokenize_table
from hf_embed.kit.plan import QUICKSTART

torch.set_num_threads(1)  # with more threads, tiny models would wait longer than they compute
gc.freeze()  # for the worker processes, which import this module; see `frozen_imports`
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds that `datasets` waits after each pass over a parquet stream

SMALL = {"vocab_size": 3000, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
BERT = SMALL | {"max_position_embeddings": 66, "pad_token_id": 0}
ROPE = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2,
                "eos_token_id": 3}  # fmt: skip
TINY = {
    "bert": (BertModel, BertConfig, BERT),
    "roberta": (RobertaModel, RobertaConfig, BERT),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, BERT),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig,
        {"vocab_size": 3000, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66},
    ),
    "mpnet": (MPNetModel, MPNetConfig, BERT | {"pad_token_id": 0}),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig,
        SMALL | {"max_position_embeddings": 64, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "qwen2": (Qwen2Model, Qwen2Config, ROPE),
    "qwen3": (Qwen3Model, Qwen3Config, ROPE | {"head_dim": 8}),
}
DECODERS = {"qwen2", "qwen3"}
MADE: dict[str, tuple[Encoder, torch.Tensor]] = {}  # what `tiny_encoder` copies, and the random state after it was made
SINCE_5_15 = pytest.mark.skipif(
    not hasattr(TrainingArguments, "dataloader_in_order"), reason="transformers before 5.15 has other settings"
)
WITHOUT_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")


@pytest.fixture(autouse=True)
def same_globals() -> Iterator[None]:
    """Restore what tests leave behind: the level of our warnings on other ranks, and the DeepSpeed settings of a refused run.

    transformers reads these settings as long as the arguments that hold them are in memory, which may be after the test.
    """
    package = logging.getLogger("hf_embed")
    before = package.level
    yield
    package.setLevel(before)
    unset_hf_deepspeed_config()


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> None:
    """Leave what is alive now out of garbage collection: accelerate collects before every training, for 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test in which transformers asks for a newer PEFT: transformers 5.24 came before the PEFT that it needs.

    It does so only for adapters inside a model (`model.add_adapter`), not for `get_peft_model`.
    """
    try:
        return (yield)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" in str(error):
            pytest.skip(str(error))
        raise


def tiny_model(name: str = "bert", seed: int = 0, **config):
    """Return a random model. Its weights are large enough that texts get different vectors; dropout is the default."""
    model_class, config_class, settings = TINY[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**(settings | config)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@functools.cache
def small_vocabulary() -> str:
    """Return the tokenizer.json of the quickstart encoder, with its most frequent tokens only."""
    content = json.loads((QUICKSTART / "encoder" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < SMALL["vocab_size"]}
    return json.dumps(content)


def small_tokenizer():
    """Load the tokenizer of the quickstart encoder with a small vocabulary, which is loaded, saved and hashed much faster."""
    with TemporaryDirectory() as folder:
        shutil.copy(QUICKSTART / "encoder" / "tokenizer_config.json", folder)
        Path(folder, "tokenizer.json").write_text(small_vocabulary())
        return AutoTokenizer.from_pretrained(folder)


def tiny_encoder(name: str = "bert", pooling: str = "mean", seed: int = 0, dense=(), **settings) -> Encoder:
    """Return an encoder of a random model: a copy of one that is made, and checked, once for all tests of a process."""
    key = repr((name, pooling, seed, settings))
    if key not in MADE or dense:
        made = Encoder(tiny_model(name, seed), small_tokenizer(), pooling, dense=dense, **settings).eval()
        if dense:  # they show neither their weights nor whether they are shared
            return made
        MADE[key] = made, torch.get_rng_state()
    made, state = MADE[key]
    torch.set_rng_state(state)  # a test that draws numbers afterwards draws the same ones
    return copy.deepcopy(made)


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


def tokenize_rows(rows, tokenizer, max_length, name="train_dataset", paired=None, prompts=None, drop_empty_rows=False):
    """Tokenize a table as a training without scores and without a teacher does."""
    prompts = prompts or {}
    row_tokenizer = RowTokenizer(tokenizer, max_length, prompts.get("query", ""), prompts.get("document", ""))
    pairs = as_pairs(as_rows(rows, name), name, paired, drop_empty_rows)
    return tokenize_table(pairs, row_tokenizer, name, paired, drop_empty_rows)


def with_plain_dropout(trainer: ContrastiveTrainer) -> ContrastiveTrainer:
    """Let a trainer pad its chunks and draw the masks of PyTorch's dropout, as plain loops and older versions do."""
    trainer.encoder.packable, trainer.fast_dropout = None, False
    return trainer


def error_of(function, *args, **kwargs):
    """Return the message of the InputError that the call raises, and check that it is one line."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount an in-memory file system with some options ("size=1m") at `tmp_path / name`. A second call changes the options."""
    disks: list[Path] = []

    def make(options: str, name: str = "disk") -> Path:
        folder, again = tmp_path / name, (tmp_path / name) in disks
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if again else options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not disks:
            pytest.skip("nothing can be mounted here")
        assert done.returncode == 0, done.stderr
        disks.append(folder)
        return folder

    yield make
    for folder in set(disks):
        subprocess.run(["umount", "-l", str(folder)], check=True)
