"""Write the vectors of many texts to a file. The ranks share the work, and a stopped run can be resumed.

    from hf_embed.vector_files import write_vectors

    write_vectors(encoder, texts, "vectors.npy", precision="int8")
    vectors = numpy.load("vectors.npy", mmap_mode="r")  # (N, D), row i is the vector of text i

While the file is being made, it is a memory map in a folder beside its final place. All ranks write to it:

    vectors.npy.work/
        identity          hash of the model, the texts and the options
        vectors.npy       (N, D), where the rows of every finished part are correct
        done/000003       hash of the rows of part 3 (see `part_size`); it exists when the part is finished
    vectors.npy.json      description of the vectors; written before vectors.npy moves to its final place
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from hf_embed.data.sources import cell_text
from hf_embed.distributed import get_rank
from hf_embed.encoder import Encoder
from hf_embed.encoding import check_encoder, text_list
from hf_embed.entry import recipe_command
from hf_embed.errors import InputError, errors_of
from hf_embed.files.read_files import read_array, read_json
from hf_embed.files.safe_files import put, write_json, writing
from hf_embed.files.work_files import already_exists, barrier, claimed, digest, make_files, work_folder
from hf_embed.fingerprint import fingerprint

SHARD = 1024  # texts per part on a CPU; a stopped run loses only unfinished parts
READ = 8192  # texts that are read at a time
WITHOUT_EFFECT = ("batch_size", "chunk_tokens")  # options that change a vector only by rounding


def write_vectors(
    encoder: Encoder, texts: Sequence[str], output_file: str | Path, about: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Encode texts into a .npy file, one row for each text. Every rank calls this and encodes its share.

    If a run is stopped, OUTPUT_FILE.work keeps the finished parts, and the same call resumes the work.

    Args:
        encoder: the encoder, on the device of this rank.
        texts: a list, a column of a `datasets.Dataset` (which is read in parts), or anything else that `Encoder.encode` takes.
        output_file: the file of the vectors, (N, D) in float32 or as `precision` says. OUTPUT_FILE.json describes them.
        about: further entries of OUTPUT_FILE.json.
        options: prompt_name, truncate_dim, normalize, precision, batch_size, chunk_tokens of `Encoder.encode`.

    Returns:
        The content of OUTPUT_FILE.json.

    Raises:
        InputError: if `output_file` exists or does not end in .npy, if the folder beside it belongs to another model, other
            texts or other options, if a text is empty, or if a vector is not finite.
    """
    check_encoder(encoder)
    # a text or an iterator cannot be counted or read in parts
    texts = texts if isinstance(texts, Sequence) and not isinstance(texts, str) else text_list(texts)
    output = Path(output_file)
    if output.suffix != ".npy":
        raise InputError(f"{output}: vectors are written as .npy files; name the file {output.with_suffix('.npy')}")
    work = work_folder(output)
    like = np.asarray(encoder.encode([], **options))  # (0, D); this also checks the options
    identity = identity_of(encoder, texts, options, (about or {}).get("file", "texts"))
    with claimed(work, identity):
        if output.is_file():
            return finished(work, output, identity)
        unfinished, shape, size = work / "vectors.npy", (len(texts), like.shape[1]), part_size(encoder)
        if get_rank() == 0 and not holds(unfinished, shape, like.dtype):
            allocate(unfinished, shape, like.dtype)
        barrier()
        forget_damaged(work / "done", np.load(unfinished, mmap_mode="r"), size)

        def write(numbers: range, path: Path) -> None:
            vectors = encoder.encode(texts[numbers.start : numbers.stop], **options)
            if not np.isfinite(vectors).all():
                bad = numbers[int(np.argmin(np.isfinite(vectors).all(1)))]
                raise InputError(f"the vector of text {bad + 1} ({texts[bad][:60]!r}) is not finite; check the model")
            rows = np.load(unfinished, mmap_mode="r+")  # for this part only, because Windows does not rename an open file
            rows[numbers.start : numbers.stop] = vectors
            rows.flush()
            path.write_text(hash_of_part(rows, numbers.start, size))

        make_files(work / "done", "", len(texts), size, write, "Encoding")
        settings = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
        found = {"rows": len(texts), "width": like.shape[1], "dtype": str(like.dtype), **(about or {}), **settings}
        found["identity"] = identity
        if get_rank() == 0:
            description = work / "description.json"  # renamed like the vectors: a kill leaves no part of it beside them
            write_json(description, found)
            put(description, description_of(output))
            put(unfinished, output)
            shutil.rmtree(work)
        barrier()
        return found


def finished(work: Path, output: Path, identity: str) -> dict[str, Any]:
    """Remove the work folder of a run that was killed after its file was complete. Return the description of the file.

    Raises:
        InputError: if the file belongs to another model, other texts or other options.
    """
    about = read_json(description_of(output)) if description_of(output).is_file() else {}
    if about.get("identity") != identity:
        raise already_exists(output)
    barrier()  # no rank removes anything before all ranks have looked
    if get_rank() == 0:
        shutil.rmtree(work)
    return about


def read_vectors(path: str | Path, encoder: Encoder, texts: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the vectors of a file as a memory map (N, D), and the options of `Encoder.encode` that made them.

    Raises:
        InputError: if `write_vectors` did not write the file, or if it belongs to another model, other texts or other settings.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: this file does not exist; create it with {recipe_command('encode')}")
    if not description_of(Path(path)).is_file():
        raise InputError(
            f"{path}: {description_of(Path(path)).name}, which describes the vectors, does not exist; encode the texts again"
        )
    about = read_json(description_of(Path(path)))
    vectors = read_array(path)
    options = {key: about[key] for key in ("prompt_name", "truncate_dim", "normalize", "precision") if key in about}
    if len(vectors) != len(texts) or about.get("rows") != len(texts):
        raise InputError(f"{path}: there are {len(vectors):,} vectors but {len(texts):,} texts; encode the texts again")
    if [vectors.shape[1], str(vectors.dtype)] != [about.get("width"), about.get("dtype")]:
        raise InputError(f"{path}: the vectors do not match {description_of(Path(path)).name}; encode the texts again")
    with errors_of(str(path)):  # raises an error if the model does not have an option, or a text is empty
        identity = identity_of(encoder, texts, options, about.get("file", "texts"))
    if identity != about.get("identity"):
        if (half := about.get("bf16")) not in (None, encoder.dtype == torch.bfloat16):
            raise InputError(
                f"{path}: the vectors were encoded {'with' if half else 'without'} --bf16; use the same setting here"
            )
        raise InputError(f"{path}: the vectors come from another model, other settings or other texts; encode the texts again")
    return vectors, options


def description_of(output: Path) -> Path:
    """Return the path of the JSON file that describes a file of vectors."""
    return output.with_name(output.name + ".json")


def identity_of(encoder: Encoder, texts: Sequence[str], options: dict[str, Any], name: str) -> str:
    """Return a hash of everything that the vectors depend on. `name` is what messages call the texts.

    Raises:
        InputError: if a text is empty.
    """
    settings = {"precision": "float32"} | {
        key: value for key, value in options.items() if key not in (*WITHOUT_EFFECT, "prompt_name") and value is not None
    }
    prompt = encoder.prompt(options.get("prompt_name"))
    return digest([fingerprint(encoder), prompt, repr(sorted(settings.items()))], filled(texts, name))


def filled(texts: Sequence[str], name: str) -> Iterator[str]:
    """Yield the texts. Raise InputError for an empty text, because leaving it out would move the rows of all later texts.

    `name` is what messages call the texts.
    """
    for start in range(0, len(texts), READ):
        for number, text in enumerate(texts[start : start + READ], start + 1):
            yield cell_text(text, f"{name}, row {number}")


def holds(path: Path, shape: tuple[int, int], dtype: np.dtype) -> bool:
    """Return whether a complete .npy file with this shape and data type exists."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(rows.shape == shape and rows.dtype == dtype)


def allocate(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Create a .npy file of this shape and reserve its room on the disk.

    Without reserved room, writing to a memory map on a full disk would kill the process.
    """
    with writing(path) as aside:
        np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(aside, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)


def part_size(encoder: Encoder) -> int:
    """Return the number of texts per part. A GPU has larger parts, because it waits while a part is written to the disk."""
    return SHARD if encoder.device.type == "cpu" else 4 * SHARD


def hash_of_part(rows: np.ndarray, start: int, size: int) -> str:
    """Return a hash of the rows of the part of `size` rows that begins at row `start`."""
    return xxhash.xxh3_128(rows[start : start + size].tobytes()).hexdigest()


def forget_damaged(done: Path, rows: np.ndarray, size: int) -> None:
    """Let damaged parts be made again. A part is damaged if its rows differ from the hash in the folder `done`.

    So are the parts of a run with parts of another size than `size`.
    """
    if get_rank() == 0:
        for part in range(0, len(rows), size):
            path = done / f"{part // size:06d}"
            if path.is_file() and path.read_text() != hash_of_part(rows, part, size):
                path.unlink()
    barrier()
