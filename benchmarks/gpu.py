"""Check and measure on a GPU everything that a CPU cannot show, with one command of about 8 minutes.

    python benchmarks/gpu.py --output_dir outputs/gpu
    python benchmarks/gpu.py --output_dir outputs/gpu --parts forward exact      # only some parts
    python benchmarks/gpu.py --output_dir outputs/gpu --device cpu --tiny        # the same code on a CPU, in about a minute

The command needs no network: the models have random weights, and the texts are random words. The parts:

    forward      training, encoding and a float64 reference on the CPU give the same vectors: every pooling, precision and
                 attention backend: eager, sdpa, and flash_attention_2 if flash_attn is installed (benchmarks/flash_of_torch.py
                 writes a package that can stand in for it)
    exact        gradient caching equals the plain chunks, and a resumed run equals an uninterrupted one, bit for bit; attention
                 within texts drops the same weights in both passes; gradients equal a float64 reference on the CPU
    tempscale    TempScale, applied and folded, equals attention whose scores are divided: every backend
    loss         tiles do not change the improved contrastive loss; its memory and time for 65,536 pairs
    matrix       the rate of matrix products in bfloat16, TF32 and float32
    step         the ten slowest kernels of a training step, the places where the host waits for the GPU, and a save while the
                 memory of the GPU is full
    throughput   training beside sentence-transformers (if it is installed): models of the shapes of MiniLM and BERT-base, 512
                 rows a step, short and long texts; the share of the matrix rate that tokens other than padding reach
    encoding     the time of `encode` beside sentence-transformers, in bfloat16
    attention    the time of each kernel that attends within texts, for texts of 16 to 256 tokens
    settings     the time of a step with other chunks, with gradient caching, padded texts, and other kernels

The results are written to OUTPUT_DIR/gpu.json and gpu.md, again after every task, so that an interrupted run leaves what it
has measured. Each line is PASS, FAIL, skipped (with the reason), or measured (a figure without a limit). The exit status is 1
if a check fails, and 2 if a package is missing or has the wrong version, or there is no GPU.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gpu_bench  # the first import that is not of Python itself: it checks that the packages are there
import gpu_step
import torch
from gpu_bench import FLASH, LENGTHS, Bench, Result, Tasks, judged, make_model, make_rows, make_trainer, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, TrainerCallback

from hf_embed import ContrastiveTrainer, Encoder, ImprovedContrastive, TempScaleConfig, apply_tempscale, fold_tempscale
from hf_embed.pooling import POOLINGS

# ---- 1. training, encoding and the reference compute the same vectors ----

# The vector of a single text without padding, from the outputs of the model.
POOLED: dict[str, Callable[[Any], Tensor]] = {
    "cls": lambda out: out.last_hidden_state[:, 0],
    "cls_mlp": lambda out: out.pooler_output,
    "cls_mlp_train": lambda out: out.last_hidden_state[:, 0],
    "mean": lambda out: out.last_hidden_state.mean(1),
    "last": lambda out: out.last_hidden_state[:, -1],
    "weighted_mean": lambda out: weighted(out.last_hidden_state),
    "first_last": lambda out: (out.hidden_states[1].mean(1) + out.hidden_states[-1].mean(1)) / 2,
    "top2": lambda out: (out.hidden_states[-2].mean(1) + out.hidden_states[-1].mean(1)) / 2,
}
# Largest relative distance from the reference. `encode` returns float32, also for float64 weights.
DISTANCES = {"float64": {"train": 1e-9, "encode": 1e-6}, "float32": {"train": 1e-4, "encode": 1e-4}}
LEAST_COSINE = 0.999  # between a vector in bfloat16 and its reference


def weighted(states: Tensor) -> Tensor:
    """Return the mean of hidden states (1, n, D) in which the i-th token has the weight i."""
    weights = torch.arange(1, states.shape[1] + 1, dtype=states.dtype)
    return (states * weights.view(1, -1, 1)).sum(1) / weights.sum()


def reference_outputs(model: PreTrainedModel, texts: list[str]) -> list[Any]:
    """Return the outputs of the model for each text alone, on the CPU in float64, with the plain attention of transformers."""
    plain = copy.deepcopy(model).cpu().double().eval()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        return [plain(**tokenizer()(text, return_tensors="pt"), output_hidden_states=True) for text in texts]


def distance(vectors: Tensor, reference: Tensor) -> float:
    """Return the largest distance of a vector from its reference, relative to the length of the reference. Both are (N, D)."""
    vectors, reference = vectors.detach().double().cpu(), reference.detach().double()
    return ((vectors - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()


def cosine(vectors: Tensor, reference: Tensor) -> float:
    """Return the smallest cosine between a vector and its reference, both (N, D)."""
    return F.cosine_similarity(vectors.detach().double().cpu(), reference.detach().double(), dim=-1).min().item()


def closest_texts(reference: Tensor) -> float:
    """Return the largest cosine between two of the vectors (N, D). If it were near 1, a wrong vector would pass the check."""
    similar = F.cosine_similarity(reference.unsqueeze(1), reference.unsqueeze(0), dim=-1)
    return similar.masked_fill(torch.eye(len(reference), dtype=torch.bool), -1).max().item()


def train_and_encode(bench: Bench, trainer: ContrastiveTrainer, texts: list[str], precision: str) -> dict[str, Tensor]:
    """Return the vectors (N, D) of the texts as training computes them, and as `encode` computes them."""
    step = trainer.step.train()
    lists = tokenizer()(texts)["input_ids"]
    flat = torch.tensor([token for ids in lists for token in ids], device=step.encoder.device)
    half = precision == "bfloat16"
    with torch.autocast(bench.device, torch.bfloat16, enabled=half):
        trained = step(flat, [len(ids) for ids in lists], chunk_tokens=256)["embeddings"]
    encoder = copy.deepcopy(step.encoder).bfloat16() if half else step.encoder
    return {"train": trained, "encode": encoder.encode(texts, convert_to_tensor=True)}


def compare_poolings(bench: Bench, backend: str, precision: str) -> list[Result]:
    """Compare training and encoding with the reference, for every pooling."""
    rows = make_rows(6, LENGTHS["NLI-like"])
    texts = [text for row in rows for text in row.values()]
    start = make_model(bench.sizes.checked, backend, dropout=0.0)
    start = start.double() if precision == "float64" else start
    outputs = reference_outputs(start, texts)
    worst: dict[str, dict[str, float]] = {"train": {}, "encode": {}}
    for pooling in POOLINGS:
        reference = torch.cat([POOLED[pooling](out) for out in outputs])
        trainer = make_trainer(bench, copy.deepcopy(start), rows, pooling=pooling, bf16=precision == "bfloat16")
        for way, vectors in train_and_encode(bench, trainer, texts, precision).items():
            head = copy.deepcopy(trainer.step.train_head) if way == "train" else None
            expected = head.cpu().double()(reference) if head is not None else reference
            worst[way][pooling] = (cosine if precision == "bfloat16" else distance)(vectors, expected)
    control = max(closest_texts(torch.cat([POOLED[pooling](out) for out in outputs])) for pooling in POOLINGS)
    return [judge_poolings(backend, precision, way, values, control) for way, values in worst.items()]


def judge_poolings(backend: str, precision: str, way: str, values: dict[str, float], control: float) -> Result:
    """Compare the worst value of any pooling with its limit. `control` is the result of `closest_texts`."""
    if precision == "bfloat16":
        worst, limit = min(values, key=values.__getitem__), f"cosine with the float64 reference >= {LEAST_COSINE}"
        passed = all(value >= LEAST_COSINE for value in values.values())  # False if one of them is NaN
    else:
        worst, largest = max(values, key=values.__getitem__), DISTANCES[precision][way]
        limit = f"relative distance from the float64 reference <= {largest:g}"
        passed = all(value <= largest for value in values.values())
    figures = {"worst pooling": worst, "value": values[worst], "largest cosine of two texts": control, "all": values}
    return judged("forward", f"{way} = reference, {backend}, {precision}", passed and control < LEAST_COSINE, figures, limit)


def forward_checks(bench: Bench) -> Tasks:
    """Check for every pooling, backend and precision that training and encoding equal a float64 reference on the CPU."""
    tasks: Tasks = {}
    for backend in bench.backends:
        for precision in ("bfloat16",) if backend == FLASH else ("float64", "float32", "bfloat16"):
            tasks[f"train = encode = reference, {backend}, {precision}"] = partial(compare_poolings, bench, backend, precision)
    return tasks | bench.left_out("forward", f"train = encode = reference, {FLASH}")


# ---- 2. gradient caching and resuming, bit for bit ----


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Choose deterministic kernels inside a `with` block. Without them, two equal runs on a GPU may differ in the last bit.

    With `warn_only=True`, attention would still take its kernels that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # for the package flash_attn; transformers reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        del os.environ["FLASH_ATTENTION_DETERMINISTIC"]


class KeepGradients(TrainerCallback):
    """A callback that copies the gradients of each step before the optimizer uses them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Copy the gradients."""
        self.gradients = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(bench: Bench, backend: str, caching: bool, seed: int = 1) -> dict[str, Tensor]:
    """Return the gradients of one bfloat16 step with dropout, whose texts are encoded in several chunks."""
    rows, keep = make_rows(bench.sizes.batch, LENGTHS["NLI-like"]), KeepGradients()
    settings = {"per_device_train_batch_size": len(rows), "chunk_tokens": 8 * len(rows), "gradient_caching": caching,
                "max_steps": 1, "max_grad_norm": 0.0, "bf16": True, "seed": seed}  # fmt: skip
    make_trainer(bench, make_model(bench.sizes.checked, backend), rows, [keep], **settings).train()
    return keep.gradients


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Return the number of tensors that are not bit for bit equal."""
    return sum(name not in one or name not in other or not torch.equal(one[name], other[name]) for name in one | other)


def caching_check(bench: Bench, backend: str, exact: bool) -> list[Result]:
    """Check that gradient caching gives the gradients of the same chunks without it, bit for bit.

    With `exact`, the kernels are deterministic. Otherwise they are PyTorch's default kernels. If these give other gradients in
    a repetition of the plain step, then they cannot decide the question, and the result is only a figure.
    """
    with deterministic() if exact else contextlib.nullcontext():
        figures = compare_caching(bench, backend)
    name = f"gradient caching, {backend}, {'deterministic' if exact else 'default'} kernels"
    if not exact and figures["different in a repetition"]:
        return [Result("exact", name, "measured", figures, "the default kernels are not deterministic")]
    passed = figures["different with caching"] == 0 and figures["different with another seed"] > 0
    return [judged("exact", name, passed, figures, "every gradient is bit for bit the same")]


def compare_caching(bench: Bench, backend: str) -> dict[str, Any]:
    """Return how many gradients differ from those of a plain step: with caching, in a repetition, and with another seed."""
    plain = gradients(bench, backend, caching=False)
    return {
        "tensors": len(plain),
        "different with caching": different(plain, gradients(bench, backend, caching=True)),
        "different in a repetition": different(plain, gradients(bench, backend, caching=False)),
        "different with another seed": different(plain, gradients(bench, backend, caching=False, seed=2)),
    }


def resume_check(bench: Bench) -> list[Result]:
    """Check that a run that resumes after two of four steps ends bit for bit like the run without an interruption."""
    rows = make_rows(4 * bench.sizes.batch, LENGTHS["NLI-like"])
    folder = bench.folder / "resume"
    settings = {"output_dir": str(folder), "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True,
                "per_device_train_batch_size": bench.sizes.batch, "gradient_caching": True}  # fmt: skip
    ends = []
    with deterministic():
        for checkpoint in (None, str(folder / "checkpoint-2")):
            trainer = make_trainer(bench, make_model(bench.sizes.checked), rows, **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
            ends.append({name: value.cpu() for name, value in trainer.step.state_dict().items()})
    halfway = {f"encoder.backbone.{name}": value for name, value in AutoModel.from_pretrained(checkpoint).state_dict().items()}
    figures = {
        "tensors": len(ends[0]),
        "different after resuming": different(*ends),
        "different two steps earlier": different(ends[0], halfway),
    }
    passed = figures["different after resuming"] == 0 and figures["different two steps earlier"] > 0
    limit = "every weight is bit for bit the same after 4 steps"
    return [judged("exact", "resumed = uninterrupted", passed, figures, limit)]


def as_needed_check(bench: Bench) -> list[Result]:
    """Check that three steps that recompute as few chunks as necessary end in the weights of steps that recompute all."""
    name = "gradient caching as needed = of all chunks"
    if not bench.cuda:
        return [Result("exact", name, "skipped", note="it needs the memory of a GPU")]
    rows, ends = make_rows(bench.sizes.batch, LENGTHS["NLI-like"]), []
    settings = {"per_device_train_batch_size": len(rows), "chunk_tokens": 8 * len(rows), "max_steps": 3, "bf16": True}
    for caching in (True, "as_needed"):
        with deterministic():
            trainer = make_trainer(bench, make_model(bench.sizes.checked), rows, gradient_caching=caching, **settings)
            before = {key: value.cpu().clone() for key, value in trainer.step.state_dict().items()}
            trainer.train()
        ends.append({key: value.cpu() for key, value in trainer.step.state_dict().items()})
    figures = {
        "tensors": len(ends[0]),
        "different": different(*ends),
        "different before training": different(before, ends[0]),
        "limit, GiB": trainer.activations.limit / 2**30,
        "bytes per token": trainer.activations.per_token,
    }
    passed = not figures["different"] and figures["different before training"] > 0 and figures["bytes per token"] > 0
    return [judged("exact", name, passed and figures["limit, GiB"] > 0, figures, "every weight is bit for bit the same")]


def exact_checks(bench: Bench) -> Tasks:
    """Check everything that has to be equal bit for bit."""
    tasks: Tasks = {f"gradient caching, {backend}": partial(caching_check, bench, backend, True) for backend in bench.backends}
    tasks["gradient caching, default kernels"] = partial(caching_check, bench, "sdpa", False)
    tasks["gradient caching as needed"] = partial(as_needed_check, bench)
    tasks["resumed = uninterrupted"] = partial(resume_check, bench)
    return tasks | gpu_step.dropout_checks(bench) | gpu_step.gradient_checks(bench)


# ---- 3. TempScale ----


def tempscale_check(bench: Bench, backend: str) -> list[Result]:
    """Check that TempScale, applied and folded, divides the scores of attention by the temperature."""
    texts = [row["anchor"] for row in make_rows(8, LENGTHS["NLI-like"])]
    model, half = make_model(bench.sizes.checked, backend, dropout=0.0), backend == FLASH
    scaled, compare = copy.deepcopy(model), cosine if half else distance
    for layer in scaled.encoder.layer:
        layer.attention.self.scaling /= 0.7  # the factor of the scores in transformers' own attention code
    reference = torch.cat([POOLED["mean"](out) for out in reference_outputs(scaled, texts)])
    model = model.to(bench.device, torch.bfloat16 if half else torch.float32)
    encoder, figures = Encoder(model, tokenizer()), {}
    changes = {
        "not scaled": nn.Identity(),
        "applied": partial(apply_tempscale, config=TempScaleConfig(0.7)),
        "folded": fold_tempscale,
    }
    for name, change in changes.items():
        change(model)
        figures[name] = compare(encoder.encode(texts, convert_to_tensor=True), reference)
    if half:
        passed, limit = min(figures["applied"], figures["folded"]) >= LEAST_COSINE, f"cosine >= {LEAST_COSINE}"
    else:
        passed = max(figures["applied"], figures["folded"]) <= 1e-4 < figures["not scaled"]
        limit = "relative distance from the float64 reference <= 0.0001, and larger without TempScale"
    return [judged("tempscale", f"applied = folded = reference, {backend}", passed, figures, limit)]


def tempscale_checks(bench: Bench) -> Tasks:
    """Check TempScale on every backend."""
    name = "applied = folded = reference"
    tasks: Tasks = {f"{name}, {backend}": partial(tempscale_check, bench, backend) for backend in bench.backends}
    return tasks | bench.left_out("tempscale", f"{name}, {FLASH}")


# ---- 4. the improved contrastive loss ----


def loss_of(bench: Bench, pairs: int, tile_rows: int | None) -> dict[str, Any]:
    """Return the loss of random pairs, its gradient, the seconds, and the peak bytes beyond the inputs (None on a CPU)."""
    vectors = torch.randn(pairs, 2, 768, generator=torch.Generator().manual_seed(0)).to(bench.device).requires_grad_()
    ids = torch.arange(1, 2 * pairs + 1, device=bench.device).view(-1, 2)
    bench.wait()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = ImprovedContrastive(0.01, tile_rows=tile_rows)(vectors, ids)
    loss.backward()
    bench.wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else None
    return {"loss": loss.item(), "gradient": vectors.grad, "seconds": seconds, "bytes": peak}


def tiling_check(bench: Bench) -> list[Result]:
    """Check that the loss and its gradient do not depend on the size of the tiles."""
    pairs = min(4096, bench.sizes.pairs)
    tiled, whole = loss_of(bench, pairs, tile_rows=pairs // 8), loss_of(bench, pairs, tile_rows=pairs)
    error = distance(tiled["gradient"].view(1, -1), whole["gradient"].cpu().view(1, -1))
    figures = {"loss, tiled": tiled["loss"], "loss, untiled": whole["loss"], "distance of the gradients": error}
    passed = math.isclose(tiled["loss"], whole["loss"], rel_tol=1e-5) and error <= 1e-4
    limit = "relative difference of the losses <= 1e-5, of the gradients <= 1e-4"
    return [judged("loss", f"tiled = untiled, {pairs:,} pairs", passed, figures, limit)]


def loss_memory(bench: Bench) -> list[Result]:
    """Measure the memory and the time of the loss of a large batch."""
    runs = []
    for _ in range(3):
        runs.append(loss_of(bench, bench.sizes.pairs, tile_rows=None))
        runs[-1].pop("gradient")
    figures = {"seconds": statistics.median(run["seconds"] for run in runs), "peak bytes": runs[-1]["bytes"]}
    name = f"{bench.sizes.pairs:,} pairs of width 768, float32, loss and gradient"
    if not bench.cuda:
        return [Result("loss", name, "measured", figures, "PyTorch counts allocated bytes only on a GPU")]
    return [judged("loss", name, figures["peak bytes"] <= 2 * 2**30, figures, "at most 2 GiB beyond the inputs")]


def loss_checks(bench: Bench) -> Tasks:
    """Check and measure GTE's improved contrastive loss."""
    return {"tiled = untiled": partial(tiling_check, bench), "memory": partial(loss_memory, bench)}


PARTS: dict[str, Callable[[Bench], Tasks]] = {
    "forward": forward_checks,
    "exact": exact_checks,
    "tempscale": tempscale_checks,
    "loss": loss_checks,
    "matrix": gpu_bench.matrix_checks,
    "step": gpu_step.step_checks,
    "throughput": gpu_bench.throughput_checks,
    "encoding": gpu_bench.encoding_checks,
    "attention": gpu_step.attention_checks,
    "settings": gpu_step.settings_checks,
}


# ---- the command ----


def run_part(bench: Bench, part: str) -> Iterator[Result]:
    """Yield the results of the tasks of a part. A task that raises an error fails, and the next task still runs."""
    for name, task in PARTS[part](bench).items():
        if time.monotonic() > bench.deadline:
            yield Result(part, name, "skipped", note="the time limit was reached")
            continue
        try:
            yield from task()
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip() or "no message").splitlines()[0]
            yield Result(part, name, "FAIL", note=f"{type(error).__name__}: {reason}")
        bench.free()


# ---- the report ----


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions of the packages."""
    names = ("torch", "transformers", "accelerate", "datasets", "sentence-transformers", "flash_attn", "triton")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {"gpu": gpu, "cpu threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def shown(value: Any) -> str:
    """Return a figure as text for the Markdown table."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown: one table of all results, then the lists that some results have."""
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [f"{facts}; {report['seconds']:.0f} seconds", "", "| part | check | status | figures | limit or reason |",
             "|---|---|---|---|---|"]  # fmt: skip
    lists: list[str] = []
    for result in report["results"]:
        flat = {name: value for name, value in result["figures"].items() if not isinstance(value, dict | list)}
        figures = ", ".join(f"{name}: {shown(value)}" for name, value in flat.items())
        cells = [result["part"], result["name"], result["status"], figures, result["note"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if slowest := result["figures"].get("ten slowest"):
            lists += ["", "| kernel | ms | share | calls |", "|---|---|---|---|"]
            lists += [f"| `{k['kernel'][:120]}` | {k['ms']:.3f} | {k['share']:.1%} | {k['calls']} |" for k in slowest]
        if places := result["figures"].get("places"):
            lists += ["", "| place of a host synchronization | count |", "|---|---|"]
            lists += [f"| {place} | {count} |" for place, count in places.items()]
    return "\n".join([*lines, *lists]) + "\n"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(report), encoding="utf-8")


def run_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, print each result, and return the report."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    start, settings = time.monotonic(), vars(args) | {"output_dir": str(args.output_dir)}
    report: dict[str, Any] = {"machine": machine(args.device), "settings": settings, "seconds": 0.0, "results": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, gpu_bench.TINY if args.tiny else gpu_bench.FULL, Path(folder), start + args.time_limit)
        for part in args.parts:
            for result in run_part(bench, part):
                report["results"].append(asdict(result))
                report["seconds"] = time.monotonic() - start
                print(f"{report['seconds']:5.0f} s  {result.status:8}  {part}: {result.name}  {result.note}", flush=True)
                write_report(args.output_dir, report)
    return report


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches, to try the script itself")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--time_limit", type=float, default=400, help="seconds after which no further task starts")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("The benchmark cannot start: PyTorch finds no GPU; add --device cpu --tiny to try the script", file=sys.stderr)
        return 2
    report = run_parts(args)
    failed = [result for result in report["results"] if result["status"] == "FAIL"]
    print(f"{len(report['results'])} results, {len(failed)} failed; see {args.output_dir / 'gpu.md'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
