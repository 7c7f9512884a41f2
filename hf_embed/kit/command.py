"""The command `hf-embed`, which runs every recipe by its name from any folder.

hf-embed                                  # lists the recipes
hf-embed sup-simcse --help
hf-embed sup-simcse --train_file nli.csv --output_dir outputs/mine
hf-embed launch --config_file recipes/accelerate/ddp_8gpu.yaml sup-simcse --train_file nli.csv
"""

import ast
import difflib
import importlib
import signal
import sys

import hf_embed
from hf_embed.entry import CONSOLE, PACKAGE, announce, recipes_folder
from hf_embed.errors import InputError

LAUNCH = "launch"  # a command that is not a recipe


def recipes() -> dict[str, str]:
    """Return the first line of each recipe's docstring by the name of the recipe, for example "sup-simcse"."""
    found, folder = {}, recipes_folder()
    for path in sorted(folder.glob("*.py")) if folder is not None else []:
        if path.stem != "__init__":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = docstring.splitlines()[0]
    return found


def listing() -> str:
    """Return the text that lists the recipes, one on each line."""
    known = recipes()
    width = max(map(len, known), default=0)
    lines = [f"  {name:{width}}  {line}" for name, line in known.items()]
    return "\n".join([
        f"{CONSOLE} RECIPE [FLAGS] runs a recipe; {CONSOLE} RECIPE --help lists its flags. The recipes:", "", *lines, "",
        f"{CONSOLE} {LAUNCH} [FLAGS OF accelerate launch] RECIPE [FLAGS] runs a recipe in several processes.",
    ])  # fmt: skip


def find_recipe(word: str) -> str:
    """Return the name of a recipe, with hyphens. Raises InputError if there is no such recipe."""
    name = word.replace("_", "-")
    known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise InputError(f"there is no recipe '{word}'{hint}; {CONSOLE} lists the recipes")
    return name


def start_several(words: list[str]) -> None:
    """Run a recipe in several processes.

    Args:
        words: the flags of `accelerate launch`, the name of the recipe, and the flags of the recipe.

    Raises:
        InputError: if no recipe is named.
    """
    if words and not words[0].startswith("-"):
        find_recipe(words[0])
    known = recipes()
    place = next((i for i, word in enumerate(words) if word.replace("_", "-") in known), None)
    if place is None:
        raise InputError(
            f"no recipe is given; give {CONSOLE} {LAUNCH} --config_file FILE RECIPE [FLAGS] ({CONSOLE} lists the recipes)"
        )
    print(f"hf_embed {hf_embed.__version__}: starting the processes ...", file=sys.stderr, flush=True)
    from hf_embed.kit.launch import launch  # imports PyTorch, which is slow

    launch(words[:place], words[place].replace("-", "_"), words[place + 1 :])


def main() -> None:
    """Run the command `hf-embed`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help", "list"):
        if hasattr(signal, "SIGPIPE"):  # not on Windows
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `hf-embed | head` ends without a message
        print(listing())
        return
    if sys.argv[1] == "--version":
        print(f"hf_embed {hf_embed.__version__}")
        return
    try:
        if sys.argv[1] == LAUNCH:
            start_several(sys.argv[2:])
            return
        name = find_recipe(sys.argv[1])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    announce(hf_embed.__version__)
    from hf_embed.kit.cli import run  # imports PyTorch, which is slow

    sys.argv = [f"{CONSOLE} {name}", *sys.argv[2:]]
    run(importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}").main)
