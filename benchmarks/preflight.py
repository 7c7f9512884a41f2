"""Measure the time and memory that a preflight needs, by the number of rows.

    python benchmarks/preflight.py                              # csv files of 250,000, 500,000 and 1,000,000 triplets
    python benchmarks/preflight.py --rows 1000000 --words 80    # longer texts

Each size runs in its own process, started as a user starts it, with its own cache, so that the time includes reading the file.
The output has the elapsed time, the CPU time and the peak memory. "mapped" is memory-mapped memory, which the system can take
back: the libraries, and the rows that `datasets` maps from its cache. "own" is the other memory of the process.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def write_rows(path: Path, rows: int, words: int) -> None:
    """Write triplets of random words. One row in a hundred repeats the row before it, one anchor in ten repeats its anchor."""
    draw = random.Random(0)
    known = [f"{first}{second}{number}" for number in range(50) for first in "bdfgklmnprst" for second in "aeiou"]
    row: list[str] = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sent0", "sent1", "hard_neg"])
        for _ in range(rows):
            if draw.random() >= 0.01 or not row:
                texts = [" ".join(draw.choices(known, k=draw.randint(words // 2, words + words // 2))) for _ in range(3)]
                row = [row[0], *texts[1:]] if row and draw.random() < 0.1 else texts
            writer.writerow(row)


def watch(process: psutil.Popen, peaks: dict[str, int]) -> None:
    """Record the peak memory of a process, in bytes, until the process ends."""
    while process.is_running():
        try:
            memory = process.memory_info()
        except psutil.Error:
            return
        own = memory.rss - memory.shared
        peaks["all"], peaks["own"] = max(peaks["all"], memory.rss), max(peaks["own"], own)
        time.sleep(0.05)


def measure(rows: int, words: int, folder: Path) -> None:
    """Make a file, run a preflight on it, and print a line."""
    file = folder / f"{rows}.csv"
    write_rows(file, rows, words)
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    start, before = time.perf_counter(), os.times()
    command = [sys.executable, str(ROOT / "recipes" / "preflight.py"), str(file)]
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = {"all": 0, "own": 0}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    if process.wait() != 0:
        raise SystemExit(f"recipes/preflight.py ended with {process.returncode}")
    watcher.join()
    seconds, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    size, own, mapped = (number / 2**20 for number in (file.stat().st_size, peaks["own"], peaks["all"] - peaks["own"]))
    print(f"{rows:10,} {size:8,.0f} {seconds:8.1f} {processor:10.1f} {own:10,.0f} {mapped:10,.0f}", flush=True)


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--words", type=int, default=12)
    args = parser.parse_args()
    print("      rows  file MB  seconds  processor s  own MB  mapped MB")
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            measure(rows, args.words, Path(folder))


if __name__ == "__main__":
    main()
