"""Tables that `datasets` keeps on disk: made once, and taken again only where they are byte for byte as they were written.

A damaged table could hold other tokens, or fewer rows, without a word. So each has its size and hash beside it, and is made
again where they do not agree: after a crash of the machine, for one, or in a cache that an earlier version has written.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, Features, is_caching_enabled
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher, generate_random_fingerprint

from hf_embed.disk import ASIDE, check_folder, disk_errors
from hf_embed.distributed import is_main_process
from hf_embed.library_internals import fingerprint_of, set_fingerprint
from hf_embed.safe_files import is_sealed, put, remove_folder, seal, seal_of, writing

logger = logging.getLogger(__name__)

TRUNCATED = "Expected to be able to read"  # is in the error about a table that is
OLD = 24 * 3600  # seconds since the last write to a file that nobody writes any more


def cache_folder() -> Path:
    """Return where tables of this package are kept, a folder in the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE, "hf_embed")


def check_cache() -> None:
    """Raise InputError where no table is in the cache yet, and none can be written there."""
    if not cache_folder().is_dir():
        check_folder(cache_folder(), "HF_DATASETS_CACHE, the cache of datasets:")


def cached_table(identity: str, features: Features, write: Callable[[ArrowWriter], None]) -> Dataset:
    """Return the rows of a table in the cache, which is made where there is none of this identity.

    Args:
        identity: what the rows depend on, a hash.
        features: the columns.
        write: writes the rows.
    """
    path = cache_folder() / f"{identity}.arrow"
    if not found(path):
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_old(path.parent)
            with writing(path) as aside, ArrowWriter(features=features, path=str(aside)) as writer:
                write(writer)
                writer.finalize()
            seal(path)
    loaded = Dataset.from_file(str(path))
    set_fingerprint(loaded, identity)
    return loaded


def cached_map(rows: Dataset, function: Callable[..., Any], **settings: Any) -> Dataset:
    """Return `rows.map(function, **settings)`, of a cache that is checked.

    The cache lies beside the file that the rows are in, as that of `datasets` does or, where nothing can be written there, in
    the cache of `datasets`. Rows in memory, and those of a process whose caching is disabled, have none.
    """
    if not rows.cache_files or not len(rows) or not is_caching_enabled():
        with disk_errors():
            return rows.map(function, **settings)
    beside = Path(rows.cache_files[0]["filename"]).parent
    folder = beside if os.access(beside, os.W_OK) else cache_folder()
    identity = identity_of(rows, function, settings)
    path = folder / f"cache-{identity}.arrow"
    named = {"new_fingerprint": identity, **settings}
    if not found(path):
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            remove_old(folder)
            with TemporaryDirectory(prefix=ASIDE, dir=folder) as new:  # `map` leaves its own files there, where it fails
                made = Path(new, "rows.arrow")
                rows.map(function, cache_file_name=str(made), load_from_cache_file=False, **named)
                put(made, path)
            seal(path)
    return rows.map(function, cache_file_name=str(path), load_from_cache_file=True, **named)


def checked_load(path: str, **settings: Any) -> Any:
    """Return `datasets.load_dataset(path, **settings)`, whose tables are made again where they are damaged."""
    with disk_errors(datasets.config.HF_DATASETS_CACHE):
        try:
            rows = datasets.load_dataset(path, **settings)
            whole = all(found(file) for file in files_of(rows) if seal_of(file).is_file())
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and TRUNCATED not in str(error):
                raise
            whole = False
        if not whole:
            rows = datasets.load_dataset(path, download_mode="reuse_cache_if_exists", **settings)
        for file in files_of(rows):
            if os.access(file.parent, os.W_OK) and not (whole and seal_of(file).is_file()):
                seal(file)
    return rows


def files_of(rows: Any) -> list[Path]:
    """Return the files in which the tables of rows lie; none for a stream, for example."""
    return [Path(file["filename"]) for file in rows.cache_files] if isinstance(rows, Dataset) else []


def identity_of(rows: Dataset, function: Callable[..., Any], settings: dict[str, Any]) -> str:
    """Return a hash of rows and of what is made of them; another one each time, where a function cannot be hashed."""
    try:
        named = sorted((name, value) for name, value in settings.items() if name != "desc")
        return Hasher.hash([fingerprint_of(rows), Hasher.hash(function), Hasher.hash(named)])
    except Exception:  # of pickling whatever the function holds
        return generate_random_fingerprint()


def found(path: Path) -> bool:
    """Return whether a table is in the cache as it was written; say it where it is another one now."""
    if is_sealed(path):
        return True
    if path.is_file() and seal_of(path).is_file() and is_main_process():
        logger.warning(f"{path}: damaged since it was written; it is made anew")
    return False


def remove_old(folder: Path) -> None:
    """Remove what killed processes have left half-written in a cache, which other processes may be writing to."""
    for path in folder.glob(f"{ASIDE}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(part.stat().st_mtime for part in [path, *path.glob("*")]) > OLD:
                remove_folder(path) if path.is_dir() else path.unlink()
