"""Compare ONNX graphs with the encoder that they were exported from: vectors, scores on an STS set, and speed.

    python benchmarks/onnx_graphs.py --data DATA [--model MODEL]

DATA has sts/stsb-train.tsv and sts/stsb-dev.tsv (score, sentence, sentence) and long/bbc_articles.tsv (label, article). The
graphs, in float32 and with int8 weights, are exported to a temporary folder. The texts are 950 sentences and 50 articles,
in batches of 8 with very unequal lengths. `difference` is the largest difference between a vector of the graph and the
encoder's, as a share of its norm. The speed is measured in one thread. The three sides encode the same texts in turns, in
batches that are sorted by length. A ratio is the median over the rounds.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from hf_embed import Encoder, export_onnx
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.kit.plan import QUICKSTART

Encode = Callable[[list[str]], np.ndarray]
TOKENS = 1024  # padded tokens of a batch, as in `Encoder.encode` on a CPU


def read_column(path: Path) -> list[str]:
    return [line.split("\t")[1] for line in path.read_text(encoding="utf-8").splitlines()]


def through_graph(encoder: Encoder, path: Path, unequal: int | None = None) -> Encode:
    """Return a function that encodes texts with a graph in one thread.

    The batches are those of `encode`: sorted by length, of at most 1,024 padded tokens. With `unequal`, each batch has so many
    texts, in the order that is given.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def encode(texts: list[str]) -> np.ndarray:
        rows = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_length)["input_ids"]
        order = list(range(len(rows))) if unequal else sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = np.zeros((len(rows), encoder.dimension), np.float32)
        while order:
            size = unequal or max(1, TOKENS // len(rows[order[0]]))
            part, order = order[:size], order[size:]
            ids = np.zeros((len(part), max(len(rows[i]) for i in part)), np.int64)
            mask = np.zeros_like(ids)
            for line, i in enumerate(part):
                ids[line, : len(rows[i])], mask[line, : len(rows[i])] = rows[i], 1
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            vectors[part] = session.run(["sentence_embedding"], {name: inputs[name] for name in names})[0]
        return vectors

    return encode


def seconds(encode: Encode, texts: list[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def speeds(sides: dict[str, Encode], texts: list[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the texts per second of each side, and the median ratio of its speed to that of the first side."""
    for encode in sides.values():
        encode(texts[:8])
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, encode in sides.items():
            times[name].append(seconds(encode, texts))
    first = next(iter(times.values()))
    return {
        name: (len(texts) / statistics.median(taken), statistics.median(a / b for a, b in zip(first, taken)))
        for name, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "encoder"))
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--timed", type=int, default=320, help="timed sentences; a tenth as many articles are timed")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    files = (args.data / "sts" / "stsb-train.tsv", args.data / "long" / "bbc_articles.tsv")
    sentences, articles = (draw.sample(read_column(file), 950) for file in files)
    texts = sentences + articles[:50]
    draw.shuffle(texts)
    encoder = Encoder.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(encoder, Path(folder, "model"), int8=True)
        paths = {"ONNX, float32": done.path, "ONNX, int8": done.int8_path}
        report(encoder, paths, texts, STS(read_sts(str(args.data / "sts" / "stsb-dev.tsv"))))
        cases = {"sentences": sentences[: args.timed], "articles": articles[: args.timed // 10]}
        sides: dict[str, Encode] = {"PyTorch": encoder.encode}
        sides |= {name: through_graph(encoder, path) for name, path in paths.items()}
        print("\n| one thread | " + " | ".join(f"{case}, texts/s | ratio" for case in cases) + " |")
        print("|---|" + "---|" * 2 * len(cases))
        measured = [speeds(sides, case, args.rounds) for case in cases.values()]
        for name in sides:
            print(f"| {name} | " + " | ".join(f"{rows[name][0]:.1f} | {rows[name][1]:.2f}x" for rows in measured) + " |")


def score(task: STS, encode: Encode) -> float:
    return task.score(lambda texts, *_: torch.as_tensor(encode(list(texts))))["spearman"]


def report(encoder: Encoder, paths: dict[str, Path], texts: list[str], task: STS) -> None:
    """Print the sizes, the differences of the vectors, and the scores."""
    expected = encoder.encode(texts)
    norms = np.linalg.norm(expected, axis=-1)
    print("| graph | MB | difference | smallest cosine | mean cosine | Spearman x 100 |\n|---|---|---|---|---|---|")
    print(f"| PyTorch | | | | | {score(task, encoder.encode):.2f} |")
    for name, path in paths.items():
        encode, vectors = through_graph(encoder, path), through_graph(encoder, path, unequal=8)(texts)
        difference = (np.linalg.norm(vectors - expected, axis=-1) / norms).max()
        cosines = (vectors * expected).sum(-1) / norms / np.linalg.norm(vectors, axis=-1)
        row = [f"{path.stat().st_size / 1e6:.1f}", f"{difference:.1e}", f"{cosines.min():.4f}", f"{cosines.mean():.4f}"]
        print(f"| {name} | {' | '.join(row)} | {score(task, encode):.2f} |", flush=True)


if __name__ == "__main__":
    main()
