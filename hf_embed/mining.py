"""Hard negatives: for each query the nearest documents that are not its answer.

1. Queries and documents are encoded, a shard at a time.
2. For each query the nearest documents are found exactly, by blocked matrix products (or FAISS).
3. Its positives are left out, and what may be an unlabelled positive: the first ranks, and what scores too near the positive.

Every shard of vectors and every block of rows is a file in `OUTPUT.work`, made once: ranks share the work, and a run that was
stopped goes on with what is missing.

A positive's false friends are common: of the nearest "negatives" in a web corpus most are answers that nobody marked. The
threshold relative to the positive, 95% of its score, is the one that NV-Retriever found best
(https://arxiv.org/abs/2407.15831, TopK-PercPos).

Shapes: Q queries, C documents, D wide.
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_embed.distributed import get_rank, get_world_size
from hf_embed.errors import InputError
from hf_embed.ranges import COUNT, FINITE, Range, check_ranges
from hf_embed.search import search

SHARD = 8192  # texts in a file of vectors
BLOCK = 2048  # rows in a file of results


@dataclass
class MiningArguments:
    num_negatives: int = field(default=3, metadata={"help": "Negatives of a row."})
    range_min: int = field(default=0, metadata={"help": "Leave out so many of the nearest documents."})
    range_max: int = field(default=100, metadata={"help": "Look no further than this rank."})
    relative_margin: float | None = field(
        default=0.05, metadata={"help": "Leave out what scores above the positive's score less this share; 0.05 is 95%."}
    )
    absolute_margin: float | None = field(
        default=None, metadata={"help": "Leave out what scores above the positive's score less this."}
    )
    max_score: float | None = field(default=None, metadata={"help": "Leave out what scores above this."})
    min_score: float | None = field(default=None, metadata={"help": "Leave out what scores below this."})
    sampling_strategy: str = field(
        default="top", metadata={"help": "The nearest of what is left, or a random choice of it.", "choices": ["top", "random"]}
    )
    use_faiss: bool = field(default=False, metadata={"help": "Search with FAISS (exactly, IndexFlatIP); needs faiss-cpu."})
    seed: int = field(default=42)

    def __post_init__(self):
        cosine, whole = Range(least=-1, most=1), Range(whole=True)
        check_ranges(
            self,
            {"num_negatives": COUNT, "range_min": whole, "range_max": whole, "relative_margin": FINITE,
             "absolute_margin": FINITE, "max_score": cosine, "min_score": cosine, "seed": whole},
        )  # fmt: skip
        if None not in (self.min_score, self.max_score) and self.min_score >= self.max_score:
            raise InputError(f"min_score {self.min_score} is not below max_score {self.max_score}: nothing would be left")
        if not 0 <= self.range_min <= self.range_max - self.num_negatives:
            raise InputError(f"ranks {self.range_min} to {self.range_max} have no room for {self.num_negatives} negatives")


def mine_hard_negatives(
    pairs: list[tuple[str, str]],
    corpus: Iterable[str],
    embed: Callable,
    output_file: str | Path,
    args: MiningArguments,
    identity: str = "",
) -> Counter:
    """Write a jsonl with a row {"query", "positive", "negatives": [...]} for each pair, in their order. Every rank calls this.

    Args:
        pairs: queries and documents that answer them. A query may stand in several; none of its documents is its negative.
        corpus: texts to choose negatives from, besides the pairs' documents; one that stands twice counts once.
        embed: `embed(texts, prompt_name)` -> (N, D).
        identity: what the vectors depend on besides the texts (the model); vectors of another identity are not reused.

    Returns counts: rows, negatives, rows with `fewer` than asked for, and the candidates that each rule left out. Raises
    InputError if `output_file` is there, or a work folder beside it is of another model or other texts.
    """
    output = Path(output_file)
    if output.exists():
        raise InputError(f"{output}: is there already; remove it or name another file")
    if args.use_faiss:
        import_faiss()
    queries = list(dict.fromkeys(query for query, _ in pairs))
    corpus = [text for text in corpus if text and text.strip()]  # an empty text is nobody's negative
    documents = list(dict.fromkeys([document for _, document in pairs] + corpus))
    if len(documents) < 2:
        raise InputError(f"{output}: {len(documents)} document(s); there is nothing to choose negatives from")
    work = output.with_name(output.name + ".work")
    claim(work, digest([identity], queries, documents))
    query_vectors = encode_shards(queries, embed, "query", work / "queries")
    document_vectors = encode_shards(documents, embed, "document", work / "documents")
    search = Rows(pairs, queries, documents, query_vectors, document_vectors, args)
    rows = work / f"rows-{digest([repr(args)], *zip(*pairs))}"  # other settings do not share rows, but vectors
    paths = make_files(rows, ".json", len(pairs), BLOCK, search.write, "Searching")
    counts = Counter()
    if get_rank() == 0:
        unfinished = work / "output"
        with open(unfinished, "w", encoding="utf-8") as file:
            for path in paths:
                block = json.loads(path.read_text(encoding="utf-8"))
                counts.update(block["counts"])
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in block["rows"])
        unfinished.rename(output)
        shutil.rmtree(work)
    barrier()
    return counts


# ---- files that are made once ----


def digest(*lists: Iterable[str]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for texts in lists:
        for text in texts:
            hashed.update(text.encode() + b"\0")
        hashed.update(b"\1")
    return hashed.hexdigest()


def claim(folder: Path, identity: str) -> None:
    """Take a work folder that is new, or was left by a run of the same identity."""
    path = folder / "identity"
    if path.is_file() and path.read_text() != identity:
        raise InputError(f"{folder}: left by a run with another model or other texts; remove the folder to start anew")
    barrier()
    if get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(identity)
    barrier()


def make_files(folder: Path, ending: str, items: int, size: int, make: Callable, title: str) -> list[Path]:
    """A file for every `size` of `items`; those that are there are kept, the ranks share the others. `make(range, path)` writes
    one. -> all paths, on every rank, when all are there."""
    rank, ranks = get_rank(), get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + size, items)) for start in range(0, items, size)]
    paths = [folder / f"{i:06d}{ending}" for i in range(len(parts))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()][rank::ranks]
    barrier()  # nobody writes before everyone has looked
    with tqdm(total=sum(len(parts[i]) for i in missing), desc=title, disable=rank > 0) as bar:
        for i in missing:
            unfinished = folder / f"unfinished-{paths[i].name}"
            make(parts[i], unfinished)
            unfinished.rename(paths[i])
            bar.update(len(parts[i]))
    barrier()
    return paths


def barrier() -> None:
    if get_world_size() > 1:
        torch.distributed.barrier()


# ---- vectors ----


def encode_shards(texts: list[str], embed: Callable, prompt_name: str, folder: Path) -> list[Path]:
    """Unit vectors of texts, float32, as files of SHARD texts."""

    def write(numbers: range, path: Path) -> None:
        parts = [texts[start : min(start + 512, numbers.stop)] for start in range(numbers.start, numbers.stop, 512)]
        vectors = torch.cat([F.normalize(embed(part, prompt_name).float(), dim=-1).cpu() for part in parts]).numpy()
        if bad := [i for i, finite in enumerate(np.isfinite(vectors).all(1)) if not finite]:
            text = texts[numbers.start + bad[0]]
            raise InputError(
                f"{len(bad)} of {len(vectors)} vectors are not finite, that of {text[:60]!r} for one; check the model"
            )
        np.save(path, vectors)

    return make_files(folder, ".npy", len(texts), SHARD, write, f"Encoding {folder.name}")


def read_vectors(paths: list[Path], numbers: list[int]) -> Tensor:
    """The vectors (len(numbers), D) of the texts with these numbers."""
    shards = {i: np.load(paths[i], mmap_mode="r") for i in {n // SHARD for n in numbers}}
    return torch.from_numpy(np.stack([shards[n // SHARD][n % SHARD] for n in numbers]))


def read_shards(paths: list[Path], device: str) -> Iterable[Tensor]:
    for path in paths:
        yield torch.from_numpy(np.load(path)).to(device)


# ---- search and choice ----


def import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise InputError("--use_faiss needs the package faiss-cpu or faiss-gpu; the search is exact without it too") from error
    return faiss


def searcher(document_vectors: list[Path], use_faiss: bool) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """A function from unit queries (Q, D) and k to the scores and numbers, (Q, k), of the nearest documents."""
    if use_faiss:
        shards = list(read_shards(document_vectors, "cpu"))
        index = import_faiss().IndexFlatIP(shards[0].shape[1])
        for shard in shards:
            index.add(shard.numpy())
        return lambda queries, k: index.search(queries.numpy(), min(k, index.ntotal))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda queries, k: search(queries.to(device), read_shards(document_vectors, device), k)


class Rows:
    """Pairs to rows with negatives."""

    def __init__(self, pairs, queries, documents, query_vectors, document_vectors, args: MiningArguments):
        self.pairs, self.documents, self.args = pairs, documents, args
        self.query_vectors, self.document_vectors = query_vectors, document_vectors
        self.query_number = {query: i for i, query in enumerate(queries)}
        self.document_number = {document: i for i, document in enumerate(documents)}
        # of each query, the documents that are no negatives: its positives, and itself
        self.taken = {query: {self.document_number.get(query)} for query in queries}
        for query, document in pairs:
            self.taken[query].add(self.document_number[document])
        self.find = searcher(document_vectors, args.use_faiss)
        self.depth = args.range_max + max(map(len, self.taken.values()))

    def write(self, numbers: range, path: Path) -> None:
        pairs, counts, rows = self.pairs[numbers.start : numbers.stop], Counter(), []
        queries = read_vectors(self.query_vectors, [self.query_number[query] for query, _ in pairs])
        positives = read_vectors(self.document_vectors, [self.document_number[document] for _, document in pairs])
        scores, found = (part.tolist() for part in self.find(queries, self.depth))
        for i, (query, document) in enumerate(pairs):
            candidates = [(s, n) for s, n in zip(scores[i], found[i]) if n not in self.taken[query]][: self.args.range_max]
            negatives = choose(
                candidates, float(queries[i] @ positives[i]), self.args, counts, f"{self.args.seed} {numbers[i]}"
            )
            counts.update(rows=1, negatives=len(negatives), fewer=len(negatives) < self.args.num_negatives)
            rows.append({"query": query, "positive": document, "negatives": [self.documents[n] for _, n in negatives]})
        path.write_text(json.dumps({"counts": counts, "rows": rows}), encoding="utf-8")


def choose(candidates: list[tuple[float, int]], positive: float, args: MiningArguments, counts: Counter, seed: str):
    """The negatives among candidates (score, number), nearest first. `positive` is the positive's score; `counts` is told how
    many each rule leaves out."""
    rules = {
        "range_min": lambda rank, score: rank >= args.range_min,
        "relative_margin": lambda rank, score: score <= positive - abs(positive) * args.relative_margin,
        "absolute_margin": lambda rank, score: score <= positive - args.absolute_margin,
        "max_score": lambda rank, score: score <= args.max_score,
        "min_score": lambda rank, score: score >= args.min_score,
    }
    kept = list(enumerate(candidates))
    for name, passes in rules.items():
        if getattr(args, name) is not None:
            before, kept = len(kept), [(rank, c) for rank, c in kept if passes(rank, c[0])]
            counts[name] += before - len(kept)
    kept = [candidate for _, candidate in kept]
    if args.sampling_strategy == "random" and len(kept) > args.num_negatives:
        kept = sorted(random.Random(seed).sample(kept, args.num_negatives), reverse=True)
    return kept[: args.num_negatives]
