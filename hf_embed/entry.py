"""How the user has started this process, so that messages name recipes the same way; and the files that recipes ship with."""

import importlib.util
import sys
from pathlib import Path

CONSOLE = "hf-embed"  # the command that setup.cfg makes
PACKAGE = "hf_embed.recipes"


def recipe_command(name: str) -> str:
    """Return the command line of a recipe, in the form in which this process was started.

    >>> recipe_command("push")
    'python recipes/push.py'
    """
    if Path(sys.argv[0]).name.split(" ")[0] == CONSOLE:
        return f"{CONSOLE} {name.replace('_', '-')}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    if spec is not None and spec.name.startswith(PACKAGE):
        return f"python -m {PACKAGE}.{name}"
    return f"python recipes/{name}.py"


def recipes_folder() -> Path | None:
    """Return the folder of the recipes that are installed with the package, or of this clone; None if there is neither."""
    clone = Path(__file__).resolve().parent.parent / "recipes"
    spec = importlib.util.find_spec(PACKAGE)
    installed = map(Path, (spec and spec.submodule_search_locations) or [])
    return next((folder for folder in [*installed, clone] if (folder / "configs").is_dir()), None)


def shipped(path: str) -> str:
    """Return `path`, or the file that the recipes ship with for one that begins with recipes/ and is not there.

    So "recipes/configs/sup_simcse_bert_base.yaml" is found from any folder.
    """
    folder, words = recipes_folder(), Path(path).parts
    if folder is None or not words or words[0] != "recipes" or Path(path).exists():
        return path
    file = folder.joinpath(*words[1:])
    return str(file) if file.is_file() else path
