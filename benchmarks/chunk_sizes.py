"""Compare training with different sizes of a chunk (`--chunk_tokens`): how long do the passes of one batch take?

    python benchmarks/chunk_sizes.py --nli nli_triplets.csv --text lines.txt.gz

A batch has 64 triplets, or 192 lines of a text file, of at most 128 tokens. It is encoded with every size, in random order,
with dropout and with the backward pass of the sum of all embeddings. The table has the time with each size, divided by that
with the default of 2,048 tokens: the median over the batches.
"""

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path

import torch
from bench_trials import read_lines
from plain_path import read_triplets

from hf_embed import Encoder
from hf_embed.forward.dropout import use_fast_dropout
from hf_embed.kit.plan import QUICKSTART

SIZES = [256, 512, 1024, 2048, 4096, 8192]
BATCH = 192  # texts


def seconds(encoder: Encoder, ids: torch.Tensor, lengths: list[int], size: int, precision: str) -> float:
    """Return the time of a forward and a backward pass."""
    encoder.zero_grad()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        embeddings = encoder(ids, lengths, chunk_tokens=size)["embeddings"]
    embeddings.float().sum().backward()
    return time.perf_counter() - start


def ratios(encoder: Encoder, texts: list[str], precision: str) -> list[float]:
    """Return the median ratio of each of `SIZES`, over the batches of these texts."""
    draw, found = random.Random(0), []
    for batch in zip(*[iter(texts)] * BATCH):
        tokens = encoder.tokenizer(list(batch), truncation=True, max_length=128)["input_ids"]
        ids, lengths = torch.tensor([token for text in tokens for token in text]), [len(text) for text in tokens]
        times = {size: seconds(encoder, ids, lengths, size, precision) for size in draw.sample(SIZES, len(SIZES))}
        found.append([times[size] / times[2048] for size in SIZES])
    return [statistics.median(column) for column in zip(*found[1:])]  # the first batch warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "encoder"))
    parser.add_argument("--nli", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    encoder = Encoder.from_pretrained(args.model).float().train()
    use_fast_dropout(encoder.backbone)
    count = (args.batches + 1) * BATCH
    triplets = read_triplets(args.nli).select(range(count // 3))
    texts = {
        "NLI triplets": [row[name] for row in triplets for name in ("anchor", "positive", "negative")],
        "lines of a text file": read_lines(args.text, count),
    }
    print("| | " + " | ".join(f"{size:,}" for size in SIZES) + " |\n" + "|---" * (len(SIZES) + 1) + "|")
    for (name, some), precision in itertools.product(texts.items(), ("float32", "bfloat16")):
        print(f"| {name}, {precision} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios(encoder, some, precision)) + " |")


if __name__ == "__main__":
    main()
