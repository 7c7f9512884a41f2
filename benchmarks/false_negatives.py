"""Compare ways to treat false negatives on captions, of which five describe one image.

    python benchmarks/false_negatives.py --captions DATA/pairs/flickr8k_caption_groups.jsonl --teacher TEACHER \
        --sts stsb=DATA/sts/stsb-dev.tsv --output_dir outputs/false_negatives

The training rows are pairs of two captions of one image, four for each of `--images` images. In a batch, other captions of an
image are false negatives of its pairs. The model is the built-in encoder. The scores are on captions of other images (find the
captions of the same image, nDCG@10) and on STS. Finished runs are not run again.
"""

import argparse
import json
import statistics
from pathlib import Path

from recipe import QUIETLY, run_recipe, write_jsonl

from hf_embed.kit.plan import QUICKSTART

HELD_OUT = 1000  # images for the evaluation
GTE = ["--directions", "query_to_doc", "--temperature", 0.05]


def methods(teacher: str) -> dict[str, tuple[str, str, list]]:
    """Return the recipe, the training file and the flags of each way."""
    known = ["--teacher", teacher]
    return {
        "no mask": ("sup_simcse.py", "pairs", ["--no_mask_other_positives"]),
        "identity (default)": ("sup_simcse.py", "pairs", []),
        "margin -0.1": ("gte_finetune.py", "pairs", [*GTE, "--margin", -0.1]),
        "guide": ("sup_simcse.py", "pairs", ["--guide_margin", 0, *known]),
        "KL over the batch": ("distill.py", "pairs", ["--objective", "TeacherKL", "--candidates", "batch", *known]),
        "all captions of an image are known": ("sup_simcse.py", "lists", []),
    }


def write_data(captions: Path, images: int, folder: Path) -> None:
    """Write the training rows, once as pairs and once with all other captions as positives, and a retrieval set."""
    groups = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    groups = [group for group in groups if len(set(group)) == 5]
    training, held_out = groups[:images], groups[-HELD_OUT:]
    pairs = [(group, k) for group in training for k in range(4)]
    write_jsonl(folder / "pairs.jsonl", [{"anchor": group[k], "positive": group[k + 1]} for group, k in pairs])
    lists = [{"query": group[k], "pos": [group[k + 1], *group[:k], *group[k + 2 :]]} for group, k in pairs]
    write_jsonl(folder / "lists.jsonl", lists)
    write_jsonl(folder / "captions" / "queries.jsonl", [{"_id": f"q{i}", "text": group[0]} for i, group in enumerate(held_out)])
    documents = [(f"d{i}-{k}", group[k]) for i, group in enumerate(held_out) for k in range(1, 5)]
    write_jsonl(folder / "captions" / "corpus.jsonl", [{"_id": name, "text": text} for name, text in documents])
    judged = [f"q{i}\td{i}-{k}\t1" for i in range(len(held_out)) for k in range(1, 5)]
    qrels = folder / "captions" / "qrels" / "test.tsv"
    qrels.parent.mkdir(parents=True, exist_ok=True)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--sts", nargs="+", default=[], help="NAME=FILE")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-4)
    args = parser.parse_args()
    data = args.output_dir / "data"
    write_data(args.captions, args.images, data)
    names = [given.partition("=")[0] for given in args.sts]
    print(f"| | captions, nDCG@10 | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for place, (method, (recipe, rows, flags)) in enumerate(methods(args.teacher).items()):
        runs = [
            run_recipe(
                recipe, args.output_dir / f"{method.replace(' ', '_')}-{seed}", "--model_name_or_path", QUICKSTART / "encoder",
                "--train_file", data / f"{rows}.jsonl", "--eval_retrieval_dir", f"captions={data / 'captions'}",
                "--eval_sts_file", *args.sts, *QUIETLY, "--per_device_train_batch_size", args.batch,
                "--max_steps", 4 * args.images * args.epochs // args.batch, "--learning_rate", args.rate,
                "--warmup_steps", 0.1, "--max_length", 48, "--seed", seed, *flags,
            )
            for seed in args.seeds
        ]  # fmt: skip
        if place == 0:
            print_row("before", [runs[0]["before"]], names)
        print_row(method, [run["after"] for run in runs], names)


def print_row(name: str, scores: list[dict], names: list[str]) -> None:
    """Print the mean, the smallest and the largest score of the seeds for each evaluation set."""
    columns = [[each["retrieval"]["captions"]["ndcg@10"] for each in scores]]
    columns += [[each["sts"][sts] for each in scores] for sts in names]
    cells = (f"{statistics.mean(c):.2f} ({min(c):.2f} to {max(c):.2f})" if len(c) > 1 else f"{c[0]:.2f}" for c in columns)
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
