"""Work that goes on where it was stopped: each piece of it is a file, made once, by one of the ranks.

    OUTPUT.work/
        identity            what the pieces depend on: the model, the texts, the settings
        000000.npy          a piece
        000000.npy.xxh3     its size and hash: a piece that is not as it was written is made again
        .saving-...         one that is being made; it is renamed when it is whole

The folder lies beside the output, and goes when the output is whole.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hf_embed.disk import check_file
from hf_embed.distributed import get_rank, get_world_size
from hf_embed.errors import InputError
from hf_embed.progress import progress_bar
from hf_embed.ranks import claim_folder
from hf_embed.read_files import read_text
from hf_embed.safe_files import is_sealed, release, remove_leftovers, seal, write_text, writing


def work_folder(output: Path) -> Path:
    """Return where the work on a file is kept.

    Raises:
        InputError: the file is there, unless the work is too: then a run was killed that had but to remove it. Or it cannot be
            written.
    """
    work = output.with_name(output.name + ".work")
    if output.exists() and not work.is_dir():
        raise is_there(output)
    check_file(output, "the output")
    return work


def is_there(output: Path) -> InputError:
    """Return the error about an output that is there."""
    return InputError(f"{output}: is there already; remove it or name another file")


def digest(*lists: Iterable[str]) -> str:
    """Return a hash of lists of texts."""
    hashed = hashlib.blake2b(digest_size=8)
    for texts in lists:
        for text in texts:
            hashed.update(text.encode() + b"\0")
        hashed.update(b"\1")
    return hashed.hexdigest()


def claim(folder: Path, identity: str) -> None:
    """Take a work folder that is new, or was left by a run of the same identity. Raises InputError for that of another.

    No other process can take it until this one ends.
    """
    claim_folder(folder)
    path = folder / "identity"
    if path.is_file() and read_text(path) != identity:
        raise InputError(
            f"{folder}: left by a run with another model or other texts or settings; remove the folder to start anew"
        )
    barrier()
    if get_rank() == 0:
        write_text(path, identity)
    barrier()


def remove_work(folder: Path) -> None:
    """Remove a work folder, whose output is whole; another process may then take one of its name. On one rank."""
    shutil.rmtree(folder)
    release(folder)


def make_files(folder: Path, ending: str, items: int, size: int, make: Callable[[range, Path], None], title: str) -> list[Path]:
    """Make a file for every `size` of `items` items: those that are there are kept, and the ranks share the others.

    Args:
        folder: where the files are; each is written under another name, renamed when it is whole, and sealed.
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
    missing = [i for i, path in enumerate(paths) if not is_sealed(path)][rank::ranks]
    barrier()  # nobody writes before everyone has looked
    if rank == 0:
        remove_leftovers(folder)
    barrier()
    with progress_bar(total=sum(len(parts[i]) for i in missing), desc=title, unit="text") as bar:
        for i in missing:
            with writing(paths[i]) as aside:
                make(parts[i], aside)
            seal(paths[i])
            bar.update(len(parts[i]))
    barrier()
    return paths


def barrier() -> None:
    """Wait until every rank is here."""
    if get_world_size() > 1:
        torch.distributed.barrier()
