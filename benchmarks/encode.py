"""Compare the speed of `encode` here and in sentence-transformers, and measure what smaller vectors cost in quality.

    python benchmarks/encode.py [--model MODEL] [--rounds 7]
    python benchmarks/encode.py --model MODEL --texts sentences.txt.gz --long articles.tsv
    python benchmarks/encode.py --model MODEL --sts stsb-dev.tsv    # size and Spearman of each precision, instead of speed

Both libraries encode the same texts with the same model, in turns in one process. Each round gives a ratio, so that a slow
moment of the machine affects both sides. On an idle machine the range of the ratios is narrow. The vectors are compared first.
The cases: `short` has sentences, `long` has texts of --long_words words or more, `mixed` has both and lengths in between,
shuffled, and `one` encodes one sentence at a time, as a search encodes its queries.
"""

import argparse
import gzip
import itertools
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from hf_embed import Encoder
from hf_embed.evaluation.sts import STS, read_named_sts
from hf_embed.kit.plan import QUICKSTART
from hf_embed.vectors import as_floats, quantize


def read_lines(path: str) -> list[str]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.strip().rpartition("\t")[2] for line in file if line.strip()]


def make_cases(sentences: list[str], articles: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the texts of each case. Without articles, long texts are made by joining sentences."""
    draw = random.Random(0)
    sentences = draw.sample(sentences, min(len(sentences), 20_000))

    def joined(words: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < 6 * words:
            parts.append(draw.choice(sentences))
        return " ".join(parts)

    long = draw.sample(articles, min(len(articles), args.count // 8)) or [
        joined(args.long_words) for _ in range(args.count // 8)
    ]
    between = [joined(draw.randint(10, args.long_words)) for _ in range(args.count // 8)]
    short = (sentences * (args.count // len(sentences) + 1))[: args.count]
    mixed = [*short[: args.count // 2], *between, *long[: args.count // 16]]
    draw.shuffle(mixed)
    return {"short": short, "long": long, "mixed": mixed, "one": short[:64]}


def time_of(encode: Callable[[str | list[str]], object], texts: str | list[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_speed(args: argparse.Namespace) -> None:
    """Print the texts per second of both sides and their ratio for each case."""
    from sentence_transformers import SentenceTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, theirs = Encoder.from_pretrained(args.model).to(device).eval(), SentenceTransformer(args.model, device=device)
    theirs.max_seq_length = ours.max_length
    sentences = read_lines(args.texts or str(QUICKSTART / "sentences.txt"))
    cases = make_cases(sentences, read_lines(args.long) if args.long else [], args)
    print(
        f"{'case':8} {'texts':>6} {'hf_embed':>10} {'sentence-t.':>12}  texts/s; ratio: median, range of {args.rounds} rounds"
    )
    for name in args.cases:
        texts = cases[name]
        calls = texts if name == "one" else [texts]  # the arguments of the calls of each side
        for call in calls:
            np.testing.assert_allclose(ours.encode(call), theirs.encode(call), atol=args.tolerance)  # this is also the warm-up
        seconds = []
        for number in range(args.rounds):
            taken = [0.0, 0.0]
            for place, call in enumerate(calls):
                for side in (0, 1) if (number + place) % 2 else (1, 0):
                    taken[side] += time_of((ours, theirs)[side].encode, call)
            seconds.append(taken)
        ratios = [b / a for a, b in seconds]
        rates = [len(texts) / statistics.median(side) for side in zip(*seconds)]
        print(
            f"{name:8} {len(texts):6} {rates[0]:10.1f} {rates[1]:12.1f}  {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def compare_precisions(args: argparse.Namespace) -> None:
    """Print the bytes of a vector and Spearman x 100 on an STS dataset, for each precision and some widths."""
    encoder, task = Encoder.from_pretrained(args.model), STS(read_named_sts(args.sts))
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    full: dict[tuple[str, ...], torch.Tensor] = {}
    print(f"{'numbers':>8} {'precision':10} {'bytes':>6} {'Spearman':>9} {'cost':>6}   {args.sts}, {args.model}")
    most = encoder.dimension
    first = None
    for width, precision in itertools.product([most, most // 2, most // 4], ["float32", "int8", "binary"]):
        kept = []

        def embed(texts: list[str], *_: str, width: int = width, precision: str = precision, kept: list = kept) -> torch.Tensor:
            key = tuple(texts)  # encode once; `encode` itself also truncates first and quantizes then
            full[key] = full[key] if key in full else torch.as_tensor(encoder.encode(texts))
            kept.append(quantize(full[key][:, :width], precision))
            return as_floats(kept[-1], precision)

        score = task.score(embed)["spearman"]
        first = score if first is None else first
        size = kept[0].shape[1] * kept[0].element_size()
        print(f"{width:8} {precision:10} {size:6} {score:9.2f} {round(first - score, 2) + 0.0:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "encoder"))
    parser.add_argument("--texts", help="file with one sentence per line, or a tsv whose last column is used; may be gzipped")
    parser.add_argument("--long", help="file of long texts, in the same formats")
    parser.add_argument("--long_words", type=int, default=300)
    parser.add_argument(
        "--count", type=int, default=512, help="number of sentences in the case short; the other cases have fewer texts"
    )
    parser.add_argument("--cases", nargs="+", default=["short", "long", "mixed", "one"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--sts", help="STS file on which to compare the precisions")
    args = parser.parse_args()
    compare_precisions(args) if args.sts else compare_speed(args)


if __name__ == "__main__":
    main()
