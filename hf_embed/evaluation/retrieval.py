"""Retrieval: do the nearest documents in the corpus answer the query? nDCG, MAP, recall and MRR are defined as in BEIR.

A BEIR folder has corpus.jsonl ({"_id", "title", "text"}), queries.jsonl ({"_id", "text"}) and qrels/SPLIT.tsv (query-id,
corpus-id, score). Code search works the same way, with docstrings as queries and functions as documents.

Shapes: Q queries, k retrieved documents.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from hf_embed.data.known_columns import plain
from hf_embed.data.sources import read_hub
from hf_embed.data.text_files import Table, json_rows, table_rows
from hf_embed.distributed import gather_objects, get_rank, get_world_size
from hf_embed.errors import InputError, shortened
from hf_embed.evaluation.geometry import ordered
from hf_embed.evaluation.rows import is_number
from hf_embed.evaluation.tasks import Embed, EvaluationTask, embed_on_all_ranks, embed_own_share, unranked
from hf_embed.ranges import COUNT
from hf_embed.search import exact_search

logger = logging.getLogger(__name__)

SPLITS = ("test", "dev", "validation", "train")
QRELS = ("query-id", "corpus-id", "score")
Row = dict[str, Any]


@dataclass
class Retrieval(EvaluationTask):
    """Queries, documents, and judgments of which documents are relevant to which query.

    Args:
        queries, corpus: texts by id.
        qrels: the judged documents of each query, {query id: {document id: grade}}; a grade above 0 means relevant.
        cutoffs: the values of k for the metrics.

    In some datasets, such as ArguAna, queries are taken from the corpus. Then the query must not be found as its own answer. A
    document is left out if it has the id and the text of the query (a title before the text is allowed), unless it is judged.

    Raises:
        InputError: if no query has a relevant document, or an argument has the wrong type.
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    cutoffs: tuple[int, ...] = (10, 100)

    kind = "retrieval"
    main = "ndcg@10"
    reported = ("ndcg@10", "mrr@10", "recall@100", "map@100")

    def __post_init__(self) -> None:
        self.check_types()
        self.qrels = {query: found for query, found in self.qrels.items() if max(found.values(), default=0) > 0}
        if not self.qrels:
            raise InputError("no query has a relevant document")
        relevant = {document for found in self.qrels.values() for document, grade in found.items() if grade > 0}
        if absent := relevant - self.corpus.keys():
            logger.warning(
                f"{len(absent):,} of {len(relevant):,} relevant documents are not in the corpus, for example "
                f"{min(absent, key=str)!r}; they count as not found"
            )
        self.itself = {q for q in self.qrels if q not in self.qrels[q] and q in self.corpus and self.is_query(q)}
        if self.itself:
            logger.warning(
                f"{len(self.itself):,} of {len(self.qrels):,} queries are also documents with the same id and text; such a "
                "document is left out of the results of its own query"
            )

    def check_types(self) -> None:
        """Raise InputError if texts, grades or cutoffs have a wrong type, or if a judged query does not exist."""
        for name, texts in (("queries", self.queries), ("corpus", self.corpus)):
            if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
                raise InputError(f"Retrieval: {name} must be a dict {{id: text}}, but it is {shortened(repr(texts))}")
        grades = list(self.qrels.values()) if isinstance(self.qrels, dict) else [None]
        if not all(
            isinstance(found, dict) and all(isinstance(grade, Real) and float(grade).is_integer() for grade in found.values())
            for found in grades
        ):
            raise InputError("Retrieval: qrels must be a dict {query id: {document id: grade}} with whole numbers as grades")
        if not isinstance(self.cutoffs, list | tuple) or not self.cutoffs or not all(k in COUNT for k in self.cutoffs):
            raise InputError(f"Retrieval: cutoffs are {self.cutoffs!r}; give whole numbers of at least 1")
        if absent := self.qrels.keys() - self.queries.keys():
            raise InputError(f"Retrieval: qrels judge the query {min(map(str, absent))!r}, which is not among the queries")

    def is_query(self, name: str) -> bool:
        """Return whether the query and the document with this id have the same text."""
        query, document = (" ".join(texts[name].split()) for texts in (self.queries, self.corpus))
        return f" {document}".endswith(f" {query}")  # the document may have a title first

    @property
    def logged(self) -> Sequence[str]:
        """All metrics that `score` returns."""
        return [f"{metric}@{k}" for k in self.cutoffs for metric in ("ndcg", "map", "recall", "mrr")]

    def score(self, embed: Embed) -> dict[str, float]:
        """Return ndcg@k, map@k, recall@k and mrr@k of `embed`, x 100, as means over the queries that have a relevant document.

        They are NaN, with a warning, if no query is nearer to one document than to another, or a cosine is not finite.
        Otherwise the order of the documents in the file would decide the result.
        """
        per_query = self.per_query(embed)
        return {key: 100 * float(np.mean([m[key] for m in per_query])) for key in per_query[0]}

    def per_query(self, embed: Embed) -> list[dict[str, float]]:
        """Return the metrics of each query of `qrels`, 0 to 1. They are NaN if the cosines cannot be ranked."""
        scores, found = self.rank(embed, max(self.cutoffs))
        if len(self.corpus) > 1 and not ordered(scores.numpy()):
            return [unranked(self.logged, f"nDCG is NaN for {len(found):,} queries")] * len(self.qrels)
        return [ranking_metrics(found[q], self.qrels[q], self.cutoffs) for q in self.qrels]

    def rank(self, embed: Embed, k: int) -> tuple[Tensor, dict[str, list[str]]]:
        """Return the largest and the smallest cosines of each query, and the ids of the k nearest documents, best first.

        Of documents with equal cosines, the larger id comes first, as in trec_eval. Each rank encodes and searches its share of
        the different texts of the corpus block by block. The embeddings are not kept.
        """
        rank, ranks = get_rank(), get_world_size()
        ids = sorted(self.corpus, key=str, reverse=True)  # of equal scores, the search takes the first
        texts = list(dict.fromkeys(map(self.corpus.__getitem__, ids)))  # so the cosines of equal documents are exactly equal
        queries = torch.from_numpy(embed_on_all_ranks([self.queries[q] for q in self.qrels], embed, "query"))
        smallest = [queries.new_empty(len(queries), 0, dtype=torch.float32)]

        def cosines(queries: Tensor, block: Tensor) -> Tensor:
            scores = queries @ block.T
            smallest.extend([scores.amin(1, keepdim=True).cpu()] if len(block) else [])
            return scores

        documents = embed_own_share(texts, embed, "document")
        blocks = (F.normalize(block.float(), dim=-1) for block in documents)  # searched on the device that encoded them
        scores, numbers = exact_search(F.normalize(queries.float(), dim=-1), blocks, k + 1, cosines)
        parts = gather_objects((scores.cpu(), numbers.cpu() * ranks + rank, torch.cat(smallest, dim=1)))
        scores, numbers, lowest = (torch.cat(part, dim=1) for part in zip(*parts))
        places: dict[str, list[int]] = {texts[number]: [] for number in numbers.unique().tolist()}
        for place, name in enumerate(ids):
            if self.corpus[name] in places:
                places[self.corpus[name]].append(place)
        found = {}
        for query, row in zip(self.qrels, zip(scores.tolist(), numbers.tolist())):
            ranked = sorted((-score, place) for score, number in zip(*row) for place in places[texts[number]][: k + 1])
            nearest = [ids[place] for _, place in ranked]
            found[query] = [document for document in nearest if not (document == query and query in self.itself)][:k]
        return torch.cat([scores, lowest], dim=1), found


def ranking_metrics(found: list[str], relevant: dict[str, int], cutoffs: tuple[int, ...]) -> dict[str, float]:
    """Return the metrics of one query, 0 to 1, as defined in trec_eval.

    ndcg@k: the sum of grade / log2(1 + rank) over the first k documents, divided by the largest possible sum.

    map@k: the sum of the precisions at each relevant rank up to k, divided by the number of relevant documents.
    """
    grades = np.array([max(0, relevant.get(document, 0)) for document in found], dtype=float)
    best = np.sort([grade for grade in relevant.values() if grade > 0])[::-1].astype(float)
    hits = grades > 0
    discounts = np.log2(np.arange(2, max(len(grades), len(best)) + 2))
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    metrics = {}
    for k in cutoffs:
        metrics[f"ndcg@{k}"] = (grades[:k] / discounts[: len(grades[:k])]).sum() / (best[:k] / discounts[: len(best[:k])]).sum()
        metrics[f"map@{k}"] = (precision * hits)[:k].sum() / len(best)
        metrics[f"recall@{k}"] = hits[:k].sum() / len(best)
        metrics[f"mrr@{k}"] = 1 / (hits[:k].argmax() + 1) if hits[:k].any() else 0.0
    return metrics


# ---- reading ----


def read_retrieval(path: str) -> Retrieval:
    """Read a BEIR folder or a Hub dataset, given as `PATH` or `PATH:SPLIT`.

    Without a split, the first existing one of test, dev, validation and train is read (on the Hub: test). Judgments of
    documents or queries that do not exist are left out, and a warning counts them.

    Raises:
        InputError: if a file or split does not exist, a line cannot be read, or no judgment is left.
    """
    folder, _, split = path.rpartition(":") if not os.path.exists(path) and ":" in path else (path, "", None)
    if os.path.isdir(folder):
        corpus, queries = read_jsonl(Path(folder, "corpus.jsonl")), read_jsonl(Path(folder, "queries.jsonl"))
        return make_retrieval(queries, corpus, read_qrels(Path(folder, "qrels"), split), folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        trouble = "this is not a folder" if os.path.exists(folder) else "this folder does not exist"
        raise InputError(f"{path}: {trouble}; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")

    def part(config: str, split: str, *columns: str) -> Dataset:
        rows = read_hub(folder, config, split)
        if not set(columns) <= set(rows.column_names):
            wanted = f"{', '.join(columns[:-1])} and {columns[-1]}"
            raise InputError(f"{folder}, {config}: found the columns {', '.join(rows.column_names)}; expected {wanted}")
        return rows

    corpus, queries = part("corpus", "corpus", "_id", "text"), part("queries", "queries", "_id", "text")
    judged = [(row["query-id"], row["corpus-id"], row["score"]) for row in part("default", split or "test", *QRELS)]
    return make_retrieval(queries, corpus, judged, folder)


def make_retrieval(queries: Iterable[Row], corpus: Iterable[Row], judged: Iterable[tuple], name: str) -> Retrieval:
    """Make a task from rows and (query id, document id, grade) judgments. Raise InputError if no judgment is left."""
    query_texts = texts_by_id(queries, lambda row: row["text"] or "", f"{name}/queries")
    documents = texts_by_id(corpus, lambda row: f"{row.get('title') or ''} {row['text'] or ''}".strip(), f"{name}/corpus")
    qrels: dict[str, dict[str, int]] = {}
    absent: dict[str, set[str]] = {"documents": set(), "queries": set()}
    for query, document, grade in judged:
        query, document = str(query), str(document)
        if document not in documents:
            absent["documents"].add(document)
        elif query not in query_texts:
            absent["queries"].add(query)
        elif not is_number(str(grade)) or float(grade) % 1:  # inf % 1 is NaN
            raise InputError(f"{name}: query {query} and document {document} have the grade {grade!r}, not a whole number")
        elif int(grade) > 0:
            qrels.setdefault(query, {})[document] = int(grade)
    for kind, ids in absent.items():
        if ids:
            logger.warning(
                f"{name}: the qrels name {len(ids)} {kind} that do not exist, for example {min(ids)}; they are left out"
            )
    if not qrels:
        raise InputError(f"{name}: no query has a relevant document that exists; check the ids in qrels and corpus")
    return Retrieval(query_texts, documents, qrels)


def texts_by_id(rows: Iterable[Row], text_of: Callable[[Row], str], name: str) -> dict[str, str]:
    """Return {id: text}. Raise InputError if two different texts have the same id. `name` names the rows in messages."""
    texts: dict[str, str] = {}
    for row in rows:
        key, text = str(row["_id"]), text_of(row)
        if texts.setdefault(key, text) != text:
            raise InputError(f"{name}: two rows have the same _id '{key}' but different texts; ids must differ")
    return texts


def read_qrels(folder: Path, split: str | None) -> list[tuple[str, str, int]]:
    """Read (query id, document id, grade) judgments. Find the columns by a BEIR header, or else by position.

    Without a header, a line has these three cells, or in a file of TREC an unused one after the first.
    """
    there = [name for name in ([split] if split else SPLITS) if (folder / f"{name}.tsv").is_file()]
    if not there:
        found = ", ".join(sorted(path.stem for path in folder.glob("*.tsv"))) or "none"
        raise InputError(
            f"{folder / f'{split or SPLITS[0]}.tsv'}: this file does not exist; the splits in this folder are: {found}"
        )
    path = str(folder / f"{there[0]}.tsv")
    grades: dict[tuple[str, str], int] = {}
    order, first, width = [0, 1, 2], True, 3
    for number, _, row in table_rows(path, Table()):
        if first:
            first = False
            names = list(map(plain, row))
            if set(map(plain, QRELS)) <= set(names):
                order, width = [names.index(plain(name)) for name in QRELS], len(row)
                continue
            if len(row) == 4 and row[1] in ("0", "Q0"):  # as TREC and MS MARCO write it: the second column is not used
                order, width = [0, 2, 3], 4
            if len(row) == 3 and not is_number(row[2]):  # a header with other names
                continue
        if len(row) != width or not is_number(row[order[2]]) or float(row[order[2]]) % 1:
            raise InputError(f"{path}, line {number}: expected query-id, corpus-id and a whole number, separated by tabs")
        query, document, grade = (row[i] for i in order)
        if grades.setdefault((query, document), int(float(grade))) != int(float(grade)):
            raise InputError(
                f"{path}, line {number}: query {query} and document {document} are judged twice, with different grades"
            )
    return [(query, document, grade) for (query, document), grade in grades.items()]


def read_jsonl(path: Path) -> list[Row]:
    """Read rows with "_id" and "text". The file may be gzipped, with .gz after its name."""
    packed = path.with_name(f"{path.name}.gz")
    path = packed if packed.is_file() and not path.is_file() else path
    if not path.is_file():
        raise InputError(f"{path}: this file does not exist; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    rows = []
    for number, row in json_rows(str(path)):
        known = isinstance(row.get("text"), str) and isinstance(row.get("_id"), str | int)
        if not known or not str(row["_id"]):
            raise InputError(f"{path}, line {number}: expected a JSON object with _id and text")
        rows.append(row)
    return rows


def judged_pairs(task: Retrieval, name: str) -> list[tuple[str, str]]:
    """Return the (query, relevant document) pairs of a task. Leave out those with an empty text, and say how many."""
    judged = [(task.queries[query], task.corpus[document]) for query, found in task.qrels.items() for document in found]
    pairs = [(query, document) for query, document in judged if query.strip() and document.strip()]
    if left_out := len(judged) - len(pairs):
        logger.warning(f"{name}: {left_out:,} of {len(judged):,} judged pairs have an empty text; they are left out")
    return pairs


def pairs_to_retrieval(pairs: Sequence[Sequence[str]]) -> Retrieval:
    """Make a task from (query, document) pairs: each query searches for its documents among those of all pairs.

    Equal texts become one query or one document.

    >>> pairs_to_retrieval([("a cat", "cats"), ("a dog", "dogs"), ("a cat", "felines")]).qrels
    {'q0': {'d0': 1, 'd2': 1}, 'q1': {'d1': 1}}
    """
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(query for query, _ in pairs))}
    corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(document for _, document in pairs))}
    qrels: dict[str, dict[str, int]] = {}
    for query, document in pairs:
        qrels.setdefault(queries[query], {})[corpus[document]] = 1
    return Retrieval({i: text for text, i in queries.items()}, {i: text for text, i in corpus.items()}, qrels)
