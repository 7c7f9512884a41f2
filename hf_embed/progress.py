"""Progress bars, all made in one way: on stderr, on the main process, gone when they are done.

There is no bar where stderr is no terminal (a log file needs none), nor within `hidden_bars`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils.logging import set_tqdm_hook

from hf_embed.distributed import is_main_process

DELAY = 3  # seconds that a library may load or write without a bar
_hidden: list[bool] = []  # of the `hidden_bars` that are open


def bars_shown() -> bool:
    """Return whether this process shows bars: the main one, on a terminal or in a notebook."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_main_process() and (terminal or "ipykernel" in sys.modules) and not any(_hidden)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, desc: str | None = None, total: int | None = None, unit: str = "it"
) -> tqdm:
    """Return a bar around `iterable`, or one of `total` steps for `update`; see the module for where it is shown."""
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, disable=not bars_shown(), dynamic_ncols=True)


@contextlib.contextmanager
def hidden_bars(hidden: bool = True) -> Iterator[None]:
    """Show no bars for a while, if `hidden`."""
    _hidden.append(hidden)
    try:
        yield
    finally:
        _hidden.pop()


@contextlib.contextmanager
def calm_libraries() -> Iterator[None]:
    """Let transformers show its bars, of loading weights and writing shards, only where they take long; not of downloads."""

    def calm(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return bar(*args, **(kwargs | {"delay": DELAY, "leave": False, "disable": not bars_shown()}))

    before = set_tqdm_hook(calm)
    try:
        yield
    finally:
        set_tqdm_hook(before)


@contextlib.contextmanager
def table_bars() -> Iterator[None]:
    """Let `datasets` show its bars, of a table that is made of another, only where bars are shown."""
    hide = not bars_shown() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
