"""Measure the speed of TempScale, compare the vectors of a folded checkpoint, and measure the cost of a temperature search.

    python benchmarks/tempscale.py --model MODEL --texts articles.txt

Speeds are ratios to the original model. The models take turns within each round.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
from sentence_transformers import SentenceTransformer

from hf_embed import Encoder, Retrieval
from hf_embed.data.sources import read_texts
from hf_embed.kit.calibrate import sweep
from hf_embed.kit.models import embed_with
from hf_embed.tempscale import fold_tempscale, tempscale


def seconds(encode, texts: list[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--sample", type=int, default=256, help="number of texts in a timed encoding")
    parser.add_argument("--documents", type=int, default=5000, help="number of texts in the search; 0: no search")
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    texts = read_texts(args.texts)
    original, scaled, folded = (Encoder.from_pretrained(args.model, max_length=args.max_length) for _ in range(3))
    fold_tempscale(folded.backbone, 0.9)
    with tempfile.TemporaryDirectory() as folder, tempscale(scaled.backbone, 0.9):
        folded.save_pretrained(folder)
        sides = {"original": original, "applied": scaled, "folded": Encoder.from_pretrained(folder)}
        sample = texts[: args.sample]
        expected = scaled.encode(sample)
        for name, encoder in (("hf_embed", sides["folded"]), ("sentence-transformers", SentenceTransformer(folder))):
            apart = np.abs(encoder.encode(sample) - expected).max()
            print(f"folded, loaded by {name}: the vectors differ from those of applied by at most {apart:.1e}")
        print(f"original: the vectors differ from those of applied by {np.abs(original.encode(sample) - expected).max():.1e}\n")
        rounds = []
        for i in range(args.rounds):  # each side starts first equally often
            order = [*sides][i % 3 :] + [*sides][: i % 3]
            rounds.append({name: seconds(sides[name].encode, sample) for name in order})
        for name in ("applied", "folded"):
            ratios = sorted(times["original"] / times[name] for times in rounds)
            print(
                f"{name}: {statistics.median(ratios):.3f} times the speed of the original ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            )
    if documents := texts[: args.documents]:
        corpus = {f"d{i}": text for i, text in enumerate(documents)}
        task = Retrieval({f"q{i}": documents[i][:60] for i in range(50)}, corpus, {f"q{i}": {f"d{i}": 1} for i in range(50)})
        plain = seconds(original.encode, documents)
        start = time.perf_counter()
        result = sweep(original.backbone, embed_with(original), {"search": task}, [0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
        cost = (time.perf_counter() - start) / plain
        found = f"a search of {len(result['curve'])} temperatures over {len(documents)} documents"
        print(f"\n{found} takes as long as {cost:.2f} plain encodings of the documents")


if __name__ == "__main__":
    main()
