"""The generator of docs/flags.md, the flags of every recipe: `python docs/site_flags.py > docs/flags.md`."""

import contextlib
import importlib.util
import inspect
import io
import re
import sys
from pathlib import Path

from hf_embed.entry import CONSOLE
from hf_embed.errors import InputError
from hf_embed.kit.cli import HelpShown, Parser
from hf_embed.kit.help import TRAINER, TRAINING, Section, sections

ROOT = Path(__file__).resolve().parent.parent
TOP = """# Recipes and their flags

Every recipe with every flag, as `--help` shows them. `python docs/site_flags.py > docs/flags.md` makes this page from the code.
Start a recipe as `hf-embed RECIPE`, or in a clone as `python recipes/RECIPE.py`. Words in capitals, such as MODEL, come first
and need no flag. `--config FILE` reads flags from a YAML file. A flag on the command line overrides the file.
"""
# Above the examples of a recipe: what tests/doc_blocks.py has to know of them.
NOT_RUN = "<!-- not run: the examples of --help; the tests check their flags -->"
OF_TRAINER = """
Recipes that train also accept all settings of
[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
in the installed version; `--help all` lists them. Each works as in a plain Trainer, or is refused with an error that names it.
"""


def parser_of(path: Path) -> tuple[str, Parser]:
    """Return the docstring of the recipe in a file, and the parser of its flags.

    The recipe runs with `--help`, which ends it as soon as it reads its flags.

    Raises:
        InputError: if the recipe ends without reading its flags.
    """
    spec = importlib.util.spec_from_file_location(f"flags_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types there
    argv, sys.argv = sys.argv, [f"{CONSOLE} {path.stem.replace('_', '-')}", "--help"]
    try:
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(io.StringIO()):
            module.main()
    except HelpShown as shown:
        return inspect.cleandoc(module.__doc__ or ""), shown.parser
    finally:
        sys.argv = argv
        del sys.modules[spec.name]
    raise InputError(f"{path}: the recipe ended without reading its flags; a recipe must read its flags first")


def table(section: Section) -> list[str]:
    """Return the flags under a heading as the lines of a Markdown table."""
    rows = [(flag.call.replace("|", "\\|"), flag.text.replace("|", "\\|")) for flag in section.flags]
    return ["| flag | what it does |", "|---|---|", *(f"| `{call}` | {text} |" for call, text in rows), ""]


def anchor(heading: str) -> str:
    """Return the name of a heading in links, as GitHub and the documentation site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def about_lines(about: str) -> list[str]:
    """Return the Markdown of what a recipe says of itself below its first line: paragraphs, and examples as code."""
    about = re.sub(r"python recipes/(\w+)\.py", lambda found: f"{CONSOLE} {found[1].replace('_', '-')}", about)
    lines = []
    for paragraph in about.split("\n\n")[1:]:
        code = inspect.cleandoc(f"\n{paragraph}") if paragraph.startswith("    ") else None
        lines += [paragraph, ""] if code is None else [NOT_RUN, "```bash", code, "```", ""]
    return lines


def page(folder: Path) -> str:
    """Return the text of docs/flags.md: first each recipe with its own flags, then the flags that several recipes share."""
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        name = path.stem.replace("_", "-")
        about, parser = parser_of(path)
        parts = [part for part in sections(parser.kinds, parser.actions, full=False) if not part.heading.startswith(TRAINER)]
        found[name] = about, parser.usage_words, parts
    users: dict[str, list[str]] = {}
    for name, (_, _, parts) in found.items():
        for part in parts:
            users.setdefault("\n".join(table(part)), []).append(name)
    lines, shared = [TOP, "| recipe | what it does |", "|---|---|"], {}
    lines += [f"| [{name}](#{name}) | {about.splitlines()[0]} |" for name, (about, _, _) in found.items()]
    lines.append("")
    for name, (about, words, parts) in found.items():
        usage = " ".join([CONSOLE, name, *words, "[FLAGS]"])
        lines += [f"## {name}", "", about.splitlines()[0], "", "```text", usage, "```", "", *about_lines(about)]
        others = []
        for part in parts:
            text = "\n".join(table(part))
            if len(users[text]) == 1:
                lines += [f"**{part.heading}**", "", text]
            else:
                shared[part.heading] = text
                others.append(f"- [{part.heading}](#{anchor(part.heading)})")
        if any(part.heading == TRAINING for part in parts):
            others.append(f"- [{TRAINER}](#{anchor(TRAINER)})")
        if others:
            lines += ["Flags that it shares with other recipes:", "", *others, ""]
    for heading, text in shared.items():
        lines += [f"## {heading}", "", text]
    return "\n".join([*lines, "## " + TRAINER, OF_TRAINER])


if __name__ == "__main__":
    print(page(ROOT / "recipes"), end="")
