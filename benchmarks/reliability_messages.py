"""Measures how long a user waits for the error message about a wrong input, from the start of the process to its end."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reliability_runs import ROOT

SUP = "sup_simcse --train_file nli.csv --model_name_or_path model --eval_sts_file dev=dev.tsv --max_steps 4 --use_cpu"
NOW = f"{SUP} --output_dir out"
# Kinds of wrong input, and a command line with each.
WRONG = {
    "no such training file": NOW.replace("nli.csv", "missing.csv"),
    "an empty training file": NOW.replace("nli.csv", "empty.csv"),
    "a column that is not known": NOW.replace("nli.csv", "columns.csv"),
    "a column that does not exist": f"{NOW} --columns anchor=question positive=sent1",
    "a row without a text": NOW.replace("nli.csv", "holes.csv"),
    "a torn JSON line": NOW.replace("nli.csv", "torn.jsonl"),
    "a file that is not text": NOW.replace("nli.csv", "binary.csv"),
    "a broken archive": NOW.replace("nli.csv", "broken.csv.gz"),
    "an unknown flag": f"{NOW} --learning_rat 1e-4",
    "a word where a number goes": f"{NOW} --learning_rate fast",
    "a number out of range": f"{NOW} --temperature 0",
    "an unknown pooling": f"{NOW} --pooling median",
    "no such model": NOW.replace("path model", "path nowhere/model"),
    "a model without weights": NOW.replace("path model", "path no_weights"),
    "a model with half its weights": NOW.replace("path model", "path half_weights"),
    "a model with a torn config": NOW.replace("path model", "path torn_config"),
    "no such checkpoint": f"{NOW} --resume_from_checkpoint out/checkpoint-7",
    "nothing to resume": f"{NOW} --resume_from_checkpoint",
    "an output folder that is a file": f"{SUP} --output_dir nli.csv",
    "an output folder that holds files": f"{SUP} --output_dir model",
    "an output folder without write permission": f"{SUP} --output_dir /proc/hf_embed",
    "no such evaluation file": NOW.replace("dev.tsv", "missing.tsv"),
    "scores that are not numbers": NOW.replace("dev.tsv", "words.tsv"),
    "a metric that is not computed": f"{NOW} --eval_strategy steps --load_best_model_at_end --metric_for_best_model f9",
    "YAML that cannot be read": f"{NOW} --config broken.yaml",
    "YAML with an unknown key": f"{NOW} --config unknown.yaml",
    "sources without a file": "gte_pretrain --sources sources.yaml --model_name_or_path model --output_dir out --use_cpu",
    "a BEIR folder without judgements": "evaluate model --eval_retrieval_dir beir=beir",
    "nothing to score on": "evaluate model",
    "no texts to encode": "encode model empty.txt out.npy",
    "an impossible temperature": "tempscale model --temperature -1 --output_dir out",
    "no file to mine for": "mine_hard_negatives model --output_file mined.jsonl",
}  # fmt: skip


def write_wrong_files(folder: Path, data: Path) -> None:
    rows = (data / "triplets.csv").read_text(encoding="utf-8").splitlines()
    texts = {
        "nli.csv": "\n".join(rows) + "\n",
        "empty.csv": "",
        "empty.txt": "",
        "columns.csv": "left,right\na cat,a dog\n",
        "holes.csv": "sent0,sent1\na cat,a dog\nrain,\n" + "snow,ice\n" * 20,
        "torn.jsonl": '{"anchor": "a cat", "positive": "a dog"}\n{"anchor": "ra',
        "words.tsv": "score\tsentence1\tsentence2\nhigh\ta cat\ta dog\n",
        "broken.yaml": "learning_rate: [1e-4\npooling: {",
        "unknown.yaml": "learning_rat: 1.0e-4\n",
        "sources.yaml": "- {name: first, file: missing.jsonl}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(data / "dev.tsv", folder / "dev.tsv")
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 40)
    (folder / "broken.csv.gz").write_bytes(b"\x1f\x8b\x08\x00" + b"\x01" * 200)
    for name in ("model", "no_weights", "half_weights", "torn_config"):
        shutil.copytree(data / "model", folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    os.truncate(folder / "half_weights" / "model.safetensors", 500_000)
    os.truncate(folder / "torn_config" / "config.json", 100)
    (folder / "beir").mkdir()
    for name, key in (("corpus", "d"), ("queries", "q")):
        lines = [json.dumps({"_id": f"{key}{i}", "title": "", "text": f"text {i}"}) for i in range(5)]
        (folder / "beir" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def messages(folder: Path, names: list[str]) -> bool:
    """Start a recipe with each wrong input. Print how long it took, and whether it ended with a one-line error."""
    done = subprocess.run(
        [sys.executable, "-c", f"from reliability_runs import write_data, Path; write_data(Path({str(folder / 'data')!r}))"],
        cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    (folder / "wrong").mkdir()
    write_wrong_files(folder / "wrong", folder / "data")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf_home")}
    times, failures = {}, []
    for number, (what, words) in enumerate(WRONG.items(), 1):
        if names and what not in names:
            continue
        recipe, *flags = words.split()
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *flags]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder / "wrong", env=environment, capture_output=True, text=True, timeout=300)
        times[what] = time.perf_counter() - started
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        fine = done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
        shown = errors[0] if errors else (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
        line = f"{what}: {times[what]:.1f} s, exit {done.returncode}: {shown[:240]}"
        print(f"[{number}/{len(WRONG)}] {line}", flush=True)
        failures += [] if fine else [line]
        shutil.rmtree(folder / "wrong" / "out", ignore_errors=True)
    slowest = max(times, key=lambda what: times[what])
    mean = statistics.mean(times.values())
    print(f"\nmessages: {len(times)} kinds of wrong input, {len(times) - len(failures)} ended in one line and exit 2; "
          f"mean {mean:.1f} s, longest {times[slowest]:.1f} s ({slowest})")  # fmt: skip
    print("".join(f"FAILED {line}\n" for line in failures), end="")
    return not failures and mean <= 5
