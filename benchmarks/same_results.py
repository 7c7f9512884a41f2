"""Check that two versions of the code write the same files, by fixed short runs of the recipes in both.

    python benchmarks/same_results.py --against CHECKOUT

A refactoring must not change a result. Weights, tokenizers, configurations and the files of sentence-transformers must be equal
byte for byte. Numbers in JSON files may differ by --tolerance; times and versions are not compared. The card must have the same
text.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (
    "--max_steps 6 --per_device_train_batch_size 8 --learning_rate 3e-4 --warmup_steps 2 --logging_steps 2 "
    "--max_length 48 --use_cpu --disable_tqdm true --report_to none --eval_sts_file dev=DATA/dev.tsv"
)
SAVE = "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 3 --load_best_model_at_end"
# The output folder of each run, and its recipe and flags. A run may read the folder of an earlier run.
RUNS = {
    "sup": "sup_simcse --train_file DATA/triplets.csv --pooling cls_mlp --hard_negative_weight 0.3",
    "unsup": "unsup_simcse --train_file DATA/sentences.txt --pooling cls_mlp_train",
    "resumed": "unsup_simcse --train_file DATA/sentences.txt --pooling cls_mlp_train "
    "--resume_from_checkpoint unsup/checkpoint-3",
    "mlm": "unsup_simcse --train_file DATA/sentences.txt --pooling cls --mlm_weight 0.1",
    "lora": "sup_simcse --train_file DATA/triplets.csv --pooling mean --lora_r 4 --save_adapter",
    "layers": "sup_simcse --train_file DATA/triplets.csv --pooling first_last --normalize true --gradient_accumulation_steps 2",
    "gte": "gte_pretrain --train_file DATA/pairs.jsonl --gradient_caching --chunk_tokens 256 --learn_temperature "
    "--matryoshka_dims 192 64",
    "seeds": "unsup_simcse --train_file DATA/sentences.txt --pooling mean --seeds 1,2 --positive crop:0.1",
    "scaled": "sup_simcse --train_file DATA/triplets.csv --pooling mean --temp_scale 0.9",
}
VOLATILE = re.compile(r"seconds|versions|hardware|target_modules|\w*_runtime|\w*_per_second")  # target_modules is a set
VOLATILE_LINES = re.compile(r"(?m)^\| Training time \|.*$|<!-- hf_embed made this card: .* -->")
LEFT_OUT = ("events.out.tfevents", "training_args.bin", ".pt", ".pth")  # they contain times, or pickled names of modules


def write_data(folder: Path) -> None:
    quickstart = ROOT / "hf_embed" / "quickstart"
    with open(quickstart / "triplets.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))[:121]
    with open(folder / "triplets.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    for name, wanted, lines in (("sentences.txt", "sentences.txt", 120), ("sts.tsv", "dev.tsv", 61)):
        text = (quickstart / name).read_text(encoding="utf-8").splitlines()[:lines]
        (folder / wanted).write_text("\n".join(text) + "\n", encoding="utf-8")
    pairs = [{"query": row[0], "positive": row[1], "negatives": [row[2]]} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def run_all(checkout: Path, data: Path, out: Path) -> None:
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, words in RUNS.items():
        seed = "" if "--seeds" in words else "--seed 1"
        recipe, *flags = [word.replace("DATA", str(data)) for word in f"{words} {TRAIN} {seed}".split()]
        flags += SAVE.split() if recipe.endswith("simcse") and name != "mlm" else []
        command = [sys.executable, str(checkout / "recipes" / f"{recipe}.py"), *flags, "--output_dir", name]
        done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{checkout}: {name} failed\n{done.stderr[-2000:]}")


def differences(old: object, new: object, where: str) -> list[tuple[str, float]]:
    """Return (place, distance) of each difference. The distance is infinite unless both values are numbers."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if not VOLATILE.fullmatch(key)]
        return [found for key in keys for found in differences(old.get(key), new.get(key), f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [found for i, pair in enumerate(zip(old, new)) for found in differences(*pair, f"{where}[{i}]")]
    if old == new:
        return []
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return [(where, abs(old - new) if numbers else float("inf"))]


def compare(old: Path, new: Path, name: str) -> list[tuple[str, float]]:
    before, after = (folder / name for folder in (old, new))
    if not before.is_file() or not after.is_file():
        return [(f"{name} is in only one of the two", float("inf"))]
    if before.read_bytes() == after.read_bytes():
        return []
    if name.endswith(".json"):
        return differences(*(json.loads(path.read_text(encoding="utf-8")) for path in (before, after)), name)
    texts = [path.read_bytes() for path in (before, after)]
    if name.endswith(".md"):
        texts = [VOLATILE_LINES.sub("", text.decode()).encode() for text in texts]
    return [] if texts[0] == texts[1] else [(name, float("inf"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="CHECKOUT", help="another version of this repository")
    parser.add_argument("--tolerance", type=float, default=1e-7, help="allowed difference of numbers in JSON files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, old, new = (Path(folder, name) for name in ("data", "old", "new"))
        data.mkdir()
        write_data(data)
        run_all(Path(args.against).resolve(), data, old)
        run_all(ROOT, data, new)
        names = {str(path.relative_to(side)) for side in (old, new) for path in side.rglob("*") if path.is_file()}
        names = sorted(name for name in names if not any(part in name for part in LEFT_OUT))
        found = [entry for name in names for entry in compare(old, new, name)]
    far = [(where, distance) for where, distance in found if not distance <= args.tolerance]
    largest = max((distance for _, distance in found), default=0.0)
    print(f"{len(RUNS)} runs, {len(names)} files: {len(found)} numbers differ, by {largest:.1e} at most")
    print("\n".join(f"DIFFERENT {where}: {distance:g}" for where, distance in far))
    raise SystemExit(bool(far))


if __name__ == "__main__":
    main()
