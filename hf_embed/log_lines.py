"""What a person sees of a run: a line for a log of the training, merged with that of the evaluation at the same step.

    step  15/90  loss 3.88  quickstart 51.23  alignment 0.325  uniformity -1.74

Each evaluation set stands by its main metric; means are shown where several sets share one. `log_history`, TensorBoard and the
other loggers have every number.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from hf_embed.evaluation.tasks import THRESHOLD, Task, metric_names
from hf_embed.progress import progress_bar
from hf_embed.trainer_settings import METRIC_SCHEDULES

if TYPE_CHECKING:
    from transformers.utils.notebook import NotebookProgressCallback

GEOMETRY = ("alignment", "uniformity")
SHOWN_BESIDE = ("loss", "temperature", *GEOMETRY)  # an evaluation set of such a name is shown with its metric
# What is for loggers: of a log of the training, and at the end of a metric's name.
FOR_LOGGERS = ("loss_", "norm_spread", "masked_share", "grad_norm", "total_flos", "num_input_tokens_", "train_mem_",
               "before_init_mem_", "init_mem_")  # fmt: skip
TIMES = ("_runtime", "_per_second", "_preparation_time", "epoch")


def digits(value: Any, count: int = 3) -> str:
    """Write a number with so many significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 10**count:
        return f"{value:,.0f}"
    return f"{value:#.{count}g}".rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.{count}g}"


def duration(seconds: float) -> str:
    """Write a time for people.

    >>> duration(137.1)
    '2 min 17 s'
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def chief_metrics(logs: Mapping[str, Any], tasks: Mapping[str, Task], prefix: str) -> dict[str, str]:
    """Return what is shown of an evaluation, written, by its name: sets, means, alignment and uniformity, and further numbers.

    Args:
        logs: PREFIX_NAME_METRIC and so on.
        tasks: the sets that were scored, by name.
        prefix: that the metrics' names begin with, "eval".
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
    """Return what is shown of a log of the training, written, by its name.

    The learning rate is shown where it follows the evaluation; the alignment and uniformity of the batch where `geometry`.
    """
    hidden = ("epoch", "step", *(() if geometry else GEOMETRY))
    if args.lr_scheduler_type not in METRIC_SCHEDULES:
        hidden = (*hidden, "learning_rate")
    shown = {key: value for key, value in logs.items() if key not in hidden and not key.startswith(FOR_LOGGERS)}
    return {key.replace("_", " "): digits(value) for key, value in shown.items()}


def summary(logs: Mapping[str, Any], state: TrainerState) -> str:
    """Return the line of a training that has ended."""
    steps, seconds = state.global_step, float(logs["train_runtime"])
    own = steps - logs.get("resumed_at_step", 0)
    if not own:
        return f"no step was left to train: {steps:,} were trained before"
    rate = f", {digits(logs['train_samples_per_second'])} rows/s" if "train_samples_per_second" in logs else ""
    loss = f", mean loss {digits(logs['train_loss'])}" if "train_loss" in logs else ""
    of = f"{own:,} of {steps:,}" if own < steps else f"{steps:,}"
    return f"trained {of} step{'s'[: steps != 1]} in {duration(seconds)}{rate}{loss}"


class LogLines:
    """Makes lines of logs. One of the training waits for the evaluation that is due at its step."""

    def __init__(self, tasks: Mapping[str, Task] | None = None):
        self.tasks, self.prefix = dict(tasks or {}), "eval"  # of the evaluation that is being logged
        self.geometry = not any(metric in metric_names(self.tasks) for metric in GEOMETRY)
        self.waiting: tuple[int, dict[str, str]] | None = None  # the step of a log, and what is shown of it

    def scored(self, tasks: Mapping[str, Task], prefix: str) -> None:
        """Say which sets the evaluation is of that is logged next, and what its metrics' names begin with."""
        self.tasks, self.prefix = dict(tasks), prefix

    def add(self, logs: Mapping[str, Any], args: TrainingArguments, state: TrainerState, control: TrainerControl) -> list[str]:
        """Return the lines that can be shown now that `logs` are there."""
        if "train_runtime" in logs:
            return [*self.flush(state), summary(logs, state)]
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
        """Return the line that was waiting, if one was."""
        step, numbers = self.waiting or (0, {})
        self.waiting = None
        return self.line(step, numbers, state)

    def line(self, step: int, numbers: Mapping[str, str], state: TrainerState) -> list[str]:
        """Return the line of a step, in a list; none where there is nothing to show."""
        width = len(f"{state.max_steps:,}")
        at = f"step {step:{width},}/{state.max_steps:,}" if state.max_steps > 0 else f"step {step:,}"
        return ["  ".join([at, *(f"{name} {value}" for name, value in numbers.items())])] if numbers else []


def write(lines: list[str]) -> None:
    """Print lines above the bars that there may be, at once, so that a log file has them too."""
    for line in lines:
        tqdm.write(line)
    sys.stdout.flush()


class Printer(PrinterCallback):
    """Prints the lines, and shows no bar: for `disable_tqdm`."""

    def __init__(self, lines: LogLines):
        self.lines = lines

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Print the lines of a log."""
        if state.is_world_process_zero:
            write(self.lines.add(logs or {}, args, state, control))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print a line whose evaluation has not come."""
        if state.is_world_process_zero and self.lines.waiting:
            write(self.lines.flush(state))


class Progress(ProgressCallback):
    """Prints the lines, above a bar of the steps; without `lines` there is the bar alone."""

    def __init__(self, lines: LogLines | None = None, desc: str | None = None):
        super().__init__()
        self.lines, self.desc = lines, desc

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the bar, where bars are shown."""
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc=self.desc, unit="step")
        self.current_step = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Print the lines of a log."""
        if state.is_world_process_zero and self.lines is not None:
            write(self.lines.add(logs or {}, args, state, control))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print a line whose evaluation has not come."""
        if state.is_world_process_zero and self.lines is not None and self.lines.waiting:
            write(self.lines.flush(state))


def notebook_table(lines: LogLines) -> "NotebookProgressCallback":
    """Return the callback of a notebook, whose table has a column for what the lines show, less the validation loss."""
    from IPython.display import HTML, display
    from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker, text_to_html_table

    class NotebookTable(NotebookProgressCallback):
        """Shows the steps' bar, and a table with a row for each log or evaluation."""

        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            self.training_tracker = NotebookTrainingTracker(state.max_steps, ["Step", "loss"])

        def on_log(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
        ) -> None:
            if "loss" in (logs or {}) and not control.should_evaluate:
                self.row(training_numbers(logs or {}, args, lines.geometry), state)

        def on_evaluate(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            metrics: dict | None = None,
            **kwargs: Any,
        ) -> None:
            last = state.log_history[-2] if len(state.log_history) > 1 else {}
            loss = training_numbers(last, args, False) if "loss" in last and last["step"] == state.global_step else {}
            self.row(loss | chief_metrics(metrics or {}, lines.tasks, lines.prefix), state)
            if self.training_tracker is not None:
                self.training_tracker.remove_child()

        def row(self, numbers: dict[str, str], state: TrainerState) -> None:
            """Show a row; a table of its own where nothing is being trained."""
            values: dict[str, Any] = {"Step": state.global_step} | numbers
            if self.training_tracker is None:
                display(HTML(text_to_html_table([list(values), list(values.values())])))
                return
            table = self.training_tracker.inner_table
            table[0].extend(name for name in values if name not in table[0])
            for row in table[1:]:
                row.extend([""] * (len(table[0]) - len(row)))
            same_step = dict(zip(table[0], table[-1])) if table[-1][0] == state.global_step else {}
            self.training_tracker.write_line(dict.fromkeys(table[0], "") | same_step | values)

    return NotebookTable()


def show_lines(trainer: Trainer, tasks: Mapping[str, Task]) -> LogLines:
    """Show lines in place of what `Trainer` prints of its logs, and return what makes them."""
    lines = LogLines(tasks)
    replaced: TrainerCallback
    if trainer.pop_callback(PrinterCallback):
        replaced = Printer(lines)
    elif trainer.pop_callback(ProgressCallback):
        replaced = Progress(lines)
    elif "transformers.utils.notebook" in sys.modules:
        from transformers.utils.notebook import NotebookProgressCallback

        if not trainer.pop_callback(NotebookProgressCallback):
            return lines
        replaced = notebook_table(lines)
    else:
        return lines
    trainer.add_callback(replaced)
    return lines
