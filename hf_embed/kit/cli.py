"""What recipes share on the command line: flags from dataclasses, `--config FILE.yaml`, and errors in one line."""

import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_embed.data.yaml_files import read_yaml
from hf_embed.errors import InputError, RankError, masked

logger = logging.getLogger(__name__)

PATIENCE = 10  # seconds
FROM_HAND = "trust_remote_code"  # no file may give this permission
FULL = (errno.ENOSPC, errno.EDQUOT)


def parse(dataclasses_: list[type], preset: Callable[[list[str]], str | None] | None = None, argv: list[str] | None = None):
    """Instances of the dataclasses from the command line.

    `--config FILE.yaml` gives values for flags; a flag on the command line overrides the file. `preset` names the file to
    take where the user gives none, from the flags given. Raises InputError for an unknown flag or key.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config, argv = take_option(argv, "--config")
    parser = Parser(dataclasses_)
    if config is None and preset is not None:
        config = preset(given_flags(argv))
    if config is not None:
        argv = from_yaml(config, parser, given_flags(argv)) + argv
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    except InputError:
        raise
    except ValueError as error:  # transformers' own checks of its arguments
        raise InputError(" ".join(str(error).split())) from error
    if rest:
        raise InputError(f"unknown flag {rest[0]}{suggestion(rest[0].lstrip('-'), parser)}; --help lists the flags")
    return parsed


def model_first(argv: list[str]) -> list[str]:
    """Arguments whose first may be the model, without its flag."""
    return ["--model_name_or_path", *argv] if argv and not argv[0].startswith("-") else argv


class Parser(HfArgumentParser):
    def __init__(self, dataclasses_: list[type]):
        super().__init__(dataclasses_, allow_abbrev=False)
        for action in self._actions:
            action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)  # argparse would fill it in
            if action.dest == "resume_from_checkpoint":  # alone it means the newest checkpoint
                action.nargs, action.const = "?", "latest"

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the flags")


def take_option(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `option` (`--x V` or `--x=V`), and the arguments without it."""
    for i, word in enumerate(argv):
        if word == option:
            if i + 1 == len(argv):
                raise InputError(f"{option} needs a file")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith(option + "="):
            return word.removeprefix(option + "="), argv[:i] + argv[i + 1 :]
    return None, argv


def given_flags(argv: list[str]) -> list[str]:
    return [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]


def known(parser: HfArgumentParser) -> set[str]:
    return {field.name for kind in parser.dataclass_types for field in dataclasses.fields(kind) if field.init}


def suggestion(word: str, parser: HfArgumentParser) -> str:
    close = difflib.get_close_matches(word, known(parser), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def from_yaml(path: str, parser: HfArgumentParser, given: list[str]) -> list[str]:
    """The file's settings as command-line words, those left out that the user gave as flags."""
    settings = read_yaml(path, f"--config {path}") or {}
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected 'flag: value' lines")
    actions = {action.dest: action for action in parser._actions}
    words = []
    for key, value in settings.items():
        if str(key).replace("-", "_") == FROM_HAND:
            raise InputError(f"--config {path}: {FROM_HAND} lets a model's own code run; give it on the command line")
        if key not in known(parser):
            raise InputError(f"--config {path}: unknown key '{key}'{suggestion(str(key), parser)}")
        if key in given or f"no_{key}" in given or value is None:
            continue
        if value is False and actions[key].type is not string_to_bool:  # YAML reads a bare `no` as False
            value = "no" if "no" in (actions[key].choices or ()) else None
        if value is None or value == []:
            continue
        words += as_flags({key: value})
    return words


def as_flags(settings: dict) -> list[str]:
    """{"learning_rate": 1e-3, "dims": [64, 32]} -> ["--learning_rate=0.001", "--dims", "64", "32"]."""
    words = []
    for key, value in settings.items():
        if isinstance(value, list):
            if flags := [item for item in value if str(item).startswith("--")]:
                raise InputError(f"{key}: '{flags[0]}' looks like a flag; give it on the command line")
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def use_all_cores() -> None:
    """`accelerate launch` gives a process one CPU thread unless OMP_NUM_THREADS says otherwise: where no accelerator does the
    work, half a laptop or more would stand idle."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = psutil.cpu_count(logical=False) or os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@contextlib.contextmanager
def full_disk_in_one_line():
    """Files are written aside and then moved, so what was there before a disk was full is whole."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None and getattr(cause, "errno", None) not in FULL and "No space left" not in str(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        where = getattr(cause, "filename", None) or os.getcwd()
        raise InputError(f"the disk is full (at {where}); make room and run it again, or name another --output_dir") from error


class MaskedFormatter(logging.Formatter):
    """Messages, and the errors with them, without the secrets of addresses."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def show_masked(kind: type, error: BaseException, trace) -> None:
    """Print an error that nobody has caught, without the secrets of addresses."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Run a recipe; what the user gave wrong, and a full disk, end in one line and exit code 2. Secrets are never shown."""
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    sys.excepthook = show_masked
    main_process = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if main_process and "hub_token" in given_flags(sys.argv):
        logger.warning("--hub_token is seen in the list of processes and in the launcher's errors; HF_TOKEN=... before is not")
    use_all_cores()
    try:
        with full_disk_in_one_line():
            main()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # left to the interpreter's exit, its threads now and then abort the process
    except InputError as error:
        # The main process says what all have found. A launcher ends all processes when the first one ends, so the others leave
        # it the time to speak; if it goes on, they have found something of their own.
        if not main_process and not isinstance(error, RankError):
            time.sleep(PATIENCE)
        # From a dataloader's worker an error comes with a traceback, whose last line is the error.
        message = str(error).splitlines()[-1].removeprefix(f"{RankError.__module__}.{RankError.__name__}: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        # Not sys.exit: under accelerate other ranks end here too, and none should wait for another.
        raise SystemExit(2) from None
