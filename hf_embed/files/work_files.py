"""Work that can be resumed: each part of it is a file, which one of the ranks makes once.

    OUTPUT.work/
        identity            what the parts depend on: the model, the texts, the settings
        000000.npy          a part
        000000.npy.xxh3     its size and hash: a part that has changed since it was written is made again
        .saving-...         a part that is being made; it is renamed when it is complete

The folder is beside the output, and is removed when the output is complete.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hf_embed.distributed import check_same_on_ranks, gather_objects, get_rank, get_world_size
from hf_embed.errors import InputError, utf8
from hf_embed.files.disk import check_output_file
from hf_embed.files.safe_files import is_sealed, remove_leftovers, seal, write_text, writing
from hf_embed.progress import progress_bar
from hf_embed.ranks import writing_alone


def work_folder(output: Path) -> Path:
    """Return the folder that keeps the unfinished work on a file.

    Raises:
        InputError: if the file cannot be written, or if it exists without a work folder. A file with a work folder is allowed:
            then an earlier run was killed when it only had to remove the folder.
    """
    work = output.with_name(output.name + ".work")
    if output.exists() and not work.is_dir():
        raise already_exists(output)
    check_output_file(output, "the output")
    return work


def already_exists(output: Path) -> InputError:
    """Return the error for an output that already exists."""
    return InputError(f"{output} already exists; remove it, or give another file")


def digest(*lists: Iterable[str]) -> str:
    """Return a hash of lists of texts. Raise InputError if a text holds half of a character."""
    hashed = hashlib.blake2b(digest_size=8)
    for texts in lists:
        for text in texts:
            hashed.update(utf8(text) + b"\0")
        hashed.update(b"\1")
    return hashed.hexdigest()


@contextlib.contextmanager
def claimed(folder: Path, identity: str) -> Iterator[None]:
    """Claim a work folder that is new or comes from a run with the same identity. No other process can use it until the end.

    Raises:
        InputError: if another process uses the folder, if a run with another identity left it, or if the ranks' identities
            differ.
    """
    check_same_on_ranks("the texts, the model or the settings", identity)
    with writing_alone(folder):
        path = folder / "identity"
        if path.is_file() and path.read_bytes() != identity.encode():  # bytes, because a damaged file may be no text
            raise InputError(
                f"{folder} belongs to a run with another model or other texts or settings; remove it to start again"
            )
        barrier()
        if get_rank() == 0:
            write_text(path, identity)
        barrier()
        try:
            yield
        except InputError:  # the user may correct a flag: a run that has done no work leaves no claim
            if get_rank() == 0 and not any(each.is_file() for each in folder.rglob("*") if each != path):
                path.unlink(missing_ok=True)
            raise


def make_files(folder: Path, ending: str, items: int, size: int, make: Callable[[range, Path], None], title: str) -> list[Path]:
    """Make a file for every `size` of `items` items. Files that exist are kept, and the ranks share the others.

    Args:
        folder: the folder of the files. Each file is written under a temporary name, renamed when it is complete, and sealed.
        ending: the suffix of the file names.
        items: the total number of items.
        size: the number of items per file.
        make: `make(numbers, path)` writes the file of the items with these numbers.
        title: the title of the progress bar.

    Returns:
        All paths, on every rank, when all files exist.
    """
    rank, ranks = get_rank(), get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + size, items)) for start in range(0, items, size)]
    paths = [folder / f"{i:06d}{ending}" for i in range(len(parts))]
    missing = [i for i, path in enumerate(paths) if not is_sealed(path)][rank::ranks]
    barrier()  # no rank writes before all ranks have looked for files
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
    """Wait until every rank has called this function. On GPUs, `torch.distributed.barrier` would print a warning."""
    gather_objects(None)
