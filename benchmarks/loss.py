"""Measure the memory and time of the improved contrastive loss and its gradient: tiled, untiled, and sentence-transformers.

    python benchmarks/loss.py [--pairs 4096 16384 65536] [--width 768] [--memory_limit 20]

Each trial runs in its own process: N pairs of random float32 embeddings, one loss, one backward pass. The memory is how much
the peak resident set of the process (on a GPU, its peak allocation) grows beyond the inputs. It includes the gradients of the
inputs. The loss of sentence-transformers is MultipleNegativesRankingLoss with all four directions and partition_mode "joint". A
trial that needs more than `--memory_limit` GB is reported as "does not fit".
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("tiled", "untiled", "sentence_transformers")


def trial(side: str, pairs: int, width: int, limit: float) -> dict:
    import torch

    from hf_embed import ImprovedContrastive

    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 2**30), resource.RLIM_INFINITY))
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def loss_of(embeddings):
        if side == "sentence_transformers":
            from sentence_transformers.losses import MultipleNegativesRankingLoss

            directions = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
            loss = MultipleNegativesRankingLoss(None, scale=100, directions=directions, partition_mode="joint")
            return loss.compute_loss_from_embeddings(list(embeddings.unbind(1)), None)
        ids = torch.arange(1, 2 * len(embeddings) + 1, device=device).view(-1, 2)
        return ImprovedContrastive(0.01, tile_rows=len(embeddings) if side == "untiled" else None)(embeddings, ids)

    def embeddings(n: int):
        generator = torch.Generator().manual_seed(n)
        return torch.randn(n, 2, width, generator=generator).to(device).requires_grad_()

    loss_of(embeddings(64)).backward()  # load the libraries and start the threads before the measurement
    inputs = embeddings(pairs)
    before, start = peak(), time.perf_counter()
    loss = loss_of(inputs)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    norm = inputs.grad.norm().item()
    return {"seconds": time.perf_counter() - start, "memory": peak() - before, "loss": loss.item(), "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory_limit", type=float, default=20, help="limit of a trial's address space, in GB")
    parser.add_argument("--trial", help=argparse.SUPPRESS)  # set for the process of one trial
    args = parser.parse_args()
    if args.trial:
        print("RESULT " + json.dumps(trial(args.trial, args.pairs[0], args.width, args.memory_limit)))
        return
    print(f"{'pairs':>7}  {'':22} {'GB over the inputs':>18} {'seconds':>9} {'loss':>10} {'gradient norm':>14}")
    for pairs in args.pairs:
        for side in args.sides:
            command = [sys.executable, str(Path(__file__)), "--trial", side, "--pairs", str(pairs), "--width", str(args.width)]
            done = subprocess.run([*command, "--memory_limit", str(args.memory_limit)], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if lines:
                r = json.loads(lines[0].removeprefix("RESULT "))
                row = f"{r['memory']:18.2f} {r['seconds']:9.1f} {r['loss']:10.4f} {r['norm']:14.6f}"
            elif "memory" in done.stderr.lower():
                row = f"{'does not fit':>18}"
            else:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            print(f"{pairs:7,}  {side:22} {row}", flush=True)


if __name__ == "__main__":
    main()
