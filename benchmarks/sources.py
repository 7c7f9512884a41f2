"""Measure, on sources of very different sizes, the effect of alpha and of batches from a single source.

    python benchmarks/sources.py --data DATA --output_dir outputs/sources

DATA has the folders `pairs/`, `nli/`, `sts/` and `retrieval/`, as docs/results.md describes them. There are seven sources of
1,040 to 28,999 pairs. The built-in encoder trains for the same number of steps with each setting and seed. The settings are
alpha 0, 0.5 and 1 with one source per batch, then alpha 0.5 and 1 with every row of a batch drawn independently ("mixed"). The
scores are on STS and retrieval datasets from other sources.
"""

import argparse
import csv
import json
import random
import statistics
from pathlib import Path

import yaml
from recipe import QUIETLY, run_recipe, write_jsonl

from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.kit.plan import QUICKSTART

TRAINING = {"per_device_train_batch_size": 128, "max_steps": 300, "learning_rate": 5e-4, "warmup_steps": 0.1, "max_length": 64,
            "dropout": 0, "temperature": 0.05}  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def read_pairs(data: Path) -> dict[str, list[dict]]:
    """Return the rows {"query", "positive"[, "negatives"]} of each source."""
    captions = {
        name: [json.loads(line) for line in lines(data / "pairs" / f"{file}_groups.jsonl")]
        for name, file in (("multi30k", "multi30k_caption"), ("flickr8k", "flickr8k_caption"), ("turk", "turkcorpus"))
    }
    sources = {name: [{"query": g[0], "positive": g[1]} for g in groups if len(g) > 1] for name, groups in captions.items()}
    quora = [line.split("\t") for line in lines(data / "pairs" / "quora_dup_subset.tsv")]
    wikiqa = [line.split("\t") for line in lines(data / "pairs" / "wikiqa-train.tsv")]
    with open(data / "nli" / "nli_triplets.csv", encoding="utf-8", newline="") as file:
        nli = list(csv.DictReader(file))
    squad = read_retrieval(str(data / "retrieval" / "squad11_dev"))
    return sources | {
        "quora": [{"query": row[1], "positive": row[2]} for row in quora],
        "wikiqa": [{"query": row[1], "positive": row[2]} for row in wikiqa if row[0] == "1"],
        "nli": [{"query": r["sent0"], "positive": r["sent1"], "negatives": [r["hard_neg"]]} for r in nli],
        "squad": [{"query": squad.queries[q], "positive": squad.corpus[d]} for q, found in squad.qrels.items() for d in found],
    }


def mix(sources: dict[str, list[dict]], alpha: float, count: int, seed: int) -> list[dict]:
    """Draw `count` rows, each from a source chosen with p_i ~ n_i^alpha. An exhausted source is reshuffled and reused."""
    rng = random.Random(seed)
    names, left, rows = list(sources), {name: [] for name in sources}, []
    for name in rng.choices(names, [len(sources[name]) ** alpha for name in names], k=count):
        if not left[name]:
            left[name] = rng.sample(sources[name], len(sources[name]))
        rows.append(left[name].pop())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, training = parser.parse_known_args()  # other flags go to the recipe

    sources = {name: [row for row in rows if all(map(str.strip, (row["query"], row["positive"])))]
               for name, rows in read_pairs(args.data).items()}  # fmt: skip
    folder = args.output_dir / "sources"
    for name, rows in sources.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "sources.yaml").write_text(yaml.safe_dump([{"name": name, "file": f"{name}.jsonl"} for name in sources]))
    print(", ".join(f"{name} {len(rows):,}" for name, rows in sorted(sources.items(), key=lambda item: len(item[1]))))

    common = [word for key, value in TRAINING.items() for word in (f"--{key}", value)]
    common += ["--model_name_or_path", QUICKSTART / "encoder", *QUIETLY]
    for name, path in {"stsb": "stsb-dev", "sick": "sickr-dev"}.items():
        common += ["--eval_sts_file", f"{name}={args.data}/sts/{path}.tsv"]
    for name in ("cranfield", "medline"):
        common += ["--eval_retrieval_dir", f"{name}={args.data}/retrieval/{name}"]
    columns = ["stsb", "sick", "cranfield", "medline"]
    print(f"{'':28}" + "".join(f"  {name:>18}" for name in [*columns, "average"]))

    def scores(part: dict) -> list[float]:
        each = [part["sts"].get(name) or part["retrieval"][name]["ndcg@10"] for name in columns]
        return [*each, statistics.mean(each)]

    settings = [("one source a batch", alpha) for alpha in (0, 0.5, 1)] + [("mixed batches", alpha) for alpha in (0.5, 1)]
    shown_before = False
    for kind, alpha in settings:
        after = []
        for seed in args.seeds:
            output = args.output_dir / f"{kind.split()[0]}_{alpha}_{seed}"
            if kind == "mixed batches":
                count = TRAINING["max_steps"] * TRAINING["per_device_train_batch_size"]
                write_jsonl(output.with_suffix(".jsonl"), mix(sources, alpha, count, seed))
                data = ["--train_file", output.with_suffix(".jsonl")]
            else:
                data = ["--sources", folder / "sources.yaml", "--source_alpha", alpha]
            results = run_recipe("gte_pretrain.py", output, *common, *data, "--seed", seed, *training)
            if not shown_before:
                print(f"{'before':28}" + "".join(f"  {value:18.2f}" for value in scores(results["before"])))
                shown_before = True
            after.append(scores(results["after"]))
        row = (f"{statistics.mean(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in zip(*after))
        print(f"{f'{kind}, alpha {alpha}':28}" + "".join(f"  {cell:>18}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
