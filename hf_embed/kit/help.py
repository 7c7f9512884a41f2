"""The text of --help and the parts of docs/flags.md: the flags of a recipe under headings, its own flags first.

`--help` shows the flags of this package, and those flags of `transformers.TrainingArguments` that most runs use. `--help all`
shows all flags.
"""

import argparse
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, get_type_hints

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_embed.entry import PACKAGE, by_console, recipe_command, running_recipe

COLUMN = 30  # the column at which the text of a flag begins
# The settings of Trainer that most runs use, in the order in which --help shows them.
USUAL = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps",
    "lr_scheduler_type", "weight_decay", "bf16", "seed", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "logging_steps", "disable_tqdm", "use_cpu",
    "dataloader_num_workers", "gradient_accumulation_steps", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "hub_private_repo",
)  # fmt: skip
TRAINER = "Settings of transformers' Trainer"
TRAINING = "Settings of the training that Trainer does not have"
CONFIG = ("--config FILE", "YAML file of flags and their values. A flag on the command line overrides the file.")
HELP = ("--help [all]", "Show this text. With all, show every setting of Trainer too.")


class Flag(NamedTuple):
    """A flag as --help shows it."""

    call: str  # "--lora_r N"
    text: str


@dataclass
class Section:
    """A heading and the flags under it."""

    heading: str
    flags: list[Flag]


def heading_of(kind: type) -> str:
    """Return the first line of a dataclass's docstring, or the name of the class if it has no docstring of its own."""
    docstring = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    first = docstring.splitlines()[0] if docstring else ""
    return kind.__name__ if not first or first.startswith(f"{kind.__name__}(") else first.rstrip(".")


def metavar(name: str, action: argparse.Action, text: str) -> str:
    """Return the placeholder for the value of a flag: "FILE", "{a,b}", or "" for a flag without a value."""
    if action.metavar is not None:
        return str(action.metavar)
    if action.nargs == 0 or (action.nargs == "?" and action.const is True):
        return ""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    named = re.match(r"NAME=\w+", text)
    kinds: dict[Any, str] = {int: "N", float: "X", string_to_bool: "{true,false}"}
    endings = {"_file": "FILE", "_dir": "FOLDER"}
    by_name = next((word for ending, word in endings.items() if name.endswith(ending)), "TEXT")
    word = named[0] if named else kinds.get(action.type, by_name)
    if action.choices is not None:
        word = choices if len(choices) <= 40 else "NAME"
    return {"+": f"{word} ...", "?": f"[{word}]"}.get(str(action.nargs), word)


def default_text(field: dataclasses.Field, action: argparse.Action, text: str) -> str:
    """Return the default of a flag as the end of its text, or "" if the default is empty or the text mentions it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is True:
        return f" (default: yes; --no_{field.name} turns it off)"
    if value is dataclasses.MISSING and action.required:
        return " (required)"
    if value in (None, False, "", [], {}, (), dataclasses.MISSING) or "default" in text.lower():
        return ""
    shown = value.value if isinstance(value, Enum) else value
    return f" (default: {' '.join(map(str, shown)) if isinstance(shown, list | tuple) else shown})"


def flag_of(field: dataclasses.Field, action: argparse.Action, brief: bool = False) -> Flag:
    """Return a flag as --help shows it. With `brief`, keep only the first sentence of its text."""
    text = " ".join((field.metadata.get("help") or "").split())
    if action.choices is not None and metavar(field.name, action, text) == "NAME" and not brief:
        text += f" One of {', '.join(map(str, action.choices))}."
    if brief:
        text = re.split(r"(?<=[^.][.]) (?=[A-Z])", text)[0]
    if field.metadata.get("positional"):
        call = f"{action.metavar or field.name.upper()}, --{field.name}"
    else:
        call = f"--{field.name} {metavar(field.name, action, text)}".rstrip()
    return Flag(call, text + default_text(field, action, text))


def sections(kinds: Sequence[type], actions: dict[str, argparse.Action], full: bool) -> list[Section]:
    """Group the flags of dataclasses under headings. The settings of Trainer come last.

    Args:
        kinds: the dataclasses.
        actions: the argparse action of each flag, by its name without dashes.
        full: show all settings of Trainer, not only those in `USUAL`.
    """
    found, trainer, others = [], [], 0
    for kind in kinds:
        get_type_hints(kind)  # fails if an annotation of the recipe names an unknown type
        fields = [field for field in dataclasses.fields(kind) if field.name in actions]
        inherited = TrainingArguments.__dataclass_fields__ if issubclass(kind, TrainingArguments) else {}
        of_trainer = [field for field in fields if field.name in inherited and field.name not in kind.__annotations__]
        own = [field for field in fields if field not in of_trainer]
        own.sort(key=lambda field: (not field.metadata.get("positional"), field.name not in kind.__annotations__))
        if own:
            heading = TRAINING if inherited else heading_of(kind)
            found.append(Section(heading, [flag_of(field, actions[field.name]) for field in own]))
        usual = [field for field in of_trainer if full or field.name in USUAL]
        usual.sort(key=lambda field: USUAL.index(field.name) if field.name in USUAL else len(USUAL))
        trainer += [flag_of(field, actions[field.name], brief=not full) for field in usual]
        others += len(of_trainer) - len(usual)
    if trainer:
        more = f"; --help all shows the other {others}" if others else ""
        found.append(Section(f"{TRAINER}{more}", trainer))
    return found


def usage(positionals: Sequence[str]) -> str:
    """Return the general form of the running recipe's command line: "hf-embed push FOLDER REPO [FLAGS]"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = sys.argv[0] if by_console() else f"python {sys.argv[0]}"
    if spec is not None and spec.name.startswith(PACKAGE):
        start = f"python -m {spec.name}"
    return " ".join([start, *positionals, "[FLAGS]"])


def help_text(parser_usage: str, shown: Sequence[Section]) -> str:
    """Return the text of --help: the usage line, the docstring of the running recipe, and the flags."""
    recipe = running_recipe()
    about = (recipe.__doc__ or "").strip() if recipe is not None else ""
    about = re.sub(r"python recipes/(\w+)\.py", lambda found: recipe_command(found[1]), about)
    lines = [f"usage: {parser_usage}", "", *([about, ""] if about else [])]
    for section in [*shown, Section("Flags of every recipe", [Flag(*CONFIG), Flag(*HELP)])]:
        lines += [f"{section.heading}:", *(line for flag in section.flags for line in flag_lines(flag)), ""]
    return "\n".join(lines[:-1])


def flag_lines(flag: Flag) -> list[str]:
    """Return the lines of a flag, wrapped to the width of the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    text = textwrap.wrap(flag.text, width - COLUMN) or [""]
    call = f"  {flag.call}"
    if len(call) <= COLUMN - 2:
        text[0] = f"{call:{COLUMN}}{text[0]}"
        return [text[0].rstrip(), *(" " * COLUMN + line for line in text[1:])]
    return [call, *(" " * COLUMN + line for line in text if line)]
