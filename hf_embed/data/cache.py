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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
import tokenizers
import transformers
import xxhash
from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import Hasher, generate_random_fingerprint

from hf_embed.files.disk import SAVING, check_folder, disk_errors
from hf_embed.files.safe_files import hash_of, is_sealed, put, remove, seal, seal_of
from hf_embed.library_internals import indices_of
from hf_embed.progress import table_bars
from hf_embed.version import __version__

logger = logging.getLogger(__name__)

FEW_ROWS = 100_000  # the results for fewer rows in memory stay in memory too; each process computes them again
HASHED = 10_000  # rows that are hashed at a time
OLD = 24 * 3600  # seconds without a write, after which a temporary file counts as abandoned


def cache_folder() -> Path:
    """Return the folder for the tables of this package, inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE, "hf_embed")


def check_cache() -> None:
    """Raise InputError if the folder for cached tables does not exist yet and cannot be created."""
    if not cache_folder().is_dir():
        check_folder(cache_folder(), "the cache folder of datasets (HF_DATASETS_CACHE)")


def cached_map(rows: Dataset, function: Callable[..., Any], anew: bool = False, **settings: Any) -> Dataset:
    """Return `rows.map(function, **settings)`, and check the cached result before it is used again.

    The result is stored in the cache of `datasets`. (`datasets` itself would put it beside the file that holds the rows. But
    `load_dataset` takes each Arrow file in the folder of a saved dataset for a part of the data.) Nothing is cached for fewer
    than `FEW_ROWS` rows in memory, or in a process that has disabled caching.

    With `anew`, the result is made in each call. This is for a function whose results may change although its hash does not.
    """
    if len(rows) < (1 if rows.cache_files else FEW_ROWS) or not is_caching_enabled():
        named = {"new_fingerprint": generate_random_fingerprint(), **settings}  # else `datasets` hashes the tokenizer
        with disk_errors():
            return rows.map(function, **named)
    identity = None if anew else identity_of(rows, function, settings)
    named = {"new_fingerprint": "not-used", "load_from_cache_file": False, **settings}
    return stored(identity, lambda path: rows.map(function, cache_file_name=str(path), **named))


def stored(identity: str | None, write: Callable[[Path], Any]) -> Dataset:
    """Return the table with this identity from a file in the cache. Call `write` first if there is no such file.

    Without an identity, `write` is always called, and the hash of the file that it writes becomes the identity.
    """
    folder = cache_folder()
    path = folder / f"{identity}.arrow" if identity else folder
    if not identity or not found(path):
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            remove_old(folder)
            with TemporaryDirectory(prefix=SAVING, dir=folder) as new:  # if `map` fails, it leaves files behind
                made = Path(new, "rows.arrow")
                write(made)
                identity = identity or hash_of(made)
                put(made, path := folder / f"{identity}.arrow")
            seal(path)
    return Dataset.from_file(str(path))


def checked_load(path: str, split: str, streaming: bool, **settings: Any) -> Any:
    """Return `datasets.load_dataset` of these arguments. Make its cached tables again if they are damaged or out of date."""
    with disk_errors(datasets.config.HF_DATASETS_CACHE), table_bars():
        if not streaming and (path == "parquet" or os.path.isdir(path)):
            settings["description"] = hash_of_files(path, **settings)
        load = partial(datasets.load_dataset, path, split=split, streaming=streaming, **settings)
        try:
            rows = load()
            whole = all(found(file) for file in files_of(rows) if seal_of(file).is_file())
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
                raise  # Arrow's own errors have the plain type and no number
            whole = False
        if not whole:
            rows = load(download_mode="reuse_cache_if_exists")
        for file in files_of(rows):
            if os.access(file.parent, os.W_OK) and not (whole and seal_of(file).is_file()):
                seal(file)
    return rows


def hash_of_files(path: str, **settings: Any) -> str:
    """Return a hash of the content of a dataset's local files.

    `datasets` itself recognizes a file by its path and its time of change. Each part of a configuration, such as this hash as
    its description, gets a cached table of its own.
    """
    files = datasets.load_dataset_builder(path, **settings).config.data_files or {}
    hashes = [hash_of(Path(file)) for split in files.values() for file in split if "://" not in file]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def files_of(rows: Any) -> list[Path]:
    """Return the files that hold the tables of `rows`. The list is empty for a stream, for example."""
    return [Path(file["filename"]) for file in rows.cache_files] if isinstance(rows, Dataset) else []


def identity_of(rows: Dataset, function: Callable[..., Any], settings: dict[str, Any]) -> str:
    """Return a hash of the rows, the function, the settings and the versions, or a random one if the function has no hash."""
    try:
        named = sorted((name, value) for name, value in settings.items() if name != "desc")
        return Hasher.hash([content_of(rows), Hasher.hash(function), Hasher.hash(named), *versions()])
    except Exception:  # pickling the objects that the function holds can raise anything
        return generate_random_fingerprint()


def content_of(rows: Dataset) -> str:
    """Return a hash of the values in a table, and of their order.

    The fingerprint of `datasets` would not do: it stands for how a table was made, by functions that may have changed since.
    """
    hashed = xxhash.xxh3_128()
    for table in (rows.data, indices_of(rows)):
        for batch in table.to_batches(max_chunksize=HASHED) if table is not None else []:
            part = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(part, batch.schema) as stream:  # with the types, and the values of a categorical column
                stream.write_batch(batch)
            hashed.update(part.getvalue())
    return hashed.hexdigest()


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
                remove(path)
