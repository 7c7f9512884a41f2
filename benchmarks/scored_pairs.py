"""Compare recipes/scored_pairs.py with the CoSENTLoss of sentence-transformers: STS scores and training time, by seed.

    python benchmarks/scored_pairs.py --model hf_embed/quickstart/encoder --train stsb-train.tsv --dev stsb-dev.tsv \
        --output_dir outputs/scored

Both train the same model with the same settings (batch, learning rate, schedule, one seed) on the same pairs, one after the
other. The time is that of the training alone, without start-up and evaluation. Finished runs are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from recipe import QUIETLY, run_recipe

from hf_embed.evaluation.sts import read_sts


def train_peer(args: argparse.Namespace, seed: int, output: Path) -> None:
    """Train with sentence-transformers, and write its score and its time to OUTPUT/results.json."""
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CoSENTLoss

    model = SentenceTransformer(str(args.model), device="cpu")
    model.max_seq_length = args.max_length
    settings = SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=args.batch, num_train_epochs=args.epochs, learning_rate=args.rate, seed=seed,
        warmup_steps=0.1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=read_sts(str(args.train)), loss=CoSENTLoss(model))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    dev = read_sts(str(args.dev))
    first, second = (model.encode(dev[side][:], normalize_embeddings=True) for side in ("sentence1", "sentence2"))
    score = 100 * spearmanr((first * second).sum(1), dev["score"][:]).statistic
    (output / "results.json").write_text(json.dumps({"score": score, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--peer", type=int, help="run only the peer, with this seed")
    args = parser.parse_args()
    if args.peer is not None:
        train_peer(args, args.peer, args.output_dir / f"peer-{args.peer}")
        return
    scores: dict[str, list[float]] = {"before": [], "this project": [], "sentence-transformers": []}
    seconds: dict[str, list[float]] = {"this project": [], "sentence-transformers": []}
    for seed in args.seeds:
        own = run_recipe(
            "scored_pairs.py", args.output_dir / f"own-{seed}", "--model_name_or_path", args.model, "--train_file", args.train,
            "--eval_sts_file", f"dev={args.dev}", *QUIETLY, "--per_device_train_batch_size", args.batch, "--num_train_epochs",
            args.epochs, "--learning_rate", args.rate, "--warmup_steps", 0.1, "--max_length", args.max_length, "--seed", seed,
        )  # fmt: skip
        found = args.output_dir / f"peer-{seed}" / "results.json"
        if not found.is_file():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peer", str(seed)], check=True, capture_output=True)
        peer = json.loads(found.read_text())
        scores["before"].append(own["before"]["sts"]["dev"])
        scores["this project"].append(own["after"]["sts"]["dev"])
        scores["sentence-transformers"].append(peer["score"])
        seconds["this project"].append(own["train"]["seconds"])
        seconds["sentence-transformers"].append(peer["seconds"])
    print("| | STS dev, mean (smallest to largest) | seconds of training, median |\n|---|---|---|")
    for name, values in scores.items():
        time_taken = f"{statistics.median(seconds[name]):.0f}" if name in seconds else ""
        print(f"| {name} | {statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}) | {time_taken} |")
    ratios = [peer / own for own, peer in zip(*seconds.values())]
    print(f"\nratio of the times, median of {len(ratios)} pairs: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
