"""Compare training throughput and peak memory here and in sentence-transformers, on the same rows and the same model.

    python benchmarks/train.py --model MODEL --nli nli_triplets.csv --sts stsb-train.tsv [--cases nli128] [--rounds 3]
    python benchmarks/train.py --model MODEL --nli nli_triplets.csv --against EARLIER    # a checkout of an earlier version

Each trial runs in its own process: a real trainer (ContrastiveTrainer, or SentenceTransformerTrainer with
MultipleNegativesRankingLoss), triplets from the same rows, dropout on, the default optimizer. The trials alternate, so that a
slow moment of the machine affects both sides. The throughput is that of the timed steps. The memory is the peak resident set of
the process (on a GPU, its peak allocation). The triplets: `nli` has premise, entailment and contradiction; `sts` has sentence1,
sentence2 and the sentence2 of the next row; `text` has three lines of a text file, whose lengths vary most.
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {"nli128": ("nli", 128), "nli32": ("nli", 32), "sts128": ("sts", 128), "text128": ("text", 128)}
WARM_UP = 2


def read_triplets(path: str, kind: str, count: int) -> list[dict]:
    """Read `count` triplets of a file, in an order that depends only on `count`."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        if kind == "nli":
            rows = [row[:3] for row in csv.reader(file)][1:]
        elif kind == "text":
            lines = [line.strip() for line in itertools.islice(file, 3 * count)]
            rows = [lines[i : i + 3] for i in range(0, len(lines), 3)]
        else:
            pairs = [line.rstrip("\n").split("\t")[1:3] for line in file]
            rows = [[a, b, pairs[(i + 1) % len(pairs)][1]] for i, (a, b) in enumerate(pairs)]
    random.Random(count).shuffle(rows)
    return [dict(zip(("anchor", "positive", "negative"), row)) for row in rows[:count]]


def trial(args: argparse.Namespace) -> dict:
    """Train `WARM_UP + steps` steps with the library args.side. Return triplets per second and peak memory in GB."""
    import torch
    from datasets import Dataset
    from transformers import AutoModel, AutoTokenizer, TrainerCallback

    kind, max_length = CASES[args.case]
    rows = Dataset.from_list(read_triplets(getattr(args, kind), kind, args.batch_size * (WARM_UP + args.steps)))
    cpu = not torch.cuda.is_available()

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, *_, **__):
            if not cpu:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": args.batch_size,
                  "learning_rate": 2e-5, "bf16": args.bf16, "report_to": [], "save_strategy": "no", "use_cpu": cpu,
                  "disable_tqdm": True, "logging_strategy": "no", "seed": 1}  # fmt: skip
        if args.side == "hf_embed":
            from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE

            trainer = ContrastiveTrainer(
                model=AutoModel.from_pretrained(args.model, dtype=torch.float32),
                processing_class=AutoTokenizer.from_pretrained(args.model),
                args=ContrastiveTrainingArguments(
                    **common, pooling="mean", max_length=max_length, gradient_caching=args.gradient_caching,
                    chunk_tokens=args.chunk_tokens,
                ),
                objective=SimCSE(temperature=0.05), train_dataset=rows, callbacks=[Clock()],
            )  # fmt: skip
        else:
            from sentence_transformers import (
                SentenceTransformer,
                SentenceTransformerTrainer,
                SentenceTransformerTrainingArguments,
            )
            from sentence_transformers.losses import MultipleNegativesRankingLoss

            model = SentenceTransformer(args.model, device="cpu" if cpu else "cuda")
            model.max_seq_length = max_length
            trainer = SentenceTransformerTrainer(
                model=model, args=SentenceTransformerTrainingArguments(**common), train_dataset=rows,
                loss=MultipleNegativesRankingLoss(model, scale=20), callbacks=[Clock()],
            )  # fmt: skip
        trainer.train()
    seconds = Clock.times[-1] - Clock.times[WARM_UP - 1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if cpu else torch.cuda.max_memory_allocated() / 2**30
    return {"rate": args.batch_size * args.steps / seconds, "memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--nli", help="csv file with sent0, sent1 and hard_neg")
    parser.add_argument("--sts", help="tsv file with score, sentence1 and sentence2")
    parser.add_argument("--text", help="plain text with one sentence per line; may be gzipped")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient_caching", action="store_true")
    parser.add_argument("--chunk_tokens", type=int)
    parser.add_argument("--against", metavar="CHECKOUT", help="compare with the hf_embed in this folder instead")
    parser.add_argument("--only", choices=["hf_embed", "sentence_transformers"], help="skip the other side")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # set for the process of one trial
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("RESULT " + json.dumps(trial(args)))
        return

    sides = [args.only] if args.only else ["hf_embed", "earlier" if args.against else "sentence_transformers"]
    print(f"{'case':18} {'side':22} {'triplets/s':>10} {'peak GB':>8}   ratio (median of {args.rounds} rounds)")
    for case in args.cases:
        for precision in args.precisions:
            results = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--case", case]
                    command += ["--side", "hf_embed" if side == "earlier" else side]
                    command += ["--bf16"] if precision == "bfloat16" else []
                    version = args.against if side == "earlier" else str(Path(__file__).parents[1])
                    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": version})
                    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if not lines:
                        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
                    results[side].append(json.loads(lines[0].removeprefix("RESULT ")))
            ratios = ""
            if len(sides) == 2:
                ours, theirs = (results[side] for side in sides)
                rate = statistics.median(a["rate"] / b["rate"] for a, b in zip(ours, theirs))
                memory = statistics.median(a["memory"] / b["memory"] for a, b in zip(ours, theirs))
                ratios = f"{rate:.2f}x the speed, {memory:.2f}x the memory"
            for side in sides:
                rate = statistics.median(r["rate"] for r in results[side])
                memory = statistics.median(r["memory"] for r in results[side])
                print(f"{case + ' ' + precision:18} {side:22} {rate:10.1f} {memory:8.2f}   {ratios}", flush=True)
                ratios = ""


if __name__ == "__main__":
    main()
