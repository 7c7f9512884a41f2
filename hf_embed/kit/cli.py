"""The command line of all recipes: flags from dataclasses, `--config FILE.yaml`, and errors in one line."""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import psutil
import torch
import torch.distributed as dist
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_embed.data.yaml_files import read_yaml
from hf_embed.distributed import warn_on_main_only
from hf_embed.entry import CONSOLE, CPU_CONFIG, recipes_folder, show_error
from hf_embed.errors import InputError, RankError, masked
from hf_embed.files.disk import disk_errors
from hf_embed.forward.activations import caching_mode
from hf_embed.kit.help import help_text, sections, usage
from hf_embed.library_internals import CHECKPOINTING, parser_actions, values_of_words
from hf_embed.ranges import REQUIRED, setting  # noqa: F401 (recipes import both from here)
from hf_embed.ranks import PATIENCE, peers_in_one_line
from hf_embed.training.stop import Stopped

logger = logging.getLogger(__name__)

FROM_HAND = "trust_remote_code"  # a permission that the user must give on the command line, never in a file
SWITCHES = (string_to_bool, caching_mode)  # the types of flags that are true or false
SAYS_NO = ("dataset_config", "dropout", "language", "report_to")  # flags for which "no" is not the same as no value
# Names of flags in other programs, and our names for them. difflib would suggest no flag, or a wrong one.
ELSEWHERE = {
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "max_seq_length": "max_length",
    "output_path": "output_dir",
    "output": "output_dir",
    "train_data": "train_file",
    "scale": "temperature",
    "cached": "gradient_caching",
    "mini_batch_size": "chunk_tokens",
}

Settings = TypeVar("Settings")


class Parser(HfArgumentParser):
    """A parser for the flags of dataclasses. It raises InputError for a user's mistake."""

    def __init__(self, kinds: Sequence[type]):
        super().__init__([flag_class(kind) for kind in kinds], allow_abbrev=False)
        self.actions = {option[2:]: action for action in parser_actions(self) for option in action.option_strings}
        self.kinds = list(kinds)
        for action in self.actions.values():
            if action.dest == "resume_from_checkpoint":  # without a value, the flag means the newest checkpoint
                action.nargs, action.const = "?", "latest"
            elif action.dest == "gradient_caching":  # a switch that also has a word as its value
                action.type = caching_mode

    def error(self, message: str) -> NoReturn:
        """Raise an InputError with the message, which argparse itself would print before it exits."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # not both spellings of a flag, --max_steps/--max-steps
        raise InputError(f"{message}; --help lists the flags")

    @property
    def positionals(self) -> dict[str, str]:
        """The flags whose values may come first on the command line, with their names in messages: {"folder": "FOLDER"}."""
        fields = [field for kind in self.kinds for field in dataclasses.fields(kind) if field.metadata.get("positional")]
        return {field.name: str(self.actions[field.name].metavar or field.name.upper()) for field in fields}

    @property
    def usage_line(self) -> str:
        """The general form of the command line, for messages and --help."""
        return usage(self.usage_words)

    @property
    def usage_words(self) -> list[str]:
        """The positional words in the general form of the command line, optional ones in brackets: "MODEL", "[FILE ...]"."""
        shown = []
        for name, word in self.positionals.items():
            word = f"{word} ..." if self.actions[name].nargs == "+" else word
            shown.append(word if self.actions[name].required else f"[{word}]")
        return shown

    def help(self, full: bool = False) -> str:
        """Return the text of --help or, with `full`, of --help all."""
        return help_text(self.usage_line, sections(self.kinds, self.actions, full))

    def names(self) -> set[str]:
        """Return the names of the flags that a YAML file may set."""
        return {field.name for kind in self.dataclass_types for field in dataclasses.fields(kind) if field.init}

    def suggestion(self, word: str) -> str:
        """Return the end of a message that suggests a flag for a misspelled word, or "" if no flag is similar."""
        word = word.partition("=")[0].replace("-", "_")
        elsewhere = ELSEWHERE.get(word)
        close = [elsewhere] if elsewhere in self.names() else difflib.get_close_matches(word, [*self.names(), "help"], 1)
        return f" (did you mean '{close[0]}'?)" if close else ""


@dataclasses.dataclass(frozen=True)
class Flags:
    """The value of every flag, from the defaults, `--config` and the command line.

    `make` builds a settings object from these values.
    """

    parser: Parser
    values: dict[str, Any]
    given: frozenset[str] = frozenset()  # the names of the flags that the user gives, on the command line or in a file
    preset: Path | None = None  # the recipe's own file of further defaults, if it applies

    def make(self, kind: type[Settings]) -> Settings:
        """Make an instance of one of the dataclasses. Raises InputError if the dataclass refuses a value."""
        names = [field.name for field in dataclasses.fields(kind) if field.name in self.values]  # type: ignore[arg-type]
        try:
            return kind(**{name: copy.deepcopy(self.values[name]) for name in names})
        except InputError:
            raise
        except ValueError as error:  # raised by the checks of transformers' TrainingArguments
            raise InputError(str(error)) from error

    def override(self, **values: Any) -> "Flags":
        """Return a copy of the flags with some other values, which must have the types of the flags."""
        return dataclasses.replace(self, values=self.values | values)

    def override_as_given(self, values: dict[str, Any]) -> "Flags":
        """Return a copy of the flags with some other values, which are given as in a YAML file and are converted.

        Raises:
            InputError: if a flag is unknown or does not accept its value.
        """
        converted = {}
        for flag, value in values.items():
            action = self.parser.actions.get(flag)
            if action is None:
                raise InputError(f"unknown flag --{flag}={value}{self.parser.suggestion(flag)}; --help lists the flags")
            converted[action.dest] = convert(self.parser, action, value)
        return self.override(**converted)


def parse(kinds: Sequence[type], argv: list[str] | None = None) -> list[Any]:
    """Read the command line, and make an instance of each dataclass. See `read_flags`."""
    flags = read_flags(kinds, argv=argv)
    return [flags.make(kind) for kind in kinds]


def read_flags(
    kinds: Sequence[type], preset: Path | None = None, unless: Sequence[str] = (), argv: list[str] | None = None
) -> Flags:
    """Read the flags of the dataclasses `kinds` from the command line. Each field is a flag.

    `--config FILE.yaml` gives defaults, which replace those of a preset. A flag on the command line overrides both.

    Args:
        kinds: the dataclasses.
        preset: a YAML file of further defaults.
        unless: names of flags. If the user gives one of them, on the command line or in the file, the preset is not used.
        argv: the words of the command line. Default: those of this process.

    Raises:
        InputError: if a flag or a key of the file is unknown, or a value has the wrong type.
        HelpShown: if the command line asks for --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(kinds)
    show_help(parser, argv)
    config, argv = take_option(argv, "--config")
    argv = name_positionals(parser, argv)
    given = given_flags(argv)
    if config is not None:
        given += set_defaults(parser, with_home(config), f"--config {config}", given)
    if set(unless) & set(given):
        preset = None
    if preset is not None:
        set_defaults(parser, str(preset), f"the recipe's preset {preset}", given)
    check_positionals(parser, argv)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        if not rest[0].startswith("-") and "train_file" in parser.names() and Path(rest[0]).suffix:
            raise InputError(f"{rest[0]} has no flag before it; give --train_file {rest[0]} (--help lists the flags)")
        if rest[0] in parser.actions:
            raise InputError(f"{rest[0]} has no dashes before it; give --{rest[0]} (--help lists the flags)")
        raise InputError(f"unknown flag {rest[0]}{parser.suggestion(rest[0].lstrip('-'))}; --help lists the flags")
    return Flags(parser, {name: with_home(value) for name, value in vars(namespace).items()}, frozenset(given), preset)


def with_home(value: Any) -> Any:
    r"""Return a value, or a list of values, with the user's home folder in place of "~" in "~/PATH" and "NAME=~/PATH".

    A shell replaces it neither in a YAML file nor in --output_dir=~/mine. The shells of Windows never replace it, so "~\PATH"
    is replaced too.
    """
    if isinstance(value, list):
        return [with_home(each) for each in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"^([^=~]+=)?~(?=[/\\])", lambda found: f"{found[1] or ''}{Path.home()}", value)


def flag_class(kind: type) -> Any:
    """Convert `kind` to a dataclass that HfArgumentParser can read. A tuple becomes a list.

    The metadata of a field may hold:

        {"flag": False}           the field is not a flag
        {"positional": True}      the value may come first on the command line, without the flag
        {"metavar": "FOLDER"}     the name of the value in messages
    """
    hints, fields = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        annotation, read = hints[field.name], copy.copy(field)  # a copy, because the parser changes it
        read.metadata = MappingProxyType({key: value for key, value in field.metadata.items() if key != "positional"})
        if get_origin(annotation) is tuple:
            annotation, read.default = list[get_args(annotation)[0]], dataclasses.MISSING  # type: ignore[misc]
            read.default_factory = partial(list, field.default)
        if field.metadata.get("flag", True):
            fields.append((field.name, annotation, read))
    return dataclasses.make_dataclass(kind.__name__, fields)


class HelpShown(SystemExit):
    """The exit of a recipe after it has printed its flags. `parser` is the parser of these flags."""

    def __init__(self, parser: Parser):
        super().__init__(0)
        self.parser = parser


def show_help(parser: Parser, argv: list[str]) -> None:
    """Print the flags and raise HelpShown if the command line contains --help or --help all."""
    for i, word in enumerate(argv):
        if word in ("-h", "--help", "--help=all", "--help-all", "--help_all"):
            print(parser.help(full=word not in ("-h", "--help") or argv[i + 1 : i + 2] == ["all"]))
            raise HelpShown(parser)


def name_positionals(parser: Parser, argv: list[str]) -> list[str]:
    """Insert the names of the positional flags before their values.

    With the positional flags "folder" and "repo", `mine me/repo --private` becomes `--folder mine --repo me/repo --private`.
    If the last positional flag takes a list, it gets all further words.

    Raises:
        InputError: if there are more words than positional flags, or if one of these flags is also given by name.
    """
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, rest, known = argv[:count], argv[count:], parser.positionals
    more = words[len(known) :] if known and parser.actions[list(known)[-1]].nargs == "+" else []
    if known and len(words) > len(known) and not more:
        raise InputError(f"unexpected argument '{words[len(known)]}'; usage: {parser.usage_line}")
    named = []
    for (flag, shown), word in zip(known.items(), words):
        if flag in given_flags(rest):
            raise InputError(f"{shown} is given twice, as '{word}' and with --{flag}; usage: {parser.usage_line}")
        named += [f"--{flag}", word]
    return [*named, *more, *(rest if known else argv)]


def check_positionals(parser: Parser, argv: list[str]) -> None:
    """Raise InputError if a required positional value is missing."""
    given = given_flags(argv)
    missing = [word for name, word in parser.positionals.items() if parser.actions[name].required and name not in given]
    if missing:
        raise InputError(f"missing: {' and '.join(missing)}; usage: {parser.usage_line} (--help lists the flags)")


def take_option(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of `option` (`--x V` or `--x=V`), None if it is not given, and the other arguments.

    Raises:
        InputError: if the option is the last word, without a value, or is given twice.
    """
    places = [i for i, word in enumerate(argv) if word.partition("=")[0] == option]
    if not places:
        return None, argv
    if len(places) > 1:
        raise InputError(f"{option} is given twice; give a single file")
    before, (word, *after) = argv[: places[0]], argv[places[0] :]
    if "=" in word:
        return word.partition("=")[2], before + after
    if not after:
        raise InputError(f"{option} needs a file; give {option} FILE")
    return after[0], before + after[1:]


def given_flags(argv: list[str]) -> list[str]:
    """Return the names of the flags on a command line, without dashes: "output_dir" for --output-dir=mine."""
    return [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]


def set_defaults(parser: Parser, path: str, source: str, given: list[str]) -> list[str]:
    """Make the values of a YAML file the parser's defaults, except for the flags that the user gave. Return their names.

    Args:
        parser: gets the defaults.
        path: the YAML file.
        source: the name of the file in messages.
        given: the names of the flags that the user gave.

    Raises:
        InputError: if the file is not a table of known flags, if a flag does not accept its value, or if the file holds
            `trust_remote_code`.
    """
    settings, names = read_yaml(path, source) or {}, []
    if not isinstance(settings, dict):
        raise InputError(f"{source}: the file must hold lines of the form 'flag: value'")
    if "activation_checkpointing" in settings:  # as in the presets, also for an older transformers
        settings[CHECKPOINTING] = settings.pop("activation_checkpointing")
    for key, value in settings.items():
        if str(key).replace("-", "_") == FROM_HAND:
            raise InputError(f"{source}: {FROM_HAND} allows a model's own code to run; give it on the command line")
        action = parser.actions.get(key)
        if action is None or key not in parser.names():
            raise InputError(f"{source}: unknown key '{key}'{parser.suggestion(str(key))}")
        without = value is False and action.type not in SWITCHES and action.default in (None, []) and key not in SAYS_NO
        if not without and value not in (None, []) and not {key, f"no_{key}"} & set(given):
            parser.set_defaults(**{key: convert(parser, action, value)})
            action.required = False
            names.append(key)
    return names


def convert(parser: Parser, action: argparse.Action, value: object) -> object:
    """Convert a value from a YAML file to the type of the flag. Raises InputError if the flag does not accept the value."""
    items = value if isinstance(value, list) else [value]
    for item in items if items is value else []:
        if str(item).startswith("--"):
            raise InputError(f"{action.dest}: '{item}' looks like a flag; give it on the command line")
    try:
        if action.nargs == 0:  # a flag without a value, for example --no_FLAG
            raise argparse.ArgumentError(action, f"ignored explicit argument {str(value)!r}")
        if action.nargs != "+" and len(items) != 1:
            raise argparse.ArgumentError(action, "expected one argument")
        return values_of_words(parser, action, [word_of(action, item) for item in items])
    except argparse.ArgumentError as error:
        parser.error(str(error))


def word_of(action: argparse.Action, value: object) -> str:
    """Return a value from a YAML file as the command line has it."""
    if value is False and action.type not in SWITCHES:
        return "no"  # YAML reads a bare `no` as False
    return json.dumps(value) if isinstance(value, dict) else str(value)


def use_all_cores() -> None:
    """Use all CPU cores in a process of `accelerate launch` if there is no accelerator.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless the user sets it. With one thread per process, half or more of the
    cores of a laptop would be idle. Several processes of a machine share its cores equally.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check_processes() -> None:
    """Check that accelerate has started as many processes as the user asked for.

    On CPUs, accelerate starts a single process even if `--num_processes` or a configuration with MULTI_CPU asks for several,
    and prints no warning. In this case, MASTER_ADDR is set in this process but not in the launcher, and WORLD_SIZE, the number
    of processes, is not set.

    Raises:
        InputError: if accelerate was asked for several processes and started one.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")):  # started by mpirun
        return
    try:
        of_launcher = psutil.Process().parent()
        asked = of_launcher is not None and "MASTER_ADDR" not in of_launcher.environ()
    except psutil.Error:
        return
    if asked:
        folder = recipes_folder()
        path = CPU_CONFIG if folder is None or folder.parent.samefile(os.getcwd()) else folder / "accelerate" / "cpu_2.yaml"
        raise InputError(
            "accelerate started one process although several were requested (it does this on CPUs); start them with "
            f"accelerate launch --config_file {path} --num_processes N, or with {CONSOLE} launch --num_processes N RECIPE"
        )


class MaskedFormatter(logging.Formatter):
    """A log formatter that removes the secrets in URLs from messages and their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a message, and remove secrets from it."""
        return masked(super().format(record))


@contextlib.contextmanager
def speaking_in_turn(main_process: bool) -> Iterator[None]:
    """Give the main process time to report an error that all processes have found.

    A launcher ends all processes when the first one ends. Therefore the other processes wait before they report an error. If
    the main process has found the same error, it reports it during this time. If not, they report their own after the wait.
    """
    try:
        yield
    except Exception as error:
        if not main_process and not isinstance(error, RankError):
            time.sleep(PATIENCE)
        raise


def end_group() -> None:
    """End the process group. Otherwise NCCL warns of resources that it could not free."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[[], object]) -> None:
    """Run a recipe.

    A mistake of the user or a full disk ends the recipe with one line and exit status 2. If the program that reads the output
    has ended, the recipe ends without a message. Secrets are never printed.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for library in ("datasets", "huggingface_hub"):  # their own handlers would print each message a second time, with secrets
        logging.getLogger(library).handlers.clear()
    sys.excepthook = show_error
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file on Windows cannot hold every character of a user's texts
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")  # as all files are read, also on Windows
    main_process = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if main_process and "hub_token" in given_flags(sys.argv):
        logger.warning(
            "--hub_token is visible in the process list and in the launcher's error messages; set the variable HF_TOKEN instead"
        )
    warn_on_main_only()
    use_all_cores()
    try:
        with speaking_in_turn(main_process), disk_errors(), peers_in_one_line():
            check_processes()
            main()
            sys.stdout.flush()
        end_group()
    except Stopped:
        end_group()  # all ranks have stopped, so no rank has to wait
        raise
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the exit
            raise SystemExit(128 + 13) from None  # 13 is SIGPIPE, which Windows does not have
        raise
    except InputError as error:
        # An error in a worker of the dataloader arrives as a traceback. Its last line is the error.
        message = str(error).splitlines()[-1].removeprefix(f"{RankError.__module__}.{RankError.__name__}: ")
        with contextlib.suppress(OSError):  # stderr may be a file on the full disk
            print(f"error: {message}", file=sys.stderr, flush=True)
        # The process group is not ended here: other ranks end here too, and no rank should wait for another.
        raise SystemExit(2) from None
