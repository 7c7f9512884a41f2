"""Tables that `datasets` keeps on disk. A cached table is used again only if it is byte for byte what was written.

It must also have been written by the same versions of this package, transformers and tokenizers.

A damaged table could hold other tokens or fewer rows without any error message. So the size and hash of each table are stored
beside it, and a table that does not match them is made again. This happens, for example, after the machine crashed, or when
an earlier version of this package wrote the cache.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
import tokenizers
import transformers
from datasets import Dataset, Features, is_caching_enabled
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher, generate_random_fingerprint

from hf_embed.disk import SAVING, check_folder, disk_errors
from hf_embed.library_internals import fingerprint_of, set_fingerprint
from hf_embed.progress import table_bars
from hf_embed.safe_files import hash_of, is_sealed, put, remove_folder, seal, seal_of
from hf_embed.version import __version__

logger = logging.getLogger(__name__)

TRUNCATED = "Expected to be able to read"  # part of the error message about a truncated table
FEW_ROWS = 100_000  # the results for fewer rows in memory stay in memory too; each process computes them again
OLD = 24 * 3600  # seconds without a write, after which a temporary file counts as abandoned


def cache_folder() -> Path:
    """Return the folder for the tables of this package, inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE, "hf_embed")


def check_cache() -> None:
    """Raise InputError if the folder for cached tables does not exist yet and cannot be created."""
    if not cache_folder().is_dir():
        check_folder(cache_folder(), "the cache folder of datasets (HF_DATASETS_CACHE)")


def cached_table(identity: str, features: Features, write: Callable[[ArrowWriter], None]) -> Dataset:
    """Return the rows of a cached table. Write the table first if the cache has none with this identity.

    Args:
        identity: a hash of everything that the rows depend on.
        features: the columns.
        write: a function that writes the rows.
    """

    def write_to(path: Path) -> None:
        with ArrowWriter(features=features, path=str(path)) as writer:
            write(writer)
            writer.finalize()

    identity = hashlib.sha256(repr([identity, *versions()]).encode()).hexdigest()[:32]
    return stored(cache_folder(), "", identity, write_to)


def cached_map(rows: Dataset, function: Callable[..., Any], anew: bool = False, **settings: Any) -> Dataset:
    """Return `rows.map(function, **settings)`, and check the cached result before it is used again.

    The result is stored beside the file that holds the rows, as `datasets` does it. If that folder is not writable, or if the
    rows are in memory, the result goes into the cache of `datasets`. Nothing is cached for fewer than `FEW_ROWS` rows in
    memory, or in a process that has disabled caching.

    With `anew`, the result is made in each call, always in the cache of `datasets`. This is for a function whose results may
    change although its hash does not. The fingerprint of the result is the hash of its content, so tables made from it can be
    cached.
    """
    if len(rows) < (1 if rows.cache_files else FEW_ROWS) or not is_caching_enabled():
        named = {"new_fingerprint": generate_random_fingerprint(), **settings}  # else `datasets` hashes the tokenizer
        with disk_errors():
            return rows.map(function, **named)
    beside = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else cache_folder()
    folder = cache_folder() if anew or not os.access(beside, os.W_OK) else beside
    identity = None if anew else identity_of(rows, function, settings)
    named = {"new_fingerprint": "not-used", "load_from_cache_file": False, **settings}
    return stored(folder, "cache-", identity, lambda path: rows.map(function, cache_file_name=str(path), **named))


def stored(folder: Path, prefix: str, identity: str | None, write: Callable[[Path], Any]) -> Dataset:
    """Return the table with this identity from a file in `folder`. Call `write` first if there is no such file.

    Without an identity, `write` is always called, and the hash of the file that it writes becomes the identity.
    """
    path = folder / f"{prefix}{identity}.arrow" if identity else folder
    if not identity or not found(path):
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            remove_old(folder)
            with TemporaryDirectory(prefix=SAVING, dir=folder) as new:  # if `map` fails, it leaves files behind
                made = Path(new, "rows.arrow")
                write(made)
                identity = identity or hash_of(made)
                put(made, path := folder / f"{prefix}{identity}.arrow")
            seal(path)
    loaded = Dataset.from_file(str(path))
    set_fingerprint(loaded, identity)
    return loaded


def checked_load(path: str, **settings: Any) -> Any:
    """Return `datasets.load_dataset(path, **settings)`. Make its cached tables again if they are damaged."""
    with disk_errors(datasets.config.HF_DATASETS_CACHE), table_bars():
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
    """Return the files that hold the tables of `rows`. The list is empty for a stream, for example."""
    return [Path(file["filename"]) for file in rows.cache_files] if isinstance(rows, Dataset) else []


def identity_of(rows: Dataset, function: Callable[..., Any], settings: dict[str, Any]) -> str:
    """Return a hash of the rows, the function, the settings and the versions, or a random one if the function has no hash."""
    try:
        named = sorted((name, value) for name, value in settings.items() if name != "desc")
        return Hasher.hash([fingerprint_of(rows), Hasher.hash(function), Hasher.hash(named), *versions()])
    except Exception:  # pickling the objects that the function holds can raise anything
        return generate_random_fingerprint()


def versions() -> list[str]:
    """Return the versions of the code that makes tables. The hash of a function covers only the names of what it calls."""
    return [__version__, transformers.__version__, tokenizers.__version__]


def found(path: Path) -> bool:
    """Return whether the cache holds the table as it was written. Log a warning if the table has changed since then."""
    if is_sealed(path):
        return True
    if path.is_file() and seal_of(path).is_file():
        logger.warning(f"{path}: the cached file has changed since it was written; it will be made again")
    return False


def remove_old(folder: Path) -> None:
    """Remove incomplete files that killed processes left in a cache. Keep recent files: other processes may be writing them."""
    for path in folder.glob(f"{SAVING}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(part.stat().st_mtime for part in [path, *path.glob("*")]) > OLD:
                remove_folder(path) if path.is_dir() else path.unlink()
