"""The readers of text, JSON, tensors and arrays, one each.

Whatever is wrong with a file is an InputError in one line: which file it is, what is wrong with it, and the mend. `name` is
what messages call the file, where its path says less (a file of a model on the Hub, the value of a flag).
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hf_embed.errors import InputError

# How the file begins that git leaves in place of one which Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
NOT_FETCHED = "is a pointer of Git LFS, not the file itself; fetch it by git lfs pull, or download it anew"
COPY_ANEW = "correct it or copy it anew"
# Objects and lists within each other. No file has so many; Python's own limit depends on who calls.
MOST_LEVELS = 100
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def trouble_with(path: str | Path) -> str | None:
    """Return why a path is not that of a file which can be read, and the mend; None if it is."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file; check the path"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL byte
        return f"no file can be there ({first_line_of_system(error)}); check the path"
    if stat.S_ISDIR(mode):
        return "this is a folder; name a file in it"
    if not stat.S_ISREG(mode):
        return "this is a pipe or a device; give a file"
    if not os.access(path, os.R_OK):
        return "you may not read it; change its permissions (chmod)"
    return None


def first_line_of_system(error: OSError | ValueError) -> str:
    """Return what the operating system says, without the path, which the message names already."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def check_file(path: str | Path, name: str = "") -> str:
    """Return what messages call a file: `name`, or its path.

    Raises:
        InputError: there is no such file, it may not be read, or it is a pointer of Git LFS.
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
    """Return the text of a file in UTF-8, without a byte-order mark.

    Raises:
        InputError: there is no such file, it may not be read, or it is no text in UTF-8.
    """
    name = check_file(path, name)
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            if b"\0" in start:  # known before a file of many gigabytes is read
                raise InputError(f"{name}: holds NUL bytes, so it is no text in UTF-8; save it as UTF-8, or name another file")
            content = start + file.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{name}: not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8, for example by "
            "iconv -f cp1252 -t UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({first_line_of_system(error)})") from error


def refuse_constant(constant: str) -> Any:
    """Raise ValueError for NaN or Infinity, which Python writes and JSON does not have."""
    raise ValueError(f"{constant} is not a number of JSON")


@cache
def decoder(constant: Callable[[str], Any]) -> json.JSONDecoder:
    """Return what decodes JSON; a file of many lines needs it for each."""
    return json.JSONDecoder(parse_constant=constant)


def parse_json(text: str, constant: Callable[[str], Any] = refuse_constant) -> Any:
    """Return the value that a text in JSON holds.

    Args:
        text: the whole text.
        constant: returns what NaN, Infinity and -Infinity stand for.

    Raises:
        ValueError: the text is no JSON (`json.JSONDecodeError`), it has more than MOST_LEVELS levels or a number of too many
            digits, or a text in it holds half of a character (`UnicodeEncodeError`), which no encoding can write.
    """
    try:
        found = decoder(constant).decode(text)
    except RecursionError as error:
        raise ValueError(f"more than {MOST_LEVELS} lists and objects within each other") from error
    if text.count("[") + text.count("{") > MOST_LEVELS and has_more_levels(found, MOST_LEVELS):
        raise ValueError(f"more than {MOST_LEVELS} lists and objects within each other")
    if "\\u" in text and SURROGATE.search(text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


def has_more_levels(value: Any, most: int) -> bool:
    """Return whether a value has more than `most` lists and dicts within each other."""
    level = [value]
    for _ in range(most + 1):
        level = [child for item in level if isinstance(item, dict | list) for child in children(item)]
    return bool(level)


def children(item: dict | list) -> Iterator[Any]:
    """Return what is in a list or a dict."""
    return iter(item.values() if isinstance(item, dict) else item)


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict, name: str = "", with_nan: bool = False) -> Any:
    """Return what a JSON file holds.

    Args:
        path: of the file.
        kind: what has to be at its top, or one of several.
        name: what messages call the file; default: its path.
        with_nan: take NaN and Infinity, which Python writes for numbers that are none.

    Raises:
        InputError: there is no such file, it is not JSON, or has something else at its top.
    """
    name = name or str(path)
    text = read_text(path, name)
    try:
        content = parse_json(text, float if with_nan else refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON (line {error.lineno}: {error.msg}); {COPY_ANEW}") from error
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        raise InputError(f"{name}: {half} is half of a character; {COPY_ANEW}") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({first_line(error)}); {COPY_ANEW}") from error
    if not isinstance(content, kind):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{name} has no {wanted} at its top; copy it anew")
    return content


# ---- tensors and arrays ----


def read_tensors(path: str | Path, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of one that `torch.save` wrote, by name, on the CPU.

    Raises:
        InputError: there is no such file, it is truncated or damaged, or holds something else than tensors, or none.
    """
    name = check_file(path, name)
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the header, the unpickler and the allocator: many kinds
        raise not_whole(name, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{name}: holds something else than tensors by name; take the weights of the model")
    if not tensors:
        raise InputError(f"{name}: holds no tensors; copy it anew")
    return tensors


def tensor_dtypes(path: str | Path, name: str = "") -> dict[str, str]:
    """Return the types of the tensors of a .safetensors file, "F32" and the like, by name; the tensors are not read.

    Raises:
        InputError: there is no such file, or it is truncated or damaged.
    """
    name = check_file(path, name)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no dict)
    except Exception as error:
        raise not_whole(name, error) from error


def not_whole(name: str, error: Exception) -> InputError:
    """Return the error of a file with tensors that could not be read."""
    reason = first_line(error).removeprefix("Error while deserializing header: ").rstrip(".:")
    return InputError(f"{name}: is no whole file of weights ({type(error).__name__}: {reason[:200]}); copy it anew")


def read_array(path: str | Path, dimensions: int = 2, name: str = "") -> np.ndarray:
    """Return the numbers of a .npy file, as a memory map that is read where it is used.

    Args:
        path: of the file.
        dimensions: how many it has to have.
        name: what messages call the file; default: its path.

    Raises:
        InputError: there is no such file, it is truncated or no .npy, or it holds objects or another shape.
    """
    name = check_file(path, name)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes many kinds
        raise InputError(f"{name}: is no whole .npy file ({first_line(error)[:200]}); make it anew") from error
    if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype.kind not in "fiub":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{name}: holds {found}; expected numbers in {dimensions} dimensions")
    return array
