r"""Measure how TempScale changes the scores of queries whose relevant document is short, of middle length, or long.

    python benchmarks/tempscale_lengths.py --model MODEL --retrieval scifact=beir/scifact:train --texts news=articles.txt \
        --max_length 512 --temperatures 1 0.9 0.8 --growth 128 --output scores.jsonl
    python benchmarks/tempscale_lengths.py ... --layers 0.8 0.9          # also one temperature per layer

The first table has nDCG@10 x 100 at temperature 1, for each dataset and each third of its queries, and the change at every
other temperature, with a 95% interval from a paired bootstrap over queries. The second table shows the gain of settings that
are chosen on the even queries and judged on the odd ones: one temperature; the best temperature that falls with length (beyond
REFERENCE tokens it is t log REFERENCE / log tokens); and with --layers one temperature for each layer, by a coordinate search.

The length of a query is the number of tokens of its relevant document before truncation, or the mean over several relevant
documents. Per-query scores are stored in the file --output, and stored scores are not computed again.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_embed import Encoder, Retrieval
from hf_embed.data.sources import read_texts
from hf_embed.evaluation.retrieval import pairs_to_retrieval, read_retrieval
from hf_embed.kit.calibrate import halves, thirds
from hf_embed.kit.models import embed_with
from hf_embed.tempscale import TempScaleConfig, tempscale

BINS = ("short", "middle", "long")
RESAMPLES = 10_000
WHOLE = TempScaleConfig(1.0)
Scores = Mapping[str, np.ndarray]  # nDCG@10 x 100 of each query (Q,), by the label of a setting


def first_queries(task: Retrieval, queries: int, documents: int) -> Retrieval:
    """Return a set of the first judged queries, all their judged documents, and other documents up to `documents` in all."""
    qrels = dict(list(task.qrels.items())[:queries])
    kept = {document for found in qrels.values() for document in found}
    others = [document for document in task.corpus if document not in kept]
    kept |= set(others[: max(0, documents - len(kept))])
    return Retrieval(task.queries, {document: text for document, text in task.corpus.items() if document in kept}, qrels)


def openings(texts: list[str], words: int) -> Retrieval:
    """Make a retrieval set in which the first words of each text (in news, a headline) are the query for the rest of it."""
    split = [text.split() for text in texts]
    return pairs_to_retrieval([(" ".join(text[:words]), " ".join(text[words:])) for text in split if len(text) > 2 * words])


def read_sets(args: argparse.Namespace) -> dict[str, Retrieval]:
    tasks = {}
    for entry in args.retrieval:
        name, _, folder = entry.partition("=")
        tasks[name] = first_queries(read_retrieval(folder), args.max_queries, args.max_documents)
    for entry in args.texts:
        name, _, file = entry.partition("=")
        texts = list(dict.fromkeys(read_texts(file)))
        texts = texts[:: max(1, len(texts) // args.max_texts)][: args.max_texts]  # take texts from all parts of the file
        tasks[name] = openings(texts, args.opening_words) if args.opening_words else halves(texts)
    return tasks


def document_tokens(encoder: Encoder, task: Retrieval) -> np.ndarray:
    """Return the mean number of tokens of each query's relevant documents, before truncation: (Q,)."""
    counts = [len(ids) for ids in encoder.tokenizer(list(task.corpus.values()), verbose=False)["input_ids"]]
    tokens = dict(zip(task.corpus, counts))
    return np.array([np.mean([tokens[d] for d, grade in found.items() if grade > 0]) for found in task.qrels.values()])


def bins(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers of the queries in each third, by a name with the shortest and the longest length."""
    return {
        f"{name}, {tokens[third].min():.0f} to {tokens[third].max():.0f}": third for name, third in zip(BINS, thirds(tokens))
    }


def label_of(config: TempScaleConfig) -> str:
    if isinstance(config.temperature, list):
        return "layers " + " ".join(f"{temperature:g}" for temperature in config.temperature)
    return f"{config.temperature:g}" + (f" log {config.reference_length}" if config.growth else "")


class Store:
    """Per-query scores of one dataset under several settings, stored in a file."""

    def __init__(self, file: Path, model: str, encoder: Encoder, name: str, task: Retrieval):
        self.file, self.encoder, self.task = file, encoder, task
        texts = [[task.queries[query], found] for query, found in task.qrels.items()], task.corpus
        self.key = [name, model, encoder.max_length, str(encoder.dtype), hashlib.sha256(repr(texts).encode()).hexdigest()]
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self.known = {row["label"]: np.array(row["ndcg"]) for row in rows if row["key"] == self.key}

    def score(self, config: TempScaleConfig) -> np.ndarray:
        """Return nDCG@10 x 100 of each query (Q,), from the file or computed by the evaluator of this package."""
        label = label_of(config)
        if label not in self.known:
            with tempscale(self.encoder.backbone, config):
                values = [100 * metrics["ndcg@10"] for metrics in self.task.per_query(embed_with(self.encoder))]
            with open(self.file, "a") as file:
                file.write(json.dumps({"key": self.key, "label": label, "ndcg": values}) + "\n")
            self.known[label] = np.array(values)
        return self.known[label]


def interval(changes: np.ndarray) -> str:
    """Format the mean of changes (Q,) and its 95% bootstrap interval over queries, in bold if zero is outside of it."""
    draws = np.random.default_rng(0)
    means = np.array([changes[draws.integers(len(changes), size=len(changes))].mean() for _ in range(RESAMPLES)])
    lower, upper = np.quantile(means, [0.025, 0.975])
    text = f"{changes.mean():+.2f} ({lower:+.2f} to {upper:+.2f})"
    return f"**{text}**" if lower > 0 or upper < 0 else text


def best(scores: Scores, chosen: np.ndarray) -> str:
    """Return the setting that scores best on the chosen queries. If several are equal, return the first one."""
    return max(scores, key=lambda label: round(scores[label][chosen].mean(), 6))


def search_layers(store: Store, chosen: np.ndarray, candidates: list[float]) -> TempScaleConfig:
    """Search one temperature per layer, from the last layer to the first, and keep the best one on the chosen queries."""
    temperatures = [1.0] * store.encoder.config.num_hidden_layers
    top = store.score(WHOLE)[chosen].mean()
    for layer in reversed(range(len(temperatures))):
        for candidate in candidates:
            tried = [*temperatures[:layer], candidate, *temperatures[layer + 1 :]]
            if (reached := store.score(TempScaleConfig(tried))[chosen].mean()) > top:
                temperatures, top = tried, reached
    return TempScaleConfig(temperatures)


def length_rows(name: str, tokens: np.ndarray, scores: Scores) -> list[str]:
    """Return Markdown rows for all queries and for each bin: the score at temperature 1, and the change at other settings."""
    rows = []
    for title, chosen in {"all": np.arange(len(tokens)), **bins(tokens)}.items():
        changes = [interval((values - scores["1"])[chosen]) for label, values in scores.items() if label != "1"]
        rows.append(" | ".join([f"| {name}", title, f"{len(chosen):,}", f"{scores['1'][chosen].mean():.2f}", *changes]) + " |")
    return rows


def judged_rows(name: str, kinds: Mapping[str, Scores], tokens: np.ndarray, even: np.ndarray) -> list[str]:
    """Return a Markdown row per kind of setting: the best setting on the even queries, judged on the odd ones."""
    rows = []
    single = kinds["one temperature"]
    one = single[best(single, even)]
    long = np.isin(np.arange(len(tokens)), thirds(tokens)[-1])
    for kind, scores in kinds.items():
        label = best(scores, even)
        gain = scores[label] - single["1"]
        against = "" if kind == "one temperature" else interval((scores[label] - one)[~even])
        judged = [f"{gain[even].mean():+.2f}", interval(gain[~even]), interval(gain[~even & long]), against]
        rows.append(" | ".join([f"| {name}", f"{kind}: {label}", *judged]) + " |")
    return rows


def kinds_of(store: Store, args: argparse.Namespace, even: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Return the scores by kind of setting: one temperature, falling with length, one temperature for each layer."""
    one = [TempScaleConfig(temperature) for temperature in dict.fromkeys([1.0, *args.temperatures])]
    growing = [TempScaleConfig(1.0, growth="log", reference_length=reference) for reference in args.growth]
    kinds = {
        "one temperature": {label_of(config): store.score(config) for config in one},
        "falls with length": {label_of(config): store.score(config) for config in growing},
    }
    if args.layers:
        config = search_layers(store, even, args.layers)
        kinds["layer by layer"] = {label_of(config): store.score(config)}
    return {kind: scores for kind, scores in kinds.items() if scores}


def table(header: list[str], rows: list[str]) -> None:
    print("\n".join(["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|", *rows]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--retrieval", nargs="*", default=[], metavar="NAME=FOLDER[:SPLIT]", help="BEIR folders")
    parser.add_argument(
        "--texts", nargs="*", default=[], metavar="NAME=FILE", help="texts without labels: their halves make a set"
    )
    parser.add_argument("--opening_words", type=int, help="for --texts: the query is this many first words, not the first half")
    parser.add_argument(
        "--max_queries", type=int, default=4000, help="number of queries to use from a BEIR folder, from the first"
    )
    parser.add_argument("--max_documents", type=int, default=1000, help="number of documents: the relevant ones, then others")
    parser.add_argument("--max_texts", type=int, default=400)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--dtype", default="float32", help="bfloat16 is faster on processors that compute in it")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.1, 1.05, 1, 0.95, 0.9, 0.8])
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=[],
        metavar="REFERENCE",
        help="temperatures that fall with the text length, from 1",
    )
    parser.add_argument(
        "--layers", type=float, nargs="*", default=[], metavar="TEMPERATURE", help="temperatures to search for each layer"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tempscale_lengths.jsonl"), help="file for the scores of each query"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    encoder = Encoder.from_pretrained(args.model, max_length=args.max_length, dtype=args.dtype)
    by_length: list[str] = []
    judged: list[str] = []
    labels: dict[str, Any] = {}
    for name, task in read_sets(args).items():
        tokens, even = document_tokens(encoder, task), np.arange(len(task.qrels)) % 2 == 0
        kinds = kinds_of(Store(args.output, args.model, encoder, name, task), args, even)
        print(f"{name}: {len(task.qrels):,} queries, {len(task.corpus):,} documents of {tokens.mean():.0f} tokens", flush=True)
        shown = kinds["one temperature"] | kinds.get("falls with length", {})
        labels |= dict.fromkeys(label for label in shown if label != "1")
        by_length += length_rows(name, tokens, shown)
        judged += judged_rows(name, kinds, tokens, even)
    table(["set", "relevant document, tokens", "queries", "t = 1", *(f"t = {label}" for label in labels)], by_length)
    table(["set", "chosen on the even queries", "there", "on the odd", "the long of these", "against one"], judged)


if __name__ == "__main__":
    main()
