"""The models, the texts and the measurements of speed of benchmarks/gpu.py, which is the command and imports this module.

A function that returns `Tasks` belongs to one part of the report. Shapes: N texts of n tokens, D numbers per vector.
"""

# ruff: noqa: E402  (the packages are checked before they are imported)
import configparser
import gc
import importlib.metadata
import importlib.util
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # measure the code of this checkout, even if hf_embed is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it


def missing_packages() -> list[str]:
    """Return a sentence about each package that hf_embed needs and that is missing or has the wrong version."""
    from packaging.requirements import Requirement

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    found = []
    for line in config["options"]["install_requires"].split():
        needed = Requirement(line)
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{needed.name} is not installed; hf_embed needs {line}")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name} {version} is installed; hf_embed needs {line}")
    return found


if missing := missing_packages():
    print("The benchmark cannot start:\n  " + "\n  ".join(missing), file=sys.stderr)
    raise SystemExit(2)

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, SimCSE
from hf_embed.forward.packed_attention import without_cudnn
from hf_embed.kit.plan import QUICKSTART
from hf_embed.objectives import Objective

disable_progress_bar()
disable_progress_bars()

# ---- results, sizes, models and texts ----

FLASH = "flash_attention_2"
Tasks: TypeAlias = "dict[str, Callable[[], list[Result]]]"  # by the name under which an error of the task is reported


@dataclass
class Result:
    """One line of the report. The status is PASS, FAIL, skipped, or measured (a figure without a limit)."""

    part: str
    name: str
    status: str
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def judged(part: str, name: str, passed: bool, figures: dict[str, Any], limit: str) -> Result:
    """Return the result of a check. `limit` says in words what the check requires."""
    return Result(part, name, "PASS" if passed else "FAIL", figures, limit)


class Lengths(NamedTuple):
    """The distribution of the numbers of words: log-normal, with one median for each text of a row."""

    medians: tuple[int, ...]
    sigma: float
    max_length: int  # largest number of tokens of a text


class Sizes(NamedTuple):
    """How large the models and the batches are."""

    checked: dict[str, int]  # the shape of the model on which the checks run
    timed: dict[str, dict[str, int]]  # the shapes whose training is timed
    batch: int
    warm_up: int
    steps: int
    rounds: int
    pairs: int  # pairs of the loss whose memory is measured
    matrix: int  # rows and columns of the matrices of the matrix rate


def shape(layers: int, hidden: int, heads: int, inner: int, vocabulary: int = 30522) -> dict[str, int]:
    """Return the arguments of a BertConfig."""
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner,
            "vocab_size": vocabulary}  # fmt: skip


LENGTHS = {"NLI-like": Lengths((12, 7, 7), 0.45, 128), "long texts": Lengths((90, 90), 0.8, 256)}
MINILM, BERT_BASE, SMALL = shape(6, 384, 12, 1536), shape(12, 768, 12, 3072), shape(2, 32, 4, 64, 12000)
FULL = Sizes(MINILM, {"MiniLM": MINILM, "BERT-base": BERT_BASE}, 512, warm_up=3, steps=6, rounds=3, pairs=65536, matrix=8192)
TINY = Sizes(SMALL, {"tiny": SMALL}, 8, warm_up=1, steps=2, rounds=2, pairs=512, matrix=256)


@dataclass
class Bench:
    """Where the benchmark runs and how long it may take."""

    device: str  # cuda or cpu
    sizes: Sizes
    folder: Path  # for temporary files
    deadline: float  # a value of time.monotonic(); no further round is started after it

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def backends(self) -> list[str]:
        """The attention backends that can run here."""
        return ["eager", "sdpa", *([FLASH] if self.cuda and is_flash_attn_2_available() else [])]

    def left_out(self, part: str, name: str) -> "Tasks":
        """Return a task that says why a check of flash attention is skipped, or none if flash attention runs here."""
        if FLASH in self.backends:
            return {}
        note = "the package flash_attn is not installed" if self.cuda else "flash attention needs a GPU"
        return {name: lambda: [Result(part, name, "skipped", note=note)]}

    def free(self) -> None:
        """Free the GPU memory of objects that are no longer used."""
        if self.cuda:  # the objects have reference cycles, and on a CPU their memory is small
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()


def make_model(form: dict[str, int], backend: str = "sdpa", dropout: float = 0.1, seed: int = 0) -> PreTrainedModel:
    """Return a BERT model with random float32 weights, which are large enough that texts get different vectors."""
    config = BertConfig(**form, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    torch.manual_seed(seed)
    model = AutoModel.from_config(config, attn_implementation=backend)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.2 / math.sqrt(form["hidden_size"]))
    return model.eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the built-in encoder."""
    return AutoTokenizer.from_pretrained(QUICKSTART / "encoder")


def make_rows(count: int, lengths: Lengths, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of random words. Their numbers of words follow `lengths` and depend only on the seed."""
    draw = random.Random(seed)
    words = sorted(word for word in tokenizer().get_vocab() if word.isalpha() and len(word) > 2)
    names = ("anchor", "positive", "negative")[: len(lengths.medians)]

    def text(median: int) -> str:
        return " ".join(draw.choices(words, k=max(2, round(draw.lognormvariate(math.log(median), lengths.sigma)))))

    return [dict(zip(names, map(text, lengths.medians))) for _ in range(count)]


def make_trainer(
    bench: Bench,
    model: PreTrainedModel,
    rows: list[dict[str, str]],
    callbacks: list[TrainerCallback] | None = None,
    objective: Objective | None = None,
    **settings: Any,
) -> ContrastiveTrainer:
    """Return a trainer, by default with SimCSE's loss, which logs and saves nothing unless `settings` say so."""
    quiet = {"output_dir": str(bench.folder / "trainer"), "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
             "save_strategy": "no", "seed": 1, "use_cpu": not bench.cuda}  # fmt: skip
    return ContrastiveTrainer(
        model=model,
        processing_class=tokenizer(),
        args=ContrastiveTrainingArguments(**(quiet | settings)),
        objective=objective or SimCSE(temperature=0.05),
        train_dataset=Dataset.from_list(rows),
        callbacks=callbacks,
    )


# ---- 5. the matrix rate of the device ----


def matrix_rate(bench: Bench, dtype: torch.dtype, precision: str) -> float:
    """Return the rate of a large matrix product in TFLOP/s. `precision` is that of torch.set_float32_matmul_precision."""
    n, before = bench.sizes.matrix, torch.get_float32_matmul_precision()
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    torch.set_float32_matmul_precision(precision)
    for _ in range(3):
        a @ b
    bench.wait()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    bench.wait()
    seconds = time.perf_counter() - start
    torch.set_float32_matmul_precision(before)
    return 10 * 2 * n**3 / seconds / 1e12


def matrix_rates(bench: Bench) -> list[Result]:
    """Measure the matrix rates in bfloat16, TF32 and float32."""
    kinds = {"bfloat16": (torch.bfloat16, "highest"), "tf32": (torch.float32, "high"), "float32": (torch.float32, "highest")}
    figures = {f"{name} TFLOP/s": matrix_rate(bench, *kind) for name, kind in kinds.items()}
    note = "" if bench.cuda else "a CPU may compute tf32 as float32"
    return [Result("matrix", f"products of {bench.sizes.matrix} x {bench.sizes.matrix}", "measured", figures, note)]


def matrix_checks(bench: Bench) -> Tasks:
    """Measure the matrix rates."""
    return {"matrix rates": partial(matrix_rates, bench)}


# ---- 7. throughput and memory of training, beside sentence-transformers ----

OURS, THEIRS = "hf_embed", "sentence-transformers"


class Case(NamedTuple):
    """A model and the texts on which its training is timed."""

    model: str
    texts: str
    backend: str


class Clock(TrainerCallback):
    """A callback that stores when each step ended, and restarts the count of peak memory after the warm-up."""

    def __init__(self, bench: Bench):
        self.bench, self.times = bench, [0.0]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Store the time."""
        self.bench.wait()
        self.times.append(time.perf_counter())
        if self.bench.cuda and state.global_step == self.bench.sizes.warm_up:
            torch.cuda.reset_peak_memory_stats()


Run: TypeAlias = "dict[str, Any]"  # rows/s and peak GiB; see `timed_run`


def timed_run(bench: Bench, case: Case, side: str, rows: list[dict[str, str]], model_folder: str) -> Run:
    """Train a few steps and measure the rows per second and the peak memory, which is None on a CPU.

    If the memory of the GPU is too small, hf_embed turns gradient caching on by itself, and "caching" is True. If
    sentence-transformers fails, its figures are None, and "error" says why.
    """
    sizes, lengths = bench.sizes, LENGTHS[case.texts]
    bench.free()  # the trainer of the run before
    clock = Clock(bench)
    settings = {"per_device_train_batch_size": sizes.batch, "max_steps": sizes.warm_up + sizes.steps, "bf16": True}
    try:
        if side == OURS:
            model = AutoModel.from_pretrained(model_folder, attn_implementation=case.backend, dtype=torch.float32)
            trainer = make_trainer(bench, model, rows, [clock], pooling="mean", max_length=lengths.max_length, **settings)
        else:
            trainer = their_trainer(bench, case, rows, model_folder, clock, settings)
        with without_cudnn():  # both sides: a long training would prepare cuDNN's kernels for each shape only once
            trainer.train()
        rate = sizes.batch * sizes.steps / (clock.times[-1] - clock.times[sizes.warm_up])
        peak = torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None
        return {"rows/s": rate, "peak GiB": peak} | ({"caching": trainer.args.gradient_caching} if side == OURS else {})
    except Exception as error:
        if side == OURS:
            raise
        return {"rows/s": None, "peak GiB": None, "error": f"{THEIRS}: {type(error).__name__}: {str(error)[:200]}"}


def their_trainer(
    bench: Bench, case: Case, rows: list[dict[str, str]], model_folder: str, clock: Clock, settings: dict[str, Any]
) -> Any:
    """Return a trainer of sentence-transformers for the same model, rows and loss."""
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    attention = {"attn_implementation": case.backend, "dtype": torch.float32}
    model = SentenceTransformer(model_folder, device=bench.device, model_kwargs=attention)
    model.max_seq_length = LENGTHS[case.texts].max_length
    args = SentenceTransformerTrainingArguments(
        str(bench.folder / "theirs"), report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=1,
        use_cpu=not bench.cuda, **settings,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model, scale=20)
    return SentenceTransformerTrainer(model, args, train_dataset=Dataset.from_list(rows), loss=loss, callbacks=[clock])


def useful_flops(form: dict[str, int], lengths: Lengths, rows: list[dict[str, str]]) -> float:
    """Return the floating-point operations of the matrix products of one training row, without padding.

    A token has 6 per weight of a layer: 2 in the forward pass and 4 in the backward pass. The scores of attention and the sums
    that they weight have 12 n^2 hidden_size per layer and text.
    """
    texts = [text for row in rows for text in row.values()]
    counts = [len(ids) for ids in tokenizer()(texts, truncation=True, max_length=lengths.max_length)["input_ids"]]
    hidden, weights = form["hidden_size"], 4 * form["hidden_size"] ** 2 + 2 * form["hidden_size"] * form["intermediate_size"]
    of_a_layer = 6 * weights * sum(counts) + 12 * hidden * sum(n * n for n in counts)
    return form["num_hidden_layers"] * of_a_layer / len(rows)


def throughput(bench: Bench, case: Case) -> list[Result]:
    """Time the training of both sides in turns. Return medians, the ratios, and the share of the matrix rate."""
    sizes, form, lengths = bench.sizes, bench.sizes.timed[case.model], LENGTHS[case.texts]
    rows = make_rows(sizes.batch * (sizes.warm_up + sizes.steps), lengths, seed=3)
    folder = str(bench.folder / case.model)
    make_model(form).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    sides = [OURS, THEIRS] if importlib.util.find_spec("sentence_transformers") else [OURS]
    rounds: list[dict[str, Run]] = []
    while len(rounds) < sizes.rounds and (not rounds or time.monotonic() < bench.deadline):
        rounds.append({side: timed_run(bench, case, side, rows, folder) for side in sides[:: (-1) ** len(rounds)]})
    figures: dict[str, Any] = {"rounds": len(rounds)} | medians(rounds)
    figures[f"{OURS} turned gradient caching on"] = any(run[OURS]["caching"] for run in rounds)
    figures[f"{OURS} TFLOP/s"] = figures[f"{OURS} rows/s"] * useful_flops(form, lengths, rows) / 1e12
    figures["share of the matrix rate"] = figures[f"{OURS} TFLOP/s"] / matrix_rate(bench, torch.bfloat16, "highest")
    reasons = [run[THEIRS]["error"] for run in rounds if "error" in run.get(THEIRS, {})]
    reasons += [] if THEIRS in sides else [f"{THEIRS} is not installed"]
    return [judge_speed(bench, case, figures, "".join(reasons[:1]))]


def judge_speed(bench: Bench, case: Case, figures: dict[str, Any], reason: str) -> Result:
    """Compare the speed with its aims, which only BERT-base with NLI-like texts on a GPU has.

    `reason` says why sentence-transformers has no figures, or is "".
    """
    name = f"{case.model}, {bench.sizes.batch} rows of {case.texts}, {case.backend}, bfloat16"
    if not (bench.cuda and case.model == "BERT-base" and case.texts == "NLI-like"):
        return Result("throughput", name, "measured", figures, reason)
    least, ratio = 1.5 if case.backend == FLASH else 2.0, figures.get("ratio of rows/s")
    passed = figures["share of the matrix rate"] >= 0.45 and (ratio is None or ratio >= least)
    limit = f"a share >= 0.45, and {'no ratio: ' + reason if ratio is None else f'a ratio >= {least}'}"
    return judged("throughput", name, passed, figures, limit)


def medians(rounds: list[dict[str, Run]]) -> dict[str, float | None]:
    """Return the medians of rates and memory of each side, and of their ratios. A figure is None if it does not exist."""

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    found: dict[str, float | None] = {}
    for figure in ("rows/s", "peak GiB"):
        for side in rounds[0]:
            found[f"{side} {figure}"] = median([sides[side][figure] for sides in rounds])
        if THEIRS in rounds[0]:
            pairs = [(sides[OURS][figure], sides[THEIRS][figure]) for sides in rounds]
            found[f"ratio of {figure}"] = median([a / b if a and b else None for a, b in pairs])
    return found


def throughput_checks(bench: Bench) -> Tasks:
    """Time the training of each model on each kind of texts, with the backends that one would choose for speed."""
    tasks: Tasks = {}
    for backend in [backend for backend in bench.backends if backend != "eager"]:
        for model in bench.sizes.timed:
            for texts in LENGTHS:
                tasks[f"{model}, {texts}, {backend}"] = partial(throughput, bench, Case(model, texts, backend))
    return tasks | bench.left_out("throughput", f"training with {FLASH}")


# ---- encoding, beside sentence-transformers ----


def encoding_times(bench: Bench, model: str, texts: str) -> list[Result]:
    """Time `encode` in bfloat16, in turns with sentence-transformers, and compare the vectors of both. Return medians."""
    lengths, folder = LENGTHS[texts], str(bench.folder / f"{model} to encode")
    make_model(bench.sizes.timed[model]).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    given = [text for row in make_rows(4 * bench.sizes.batch, lengths, seed=5) for text in row.values()]
    encoder = Encoder.from_pretrained(folder, "mean", lengths.max_length, dtype=torch.bfloat16).to(bench.device)
    ways: dict[str, Callable[[], np.ndarray]] = {OURS: lambda: encoder.encode(given)}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        theirs = SentenceTransformer(folder, device=bench.device, model_kwargs={"dtype": torch.bfloat16})
        theirs.max_seq_length = lengths.max_length
        ways[THEIRS] = lambda: theirs.encode(given, batch_size=256)
    with without_cudnn():
        vectors = [torch.from_numpy(encode()).float() for encode in ways.values()]  # which also warms up
    seconds: dict[str, list[float]] = {side: [] for side in ways}
    for _ in range(bench.sizes.rounds):
        for side, encode in ways.items():
            start = time.perf_counter()
            with without_cudnn():
                encode()
            seconds[side].append(time.perf_counter() - start)
    figures: dict[str, Any] = {f"{side} texts/s": len(given) / statistics.median(taken) for side, taken in seconds.items()}
    name, reason = f"{model}, {len(given):,} {texts}, bfloat16", "" if THEIRS in ways else f"{THEIRS} is not installed"
    if THEIRS in ways:
        figures["ratio"] = figures[f"{OURS} texts/s"] / figures[f"{THEIRS} texts/s"]
        figures["smallest cosine"] = nn.functional.cosine_similarity(vectors[0], vectors[-1], dim=-1).min().item()
    return [Result("encoding", name, "measured", figures, reason)]


def encoding_checks(bench: Bench) -> Tasks:
    """Time `encode` with each model on each kind of texts."""
    cases = [(model, texts) for model in bench.sizes.timed for texts in LENGTHS]
    return {f"encoding, {model}, {texts}": partial(encoding_times, bench, model, texts) for model, texts in cases}
