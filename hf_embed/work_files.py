"""Work that goes on where it was stopped: each piece of it is a file, made once, by one of the ranks.

    OUTPUT.work/
        identity            what the pieces depend on: the model, the texts, the settings
        000000.npy          a piece
        unfinished-...      one that is being made; it is renamed when it is whole

The folder lies beside the output, and goes when the output is whole.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hf_embed.distributed import get_rank, get_world_size
from hf_embed.errors import InputError
from hf_embed.progress import progress_bar
from hf_embed.read_files import read_text


def work_folder(output: Path) -> Path:
    """Return where the work on a file is kept. Raises InputError if the file is there."""
    if output.exists():
        raise InputError(f"{output}: is there already; remove it or name another file")
    return output.with_name(output.name + ".work")


def digest(*lists: Iterable[str]) -> str:
    """Return a hash of lists of texts."""
    hashed = hashlib.blake2b(digest_size=8)
    for texts in lists:
        for text in texts:
            hashed.update(text.encode() + b"\0")
        hashed.update(b"\1")
    return hashed.hexdigest()


def claim(folder: Path, identity: str) -> None:
    """Take a work folder that is new, or was left by a run of the same identity. Raises InputError for that of another."""
    path = folder / "identity"
    if path.is_file() and read_text(path) != identity:
        raise InputError(
            f"{folder}: left by a run with another model or other texts or settings; remove the folder to start anew"
        )
    barrier()
    if get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(identity)
    barrier()


def make_files(folder: Path, ending: str, items: int, size: int, make: Callable[[range, Path], None], title: str) -> list[Path]:
    """Make a file for every `size` of `items` items: those that are there are kept, and the ranks share the others.

    Args:
        folder: where the files are; each is written under another name, and renamed when it is whole.
        ending: of the files' names.
        items: how many items there are in all.
        size: how many of them a file has.
        make: `make(numbers, path)` writes the file of the items with these numbers.
        title: of the progress bar.

    Returns:
        All paths, on every rank, when all files are there.
    """
    rank, ranks = get_rank(), get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + size, items)) for start in range(0, items, size)]
    paths = [folder / f"{i:06d}{ending}" for i in range(len(parts))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()][rank::ranks]
    barrier()  # nobody writes before everyone has looked
    with progress_bar(total=sum(len(parts[i]) for i in missing), desc=title, unit="text") as bar:
        for i in missing:
            unfinished = folder / f"unfinished-{paths[i].name}"
            make(parts[i], unfinished)
            unfinished.rename(paths[i])
            bar.update(len(parts[i]))
    barrier()
    return paths


def barrier() -> None:
    """Wait until every rank is here."""
    if get_world_size() > 1:
        torch.distributed.barrier()
