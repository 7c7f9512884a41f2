"""Runs recipes for the quality benchmarks. Each run happens once, and its results are kept."""

import json
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"
QUIETLY = ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--overwrite_output_dir"]


def run_recipe(name: str, output: Path, *flags) -> dict:
    """Run `recipes/NAME FLAGS --output_dir OUTPUT` unless it has run already, and return the content of its results.json."""
    results = output / "results.json"
    if not results.is_file():
        command = [sys.executable, RECIPES / name, *flags, "--output_dir", output]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return json.loads(results.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
