"""Measure what smaller vectors cost in quality: the bytes of a vector and Spearman x 100 on an STS dataset.

    python benchmarks/small_vectors.py --model MODEL --sts stsb-dev.tsv

The table has a line for each precision (float32, int8, binary) of all numbers of a vector, of the first half, and of the first
quarter.
"""

import argparse
import itertools

import torch

from hf_embed import Encoder
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.kit.plan import QUICKSTART
from hf_embed.vectors import as_floats, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "encoder"))
    parser.add_argument("--sts", required=True, help="STS file on which to compare the precisions")
    args = parser.parse_args()
    encoder, task = Encoder.from_pretrained(args.model), STS(read_sts(args.sts))
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


if __name__ == "__main__":
    main()
