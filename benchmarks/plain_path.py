"""Compare the fast path of training on a CPU with the plain path: do they end in models of the same quality?

    python benchmarks/plain_path.py --nli nli_triplets.csv --eval_sts_file stsb-dev.tsv
    python benchmarks/plain_path.py --sentences sentences.txt [--same_dropout_mask] --eval_sts_file stsb-dev.tsv

The fast path is the default: chunks without padding, and dropout masks of 16 random bits. The plain path pads its chunks, and
uses the attention of transformers ("eager") and the dropout of PyTorch. Both train SimCSE from the same model on the same
batches: supervised on triplets, or unsupervised on sentences, where two masks are all that there is to learn from.

The masks of dropout differ, so the two paths cannot be equal. Their difference is compared with that of seeds, which changes
the masks and the batches.
"""

import argparse
import csv
import statistics
import tempfile
from itertools import combinations
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE
from hf_embed.evaluation.sts import read_sts
from hf_embed.kit.plan import QUICKSTART

PATHS = {"fast": "sdpa", "plain": "eager"}  # and their attention


def read_triplets(path: Path) -> Dataset:
    """Read a csv file with a header and the columns anchor, positive and negative, whatever their names."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row[:3] for row in csv.reader(file)][1:]
    return Dataset.from_list([dict(zip(("anchor", "positive", "negative"), row)) for row in rows])


def train(path: str, seed: int, args: argparse.Namespace, rows: Dataset) -> dict[str, object]:
    """Train once. Return the mean loss of the last tenth of the steps, the score, and all weights as a vector."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContrastiveTrainer(
            model=AutoModel.from_pretrained(args.model, attn_implementation=PATHS[path]),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            args=ContrastiveTrainingArguments(
                folder,
                per_device_train_batch_size=64,
                max_steps=args.steps,
                learning_rate=args.learning_rate,
                seed=seed,
                max_length=64,
                logging_steps=1,
                pooling="cls_mlp_train" if args.sentences else None,
                same_dropout_mask=args.same_dropout_mask,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            objective=SimCSE(temperature=0.05),
            train_dataset=rows,
            eval_dataset={"sts": read_sts(str(args.eval_sts_file))},
        )
        packed = trainer.encoder.numbering is not None
        if packed != (path == "fast"):
            raise SystemExit(f"the {path} path {'packs' if packed else 'does not pack'} this model; compare another model")
        trainer.fast_dropout = path == "fast"
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        score = trainer.evaluate()["eval_sts_spearman"]
    weights = torch.cat([p.detach().flatten() for p in trainer.encoder.parameters()])
    return {"loss": statistics.mean(losses[-len(losses) // 10 :]), "score": score, "weights": weights}


def distance(one: Tensor, other: Tensor, start: Tensor) -> float:
    """Return how far apart two models have ended, divided by how far the first one has moved from the start."""
    return float((one - other).norm() / (one - start).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "encoder"))
    parser.add_argument("--nli", type=Path, default=QUICKSTART / "triplets.csv")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--same_dropout_mask", action="store_true")
    parser.add_argument("--eval_sts_file", type=Path, default=QUICKSTART / "sts.tsv")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if args.sentences:
        rows = Dataset.from_dict({"text": args.sentences.read_text(encoding="utf-8").splitlines()})
    else:
        rows = read_triplets(args.nli)
    runs = {(path, seed): train(path, seed, args, rows) for seed in args.seeds for path in PATHS}
    print("mean (smallest to largest; standard deviation) of the seeds\n")
    print("| path | loss at the end | Spearman x 100 |\n|---|---|---|")
    for path in PATHS:
        cells = []
        for key, form in (("loss", ".4f"), ("score", ".2f")):
            values = [runs[path, seed][key] for seed in args.seeds]
            low, high = format(min(values), form), format(max(values), form)
            cells.append(f"{statistics.mean(values):{form}} ({low} to {high}; {statistics.stdev(values):{form}})")
        print(f"| {path} | {' | '.join(cells)} |")
    start = torch.cat([p.detach().flatten() for p in AutoModel.from_pretrained(args.model).parameters()])
    same = [(("fast", seed), ("plain", seed)) for seed in args.seeds]
    seeds = [((path, one), (path, other)) for path in PATHS for one, other in combinations(args.seeds, 2)]
    for name, pairs in (("the two paths with the same seed", same), ("two seeds on the same path", seeds)):
        values = [distance(runs[one]["weights"], runs[other]["weights"], start) for one, other in pairs]
        print(f"distance of the weights of {name}: {min(values):.2f} to {max(values):.2f} times the distance trained")


if __name__ == "__main__":
    main()
