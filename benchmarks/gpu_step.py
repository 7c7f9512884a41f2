"""What one training step on a GPU consists of, and what it costs with other settings: two parts of benchmarks/gpu.py."""

import contextlib
import copy
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_bench import FLASH, LENGTHS, Bench, Clock, Result, Tasks, judged, make_model, make_rows, make_trainer, tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_embed import Encoder, SimCSE
from hf_embed.forward import packed_attention, packing
from hf_embed.forward.packed_attention import CannotPack, attend_by_text
from hf_embed.library_internals import EFFICIENT_DROPOUT, efficient_attention, flash_attention
from hf_embed.objectives import ImprovedContrastive, Objective

# ---- the slowest kernels, and host synchronizations ----


class AroundStep(TrainerCallback):
    """A callback that runs one training step, from the batch to the optimizer, inside a context."""

    def __init__(self, step: int, context: contextlib.AbstractContextManager):
        self.step, self.context, self.stack = step, context, contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Enter the context."""
        if state.global_step == self.step:
            self.stack.enter_context(self.context)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the context."""
        self.stack.close()


def one_step(bench: Bench, context: contextlib.AbstractContextManager, objective: Objective | None = None) -> str:
    """Run the step after the warm-up inside a context. Return the name of the case: the largest model, NLI-like texts.

    One more step follows, because the last step of a training also checks all weights.
    """
    sizes, (name, form) = bench.sizes, list(bench.sizes.timed.items())[-1]
    rows = make_rows(sizes.batch * (sizes.warm_up + 2), LENGTHS["NLI-like"])
    settings = {"per_device_train_batch_size": sizes.batch, "max_steps": sizes.warm_up + 2, "bf16": True, "max_length": 128}
    make_trainer(bench, make_model(form), rows, [AroundStep(sizes.warm_up, context)], objective, **settings).train()
    loss = "" if objective is None else f", {type(objective).__name__}"
    return f"a step of {name}, {sizes.batch} NLI-like triplets, bfloat16{loss}"


def slowest_kernels(bench: Bench) -> list[Result]:
    """List the ten kernels of a training step that take the most time."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if bench.cuda else [])]
    seconds: list[float] = []
    profiler = torch.profiler.profile(activities=kinds)

    @contextlib.contextmanager
    def profiled() -> Iterator[None]:
        with profiler:
            start = time.perf_counter()
            yield
            bench.wait()
            seconds.append(time.perf_counter() - start)

    name = one_step(bench, profiled())
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.key_averages():
        # Operators also have a device time: that of their kernels, which are events of their own.
        if bench.cuda and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue
        times[event.key] += (event.self_device_time_total if bench.cuda else event.self_cpu_time_total) / 1000
        counts[event.key] += event.count
    total = sum(times.values())
    slowest = [{"kernel": key, "ms": ms, "share": ms / total, "calls": counts[key]} for key, ms in times.most_common(10)]
    figures = {"step ms": 1000 * seconds[0], "kernels ms": total, "ten slowest": slowest}
    return [Result("step", f"kernels of {name}", "measured", figures, "the step is slower under the profiler")]


def caller() -> str:
    """Return the innermost place in the stack outside of PyTorch, of warnings.py and of this file, as FILE:LINE."""
    skipped = (Path(warnings.__file__), Path(__file__))
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if not path.is_relative_to(Path(torch.__file__).parent) and path not in skipped:
            return f"{'/'.join(path.parts[-2:])}:{frame.lineno}"
    return "unknown"


@contextlib.contextmanager
def recorded_synchronizations(bench: Bench, found: Counter[str]) -> Iterator[None]:
    """Count in `found` by place how often the host waits for the GPU inside a `with` block. A CPU never does."""

    def show(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            found[caller()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = show
        try:
            yield
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")


def synchronizations(bench: Bench, objective: Objective | None = None) -> list[Result]:
    """Count the host synchronizations of a training step, with the places that cause them."""
    found: Counter[str] = Counter()
    name = f"host synchronizations in {one_step(bench, recorded_synchronizations(bench, found), objective)}"
    figures = {"count": found.total(), "places": dict(found.most_common())}
    if not bench.cuda:
        return [Result("step", name, "skipped", figures, "only a GPU has them")]
    elsewhere = [place for place in found if "/watch.py:" not in place]
    return [judged("step", name, found.total() <= 1 and not elsewhere, figures, "one: the gradient norm, before the update")]


def full_memory_check(bench: Bench) -> list[Result]:
    """Check that a model is saved after a step although the GPU has no memory for a copy of it."""
    name, form = "a model is saved on a full GPU", list(bench.sizes.timed.values())[-1]
    if not bench.cuda:
        return [Result("step", name, "skipped", note="it needs the memory of a GPU")]
    trainer = make_trainer(bench, make_model(form), make_rows(8, LENGTHS["NLI-like"]), max_steps=1)
    trainer.train()
    torch.cuda.empty_cache()
    room = sum(tensor.nbytes for tensor in trainer.encoder.state_dict().values()) // 2  # for half a model
    _, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        trainer.save_model()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    saved = (bench.folder / "trainer" / "model.safetensors").is_file()
    return [judged("step", name, saved, {"room, GiB": room / 2**30}, "the check of the saved model moves to the CPU")]


def step_checks(bench: Bench) -> Tasks:
    """Look into one training step, and save the model after it."""
    return {
        "kernels": partial(slowest_kernels, bench),
        "host synchronizations": partial(synchronizations, bench),
        "host synchronizations, large loss": partial(synchronizations, bench, ImprovedContrastive()),
        "full memory": partial(full_memory_check, bench),
    }


# ---- gradients ----


def all_gradients(model: nn.Module, vectors: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the gradients of all weights, in one row, float64 on the CPU: of SimCSE's loss of the vectors (N, D) of rows."""
    model.zero_grad()
    grid = vectors.view(rows, -1, vectors.shape[-1])
    SimCSE(0.05)(grid, torch.arange(1, len(vectors) + 1, device=grid.device).view(rows, -1)).backward()
    return torch.cat([weight.grad.double().cpu().flatten() for weight in model.parameters() if weight.grad is not None])


def gradient_check(bench: Bench, texts: str) -> list[Result]:
    """Compare the gradients of a step without dropout with those of each text alone, in float64 on the CPU."""
    rows, start = make_rows(4, LENGTHS[texts]), make_model(bench.sizes.checked, "eager", dropout=0.0)
    given = [text for row in rows for text in row.values()]
    lists = tokenizer()(given, truncation=True, max_length=LENGTHS[texts].max_length)["input_ids"]
    plain, results = copy.deepcopy(start).double(), []
    alone = [plain(torch.tensor([ids])).last_hidden_state.mean(1) for ids in lists]
    expected = all_gradients(plain, torch.cat(alone), len(rows))
    for backend in bench.backends:
        model = make_model(bench.sizes.checked, backend, dropout=0.0).to(bench.device)
        for half in (False, True) if backend != FLASH else (True,):
            encoder, flat = Encoder(model, tokenizer()), torch.tensor([i for ids in lists for i in ids], device=bench.device)
            with torch.autocast(bench.device, torch.bfloat16, enabled=half):
                vectors = encoder(flat, [*map(len, lists)], chunk_tokens=len(flat) // 2)["embeddings"].float()
            found = all_gradients(model, vectors, len(rows))
            distance, largest = ((found - expected).norm() / expected.norm()).item(), 0.1 if half else 1e-4
            name = f"gradients = reference, {texts}, {backend}, {'bfloat16' if half else 'float32'}"
            figures = {"relative distance": distance, "packed": encoder.numbering is not None}
            results.append(judged("exact", name, distance <= largest, figures, f"at most {largest:g} from float64 on the CPU"))
    return results


def gradient_checks(bench: Bench) -> Tasks:
    """Check the gradients for short and for long texts, which have other kernels."""
    return {f"gradients, {texts}": partial(gradient_check, bench, texts) for texts in LENGTHS}


# ---- the kernels of attention ----

HEADS, WIDTH, TOKENS = 12, 64, 16384  # BERT-base


def dropout_check(bench: Bench, dtype: torch.dtype, length: int) -> list[Result]:
    """Check that attention within texts drops the same weights in both passes, and others in each head and each text.

    The output is linear in the values. So the product of the output with any factors equals that of the values with their
    gradient, if the backward pass has the masks of the forward pass. The other check is that heads and texts with equal states
    have different outputs.
    """
    texts = 8
    query, key, value = (torch.randn(length, 1, WIDTH).repeat(texts, HEADS, 1).to(bench.device, dtype) for _ in range(3))
    rows = [states.requires_grad_().transpose(0, 1).unsqueeze(0) for states in (query, key, value)]
    bounds = torch.arange(0, texts * length + 1, length, device=bench.device, dtype=torch.int32)
    name = f"dropout of {texts} texts of {length} tokens, {str(dtype).removeprefix('torch.')}"
    try:
        out = attend_by_text(nn.Module().train(), *rows, None, 0.1, text_bounds=bounds, longest_text=length)[0].squeeze(0)
    except CannotPack as error:
        return [Result("exact", name, "skipped", note=f"{error} is not possible, so texts are padded")]
    factors = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, value, factors)
    expected, found = ((one.double() * other.double()).sum() for one, other in ((out, factors), (value, gradient)))
    figures = {
        "difference of the products": ((found - expected).abs() / (out.double() * factors.double()).norm()).item(),
        "equal heads": sum(torch.equal(out[:, 0], out[:, head]) for head in range(1, HEADS)),
        "equal texts": sum(torch.equal(out[:length], part) for part in out.split(length)[1:]),
    }
    passed = figures["difference of the products"] <= 0.03 and figures["equal heads"] == figures["equal texts"] == 0
    return [judged("exact", name, passed, figures, "a difference <= 0.03 of the norm of the terms, and nothing equal")]


def dropout_checks(bench: Bench) -> Tasks:
    """Check the dropout of attention within texts, for the kernels of short and of long texts."""
    cases = [(dtype, length) for dtype in (torch.bfloat16, torch.float32) for length in (16, 128)]
    return {f"dropout, {dtype}, {length} tokens": partial(dropout_check, bench, dtype, length) for dtype, length in cases}


def attention_times(bench: Bench, length: int) -> list[Result]:
    """Time attention with dropout, forward and backward, for texts of one length, with every kernel that could compute it."""
    texts = TOKENS // length
    query, key, value = (
        torch.randn(TOKENS, HEADS, WIDTH, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    bounds, gradient = torch.arange(0, TOKENS + 1, length, device=bench.device, dtype=torch.int32), torch.randn_like(query)

    def padded() -> torch.Tensor:
        rows = [states.view(texts, length, HEADS, WIDTH).transpose(1, 2) for states in (query, key, value)]
        return F.scaled_dot_product_attention(*rows, dropout_p=0.1).transpose(1, 2).reshape(TOKENS, HEADS, WIDTH)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "flash": lambda: flash_attention(query, key, value, bounds, length, 0.1, None),
        "memory-efficient": lambda: efficient_attention(query, key, value, bounds, length, 0.1, None),
        "as a padded batch": padded,
    }
    inputs = (query, key, value)
    steps = {name: lambda way=way: torch.autograd.grad(way(), inputs, gradient) for name, way in ways.items()}
    figures = {f"{name} ms": milliseconds(bench, step) for name, step in steps.items()}
    return [Result("attention", f"{texts:,} texts of {length} tokens, {HEADS} heads of {WIDTH}", "measured", figures)]


def milliseconds(bench: Bench, function: Callable[[], Any], times: int = 20) -> float:
    """Return the mean time of a call."""
    for _ in range(5):
        function()
    bench.wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    bench.wait()
    return 1000 * (time.perf_counter() - start) / times


def attention_checks(bench: Bench) -> Tasks:
    """Time the kernels of attention within texts."""
    if not bench.cuda:
        return {"attention": lambda: [Result("attention", "kernels for packed rows", "skipped", note="only a GPU has them")]}
    return {f"attention, {length} tokens": partial(attention_times, bench, length) for length in (16, 32, 64, 128, 256)}


# ---- a step with other settings ----

# What is changed, by the name in the report: arguments of the trainer, and constants of modules.
VARIANTS: dict[str, tuple[dict[str, Any], list[tuple[Any, str, Any]]]] = {
    "as it is": ({}, []),
    "chunks of 16,384 tokens": ({"chunk_tokens": 16384}, []),
    "chunks of 8,192 tokens": ({"chunk_tokens": 8192}, []),
    "gradient caching": ({"gradient_caching": True}, []),
    "texts padded": ({}, [(packing, "PACKED_ATTENTION", [])]),
    "texts padded, with cuDNN": ({}, [(packing, "PACKED_ATTENTION", []), (packed_attention, "CUDNN", True)]),
    "size of a row a multiple of 512": ({}, [(packing, "MULTIPLE", 512)]),
}
if EFFICIENT_DROPOUT:  # otherwise, flash attention is used for all texts
    VARIANTS["flash attention for short texts too"] = ({}, [(packed_attention, "FLASH_TOKENS", 0)])
    VARIANTS["memory-efficient attention for long texts too"] = ({}, [(packed_attention, "FLASH_TOKENS", 10**6)])


@contextlib.contextmanager
def changed(constants: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Change constants of modules inside a `with` block."""
    before = [getattr(module, name) for module, name, _ in constants]
    try:
        for module, name, value in constants:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(constants, before):
            setattr(module, name, value)


def step_of_variant(bench: Bench, model: str, texts: str, variant: str) -> list[Result]:
    """Time a step with other settings."""
    sizes, lengths, (settings, constants) = bench.sizes, LENGTHS[texts], VARIANTS[variant]
    clock, count = Clock(bench), sizes.warm_up + sizes.steps
    rows = make_rows(sizes.batch * count, lengths, seed=3)
    given = {"per_device_train_batch_size": sizes.batch, "max_steps": count, "bf16": True, "max_length": lengths.max_length}
    bench.free()
    with changed(constants):
        make_trainer(bench, make_model(sizes.timed[model]), rows, [clock], pooling="mean", **(given | settings)).train()
    times = [1000 * (end - start) for start, end in pairwise(clock.times[sizes.warm_up :])]
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None
    figures = {"median step ms": statistics.median(times), "peak GiB": peak}
    return [Result("settings", f"{model}, {sizes.batch} rows of {texts}, {variant}", "measured", figures)]


def settings_checks(bench: Bench) -> Tasks:
    """Time a step of each model with other settings."""
    cases = [(model, "NLI-like", variant) for model in bench.sizes.timed for variant in VARIANTS]
    cases += [(list(bench.sizes.timed)[-1], "long texts", variant) for variant in VARIANTS if "texts" in variant]
    return {", ".join(case): partial(step_of_variant, bench, *case) for case in cases}
