"""How the user started this process, so that messages name recipes in the same way, and where the files of the recipes are.

Neither this module nor anything that it imports may import PyTorch, because the first line of a recipe is printed before
PyTorch is loaded.
"""

import importlib.util
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType

from hf_embed.errors import masked

CONSOLE = "hf-embed"  # the command that setup.cfg defines
PACKAGE = "hf_embed.recipes"
CPU_CONFIG = "recipes/accelerate/cpu_2.yaml"  # several CPU processes; for MULTI_CPU or --cpu, accelerate starts one
PRESET = "configs/sup_simcse_quickstart.yaml"  # a folder with this file is the folder of the recipes


def recipe_command(name: str) -> str:
    """Return the command line of a recipe, in the form in which the user started this process: "python recipes/push.py".

    In a user's own script, return the form that works in every folder: "hf-embed push".
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m`
    if spec is not None and spec.name.startswith(PACKAGE):
        return f"python -m {PACKAGE}.{name}"
    if by_console() or running_recipe() is None:
        return f"{CONSOLE} {name.replace('_', '-')}"
    return f"python recipes/{name}.py"


def by_console() -> bool:
    """Return whether this process was started as `hf-embed`."""
    return Path(sys.argv[0] if sys.argv else "").name.split(" ")[0] == CONSOLE


def running_recipe() -> ModuleType | None:
    """Return the module of the recipe that this process runs, or None for anything else, such as a user's own script."""
    if by_console():
        name = Path(sys.argv[0]).name.removeprefix(CONSOLE).strip().replace("-", "_")
        return sys.modules.get(f"{PACKAGE}.{name}")
    main = sys.modules["__main__"]
    folder = Path(getattr(main, "__file__", None) or "").resolve().parent
    return main if folder.name == "recipes" and (folder / PRESET).is_file() else None


def starts_recipe() -> bool:
    """Return whether this process is starting a recipe, as a script or by `python -m`. The first imports may call this."""
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module
        return any(word.startswith(f"{PACKAGE}.") for word in sys.orig_argv[1:])
    return not by_console() and running_recipe() is not None


def is_first_process() -> bool:
    """Return whether this process prints messages: it has rank 0 and is not a worker."""
    return os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nothing has caught, without the secrets in URLs.

    For Ctrl-C, print one line, because its traceback is of no interest.
    """
    if not issubclass(kind, KeyboardInterrupt):
        print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
    elif is_first_process():
        print("interrupted", file=sys.stderr, flush=True)


def announce(version: str) -> None:
    """Print the first line of a recipe to stderr on the main process, because the next imports take seconds.

    Errors that nothing catches are printed by `show_error` from now on.
    """
    sys.excepthook = show_error
    if is_first_process():
        print(f"hf_embed {version}: loading PyTorch and transformers ...", file=sys.stderr, flush=True)


def recipes_folder() -> Path | None:
    """Return the folder of the recipes, installed with the package or in this clone, or None if there is neither."""
    clone = Path(__file__).resolve().parent.parent / "recipes"
    spec = importlib.util.find_spec(PACKAGE)
    installed = map(Path, (spec and spec.submodule_search_locations) or [])
    return next((folder for folder in [*installed, clone] if (folder / "configs").is_dir()), None)


def shipped(path: str) -> str:
    """Return `path`. If it begins with recipes/ and does not exist, return the file that ships with the recipes instead.

    So "recipes/configs/sup_simcse_bert_base.yaml" is found from any folder.
    """
    folder, words = recipes_folder(), Path(path).parts
    if folder is None or not words or words[0] != "recipes" or os.path.exists(path):
        return path
    file = folder.joinpath(*words[1:])
    return str(file) if file.is_file() else path
