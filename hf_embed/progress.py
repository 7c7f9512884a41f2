"""Progress bars and messages of libraries, and durations for people.

All bars are made in the same way: on stderr, on the main process only, and cleared when they are done. No bar is shown if
stderr is not a terminal (for example a log file), except in notebooks, nor inside `hidden_bars`.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils.logging import set_tqdm_hook

from hf_embed.distributed import is_main_process

DELAY = 3  # seconds; a library that loads or writes for a shorter time shows no bar
_hidden: list[bool] = []  # the argument of each `hidden_bars` that is active


def bars_shown() -> bool:
    """Return whether this process shows bars: it is the main process, in a terminal or notebook, and bars are not hidden."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_main_process() and (terminal or "ipykernel" in sys.modules) and not any(_hidden)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, desc: str | None = None, total: int | None = None, unit: str = "it"
) -> tqdm:
    """Return a bar around `iterable`, or a bar of `total` steps that the caller advances by `update`.

    The module docstring says when a bar is shown.
    """
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, disable=not bars_shown(), dynamic_ncols=True)


def duration(seconds: float) -> str:
    """Format a duration for people.

    >>> duration(137.1)
    '2 min 17 s'
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


@contextlib.contextmanager
def hidden_bars(hidden: bool = True) -> Iterator[None]:
    """Show no progress bars inside the `with` block, if `hidden`."""
    _hidden.append(hidden)
    try:
        yield
    finally:
        _hidden.pop()


@contextlib.contextmanager
def hidden_messages(parts: Iterable[str], *loggers: str) -> Iterator[None]:
    """Hide the messages of some loggers that contain one of `parts`, inside the `with` block."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in parts)

    found = [logging.getLogger(name) for name in loggers]
    for each in found:
        each.addFilter(wanted)
    try:
        yield
    finally:
        for each in found:
            each.removeFilter(wanted)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Show transformers' bars for loading weights and writing shards only if they take long. Downloads are not affected.

    Also hide its table of unused and missing weights: a loaded encoder does not use the head of a language model, and
    `hf_embed.checkpoint.load` checks what is missing.
    """

    def calm(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return bar(*args, **(kwargs | {"delay": DELAY, "leave": False, "disable": not bars_shown()}))

    before = set_tqdm_hook(calm)
    try:
        with hidden_messages(["LOAD REPORT"], "transformers.modeling_utils"):
            yield
    finally:
        set_tqdm_hook(before)


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Hide all that libraries print and log inside a `with` block. This is for results that are checked afterwards."""
    disabled, printed = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            with hidden_bars(), quiet_libraries():  # a bar of a notebook is not printed, so it is hidden in another way
                yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def table_bars() -> Iterator[None]:
    """Show the bars of `datasets`, for example those of `Dataset.map`, only if this process shows bars."""
    hide = not bars_shown() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
