"""Measure what many rows cost in training: memory, tokenization, and the time of batches beside that of steps.

    python benchmarks/scale.py [--rows 200000] [--kind jsonl] [--sources 1] [--batch_sizes 64 512 4096]

The script generates pairs of short texts, and makes the trainer, its rows and its batches as any training does. The model is
the built-in encoder, on one thread. Memory is given in two kinds, both of this process (Linux only):

    private   anonymous memory (RssAnon): Python objects, numpy arrays, tensors. Each rank has its own.
    mapped    pages of files (RssFile): here mostly Arrow tables. All ranks of a machine share them, and the kernel drops them
              when memory is needed.

Both are differences to the same process after it has trained on 1,000 rows, so the libraries and the model do not count.
Seconds are those of the CPU in this process, so other work on the machine does not change them.
"""

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
FILE_ROWS = 10_000  # rows that are generated and written at once


def resident() -> dict[str, float]:
    """Return the resident memory of this process in MB, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"private": int(found["RssAnon"]) / 1024, "mapped": int(found["RssFile"]) / 1024}


class Peak(threading.Thread):
    """Read the private memory of this process every 20 ms, and keep the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.value = max(self.value, resident()["private"])

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def pairs(rows: int, least: int, most: int, seed: int) -> Iterator[dict[str, str]]:
    """Generate pairs of texts of `least` to `most` frequent words."""
    from hf_embed.kit.plan import QUICKSTART

    sentences = (QUICKSTART / "sentences.txt").read_text(encoding="utf-8").split()
    words, drawn = sorted(set(sentences[:20_000])), random.Random(seed)
    for _ in range(rows):
        yield {side: " ".join(drawn.choices(words, k=drawn.randint(least, most))) for side in ("anchor", "positive")}


def write_rows(path: Path, rows: int, args: argparse.Namespace, seed: int) -> str:
    """Write a file of generated pairs."""
    import pyarrow
    from pyarrow import parquet

    made, schema = pairs(rows, *args.words, seed), pyarrow.schema({"anchor": pyarrow.string(), "positive": pyarrow.string()})
    if args.kind == "jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    else:
        with parquet.ParquetWriter(path, schema) as writer:
            while batch := list(islice(made, FILE_ROWS)):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    return str(path)


def make_trainer(folder: Path, files: list[str], batch_size: int):
    """Make a trainer on the rows of files. Several files are several sources."""
    from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder
    from hf_embed.kit.plan import QUICKSTART

    args = ContrastiveTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=batch_size, use_cpu=True, max_length=64, report_to=[],
        gradient_caching=True, dataloader_pin_memory=False, disable_tqdm=True, max_steps=10,
    )  # fmt: skip
    rows = files[0] if len(files) == 1 else {Path(file).stem: file for file in files}
    return ContrastiveTrainer(model=Encoder.from_pretrained(QUICKSTART / "encoder"), args=args, train_dataset=rows)


def measure_step(trainer, batch: dict) -> tuple[float, float]:
    """Return the seconds of one forward and backward pass, and its private memory in MB."""
    trainer.model.train()
    before, start = resident()["private"], time.process_time()
    with Peak() as peak:
        trainer.compute_loss(trainer.model, batch).backward()
    seconds = time.process_time() - start
    trainer.model.zero_grad(set_to_none=True)
    return seconds, peak.value - before


def measure_batches(trainer, size: int, args: argparse.Namespace, steps: int) -> dict[str, float]:
    """Return the seconds of the first batch of an epoch, of a further batch, and of a step on it (the best of `steps`)."""
    from hf_embed.data.loader import batch_sampler, make_loader

    start, rows = time.process_time(), trainer.train_dataset
    batches = iter(make_loader(rows, batch_sampler(rows, trainer.args, size), trainer.data_collator, trainer.args))
    batch = next(batches)
    first, times = time.process_time() - start, []
    for _ in range(args.batches):
        start = time.process_time()
        batch = next(batches)
        times.append(time.process_time() - start)
    found = {"first": first, "batch": statistics.median(times)}
    if steps:
        seconds, memory = zip(*(measure_step(trainer, batch) for _ in range(steps)))
        found |= {"step": min(seconds), "memory": max(memory)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=1, help="use the tokenized rows so many times, for even more rows")
    parser.add_argument("--sources", type=int, default=1, help="share the rows among so many sources")
    parser.add_argument("--words", type=int, nargs=2, default=[5, 8], help="fewest and most words of a text")
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--batches", type=int, default=10, help="batches whose median time is reported")
    parser.add_argument("--largest_step", type=int, default=4096, help="train no step on a larger batch")
    args = parser.parse_args()
    if args.repeat > 1 and args.sources > 1:
        parser.error("--repeat needs a single source")
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = name
        measure(Path(name), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Measure everything with the caches in `folder`, and print it."""
    import torch
    from datasets import concatenate_datasets

    from hf_embed.data.tokenization import most_texts, truncated_share

    torch.set_num_threads(1)
    logging.getLogger("hf_embed").setLevel(logging.ERROR)
    few = make_trainer(folder, [write_rows(folder / f"few.{args.kind}", 1000, args, 1)], 64)
    measure_batches(few, 64, argparse.Namespace(batches=3), steps=1)
    start, share = time.process_time(), args.rows // args.sources
    files = [write_rows(folder / f"rows{i}.{args.kind}", share, args, 2 + i) for i in range(args.sources)]
    size, before = sum(Path(file).stat().st_size for file in files) / 2**20, resident()
    seconds = time.process_time() - start
    print(f"{args.rows:,} rows in {args.sources} {args.kind} file(s), {size:,.0f} MB, generated in {seconds:.0f} s", flush=True)
    start = time.process_time()
    with Peak() as peak:
        trainer = make_trainer(folder, files, args.batch_sizes[0])
    seconds = time.process_time() - start
    print(f"read and tokenized in {seconds:.1f} s, {seconds / args.rows * 1e6:.0f} s for a million rows", flush=True)
    show_memory("while reading and tokenizing", peak.value, before)
    start = time.process_time()
    make_trainer(folder, files, args.batch_sizes[0])
    print(f"again, from the cache: {time.process_time() - start:.1f} s", flush=True)
    with Peak() as peak:
        if args.repeat > 1:
            rows = trainer.train_dataset = concatenate_datasets([trainer.train_dataset] * args.repeat)
            print(f"{len(rows):,} rows, up to {most_texts(rows)} texts in a row, {truncated_share(rows):.0%} of them truncated")
        found = {size: measure_batches(trainer, size, args, steps=0) for size in args.batch_sizes}
    show_memory("while drawing batches", peak.value, before)
    columns = {
        "rows of a batch": 16,
        "first batch": 12,
        "a batch": 10,
        "rows/s": 9,
        "a step": 9,
        "step : batch": 13,
        "memory": 9,
    }
    print(" ".join(name.rjust(width) for name, width in columns.items()))
    times = {size: own["batch"] for size, own in found.items()}
    for size, own in found.items():
        line = f"{size:16,} {own['first']:10.2f} s {own['batch'] * 1000:7.1f} ms {size / own['batch']:9,.0f}"
        if size <= args.largest_step:
            own |= measure_batches(trainer, size, argparse.Namespace(batches=1), steps=3 if size <= 512 else 1)
            line += f" {own['step']:7.2f} s {own['step'] / times[size]:12.0f}x {own['memory']:6,.0f} MB"
        print(line, flush=True)


def show_memory(when: str, peak: float, before: dict[str, float]) -> None:
    """Print the memory beyond that before the rows were read."""
    now = resident()
    print(
        f"memory {when}: {peak - before['private']:,.0f} MB private at the peak, {now['private'] - before['private']:,.0f} MB "
        f"private afterwards, {now['mapped'] - before['mapped']:,.0f} MB mapped",
        flush=True,
    )


if __name__ == "__main__":
    main()
