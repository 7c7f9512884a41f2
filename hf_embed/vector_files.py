"""Vectors of many texts in a file: shared among ranks, and gone on with where it was stopped.

    from hf_embed.vector_files import write_vectors

    write_vectors(encoder, texts, "vectors.npy", precision="int8")
    vectors = numpy.load("vectors.npy", mmap_mode="r")  # (N, D), row i is of text i

While the file is made it lies in a folder beside it, as a memory map that all ranks write to:

    vectors.npy.work/
        identity          hash of the model, the texts and the options
        vectors.npy       (N, D), of which the rows of every finished part are right
        done/000003       the rows of part 3 are there, SHARD texts: a hash of them
    vectors.npy.json      what the vectors are of; written before the folder goes and vectors.npy takes its place
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hf_embed.data.files import FILL_IN, missing_text
from hf_embed.distributed import get_rank
from hf_embed.encoder import Encoder
from hf_embed.encoding import text_list
from hf_embed.errors import InputError
from hf_embed.evaluation.mteb import fingerprint
from hf_embed.read_files import read_array, read_json
from hf_embed.safe_files import put, write_json, writing
from hf_embed.work_files import barrier, claim, digest, is_there, make_files, remove_work, work_folder

SHARD = 1024  # texts between two points from which a stopped run goes on
READ = 8192  # texts that are read at a time
WITHOUT_EFFECT = ("batch_size", "chunk_tokens")  # options that change a vector by rounding alone


def write_vectors(
    encoder: Encoder, texts: Sequence[str], output_file: str | Path, about: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Encode texts into a .npy file, a row for each. Every rank calls this, and encodes its share.

    What was done when a run is stopped is kept in OUTPUT_FILE.work; the same call goes on.

    Args:
        encoder: on the device where this rank computes.
        texts: a list, or a column of a `datasets.Dataset`, which is read in parts; or what else `Encoder.encode` takes.
        output_file: where the vectors go, (N, D) in float32 or as `precision` says; OUTPUT_FILE.json says what they are of.
        about: what else OUTPUT_FILE.json is to say.
        options: prompt_name, truncate_dim, normalize, precision, batch_size, chunk_tokens of `Encoder.encode`.

    Returns:
        What OUTPUT_FILE.json says.

    Raises:
        InputError: `output_file` is there, or is no .npy; the folder beside it is of another model, other texts or other
            options; a text is empty; a vector is not finite.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):  # which could not be counted, or read in parts
        texts = text_list(texts)
    output = Path(output_file)
    if output.suffix != ".npy":
        raise InputError(f"{output}: vectors are written as .npy; name it {output.with_suffix('.npy')}")
    work = work_folder(output)
    like = np.asarray(encoder.encode([], **options))  # (0, D); and the options are checked
    identity = identity_of(encoder, texts, options, (about or {}).get("file", "texts"))
    claim(work, identity)
    if output.is_file():
        return finished(work, output, identity)
    unfinished, shape = work / "vectors.npy", (len(texts), like.shape[1])
    if get_rank() == 0 and not holds(unfinished, shape, like.dtype):
        allocate(unfinished, shape, like.dtype)
    barrier()
    rows = np.lib.format.open_memmap(unfinished, mode="r+")
    forget_damaged(work / "done", rows)

    def write(numbers: range, path: Path) -> None:
        vectors = encoder.encode(texts[numbers.start : numbers.stop], **options)
        if not np.isfinite(vectors).all():
            bad = numbers[int(np.argmin(np.isfinite(vectors).all(1)))]
            raise InputError(f"the vector of text {bad + 1} ({texts[bad][:60]!r}) is not finite; check the model")
        rows[numbers.start : numbers.stop] = vectors
        rows.flush()
        path.write_text(hash_of(rows, numbers.start))

    make_files(work / "done", "", len(texts), SHARD, write, "Encoding")
    settings = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    found = {"rows": len(texts), "width": like.shape[1], "dtype": str(like.dtype), **(about or {}), **settings}
    found["identity"] = identity
    if get_rank() == 0:
        write_json(description_of(output), found)
        put(unfinished, output)
        remove_work(work)
    barrier()
    return found


def finished(work: Path, output: Path, identity: str) -> dict[str, Any]:
    """Remove the work on a file that a run had finished when it was killed; return what is said of the file.

    Raises:
        InputError: the file is of another model, other texts or other options.
    """
    about = read_json(description_of(output)) if description_of(output).is_file() else {}
    if about.get("identity") != identity:
        raise is_there(output)
    barrier()  # nobody removes anything before everyone has looked
    if get_rank() == 0:
        remove_work(work)
    return about


def read_vectors(path: str | Path, encoder: Encoder, texts: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the vectors of a file, a memory map (N, D), and the options of `Encoder.encode` that they were made with.

    Raises:
        InputError: the file was not written by `write_vectors`, or is of another model, other texts or other settings.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; recipes/encode.py writes one")
    if not description_of(Path(path)).is_file():
        raise InputError(f"{path}: {description_of(Path(path)).name} is not beside it, which says what the vectors are of")
    about = read_json(description_of(Path(path)))
    vectors = read_array(path)
    options = {key: about[key] for key in ("prompt_name", "truncate_dim", "normalize", "precision") if key in about}
    if len(vectors) != len(texts) or about.get("rows") != len(texts):
        raise InputError(f"{path}: there are {len(vectors):,} vectors and {len(texts):,} texts; encode the file anew")
    if [vectors.shape[1], str(vectors.dtype)] != [about.get("width"), about.get("dtype")]:
        raise InputError(f"{path}: the vectors are not those that {description_of(Path(path)).name} describes; encode anew")
    try:
        identity = identity_of(encoder, texts, options, about.get("file", "texts"))
    except InputError as error:  # of an option that this model does not have, or an empty text
        raise InputError(f"{path}: {error}") from error
    if identity != about.get("identity"):
        raise InputError(f"{path}: the vectors are of another model, other settings of it or other texts; encode the file anew")
    return vectors, options


def description_of(output: Path) -> Path:
    """Return where it is said what the vectors of a file are of."""
    return output.with_name(output.name + ".json")


def identity_of(encoder: Encoder, texts: Sequence[str], options: dict[str, Any], name: str) -> str:
    """Return a hash of all that vectors depend on. Raises InputError for an empty text; `name` is of what messages speak."""
    settings = {"precision": "float32"} | {
        key: value for key, value in options.items() if key not in (*WITHOUT_EFFECT, "prompt_name") and value is not None
    }
    prompt = encoder.prompt(options.get("prompt_name"))
    return digest([fingerprint(encoder), prompt, repr(sorted(settings.items()))], filled(texts, name))


def filled(texts: Sequence[str], name: str) -> Iterator[str]:
    """Yield the texts of `name`. Raises InputError for an empty one: left out, it would move the rows of all that follow."""
    for start in range(0, len(texts), READ):
        for number, text in enumerate(texts[start : start + READ], start + 1):
            if wrong := missing_text(text):
                raise InputError(f"{name}, row {number}: the text is {wrong}; {FILL_IN}")
            yield text


def holds(path: Path, shape: tuple[int, int], dtype: np.dtype) -> bool:
    """Return whether a .npy file is there, of this shape and as long as that."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(rows.shape == shape and rows.dtype == dtype)


def allocate(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Make a .npy file of this shape with room on the disk: on a full one, writing to a memory map would kill the process."""
    with writing(path) as aside:
        np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(aside, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)


def hash_of(rows: np.ndarray, start: int) -> str:
    """Return a hash of the rows of the part that begins at row `start`."""
    return xxhash.xxh3_128(rows[start : start + SHARD].tobytes()).hexdigest()


def forget_damaged(done: Path, rows: np.ndarray) -> None:
    """Let the parts be made again whose rows are not as they were written: `done` says of each what its rows were."""
    if get_rank() == 0:
        for part in range(0, len(rows), SHARD):
            path = done / f"{part // SHARD:06d}"
            if path.is_file() and path.read_text() != hash_of(rows, part):
                path.unlink()
    barrier()
