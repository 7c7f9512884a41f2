"""Compute what a step of GTE costs on R GPUs: bytes over the network, memory, and time. Nothing is measured.

    python benchmarks/scaling.py [--gpus 8 64] [--rate 150] [--network 320]

docs/scaling.md explains the formulas and the assumptions, which are the flags. The defaults are BERT-base and H100 GPUs.
"""

import argparse
from dataclasses import dataclass

LAYERS, WIDTH = 12, 768  # BERT-base
PARAMETERS, IN_LAYERS = 110e6, 85e6  # all parameters, and those in the matrices of the layers
PER_NODE = 8  # GPUs
CHUNK_TOKENS = 16_384  # the default of --chunk_tokens on a GPU
ACTIVATIONS = 34 * WIDTH * LAYERS  # bytes that the layers keep for the backward pass, per token
PASSES = 100  # bytes that the loss reads and writes for a similarity


@dataclass
class Step:
    """The cost of a step of N rows on R GPUs."""

    gpus: int
    flags: argparse.Namespace

    @property
    def tokens(self) -> float:
        """Tokens of one rank."""
        return self.flags.texts * self.flags.pairs * self.flags.tokens / self.gpus

    @property
    def embeddings(self) -> float:
        """Bytes of the embeddings of all ranks in float32: S."""
        return self.flags.texts * self.flags.pairs * WIDTH * 4

    def sent(self) -> dict[str, float]:
        """Return the bytes that each rank sends with the ring algorithm, by collective."""
        ring = (self.gpus - 1) / self.gpus
        return {
            "gather of the embeddings": ring * self.embeddings,
            "sum of their gradients": ring * self.embeddings,
            "gradients of the weights (DDP)": 2 * ring * 4 * PARAMETERS,
        }

    def memory(self) -> dict[str, float]:
        """Return the bytes of memory on each GPU, by use."""
        return {
            "weights, gradients, AdamW": 16 * PARAMETERS,
            "activations of a chunk": ACTIVATIONS * min(CHUNK_TOKENS, self.tokens),
            "embeddings of all texts": 5 * self.embeddings,
            "tile of the loss": 1.5 * 2**26 * 4,
        }

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step, by part."""
        flags = self.flags
        forward = 2 * IN_LAYERS + 4 * LAYERS * flags.tokens * WIDTH  # operations per token
        bandwidth = flags.node if self.gpus <= PER_NODE else min(flags.node, flags.network)
        similarities = 2 * flags.texts * flags.pairs**2 / self.gpus
        return {
            "model": 4 * forward * self.tokens / (flags.rate * 1e12),
            "loss": 6 * WIDTH * similarities / (flags.loss_rate * 1e12) + PASSES * similarities / 2e12,
            "network": sum(self.sent().values()) / (bandwidth * 1e9),
        }


def rows_of(flags: argparse.Namespace) -> list[list[str]]:
    """Return the table, row by row."""
    steps = [Step(gpus, flags) for gpus in flags.gpus]
    base = Step(PER_NODE, flags)
    least = PER_NODE * sum(base.seconds().values())
    table = [["", *(f"{step.gpus} GPUs" for step in steps)]]
    table.append(["rows, tokens of a GPU", *(f"{flags.pairs / step.gpus:,.0f}, {step.tokens:,.0f}" for step in steps)])
    for name in base.sent():
        table.append([f"sent: {name}", *(f"{step.sent()[name] / 1e6:,.0f} MB" for step in steps)])
    table.append(["sent, together", *(f"{sum(step.sent().values()) / 1e6:,.0f} MB" for step in steps)])
    for name in base.memory():
        table.append([f"memory: {name}", *(f"{step.memory()[name] / 1e9:.1f} GB" for step in steps)])
    table.append(["memory, together", *(f"{sum(step.memory().values()) / 1e9:.1f} GB" for step in steps)])
    table.append(["activations without caching", *(f"{step.tokens * ACTIVATIONS / 1e9:.1f} GB" for step in steps)])
    for name in base.seconds():
        table.append([f"time: {name}", *(f"{step.seconds()[name] * 1000:,.0f} ms" for step in steps)])
    times = [sum(step.seconds().values()) for step in steps]
    table.append(["time of a step", *(f"{time * 1000:,.0f} ms" for time in times)])
    table.append(["50,000 steps", *(f"{time * 50_000 / 3600:.1f} h" for time in times)])
    table.append(["speed per GPU, of that on 8", *(f"{least / (step.gpus * time):.0%}" for step, time in zip(steps, times))])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 128, 512])
    parser.add_argument("--pairs", type=int, default=16_384, help="rows of a batch")
    parser.add_argument("--texts", type=int, default=2, help="texts of a row: more than 2 with hard negatives")
    parser.add_argument("--tokens", type=float, default=60, help="mean tokens of a text")
    parser.add_argument("--rate", type=float, default=150, help="TFLOP/s of a GPU in the model, in bfloat16")
    parser.add_argument("--loss_rate", type=float, default=30, help="TFLOP/s of a GPU in the loss, in float32")
    parser.add_argument("--node", type=float, default=300, help="GB/s from GPU to GPU of one node")
    parser.add_argument("--network", type=float, default=320, help="GB/s out of a node, over all its network cards")
    table = rows_of(parser.parse_args())
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    for row in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


if __name__ == "__main__":
    main()
