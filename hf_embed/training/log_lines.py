"""The log lines that a user sees during a run. Training and evaluation at the same step share one line.

    step  15/90  loss 3.88  quickstart 51.23  alignment 0.325  uniformity -1.74

For each evaluation set, the line has its name and its main metric. If several sets have the same main metric, the line also has
the mean. `log_history`, TensorBoard and the other loggers have all numbers.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.training_args import TrainingArguments

from hf_embed.evaluation.tasks import THRESHOLD, Task, metric_names
from hf_embed.progress import duration, progress_bar
from hf_embed.training.record import ends_training
from hf_embed.training.settings import METRIC_SCHEDULES

GEOMETRY = ("alignment", "uniformity")
# An evaluation set with one of these names is shown with its metric, to avoid confusion.
SHOWN_BESIDE = ("loss", "temperature", *GEOMETRY)
# Numbers that only the loggers get: beginnings of names in a training log, and endings of the names of metrics.
FOR_LOGGERS = ("loss_", "norm_spread", "masked_share", "grad_norm", "total_flos", "num_input_tokens_", "train_runtime",
               "train_tokens_per_second", "train_mem_", "before_init_mem_", "init_mem_")  # fmt: skip
TIMES = ("_runtime", "_per_second", "_preparation_time", "epoch")


def digits(value: Any, count: int = 3) -> str:
    """Format a number with `count` significant digits. Integers are written in full, and other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(float(f"{value:.{count}g}")) >= 10**count:  # also 999.7, which is rounded to 1,000
        return f"{value:,.0f}"
    return f"{value:#.{count}g}".rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.{count}g}"


def chief_metrics(logs: Mapping[str, Any], tasks: Mapping[str, Task], prefix: str) -> dict[str, str]:
    """Return the numbers of an evaluation that are shown, formatted, by name.

    They are the main metric of each set, the means over sets, alignment and uniformity, and numbers that are not from a task.

    Args:
        logs: metrics by name: PREFIX_NAME_METRIC and PREFIX_METRIC.
        tasks: the evaluation sets that were scored, by name.
        prefix: the prefix of the metric names, for example "eval".
    """
    shown: dict[str, str] = {}
    for name, task in tasks.items():
        if (key := f"{prefix}_{name}_{task.main}") in logs:
            shown[f"{name} {task.main}" if name in SHOWN_BESIDE else name] = digits(logs[key], 4)
    for metric, sets in Counter(task.main for task in tasks.values()).items():
        if sets > 1 and f"{prefix}_{metric}" in logs:
            shown[f"mean {metric}"] = digits(logs[f"{prefix}_{metric}"], 4)
    known = {f"{prefix}_{metric}" for metric in metric_names(tasks)}
    for key, value in logs.items():
        name = key.removeprefix(f"{prefix}_")
        if name in GEOMETRY:
            shown[name] = digits(value)
        elif (
            key not in known and not key.endswith((*TIMES, THRESHOLD)) and not key.startswith((*FOR_LOGGERS, f"{prefix}_mem_"))
        ):
            shown[key.replace("_", " ")] = digits(value, 4)
    return shown


def training_numbers(logs: Mapping[str, Any], args: TrainingArguments, geometry: bool) -> dict[str, str]:
    """Return the numbers of a training log that are shown, formatted, by name.

    The learning rate is shown if it depends on the evaluation. Alignment and uniformity of the batch are shown if `geometry`.
    """
    hidden = ("epoch", "step", *(() if geometry else GEOMETRY))
    if args.lr_scheduler_type not in METRIC_SCHEDULES:
        hidden = (*hidden, "learning_rate")
    shown = {key: value for key, value in logs.items() if key not in hidden and not key.startswith(FOR_LOGGERS)}
    return {key.replace("_", " "): digits(value) for key, value in shown.items()}


def closing_line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """Return the line that is shown at the end of a training."""
    steps, seconds = state.global_step, float(logs["train_runtime"])
    own = steps - logs.get("resumed_at_step", 0)
    if not own:
        return f"no steps were left to train: all {steps:,} were trained before"
    rate = f", {digits(logs['train_samples_per_second'])} rows/s" if "train_samples_per_second" in logs else ""
    loss = f", mean loss {digits(logs['train_loss'])}" if "train_loss" in logs else ""
    of = f"{own:,} of {steps:,}" if own < steps else f"{steps:,}"
    return f"trained {of} step{'s'[: steps != 1]} in {duration(seconds)}{rate}{loss}"


class LogLines:
    """Makes lines from log entries. The line of a training log waits if an evaluation follows at the same step."""

    def __init__(self, tasks: Mapping[str, Task] | None = None):
        self.tasks, self.prefix = dict(tasks or {}), "eval"  # those of the evaluation that is logged next
        self.geometry = not any(metric in metric_names(self.tasks) for metric in GEOMETRY)  # show them for batches?
        self.waiting: tuple[int, dict[str, str]] | None = None  # the step and the numbers of the training log that waits

    def scored(self, tasks: Mapping[str, Task], prefix: str) -> None:
        """Set the tasks of the evaluation that is logged next, and the prefix of its metric names."""
        self.tasks, self.prefix = dict(tasks), prefix

    def add(self, logs: Mapping[str, Any], args: TrainingArguments, state: TrainerState, control: TrainerControl) -> list[str]:
        """Add a log entry, and return the lines that can be shown now."""
        if ends_training(logs):
            return [*self.flush(state), closing_line(logs, state)]
        if any(key.startswith(f"{self.prefix}_") for key in logs):
            step, before = self.waiting or (state.global_step, {})
            lines = self.flush(state) if step != state.global_step else []
            self.waiting = None
            return [*lines, *self.line(state.global_step, before | chief_metrics(logs, self.tasks, self.prefix), state)]
        lines = self.flush(state)
        numbers = training_numbers(logs, args, self.geometry)
        if "loss" in logs and control.should_evaluate:
            self.waiting = state.global_step, numbers
            return lines
        return [*lines, *self.line(state.global_step, numbers, state)]

    def flush(self, state: TrainerState) -> list[str]:
        """Return the line that was waiting, in a list; the list is empty if no line was waiting."""
        step, numbers = self.waiting or (0, {})
        self.waiting = None
        return self.line(step, numbers, state)

    def line(self, step: int, numbers: Mapping[str, str], state: TrainerState) -> list[str]:
        """Return the line of a step, in a list; the list is empty if there is nothing to show."""
        width = len(f"{state.max_steps:,}")
        at = f"step {step:{width},}/{state.max_steps:,}" if state.max_steps > 0 else f"step {step:,}"
        return ["  ".join([at, *(f"{name} {value}" for name, value in numbers.items())])] if numbers else []


def write(lines: list[str]) -> None:
    """Print lines above any progress bars. Flush stdout, so that a log file has the lines at once."""
    for line in lines:
        tqdm.write(line)
    sys.stdout.flush()


class Writer(TrainerCallback):
    """Prints the lines; without `lines`, nothing."""

    def __init__(self, lines: LogLines | None):
        super().__init__()
        self.lines = lines

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Print the lines that can be shown after a log entry."""
        if state.is_world_process_zero and self.lines is not None:
            write(self.lines.add(logs or {}, args, state, control))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the line that waits, if its evaluation did not follow."""
        if state.is_world_process_zero and self.lines is not None and self.lines.waiting:
            write(self.lines.flush(state))


class Printer(Writer, PrinterCallback):
    """Prints the lines without a progress bar. This is used with `disable_tqdm`."""


class Progress(Writer, ProgressCallback):
    """Prints the lines above a progress bar of the steps. Without `lines`, it shows only the bar."""

    def __init__(self, lines: LogLines | None = None, desc: str | None = None):
        super().__init__(lines)
        self.desc = desc

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the progress bar, unless bars are hidden (see `hf_embed.progress`)."""
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc=self.desc, unit="step")
        self.current_step = 0


def show_lines(trainer: Trainer, tasks: Mapping[str, Task]) -> LogLines:
    """Replace the callback with which `Trainer` prints its logs by one that prints lines. Return its `LogLines`."""
    lines = LogLines(tasks)
    if trainer.pop_callback(PrinterCallback):
        trainer.add_callback(Printer(lines))
    elif trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK):
        trainer.add_callback(Progress(lines))
    return lines
