"""Compare GTE's improved contrastive loss with the vanilla loss at batches of 64 to 4,096 pairs: from which size does it help?

    python benchmarks/batch_sizes.py --data DATA --output_dir outputs/batch_sizes

DATA has `pairs/`, `nli/`, `sts/` and `retrieval/` as docs/results.md describes them. The built-in encoder is trained on the
same number of pairs in each setting, with gradient caching in batches of more than 256 pairs. The pairs come from the five
sources with at least 8,000 pairs, and each batch has one source.

The learning rate of each batch size is the one of `--rates` with the best average score for the vanilla loss, at the first of
`--temperatures` and the first seed. Both losses, all temperatures and all seeds use this rate. The scores are on STS and
retrieval sets of other sources. The output is a table and OUTPUT_DIR/batch_sizes.png. Finished runs are not run again. `--jobs`
runs are trained at a time, each with one thread.
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from recipe import QUIETLY, run_recipe, write_jsonl
from sources import read_pairs

from hf_embed.kit.plan import QUICKSTART

LOSSES = {"vanilla": ["--directions", "query_to_doc"], "improved": []}
COLORS = {"vanilla": "#0072b2", "improved": "#d55e00"}
STS = {"stsb": "stsb-dev", "sick": "sickr-dev"}
RETRIEVAL = ("cranfield", "medline")


def write_sources(data: Path, folder: Path) -> Path:
    """Write the sources of at least 8,000 pairs, without hard negatives. Return the path of the YAML file that lists them."""
    sources = {
        name: [
            {"query": row["query"], "positive": row["positive"]}
            for row in rows
            if row["query"].strip() and row["positive"].strip()
        ]
        for name, rows in read_pairs(data).items()
        if len(rows) >= 8000
    }  # fmt: skip
    for name, rows in sources.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump([{"name": name, "file": f"{name}.jsonl"} for name in sources]))
    return path


class Runs:
    """Runs of recipes/gte_pretrain.py, one for each setting. `further` are flags for all of them."""

    def __init__(self, args: argparse.Namespace, further: list[str]):
        self.args, self.further = args, further
        self.sources = write_sources(args.data, args.output_dir / "sources")
        self.evaluation = [w for name, file in STS.items() for w in ("--eval_sts_file", f"{name}={args.data}/sts/{file}.tsv")]
        self.evaluation += [w for name in RETRIEVAL for w in ("--eval_retrieval_dir", f"{name}={args.data}/retrieval/{name}")]

    def scores(self, batch: int, loss: str, temperature: float, rate: float, seed: int, when: str = "after") -> list[float]:
        """Train with one setting. Return the score on each evaluation set, and the average of these scores."""
        results = run_recipe(
            "gte_pretrain.py", self.args.output_dir / f"{loss}_{batch}_t{temperature}_lr{rate}_seed{seed}",
            "--model_name_or_path", QUICKSTART / "encoder", "--sources", self.sources, *LOSSES[loss], *self.evaluation,
            *QUIETLY, *(["--gradient_caching"] if batch > 256 else []),
            "--per_device_train_batch_size", batch, "--max_steps", self.args.pairs // batch,
            "--temperature", temperature, "--learning_rate", rate, "--seed", seed, "--warmup_steps", 0.1, "--max_length", 64,
            "--dropout", 0, *self.further,
        )[when]  # fmt: skip
        each = [results["sts"][name] for name in STS] + [results["retrieval"][name]["ndcg@10"] for name in RETRIEVAL]
        return [*each, statistics.mean(each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--pairs", type=int, default=32_768, help="number of pairs that each run trains on")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    args, further = parser.parse_known_args()  # other flags are passed to the recipe
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = Runs(args, further)

    with ThreadPoolExecutor(args.jobs) as pool:
        first = ("vanilla", args.temperatures[0])
        tuning = {(b, r): pool.submit(runs.scores, b, *first, r, args.seeds[0]) for b in args.batches for r in args.rates}
        print("| batch | " + " | ".join(f"vanilla, learning rate {rate}" for rate in args.rates) + " |")
        best = {}
        for batch in args.batches:
            found = [tuning[batch, rate].result()[-1] for rate in args.rates]
            best[batch] = args.rates[found.index(max(found))]
            print(f"| {batch:,} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True)
        settings = [(b, loss, t) for b in args.batches for t in args.temperatures for loss in LOSSES]
        done = {s: [pool.submit(runs.scores, *s, best[s[0]], seed) for seed in args.seeds] for s in settings}
        print(f"\n| batch | learning rate | temperature | loss | {' | '.join([*STS, *RETRIEVAL, 'average'])} |")
        before = runs.scores(args.batches[0], *first, best[args.batches[0]], args.seeds[0], "before")
        print("| before | | | | " + " | ".join(f"{value:.2f}" for value in before) + " |")
        averages = {}
        for (batch, loss, t), futures in done.items():
            columns = list(zip(*(future.result() for future in futures)))
            averages[batch, loss, t] = columns[-1]
            cells = (f"{statistics.mean(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns)
            print(f"| {batch:,} | {best[batch]} | {t} | {loss} | " + " | ".join(cells) + " |", flush=True)
    draw(averages, before[-1], args)


def draw(averages: dict[tuple, tuple[float, ...]], before: float, args: argparse.Namespace) -> None:
    """Draw the average score against the batch size: a line for each loss and temperature, with the range over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for t, style in zip(args.temperatures, ("-", "--", ":")):
        for loss, color in COLORS.items():
            values = [averages[batch, loss, t] for batch in args.batches]
            axes.plot(
                args.batches,
                [statistics.mean(v) for v in values],
                style,
                color=color,
                marker="o",
                label=f"{loss}, temperature {t}",
            )
            axes.fill_between(args.batches, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
    axes.axhline(before, color="#999999", linewidth=1, label="before training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(args.batches, [f"{batch:,}" for batch in args.batches])
    axes.set(xlabel="pairs in a batch", ylabel="average score x 100")
    axes.legend(frameon=False)
    figure.savefig(args.output_dir / "batch_sizes.png", dpi=150)


if __name__ == "__main__":
    main()
