"""Readers for text, JSON, tensors and arrays, with one function for each format.

Any problem with a file becomes an InputError of one line, which says which file it is, what is wrong and how to fix it. `name`
is what messages call the file, if its path would say less (a file of a model on the Hub, the value of a flag).
"""

import codecs
import json
import os
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hf_embed.errors import InputError, first_line

# The beginning of a pointer file. Git leaves such a file in place of each file that Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
NOT_FETCHED = "is a Git LFS pointer, not the file itself; run git lfs pull, or download the file again"
UTF_16 = "UTF-16; save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8"
# The first bytes of files that are no UTF-8 text -> what they are, and the mend.
OTHER_KINDS = {
    codecs.BOM_UTF16_LE: UTF_16,
    codecs.BOM_UTF16_BE: UTF_16,
    b"\x1f\x8b": "compressed by gzip; decompress it, or add .gz to its name",
    b"PAR1": "a parquet file; give it the ending .parquet",
}
COPY_ANEW = "correct it or copy it again"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def kind_of(path: str) -> str:
    """Return the ending of a path or URL, without .gz: "jsonl" for `b.jsonl.gz` and `https://host/b.jsonl?x=y`."""
    suffixes = [suffix.lower() for suffix in Path(urlsplit(path).path if "://" in path else path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1][1:] if suffixes else ""


def is_packed(path: str) -> bool:
    """Return whether the name of a path or URL ends in .gz."""
    return (urlsplit(path).path if "://" in path else path).lower().endswith(".gz")


def other_kind(start: bytes) -> str | None:
    """Return what a file is and how to fix that, if its first bytes show that it is no UTF-8 text; otherwise None."""
    return next((kind for signature, kind in OTHER_KINDS.items() if start.startswith(signature)), None)


def trouble_with(path: str | Path) -> str | None:
    """Return why a path is not a readable file, and how to fix that, or None if the file can be read."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "this file does not exist; check the path"
    except (OSError, ValueError) as error:  # the name is too long, or holds a NUL byte
        return f"no file can have this path ({first_line_of_system(error)}); check the path"
    if stat.S_ISDIR(mode):
        return "this is a folder; name a file in it"
    if not stat.S_ISREG(mode):
        return "this is a pipe or a device; give a file"
    if not os.access(path, os.R_OK):
        return "you have no permission to read it; change its permissions (chmod)"
    return None


def first_line_of_system(error: OSError | ValueError) -> str:
    """Return the message of the operating system without the path, which the caller's message already names."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def check_file(path: str | Path, name: str = "") -> str:
    """Check that a file can be read. Return what messages call it: `name`, or its path.

    Raises:
        InputError: if the file does not exist, may not be read, or is a pointer of Git LFS.
    """
    name = name or str(path)
    if trouble := trouble_with(path):
        raise InputError(f"{name}: {trouble}")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({first_line_of_system(error)})") from error
    if start == LFS_POINTER:
        raise InputError(f"{name} {NOT_FETCHED}")
    return name


# ---- text and JSON ----


def read_text(path: str | Path, name: str = "") -> str:
    """Return the text of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: if the file does not exist, may not be read, or is not text in UTF-8.
    """
    name = check_file(path, name)
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            if b"\0" in start:  # checked before many gigabytes are read
                raise InputError(f"{name} holds NUL bytes, so it is not UTF-8 text; save it as UTF-8, or give another file")
            content = start + file.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{name} is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}); save it as UTF-8, for example with "
            "iconv -f cp1252 -t UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({first_line_of_system(error)})") from error


def refuse_constant(constant: str) -> Any:
    """Raise ValueError for NaN or Infinity, which Python writes although JSON does not have them."""
    raise ValueError(f"{constant} is not valid in JSON")


@cache
def decoder(constant: Callable[[str], Any]) -> json.JSONDecoder:
    """Return a JSON decoder. It is cached, because a file of many lines needs it for each line."""
    return json.JSONDecoder(parse_constant=constant)


def parse_json(text: str, constant: Callable[[str], Any] = refuse_constant, line: int = 1) -> Any:
    """Parse a JSON text and return its value.

    Args:
        text: the whole text.
        constant: a function that returns the value of NaN, Infinity and -Infinity.
        line: the number of the first line of the text, for messages.

    Raises:
        ValueError: if the text is not JSON, or if a string holds half of a character (a surrogate), which no encoding can
            write. The message names the line.
    """
    try:
        found = decoder(constant).decode(text)
        if "\\u" in text and SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1}: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"line {line}: {ascii(error.object[error.start])} is only half of a character") from error
    except (ValueError, RecursionError) as error:  # a constant, a number of thousands of digits, thousands of brackets
        raise ValueError(f"line {line}: {first_line(error)}") from error
    return found


def read_json(path: str | Path, kind: type = dict, name: str = "", with_nan: bool = False) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the path of the file.
        kind: the type that the top-level value must have.
        name: what messages call the file. Default: its path.
        with_nan: accept NaN and Infinity, which Python writes although JSON does not have them.

    Raises:
        InputError: if the file does not exist, is not JSON, or has another type at its top.
    """
    name = name or str(path)
    text = read_text(path, name)
    try:
        content = parse_json(text, float if with_nan else refuse_constant)
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error}); {COPY_ANEW}") from error
    if not isinstance(content, kind):
        raise InputError(f"{name} does not hold a {kind.__name__} at the top level; copy it again")
    return content


# ---- tensors and arrays ----


def read_tensors(path: str | Path, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a file that `torch.save` wrote, by name, on the CPU.

    Raises:
        InputError: if the file does not exist, is truncated or damaged, holds anything except tensors, or holds none.
    """
    name = check_file(path, name)
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # header, unpickler and allocator raise many kinds of errors
        raise not_whole(name, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{name} holds other values than named tensors; use the weights of the model")
    if not tensors:
        raise InputError(f"{name} holds no tensors; copy it again")
    return tensors


def tensor_dtypes(path: str | Path, name: str = "") -> dict[str, str]:
    """Return the data types of the tensors in a .safetensors file by name, such as "F32". The tensors are not read.

    Raises:
        InputError: if the file does not exist, or is truncated or damaged.
    """
    name = check_file(path, name)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no dict)
    except Exception as error:
        raise not_whole(name, error) from error


def not_whole(name: str, error: Exception) -> InputError:
    """Return the error for a file of tensors that could not be read."""
    reason = first_line(error).removeprefix("Error while deserializing header: ").rstrip(".:")
    return InputError(
        f"{name}: the weights file is incomplete or damaged ({type(error).__name__}: {reason[:200]}); copy it again"
    )


def read_array(path: str | Path) -> np.ndarray:
    """Return the numbers of a .npy file, in two dimensions, as a memory map, which reads data only when it is used.

    Raises:
        InputError: if the file does not exist, is truncated, is not a .npy file, holds objects, or has another number of
            dimensions.
    """
    name = check_file(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises many kinds of errors
        raise InputError(
            f"{name}: the .npy file is incomplete or damaged ({first_line(error)[:200]}); create it again"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiub":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{name} holds {found}, not numbers in 2 dimensions; give another file")
    return array
