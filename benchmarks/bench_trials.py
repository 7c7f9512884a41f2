"""The trials of benchmarks/bench.py, which is the command. Each trial runs in its own process and prints one line of JSON.

A trial is a function of its settings `s`: the fields of a `Case`, `side`, `precision`, the folder of the model (`path`)
and the paths of the data (`files`). It returns a dictionary. Only `seconds` is always present:

    seconds   the time of the measured part, which begins after the warm-up
    amount    how many rows, texts or documents the measured part processed
    peak      the largest resident set of the process (on a GPU: the peak allocation), in GB of 2^30 bytes
    above     the part of `peak` that is above the resident set right after the imports
    flops     floating-point operations of the tokens that are not padding
    same      numbers that have to be equal on both sides
    further   other figures, by the name that the table shows

The side `sentence_transformers` uses what its documentation recommends for speed, as far as this does not change the training:
bfloat16; the merged forward pass of the positives and the negatives, which is the default of its losses; in `encode`, which
sorts the texts by length, the fastest of several values of `batch_size`; with caching, mini-batches of 64 rows on a CPU and 256
on a GPU. On a GPU with the package flash_attn, both sides use flash attention in bfloat16; sentence-transformers then packs the
texts without padding, and its mini-batches have a token budget. Not used are other runtimes (ONNX, OpenVINO) and
`torch.compile`. Its trainer has no option for batches of rows of similar length, which would also change the negatives.
"""

import contextlib
import csv
import gzip
import itertools
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import psutil
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, TrainerCallback
from transformers.utils import is_flash_attn_2_available

Settings: TypeAlias = SimpleNamespace
Result: TypeAlias = dict[str, Any]

PEER = "sentence_transformers"
ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")  # of the improved contrastive loss of GTE
MEMORY_LIMIT = 20  # GB of address space for a loss on a CPU; a loss that needs more does not fit
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
imported = {"at": time.perf_counter(), "resident": 0}  # when the imports of the trial ended, and its resident set then


def import_side(side: str) -> None:
    """Import the library of one side, and store the time and the resident set after that."""
    if side == PEER:
        import sentence_transformers.losses  # noqa: F401
        from sentence_transformers import SentenceTransformerTrainer  # noqa: F401
    else:
        from hf_embed import ContrastiveTrainer, Encoder, ImprovedContrastive, SimCSE  # noqa: F401
    imported.update(at=time.perf_counter(), resident=psutil.Process().memory_info().rss)


def peak() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory() -> Result:
    return {"peak": peak(), "above": peak() - (0 if CUDA else imported["resident"] / 2**30)}


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Append the seconds of a `with` block to the list that it returns."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if CUDA:
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


def dtype_of(s: Settings) -> torch.dtype:
    return torch.bfloat16 if s.precision == "bfloat16" else torch.float32


def attention(s: Settings) -> dict[str, str]:
    """Return the argument that chooses flash attention, or nothing where it is not available."""
    flash = CUDA and s.precision == "bfloat16" and is_flash_attn_2_available()
    return {"attn_implementation": "flash_attention_2"} if flash else {}


# ---- texts ----


def read_lines(path: str, most: int | None = None) -> list[str]:
    """Read the lines of a text file, or the last column of a tsv file. Either may be gzipped."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.strip().rpartition("\t")[2] for line in itertools.islice(file, most) if line.strip()]


def read_texts(s: Settings, most: int) -> list[str]:
    """Return up to `most` texts of unequal lengths: the lines of --text, or built-in sentences, of which some are joined."""
    if s.files["text"]:
        return read_lines(s.files["text"], most)
    lines, draw, texts = read_lines(s.files["sentences"]), random.Random(0), []
    while lines and len(texts) < most:
        size = draw.choice((1, 1, 1, 2, 4, 8))
        texts.append(" ".join(lines[:size]))
        lines = lines[size:]
    return texts


def read_rows(s: Settings, count: int) -> list[dict[str, str]]:
    """Return `count` training rows in an order that depends only on `count`. Rows are repeated if there are too few."""
    if s.rows == "sts":  # for unsupervised training: single sentences
        with open(s.files["sts"], encoding="utf-8") as file:
            lines = [line.rstrip("\n").split("\t") for line in file]
        rows = [[text] for score, *texts in lines if score != "score" for text in texts[:2]]
    elif s.rows == "nli":
        with open(s.files["nli"], encoding="utf-8", newline="") as file:
            rows = [row[:3] for row in csv.reader(file)][1:]
    else:
        lines = read_texts(s, 3 * count)
        rows = [lines[i : i + 3] for i in range(0, len(lines) - 2, 3)]
    random.Random(count).shuffle(rows)
    names = ("text",) if s.rows == "sts" else ("anchor", "positive", "negative")
    return [dict(zip(names, row)) for row in itertools.islice(itertools.cycle(rows), count)]


def texts_to_encode(s: Settings) -> list[str]:
    """Return the texts of an encoding: `short` sentences, `long` texts, or `mixed`, which has also lengths in between."""
    draw = random.Random(0)
    sentences = read_lines(s.files["text"] or s.files["sentences"], 200_000)
    sentences = draw.sample(sentences, min(len(sentences), 20_000))

    def joined(words: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < 6 * words:
            parts.append(draw.choice(sentences))
        return " ".join(parts)

    articles = read_lines(s.files["long"]) if s.files["long"] else [joined(300) for _ in range(s.count // 8)]
    long = draw.sample(articles, min(len(articles), s.count // 8))
    short = list(itertools.islice(itertools.cycle(sentences), s.count))
    mixed = [*short[: s.count // 2], *(joined(draw.randint(10, 300)) for _ in range(s.count // 8)), *long[: s.count // 16]]
    draw.shuffle(mixed)
    return {"short": short, "long": long, "mixed": mixed, "one": short}[s.rows]


# ---- training ----


class Clock(TrainerCallback):
    """A callback that stores when the first epoch began, and when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        if not self.times:
            self.note()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.note()


def make_trainer(s: Settings, rows: list[dict[str, str]], folder: str, clock: Clock) -> Any:
    """Return a trainer of one side with the default optimizer. It logs and saves nothing."""
    common = {"output_dir": folder, "max_steps": s.warm_up + s.steps, "per_device_train_batch_size": s.batch, "seed": 1,
              "learning_rate": 2e-5, "bf16": s.precision == "bfloat16", "use_cpu": not CUDA, "report_to": [],
              "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}  # fmt: skip
    return (peer_trainer if s.side == PEER else own_trainer)(s, rows, common, clock)


def with_dropout(s: Settings, model: Any) -> Any:
    """Return a model with its own dropout, or without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not s.dropout:
            module.p = 0.0
    return model


def own_trainer(s: Settings, rows: list[dict[str, str]], common: dict[str, Any], clock: Clock) -> Any:
    from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, SimCSE

    return ContrastiveTrainer(
        model=with_dropout(s, AutoModel.from_pretrained(s.path, dtype=torch.float32, **attention(s))),
        processing_class=AutoTokenizer.from_pretrained(s.path),
        args=ContrastiveTrainingArguments(
            **common, pooling="mean", max_length=s.max_length, gradient_caching=bool(s.caching), chunk_tokens=s.chunk_tokens
        ),
        objective=ImprovedContrastive(0.01) if s.gte else SimCSE(temperature=0.05),
        train_dataset=Dataset.from_list(rows), callbacks=[clock],
    )  # fmt: skip


def peer_trainer(s: Settings, rows: list[dict[str, str]], common: dict[str, Any], clock: Clock) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    model = with_dropout(s, load_peer(s, torch.float32))
    model.max_seq_length = s.max_length
    loss: dict[str, Any] = {"scale": 100, "directions": ALL_DIRECTIONS, "partition_mode": "joint"} if s.gte else {"scale": 20}
    if s.caching:
        loss |= {"mini_batch_num_tokens": 16384} if attention(s) else {"mini_batch_size": 256 if CUDA else 64}
    kind = losses.CachedMultipleNegativesRankingLoss if s.caching else losses.MultipleNegativesRankingLoss
    rows = [{"anchor": row["text"], "positive": row["text"]} if "text" in row else row for row in rows]
    return SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(**common), train_dataset=Dataset.from_list(rows),
        loss=kind(model, **loss), callbacks=[clock],
    )  # fmt: skip


def train(s: Settings) -> Result:
    """Train `warm_up` steps and then `steps` measured steps. For a start-up, measure from the end of the imports on."""
    rows, clock = read_rows(s, s.batch * (s.warm_up + s.steps)), Clock()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(s, rows, folder, clock).train()
    seconds = clock.times[-1] - (imported["at"] if s.kind == "startup" else clock.times[s.warm_up])
    result = {"seconds": seconds, "amount": s.batch * s.steps, **memory()}
    # The backward pass has twice as many operations as the forward pass. The measured steps have the average length.
    return result | {"flops": 3 * forward_flops_of_rows(s, rows) * s.steps / (s.warm_up + s.steps)}


def forward_flops_of_rows(s: Settings, rows: list[dict[str, str]]) -> int:
    """Return the floating-point operations of encoding all texts of the rows. A row of a single text is encoded twice."""
    texts = [text for row in rows for text in row.values()] * (2 if s.rows == "sts" else 1)
    ids = AutoTokenizer.from_pretrained(s.path)(texts, truncation=True, max_length=s.max_length)["input_ids"]
    with torch.device("meta"):  # without memory for the weights
        model = AutoModel.from_config(AutoConfig.from_pretrained(s.path))
    return forward_flops(model, [len(tokens) for tokens in ids])


def forward_flops(model: PreTrainedModel, lengths: list[int]) -> int:
    """Return the floating-point operations of the matrix products that encode texts of these numbers of tokens.

    A token has 2 for each weight of a linear layer. Attention has, in each layer, 2 n^2 hidden_size for the scores and as many
    for the sums that they weight. The pooler is left out, because mean pooling does not need it.
    """
    layers = (module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "pooler" not in name)
    weights = sum(layer.weight.numel() for layer in layers)
    attended = 4 * model.config.num_hidden_layers * model.config.hidden_size
    return sum(2 * weights * n + attended * n * n for n in lengths)


def collate(s: Settings) -> Result:
    """Measure tokenization and collation of `count` rows without the model, and how much faster batches are made than used."""
    rows, clock = read_rows(s, s.count), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(s, rows, folder, clock)
        trainer.train()
        with timed() as collating:
            for _ in trainer.get_train_dataloader():
                pass
    tokenizing = [0.0]  # sentence-transformers tokenizes in its collator
    if s.side != PEER:
        from hf_embed.data.tokenization import RowTokenizer, tokenize_table

        table, tokenizer = Dataset.from_list(rows), RowTokenizer(trainer.encoder.tokenizer, s.max_length)
        with timed() as tokenizing:
            tokenize_table(table, tokenizer, "rows")
    step = (clock.times[-1] - clock.times[s.warm_up]) / s.steps / s.batch
    further = {"collation : training step": step * s.count / collating[0]}
    return {"seconds": tokenizing[0] + collating[0], "amount": s.count, "further": further, **memory()}


def loss(s: Settings) -> Result:
    """Measure the improved contrastive loss of `count` pairs and its gradient. `above` is the growth beyond the inputs."""
    if not CUDA:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT * 2**30, resource.RLIM_INFINITY))

    def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
        if s.side == PEER:
            from sentence_transformers.losses import MultipleNegativesRankingLoss

            peer = MultipleNegativesRankingLoss(None, scale=100, directions=ALL_DIRECTIONS, partition_mode="joint")
            return peer.compute_loss_from_embeddings(list(embeddings.unbind(1)), None)
        from hf_embed import ImprovedContrastive

        ids = torch.arange(1, 2 * len(embeddings) + 1, device=DEVICE).view(-1, 2)
        return ImprovedContrastive(0.01)(embeddings, ids)

    def embeddings(count: int) -> torch.Tensor:
        drawn = torch.randn(count, 2, s.width, generator=torch.Generator().manual_seed(count))
        return drawn.to(DEVICE).requires_grad_()

    loss_of(embeddings(64)).backward()  # load the libraries and start the threads before the measurement
    inputs = embeddings(s.count)
    before = peak()
    with timed() as seconds:
        value = loss_of(inputs)
        value.backward()
    above = peak() - before
    return {"seconds": seconds[0], "amount": 1, "peak": peak(), "above": above,
            "same": [value.item(), inputs.grad.norm().item()]}  # fmt: skip


# ---- encoding and evaluation ----


def load_peer(s: Settings, dtype: torch.dtype) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(s.path, device=DEVICE, model_kwargs={"dtype": dtype, **attention(s)})


def load_own(s: Settings, dtype: torch.dtype) -> Any:
    from hf_embed import Encoder

    return Encoder.from_pretrained(s.path, dtype=dtype, **attention(s)).to(DEVICE).eval()


def encoder_of(s: Settings) -> Callable[[str | list[str]], Any]:
    """Return the function of one side that encodes texts with at most `max_length` tokens."""
    model = (load_peer if s.side == PEER else load_own)(s, dtype_of(s))
    if s.side != PEER:
        model.max_length = s.max_length
        return model.encode
    model.max_seq_length = s.max_length
    return lambda texts: model.encode(texts, batch_size=s.batch)


def timed_vectors(encode_texts: Callable[[str | list[str]], Any], calls: list) -> tuple[float, torch.Tensor]:
    """Encode the texts of each call, after a warm-up. Return the seconds and the vectors (N, D)."""
    for call in calls[:8]:
        encode_texts(call[:64])
    with timed() as seconds:
        parts = [torch.as_tensor(encode_texts(call)) for call in calls]
    return seconds[0], torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).cpu()


def encode(s: Settings) -> Result:
    """Encode texts. With the texts "one", each text is encoded by its own call, as a search encodes its queries."""
    texts = texts_to_encode(s)
    calls = texts if s.rows == "one" else [texts]
    seconds, vectors = timed_vectors(encoder_of(s), calls)
    result = {"seconds": seconds, "amount": len(texts), **memory()}
    if s.precision == "float32":
        return result | {"same": vectors.abs().mean(0)[:4].tolist()}
    if s.side == PEER:
        return result
    full_seconds, full = timed_vectors(encoder_of(SimpleNamespace(**vars(s) | {"precision": "float32"})), calls)
    cosine = nn.functional.cosine_similarity(vectors.double(), full.double()).min().item()
    return result | {"further": {"smallest cosine with float32": cosine, "speed : float32": full_seconds / seconds}}


def tune(s: Settings) -> Result:
    """Return the `batch_size` with which sentence-transformers encodes a quarter of the texts fastest."""
    texts, encode_texts, found = texts_to_encode(s), encoder_of(s), {}
    for s.batch in (8, 16, 32, 64, 128):
        found[s.batch], _ = timed_vectors(encode_texts, [texts[: len(texts) // 4]])
    return {"seconds": sum(found.values()), "batch": min(found, key=found.__getitem__)}


def evaluate(s: Settings) -> Result:
    """Score a retrieval set of `count` documents with a query for every hundredth. The other side only encodes its texts."""
    from hf_embed.evaluation.retrieval import Retrieval

    lines = read_lines(s.files["text"] or s.files["sentences"], s.count)
    documents = {f"d{i}": f"{lines[i % len(lines)]} {i}" for i in range(s.count)}
    queries = {f"q{i}": documents[f"d{i}"] for i in range(0, s.count, 100)}
    task, encoder = Retrieval(queries, documents, {query: {f"d{query[1:]}": 1} for query in queries}), load_own(s, dtype_of(s))
    encoder.encode(list(queries.values())[:64])
    further = {}
    with timed() as seconds:
        if s.side == "encoding alone":
            for texts in (documents, queries):
                encoder.encode(list(texts.values()))
        else:
            further = {
                "nDCG@10": task.score(lambda texts, name=None: encoder.encode(texts, name, convert_to_tensor=True))["ndcg@10"]
            }
    return {"seconds": seconds[0], "amount": s.count, "further": further, **memory()}


# ---- the machine ----


def machine(s: Settings) -> Result:
    """Measure the rates of square matrix products, in GFLOP/s: the median of five products."""
    size, rates = s.size * (4 if CUDA else 1), {}
    start = time.perf_counter()
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size, device=DEVICE).to(dtype)
        products = []
        for _ in range(7):
            with timed() as seconds:
                matrix @ matrix
            products.append(seconds[0])
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(products[2:]) / 1e9
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    return {"seconds": time.perf_counter() - start, "rates": rates, "threads": torch.get_num_threads(), "device": device}


def make_bert_base(s: Settings) -> Result:
    """Save a model of the size of BERT-base with random weights, and the tokenizer of the built-in encoder."""
    start = time.perf_counter()
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig()).save_pretrained(s.path)
    AutoTokenizer.from_pretrained(s.tokenizer).save_pretrained(s.path)
    return {"seconds": time.perf_counter() - start}


TRIALS: dict[str, Callable[[Settings], Result]] = {
    "train": train, "startup": train, "collate": collate, "loss": loss, "encode": encode, "tune": tune, "evaluate": evaluate,
    "machine": machine, "bert-base": make_bert_base,
}  # fmt: skip

if __name__ == "__main__":
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.kind not in ("machine", "bert-base"):
        import_side(settings.side)
    print("RESULT " + json.dumps(TRIALS[settings.kind](settings)))
