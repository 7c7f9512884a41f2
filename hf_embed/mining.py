"""Mine hard negatives: for each query, the nearest documents that do not answer it.

    from datasets import load_dataset
    from hf_embed import Encoder, mine_hard_negatives

    encoder = Encoder.from_pretrained("BAAI/bge-base-en-v1.5")
    pairs = load_dataset("csv", data_files="pairs.csv", split="train")  # e.g. with the columns anchor and positive
    rows = mine_hard_negatives(pairs, encoder, num_negatives=7)         # the same, and a column of lists, negatives

1. Queries and documents are encoded, one shard at a time.
2. The nearest documents of each query are found exactly, by blocked matrix products (or FAISS).
3. The query's positives are left out. So are documents that may be unlabeled positives: those in the first ranks, and those
   that score too near the positive.

Every shard of vectors and every block of rows is a file that is written once. So ranks share the work, and a run that was
stopped resumes with the missing files. They are in a folder beside the output, which is removed when all is done:

    mined.jsonl.work/
        identity                a hash of the model, the queries and the documents
        queries/000000.npy      unit vectors of the first SHARD queries, float32
        documents/000000.npy    the same for the documents
        rows-HASH/000000.json   the first BLOCK rows and their counts; HASH depends on the pairs and the settings
        output                  all rows; the file is renamed to mined.jsonl when it is complete

False negatives are common: in a web corpus, most of the nearest "negatives" are answers without a label. By default a
negative may score at most 95% of the positive's score. This threshold relative to the positive is the one that NV-Retriever
found best (https://arxiv.org/abs/2407.15831, TopK-PercPos). The margin is a share of the absolute value of the positive's
score, so a negative score has a margin below it too.

Shapes: Q queries, C documents, D numbers per vector.
"""

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from hf_embed.data.labeled import as_pairs, pair_columns
from hf_embed.data.python_rows import RowData, as_rows, refuse_paths
from hf_embed.data.sources import FILL_IN, texts_of
from hf_embed.distributed import get_rank, get_world_size, on_cpu
from hf_embed.encoder import Encoder
from hf_embed.encoding import check_encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.rows import as_list
from hf_embed.evaluation.tasks import Embed
from hf_embed.files.read_files import read_array, read_json
from hf_embed.files.safe_files import put, writing
from hf_embed.files.work_files import already_exists, barrier, claimed, digest, make_files, work_folder
from hf_embed.fingerprint import fingerprint
from hf_embed.forward.exact import free_memory
from hf_embed.progress import progress_bar
from hf_embed.ranges import COUNT, FINITE, Range, check_ranges, setting
from hf_embed.search import exact_search

logger = logging.getLogger(__name__)

SHARD = 8192  # texts in one file of vectors
PART = 2048  # texts that are passed to the encoder at once: several of its batches, of which it tokenizes one in advance
BLOCK = 2048  # rows in one file of results


Pairs = Sequence[tuple[str, str]]  # queries, and documents that answer them
Candidate = tuple[float, int]  # score, and number of the document


@dataclass
class MiningArguments:
    """Which of the nearest documents become negatives.

    Raises:
        InputError: if a number is out of range, or if the ranks or scores leave no room for a negative.
    """

    num_negatives: int = setting(3, "Number of negatives per row.")
    range_min: int = setting(0, "Number of nearest documents to skip.")
    range_max: int = setting(100, "Last rank to consider among the nearest documents.")
    relative_margin: float | None = setting(
        0.05, "Skip documents that score above the positive's score minus this share of it; 0.05 means 95%."
    )
    absolute_margin: float | None = setting(None, "Skip documents that score above the positive's score minus this number.")
    max_score: float | None = setting(None, "Skip documents that score above this number.")
    min_score: float | None = setting(None, "Skip documents that score below this number.")
    sampling_strategy: str = setting(
        "top", "Take the nearest remaining documents, or a random sample of them.", choices=["top", "random"]
    )
    use_faiss: bool = setting(False, "Search with FAISS (exactly, IndexFlatIP); requires faiss-cpu.")
    seed: int = setting(42, "Seed of the random sample.")
    write_scores: bool = setting(
        False, "Also write the scores of the positive and the negatives: the columns pos_scores and neg_scores."
    )

    def __post_init__(self) -> None:
        cosine, whole = Range(least=-1, most=1), Range(whole=True)
        check_ranges(
            self,
            {"num_negatives": COUNT, "range_min": whole, "range_max": whole, "relative_margin": FINITE,
             "absolute_margin": FINITE, "max_score": cosine, "min_score": cosine, "seed": whole},
        )  # fmt: skip
        if self.min_score is not None and self.max_score is not None and self.min_score >= self.max_score:
            raise InputError(
                f"min_score {self.min_score} is not below max_score {self.max_score}, so no document is left; lower min_score"
            )
        if not 0 <= self.range_min <= self.range_max - self.num_negatives:
            raise InputError(
                f"ranks {self.range_min} to {self.range_max} have no room for {self.num_negatives} negatives; set a larger "
                "range_max"
            )


def mine_hard_negatives(
    dataset: RowData,
    encoder: Encoder,
    corpus: Iterable[str] = (),
    output_file: str | Path | None = None,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    **rules: Any,
) -> Dataset:
    """Return pairs with hard negatives. With several ranks, every rank calls this, with an `output_file` that all can write.

    Args:
        dataset: pairs in two columns of a `Dataset`, or of anything that `hf_embed.data.python_rows` converts, for example a
            DataFrame. Rows with the same anchor are answers to one query, so their documents are not negatives of each other.
        encoder: the model that finds the negatives, by the cosine, with its prompts "query" and "document".
        corpus: further texts to choose negatives from, besides the documents of the pairs.
        output_file: a jsonl file to write the rows to as well. With it, a run that was stopped can be resumed.
        anchor_column_name: the column of queries; default: chosen as in training.
        positive_column_name: the column of answers; default: the column that belongs to the anchor column.
        rules: fields of `MiningArguments`: num_negatives, relative_margin, range_min, sampling_strategy ...

    Returns:
        The two columns under their own names, and `negatives`: for each row a list of at most `num_negatives` texts, nearest
        first. `ContrastiveTrainer` can train on this dataset directly, if it knows the two names. With `write_scores`, also
        `pos_scores` and `neg_scores`.

    Raises:
        InputError: if the columns are not found or a text is empty, or for a reason that `write_hard_negatives` names.
        TypeError: if a rule is unknown.
    """
    known = {rule.name for rule in fields(MiningArguments)}
    if unknown := sorted(set(rules) - known):
        raise TypeError(f"mine_hard_negatives() has no argument '{unknown[0]}'; the rules are {', '.join(sorted(known))}")
    check_encoder(encoder)
    args = MiningArguments(**rules)
    if output_file is None and get_world_size() > 1:
        raise InputError("mine_hard_negatives runs on several ranks; give an output_file that all of them can write")
    pairs, columns = read_dataset(dataset, anchor_column_name, positive_column_name)
    embed = cast(Embed, partial(encoder.encode, convert_to_tensor=True))
    with TemporaryDirectory() as folder:
        output = Path(output_file or Path(folder, "mined.jsonl"))
        counts = write_hard_negatives(pairs, corpus, embed, output, args, fingerprint(encoder))
        with output.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    if get_rank() == 0:
        logger.log(logging.WARNING if counts["fewer"] else logging.INFO, "; ".join(describe(counts)))
    mined = Dataset.from_dict(dict(zip(columns, map(list, zip(*pairs)))))
    mined = mined.add_column("negatives", pyarrow.array([row["negatives"] for row in rows], pyarrow.list_(pyarrow.string())))
    for name in ("pos_scores", "neg_scores") if args.write_scores else ():
        mined = mined.add_column(name, pyarrow.array([row[name] for row in rows], pyarrow.list_(pyarrow.float64())))
    return mined


def read_dataset(
    dataset: RowData, anchor_column: str | None = None, positive_column: str | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the pairs of a table and the names of its two columns. A row with several positives gives several pairs.

    Raises:
        InputError: if a column does not exist, a text is empty, or the dataset is streaming.
    """
    table = as_rows(dataset, "dataset")
    if not isinstance(table, Dataset):
        raise InputError("dataset: mining needs all rows at once, so a streaming dataset is not supported; give a Dataset")
    names = [anchor_column, positive_column]
    if None in names:
        table = as_pairs(table, "dataset", paired=True)
        names = [given or found for given, found in zip(names, pair_columns(table, "dataset"))]
    columns = [str(name) for name in names]
    if missing := [column for column in columns if column not in table.column_names]:
        raise InputError(f"dataset: there is no column '{missing[0]}'; found {', '.join(table.column_names)}")
    return [(anchor, positive) for anchor, positive in texts_of(table, columns, "dataset")], columns


def write_hard_negatives(
    pairs: Pairs,
    corpus: Iterable[str],
    embed: Embed,
    output_file: str | Path,
    args: MiningArguments,
    identity: str = "",
) -> Counter[str]:
    """Write a jsonl file with a row {"query", "positive", "negatives": [...]} for each pair, in order. Every rank calls this.

    With `write_scores`, a row also has the cosines "pos_scores" (of the positive) and "neg_scores" (of each negative).

    Args:
        pairs: queries and documents that answer them. A query may be in several pairs; none of its documents is its negative.
        corpus: further texts to choose negatives from, besides the documents of the pairs. Duplicates count once.
        embed: `embed(texts, prompt_name)` -> (N, D), where `prompt_name` is "query" or "document".
        output_file: the jsonl file. The files of an unfinished run are in a folder beside it.
        args: how many negatives to choose, and by which rules.
        identity: what the vectors depend on besides the texts, that is, the model. Vectors with another identity are not
            reused.

    Returns:
        Counts, on the first rank: `rows`; `negatives`; `fewer`, the rows with fewer negatives than asked for; and the number of
        candidates that each rule left out, by the name of the rule.

    Raises:
        InputError: if `output_file` exists, or its name does not end in .jsonl or .json; if the work folder beside it belongs
            to another model or other texts; if there are fewer than two documents; if a vector is not finite; or if FAISS is
            asked for and not installed.
    """
    output = Path(output_file)
    if output.suffix not in (".jsonl", ".json"):  # the recipes read a file by its ending
        raise InputError(f"{output}: the rows are written as jsonl; give a name that ends in .jsonl")
    work = work_folder(output)
    if args.use_faiss:
        import_faiss()
    queries, documents = distinct_texts(pairs, corpus)
    if len(documents) < 2:
        raise InputError(
            f"{output}: there are {len(documents)} document(s), too few to choose negatives from; give more pairs or a corpus"
        )
    with claimed(work, digest([identity], queries, documents)):
        folder = work / f"rows-{digest([repr(args)], *zip(*pairs))}"  # other settings reuse the vectors only
        if output.is_file():
            if not folder.is_dir() and any(work.glob("rows-*")):  # the output has other settings
                raise already_exists(output)
            return finished(work, output, pairs, args.num_negatives)
        query_vectors = encode_shards(queries, embed, "query", work / "queries")
        document_vectors = encode_shards(documents, embed, "document", work / "documents")
        rows = Rows(pairs, queries, documents, query_vectors, document_vectors, args)
        blocks = make_files(folder, ".json", len(pairs), BLOCK, rows.write, "Searching")
        counts = join_blocks(blocks, work, output) if get_rank() == 0 else Counter()
        barrier()
        return counts


def distinct_texts(pairs: Pairs, corpus: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the distinct queries, and the distinct documents of the pairs and the corpus, in order."""
    queries = list(dict.fromkeys(query for query, _ in pairs))
    given = as_list(corpus, "corpus")
    refuse_paths(given, "corpus")
    if odd := [number for number, text in enumerate(given, 1) if not isinstance(text, str | None)]:
        raise InputError(f"corpus, row {odd[0]}: the text is not a string ({given[odd[0] - 1]!r}); {FILL_IN}")
    texts = [text for text in given if text and text.strip()]  # an empty text cannot be a negative
    return queries, list(dict.fromkeys([document for _, document in pairs] + texts))


def join_blocks(blocks: list[Path], work: Path, output: Path) -> Counter[str]:
    """Write the rows of all blocks to `output`, remove the work folder, and return the summed counts."""
    counts: Counter[str] = Counter()
    unfinished = work / "output"
    with writing(unfinished) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        for path in blocks:
            block = read_json(path)
            if not block.keys() >= {"counts", "rows"}:
                raise InputError(f"{path}: the file is not part of this search; remove its folder to start again")
            counts.update(block["counts"])
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in block["rows"])
    put(unfinished, output)
    shutil.rmtree(work)
    return counts


def finished(work: Path, output: Path, pairs: Pairs, most: int) -> Counter[str]:
    """Remove the work folder beside a complete output, and return the counts of the output's rows.

    The run that wrote the output was killed before it could remove the folder.

    Raises:
        InputError: if the output has other rows.
    """
    with output.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if [(row["query"], row["positive"]) for row in rows] != [tuple(pair) for pair in pairs]:
        raise already_exists(output)
    barrier()  # every rank has read the output before the folder goes
    if get_rank() == 0:
        shutil.rmtree(work)
    lengths = [len(row["negatives"]) for row in rows]
    return Counter(rows=len(rows), negatives=sum(lengths), fewer=sum(length < most for length in lengths))


def describe(counts: Counter[str]) -> list[str]:
    """Return the counts of `write_hard_negatives` as readable lines."""
    rules = ("range_min", "relative_margin", "absolute_margin", "max_score", "min_score")
    return [
        f"{counts['rows']:,} rows with {counts['negatives']:,} negatives; rows with fewer than requested: {counts['fewer']:,}",
        *(f"left out by {rule}: {counts[rule]:,} candidates" for rule in rules if counts[rule]),
    ]


# ---- vectors ----


def encode_shards(texts: list[str], embed: Embed, prompt_name: str, folder: Path) -> list[Path]:
    """Write unit vectors of texts, float32, in files of SHARD texts. Raise InputError if a vector is not finite."""

    def write(numbers: range, path: Path) -> None:
        parts = [texts[start : min(start + PART, numbers.stop)] for start in range(numbers.start, numbers.stop, PART)]
        bar = progress_bar(parts, desc=f"File of {len(numbers):,} texts", unit="part")
        vectors = torch.cat([F.normalize(embed(part, prompt_name).float(), dim=-1).cpu() for part in bar]).numpy()
        if bad := [i for i, finite in enumerate(np.isfinite(vectors).all(1)) if not finite]:
            text = texts[numbers.start + bad[0]]
            raise InputError(
                f"{len(bad)} of {len(vectors)} vectors are not finite, for example that of {text[:60]!r}; check the model"
            )
        np.save(path, vectors)

    return make_files(folder, ".npy", len(texts), SHARD, write, f"Encoding {folder.name}")


def read_vectors(paths: list[Path], numbers: list[int]) -> Tensor:
    """Return the vectors (len(numbers), D) of the texts with these numbers."""
    shards = {shard: read_array(paths[shard]) for shard in {number // SHARD for number in numbers}}
    return torch.from_numpy(np.stack([shards[number // SHARD][number % SHARD] for number in numbers]))


def read_shards(paths: list[Path], device: torch.device) -> Iterator[Tensor]:
    """Yield the vectors of each file, (SHARD, D) or fewer rows, on a device."""
    for path in paths:
        yield torch.from_numpy(np.array(read_array(path))).to(device)


# ---- search and choice ----


def import_faiss() -> Any:
    """Return the module faiss. Raise InputError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--use_faiss requires the package faiss-cpu or faiss-gpu; install it or remove the flag: the search is exact "
            "without it too"
        ) from error
    return faiss


def searcher(document_vectors: list[Path], use_faiss: bool) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Return a function from unit queries (Q, D) and k to the scores and numbers, both (Q, k), of the nearest documents."""
    if use_faiss:
        shards = list(read_shards(document_vectors, torch.device("cpu")))
        index = import_faiss().IndexFlatIP(shards[0].shape[1])
        for shard in shards:
            index.add(shard.numpy())
        return lambda queries, k: index.search(queries.numpy(), min(k, index.ntotal))
    device, kept = torch.device("cpu" if on_cpu() else "cuda"), []
    if device.type == "cuda" and 2 * sum(path.stat().st_size for path in document_vectors) < free_memory(device):
        kept = list(read_shards(document_vectors, device))  # otherwise, each block of queries copies them to the GPU again
    return lambda queries, k: exact_search(queries.to(device), kept or read_shards(document_vectors, device), k)


class Rows:
    """The search: it adds negatives to the pairs, one block of pairs at a time."""

    def __init__(
        self,
        pairs: Pairs,
        queries: list[str],
        documents: list[str],
        query_vectors: list[Path],
        document_vectors: list[Path],
        args: MiningArguments,
    ):
        self.pairs, self.documents, self.args = pairs, documents, args
        self.query_vectors, self.document_vectors = query_vectors, document_vectors
        self.query_number = {query: number for number, query in enumerate(queries)}
        self.document_number = {document: number for number, document in enumerate(documents)}
        # for each query, the documents that cannot be negatives: its positives, and the query itself
        self.taken = {query: {self.document_number.get(query)} for query in queries}
        for query, document in pairs:
            self.taken[query].add(self.document_number[document])
        self.find = searcher(document_vectors, args.use_faiss)
        self.depth = args.range_max + max(map(len, self.taken.values()))

    def write(self, numbers: range, path: Path) -> None:
        """Write the rows of the pairs with these numbers, and the counts of these rows."""
        pairs, rows = self.pairs[numbers.start : numbers.stop], []
        counts: Counter[str] = Counter()
        queries = read_vectors(self.query_vectors, [self.query_number[query] for query, _ in pairs])
        positives = read_vectors(self.document_vectors, [self.document_number[document] for _, document in pairs])
        scores, found = (part.tolist() for part in self.find(queries, self.depth))
        for i, (query, document) in enumerate(pairs):
            nearest = [(score, number) for score, number in zip(scores[i], found[i]) if number not in self.taken[query]]
            positive = float(queries[i] @ positives[i])
            negatives = choose(nearest[: self.args.range_max], positive, self.args, counts, f"{self.args.seed} {numbers[i]}")
            counts.update(rows=1, negatives=len(negatives), fewer=len(negatives) < self.args.num_negatives)
            texts = [self.documents[number] for _, number in negatives]
            row: dict[str, Any] = {"query": query, "positive": document, "negatives": texts}
            if self.args.write_scores:
                row |= {"pos_scores": [round(positive, 6)], "neg_scores": [round(score, 6) for score, _ in negatives]}
            rows.append(row)
        path.write_text(json.dumps({"counts": counts, "rows": rows}), encoding="utf-8")


def choose(
    candidates: list[Candidate], positive: float, args: MiningArguments, counts: Counter[str], seed: str
) -> list[Candidate]:
    """Choose the negatives among candidates. Return them nearest first.

    Args:
        candidates: the candidates, nearest first.
        positive: the score of the positive.
        args: the rules.
        counts: the number of candidates that each rule leaves out is added to these counts.
        seed: the seed of a random choice.
    """
    # True keeps a candidate. relative_margin is TopK-PercPos: score <= (1 - margin) * positive, for a positive score above 0.
    rules: dict[str, Callable[[int, float, float], bool]] = {
        "range_min": lambda rank, score, limit: rank >= limit,
        "relative_margin": lambda rank, score, limit: score <= positive - abs(positive) * limit,
        "absolute_margin": lambda rank, score, limit: score <= positive - limit,
        "max_score": lambda rank, score, limit: score <= limit,
        "min_score": lambda rank, score, limit: score >= limit,
    }
    ranked = list(enumerate(candidates))
    for name, passes in rules.items():
        limit = getattr(args, name)
        if limit is not None:
            passed = [(rank, candidate) for rank, candidate in ranked if passes(rank, candidate[0], limit)]
            counts[name] += len(ranked) - len(passed)
            ranked = passed
    kept = [candidate for _, candidate in ranked]
    if args.sampling_strategy == "random" and len(kept) > args.num_negatives:
        kept = sorted(random.Random(seed).sample(kept, args.num_negatives), reverse=True)
    return kept[: args.num_negatives]
