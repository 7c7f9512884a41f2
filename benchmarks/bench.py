"""Measure the speed and the memory of this package beside sentence-transformers: one command, one table.

    make bench                                                                  # all cases, with the built-in model and texts
    make bench QUICK=1                                                          # a few cases, in about five minutes
    make bench ARGS="--model MODEL --nli nli_triplets.csv --sts stsb-train.tsv --text sentences.txt.gz --long articles.tsv"
    python benchmarks/bench.py --cases sup128 encode-mixed --against CHECKOUT   # beside an earlier version of this package
    python benchmarks/bench.py --cases sup128 --set steps=20 chunk_tokens=4096  # with other settings

Each trial runs in its own process (benchmarks/bench_trials.py). The two sides of a pair follow each other and take turns in
being first, so that a slow moment of the machine affects both. A ratio is the median over the pairs. In training, the rate of
large matrix products is measured before each pair. The share of this rate counts only tokens that are not padding, and counts
the forward pass once, even if gradient caching repeats it.

The results are written to OUTPUT_DIR/bench.json, bench.md and bench.png after each case. A case that bench.json already has,
with the same settings, files, code, versions and machine, is not measured again. The exit status is 1 if a case fails.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = ROOT / "hf_embed" / "quickstart"
PRECISIONS = ("float32", "bfloat16")
OWN, PEER, EARLIER = "hf_embed", "sentence_transformers", "earlier version"
UNITS = {"train": "rows/s", "collate": "rows/s", "encode": "texts/s", "evaluate": "documents/s"}  # other kinds: seconds
MACHINE = {"kind": "machine", "size": 2048}  # the trial that measures the matrix rate, and the size of its matrices on a CPU
NO_MEMORY = re.compile(r"out of memory|allocate memory|MemoryError", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """What is measured. `--set` changes every field that is a number."""

    about: str
    kind: str = "train"  # a trial of bench_trials.py
    rows: str = "nli"  # nli (triplets), text (triplets of lines), sts (single sentences); to encode: short, long, mixed, one
    max_length: int = 128  # largest number of tokens of a text
    batch: int = 64
    warm_up: int = 2  # steps before the measurement
    steps: int = 6  # measured steps
    model: str = "given"  # the one of --model, or: built-in, bert-base (with random weights)
    gte: int = 0  # 1: the improved contrastive loss of GTE, 0: SimCSE
    caching: int = 0  # 1: gradient caching
    dropout: int = 1  # 1: the dropout of the model, 0: none
    chunk_tokens: int | None = None  # of this package; None: its default
    count: int = 0  # number of texts to encode, rows to collate, documents, or pairs of a loss
    width: int = 768  # of the vectors of a loss
    beside: str = PEER  # the other side
    most_pairs: int = 99  # for a case that takes very long

    @property
    def precisions(self) -> tuple[str, ...]:
        return PRECISIONS if self.kind in ("train", "encode") else PRECISIONS[:1]


LOSS = {"kind": "loss", "about": "the improved contrastive loss and its gradient; the memory is that above the inputs"}
CASES = {
    "sup128": Case("supervised SimCSE, triplets"),
    "sup32": Case("supervised SimCSE, at most 32 tokens", max_length=32),
    "unsup128": Case("unsupervised SimCSE, single sentences", rows="sts"),
    "unsup32": Case("unsupervised SimCSE, at most 32 tokens", rows="sts", max_length=32),
    "gte128": Case("GTE's improved contrastive loss, one hard negative", gte=1),
    "plain128": Case("supervised SimCSE without dropout", dropout=0),
    "text128": Case("supervised SimCSE, texts of unequal lengths", rows="text", warm_up=1, steps=4),
    "batch512": Case("supervised SimCSE, 512 rows, at most 32 tokens", max_length=32, batch=512, warm_up=1, steps=2),
    "batch4096": Case(
        "supervised SimCSE, 4,096 rows a step with gradient caching, the built-in model, one step without a warm-up",
        batch=4096, warm_up=0, steps=1, caching=1, model="built-in",
    ),
    "bert-base": Case(
        "supervised SimCSE, the size of BERT-base with random weights", batch=32, warm_up=1, steps=2, model="bert-base",
    ),
    "loss-4096": Case(**LOSS, count=4096),
    "loss-16384": Case(**LOSS, count=16384),
    "loss-65536": Case(**LOSS, count=65536, most_pairs=1),
    "encode-short": Case("sentences", "encode", "short", 512, count=512),
    "encode-long": Case("long texts", "encode", "long", 256, count=512),
    "encode-mixed": Case("short, long and middle texts, shuffled", "encode", "mixed", 256, count=512),
    "encode-one": Case("one sentence at a time", "encode", "one", 512, count=64),
    "collate": Case("tokenization and collation without the model", "collate", steps=4, count=4096),
    "evaluate": Case(
        "scoring a retrieval set with the built-in model; at 0.91x it takes 1.1 times as long as the encoding", "evaluate",
        model="built-in", count=100_000, beside="encoding alone",
    ),
    "startup": Case("from the imports to the end of the first step", "startup", batch=8, warm_up=0, steps=1, model="built-in"),
}  # fmt: skip
QUICK = {"sup128": {}, "loss-4096": {}, "encode-mixed": {"count": 256}, "evaluate": {"count": 3000}, "startup": {}}


# ---- trials ----


class TrialError(Exception):
    """A trial failed for a reason other than missing memory."""


def run_trial(settings: dict[str, Any], checkout: str) -> dict[str, Any]:
    """Run one trial in a new process with the code of `checkout`, and return its result. {} means: not enough memory."""
    command = [sys.executable, str(Path(__file__).with_name("bench_trials.py")), json.dumps(settings)]
    offline = {"HF_HUB_OFFLINE": "1"} if Path(settings.get("path", "")).is_dir() else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline | {"PYTHONPATH": checkout})
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    if done.returncode == -9 or NO_MEMORY.search(done.stderr):
        return {}
    raise TrialError(f"{settings['kind']}, {settings.get('side')}:\n{done.stderr[-2000:]}")


def measure(case: Case, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the results of each pair: {side: result of the trial}, and in training also {"machine": its matrix rates}."""
    models = {"given": args.model, "built-in": str(BUILT_IN / "encoder"), "bert-base": str(args.output_dir / "bert-base")}
    settings = dataclasses.asdict(case) | {"precision": precision, "path": models[case.model], "files": files(args)}
    if case.model == "bert-base" and not (args.output_dir / "bert-base").is_dir():
        run_trial({"kind": "bert-base", "path": models["bert-base"], "tokenizer": models["built-in"]}, str(ROOT))
    sides = [OWN, EARLIER if args.against else case.beside]
    if case.kind == "encode" and PEER in sides:
        settings["batch"] = run_trial(settings | {"kind": "tune", "side": PEER}, str(ROOT)).get("batch", 32)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < min(args.pairs, case.most_pairs):
        pair = {"machine": run_trial(MACHINE, str(ROOT))} if case.kind == "train" else {}
        for side in sides[:: (-1) ** len(pairs)]:
            pair[side] = run_trial(settings | {"side": side}, args.against if side == EARLIER else str(ROOT))
            if "machine" in pair and pair[side]:
                pair[side]["share"] = pair[side]["flops"] / pair[side]["seconds"] / 1e9 / pair["machine"]["rates"][precision]
        compare(*(pair[side] for side in sides))
        pairs.append(pair)
    return pairs


def compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise TrialError if two sides computed different numbers: then their speeds cannot be compared."""
    for a, b in zip(one.get("same", []), other.get("same", [])):
        if not math.isclose(a, b, rel_tol=1e-3):
            raise TrialError(f"the two sides computed different results: {one['same']} and {other['same']}")


def files(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the files of the texts: the given ones, or the built-in ones. Some cases make their texts of `sentences`."""
    built_in = {name: str(BUILT_IN / file) for name, file in (("nli", "triplets.csv"), ("sts", "graded.tsv"))}
    given = {name: getattr(args, name) for name in ("nli", "sts", "text", "long") if getattr(args, name)}
    return {"text": None, "long": None, "sentences": str(BUILT_IN / "sentences.txt")} | built_in | given


def fixed_settings(args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Return everything except the case that decides whether two measurements are comparable."""

    def code_of(folder: Path) -> str:
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("hf_embed/**/*.py"), *Path(__file__).parent.glob("bench*.py")]):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]

    packages = ("torch", "transformers", "sentence-transformers")
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else []
    return {
        "model": args.model, "files": files(args), "code": code_of(ROOT),
        "against": code_of(Path(args.against)) if args.against else None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": f"{names[0] if names else platform.machine()}, device {machine['device']}, {machine['threads']} threads",
    }  # fmt: skip


# ---- the table ----


def median(pairs: list[dict[str, Any]], side: str, key: str) -> float | None:
    """Return the median of a number in the results of one side, or None if no result has it."""
    values = [pair[side][key] for pair in pairs if key in pair[side]]
    return statistics.median(values) if values else None


def ratios(pairs: list[dict[str, Any]], key: str, sides: tuple[str, str]) -> list[float]:
    """Return for each pair the number of the first side, divided by that of the second side."""
    found = [(pair[sides[0]].get(key), pair[sides[1]].get(key)) for pair in pairs]
    return [a / b for a, b in found if a and b]


def row_of(entry: dict[str, Any]) -> list[str]:
    """Return the cells of one case, in the order of COLUMNS."""
    pairs, unit, (own, other) = entry["pairs"], UNITS.get(entry["case"]["kind"]), entry["sides"]

    def both(key: str, form: str) -> str:
        values = [median(pairs, side, key) for side in (own, other)]
        return " : ".join("-" if value is None else format(value, form) for value in values)

    def speed(side: str) -> str:
        seconds, amount = median(pairs, side, "seconds"), median(pairs, side, "amount")
        if seconds is None or amount is None:
            return "not enough memory"
        return f"{amount / seconds:,.1f} {unit}" if unit else f"{seconds:.2f} s"

    faster = ratios(pairs, "seconds", (other, own))
    times = [f"; {statistics.median(values):.2f}x" if (values := ratios(pairs, key, (own, other))) else "" for key in MEMORY]
    further = {
        name: statistics.median(pair[own]["further"][name] for pair in pairs) for name in pairs[0][own].get("further", {})
    }
    return [
        f"{entry['name']}, {entry['precision']}", f"{speed(own)} : {speed(other)}",
        f"**{statistics.median(faster):.2f}x** ({min(faster):.2f} to {max(faster):.2f})" if faster else "-", str(len(pairs)),
        *(both(key, ".2f") + ratio for key, ratio in zip(MEMORY, times)), both("share", ".0%").replace("- : -", ""),
        "; ".join(f"{name} {value:.5g}" for name, value in further.items()),
    ]  # fmt: skip


MEMORY = ("peak", "above")
COLUMNS = ("case", "speed", "times as fast, median (range)", "pairs", "peak memory, GB", "above the imports, GB",
           "share of the matrix rate", "further figures")  # fmt: skip


def report(entries: list[dict[str, Any]], fixed: dict[str, Any], command: str) -> str:
    """Return the page bench.md."""
    versions = ", ".join(f"{name} {version}" for name, version in fixed["versions"].items())
    rates = {p: [pair["machine"]["rates"][p] for e in entries for pair in e["pairs"] if "machine" in pair] for p in PRECISIONS}
    measured = [f"{statistics.median(values):,.0f} GFLOP/s in {p}" for p, values in rates.items() if values]
    others = " or ".join(dict.fromkeys(entry["sides"][1] for entry in entries))
    lines = [
        f"    {command}", "", f"{fixed['machine']}; {versions}; Python {platform.python_version()}; code {fixed['code']}.",
        f"Matrix rate: {', '.join(measured)}." if measured else "", f"Cells with two figures: {OWN} : {others}.", "",
        f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *(f"| {' | '.join(row_of(e))} |" for e in entries), "",
        *dict.fromkeys(f"- `{e['name']}`: {e['case']['about']}" for e in entries),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of speed and of peak memory as horizontal bars."""
    from matplotlib.figure import Figure

    names = [f"{entry['name']}, {entry['precision']}" for entry in entries]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(entries)), layout="constrained")
    figure.suptitle(f"{OWN} : {' or '.join(dict.fromkeys(entry['sides'][1] for entry in entries))}")
    panels = (("seconds", "times as fast (more is better)"), ("peak", "times the peak memory (less is better)"))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels):
        for place, entry in enumerate(entries):
            sides = entry["sides"][::-1] if key == "seconds" else entry["sides"]
            values = ratios(entry["pairs"], key, tuple(sides))
            if values:
                bar = axes.barh(place, statistics.median(values), color="tab:blue" if key == "seconds" else "tab:orange")
                axes.bar_label(bar, fmt="%.2f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(x=0.15, y=0.01)
        axes.set_title(title)
        axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


# ---- the command ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUILT_IN / "encoder"), help="default: the built-in model")
    parser.add_argument("--nli", help="csv file with sent0, sent1 and hard_neg")
    parser.add_argument("--sts", help="tsv file with score, sentence1 and sentence2")
    parser.add_argument("--text", help="texts of unequal lengths, one a line, or the last column of a tsv; may be gzipped")
    parser.add_argument("--long", help="long texts, in the same formats")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=f"default: all. {', '.join(CASES)}")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--pairs", type=int, help="trials of each side; default: 5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, smaller, and two pairs")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=NUMBER", help="change fields of `Case` in every case")
    parser.add_argument("--against", metavar="CHECKOUT", help="compare with the hf_embed in this folder instead")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "bench")
    args = parser.parse_args(argv)
    numbers = {field.name for field in dataclasses.fields(Case) if "int" in str(field.type)}
    changes = dict(change.partition("=")[::2] for change in args.set)
    for name, value in changes.items():
        if name not in numbers or not value.isdigit():
            parser.error(f"--set {name}={value}: give a whole number for one of {', '.join(sorted(numbers))}")
    if args.against and not Path(args.against, "hf_embed").is_dir():
        parser.error(f"--against {args.against}: there is no folder hf_embed in it")
    args.changes = {name: int(value) for name, value in changes.items()}
    args.pairs = args.pairs or (2 if args.quick else 5)
    return args


def chosen(args: argparse.Namespace) -> list[tuple[str, str, Case]]:
    """Return the name, precision and settings of each case to measure."""
    found = []
    for name in args.cases or (QUICK if args.quick else CASES):
        case = dataclasses.replace(CASES[name], **((QUICK.get(name, {}) if args.quick else {}) | args.changes))
        found += [(name, precision, case) for precision in case.precisions if precision in args.precisions]
    return found


def main(argv: list[str] | None = None) -> int:
    args, failed = parse(argv), 0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    store = args.output_dir / "bench.json"
    stored = json.loads(store.read_text()) if store.is_file() else []
    fixed = fixed_settings(args, run_trial(MACHINE, str(ROOT)))
    command = shlex.join(["python", "benchmarks/bench.py", *(sys.argv[1:] if argv is None else argv)])
    for name, precision, case in chosen(args):
        sides = [OWN, EARLIER if args.against else case.beside]
        entry = {"name": name, "precision": precision, "case": json.loads(json.dumps(dataclasses.asdict(case))), "sides": sides,
                 "fixed": fixed}  # fmt: skip
        if not any(entry.items() <= old.items() and len(old["pairs"]) >= min(args.pairs, case.most_pairs) for old in stored):
            try:
                pairs = measure(case, precision, args)
            except TrialError as error:
                print(f"{name}, {precision} failed: {error}", file=sys.stderr)
                failed = 1
                continue
            stored = [old for old in stored if not entry.items() <= old.items()] + [entry | {"pairs": pairs}]
            aside = store.with_suffix(".tmp")  # so that an interruption never leaves half of the file
            aside.write_text(json.dumps(stored, indent=1))
            aside.replace(store)
        comparable = [old for old in stored if old["fixed"] == fixed]
        comparable.sort(key=lambda old: (list(CASES).index(old["name"]), PRECISIONS.index(old["precision"])))
        print(" | ".join(row_of(next(old for old in comparable if entry.items() <= old.items()))), flush=True)
        (args.output_dir / "bench.md").write_text(report(comparable, fixed, command), encoding="utf-8")
        draw(comparable, args.output_dir / "bench.png")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
