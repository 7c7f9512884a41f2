"""The command `hf-embed`: every recipe by its name, from any folder.

hf-embed                                  # the recipes
hf-embed sup-simcse --help
hf-embed sup-simcse --train_file nli.csv --output_dir outputs/mine
"""

import ast
import difflib
import importlib
import sys

import hf_embed
from hf_embed.entry import CONSOLE, PACKAGE, announce, recipes_folder
from hf_embed.errors import InputError


def recipes() -> dict[str, str]:
    """Return the first line of what each recipe says of itself, by the name that the command has for it."""
    found, folder = {}, recipes_folder()
    for path in sorted(folder.glob("*.py")) if folder is not None else []:
        if path.stem != "__init__":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = docstring.splitlines()[0]
    return found


def listing() -> str:
    """Return the list of the recipes, a line for each."""
    known = recipes()
    width = max(map(len, known), default=0)
    lines = [f"  {name:{width}}  {line}" for name, line in known.items()]
    return "\n".join([f"{CONSOLE} RECIPE [FLAGS]; {CONSOLE} RECIPE --help lists the flags of one:", "", *lines])


def find_recipe(word: str) -> str:
    """Return the name of a recipe. Raises InputError for a name that there is not."""
    name = word.replace("_", "-")
    known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise InputError(f"there is no recipe '{word}'{hint}; {CONSOLE} lists them")
    return name


def main() -> None:
    """Run `hf-embed`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help", "list"):
        print(listing())
        return
    if sys.argv[1] == "--version":
        print(f"hf_embed {hf_embed.__version__}")
        return
    try:
        name = find_recipe(sys.argv[1])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    announce(hf_embed.__version__)
    from hf_embed.kit.cli import run  # which imports PyTorch

    sys.argv = [f"{CONSOLE} {name}", *sys.argv[2:]]
    run(importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}").main)
