"""How the user has started this process: messages name recipes the same way; and the files that recipes ship with.

Nothing here, and nothing that is imported here, imports PyTorch: the first line of a recipe is printed before that.
"""

import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path
from types import ModuleType, TracebackType

CONSOLE = "hf-embed"  # the command that setup.cfg makes
PACKAGE = "hf_embed.recipes"
CPU_CONFIG = "recipes/accelerate/cpu_2.yaml"  # several CPU processes: of MULTI_CPU, or --cpu, accelerate starts a single one
PRESET = "configs/sup_simcse_quickstart.yaml"  # by which a folder of recipes is known


def recipe_command(name: str) -> str:
    """Return the command line of a recipe, in the form in which this process was started.

    >>> recipe_command("push")
    'python recipes/push.py'
    """
    if by_console():
        return f"{CONSOLE} {name.replace('_', '-')}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    if spec is not None and spec.name.startswith(PACKAGE):
        return f"python -m {PACKAGE}.{name}"
    return f"python recipes/{name}.py"


def by_console() -> bool:
    """Return whether this process was started as `hf-embed`."""
    return Path(sys.argv[0] if sys.argv else "").name.split(" ")[0] == CONSOLE


def running_recipe() -> ModuleType | None:
    """Return the module of the recipe that this process was started for; None in anything else, a user's own script for one."""
    if by_console():
        name = Path(sys.argv[0]).name.removeprefix(CONSOLE).strip().replace("-", "_")
        return sys.modules.get(f"{PACKAGE}.{name}")
    main = sys.modules["__main__"]
    folder = Path(getattr(main, "__file__", None) or "").resolve().parent
    return main if folder.name == "recipes" and (folder / PRESET).is_file() else None


def starts_recipe() -> bool:
    """Return whether this process is starting a recipe, as a script or by `python -m`: what it imports first may ask."""
    if sys.argv[:1] == ["-m"]:  # Python is looking for the module
        return any(word.startswith(f"{PACKAGE}.") for word in sys.orig_argv[1:])
    return not by_console() and running_recipe() is not None


def is_first_process() -> bool:
    """Return whether this is the process that speaks: no other rank, and no worker."""
    return os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nobody has caught; Ctrl-C is one line, for where it fell is of no interest."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif is_first_process():
        print("interrupted", file=sys.stderr, flush=True)


def announce(version: str) -> None:
    """Print the first line of a recipe to stderr on the main process: the imports that follow take seconds."""
    sys.excepthook = show_error
    if is_first_process():
        print(f"hf_embed {version}: loading PyTorch and transformers ...", file=sys.stderr, flush=True)


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
    if folder is None or not words or words[0] != "recipes" or os.path.exists(path):
        return path
    file = folder.joinpath(*words[1:])
    return str(file) if file.is_file() else path
