"""Errors that the user can fix, as messages of one line. Secrets are removed from messages and files."""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

# Parts: scheme; user name and password; host and path; query and fragment, without punctuation of the surrounding sentence.
ADDRESS = re.compile(
    r"\b([a-z][\w+.-]*://)(?:[^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*?(?=[.,:;)\]]*(?:[\s'\"<>]|$)))?", re.IGNORECASE
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=\bBearer )[^\s'\"]+")
TRACEBACK = "Traceback (most recent call last)"
# Line ends, and characters that move the cursor of a terminal. A column, a key or a path may hold them.
CONTROL = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*")
SECRET_WORDS = {"token", "secret", "password", "credentials"}
Settings = TypeVar("Settings")


def masked(text: str, *addresses: str) -> str:
    """Reduce each address in `text` to scheme, host and path, and mask tokens of the Hub.

    The user name, password, query and fragment of an address may be secret. For the given `addresses`, these parts are masked
    wherever they occur in `text`, because errors of other libraries quote them one by one.

    >>> masked("https://me:key@host/a.csv?sig=key: no such file")
    'https://host/a.csv: no such file'
    """
    for address in addresses:
        _, found, rest = address.partition("://")
        user, _, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
        _, _, query = rest.partition("?")
        for part in re.split(r"[:&=#]", f"{user}&{query}") if found else []:
            if len(part) > 3:
                text = text.replace(part, "***")
    return HUB_TOKEN.sub("***", ADDRESS.sub(r"\1\2", text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty.

    This suits most errors of libraries: the lines after the first are advice for other users.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_line(error: BaseException) -> str:
    """Return the first line of the error that caused `error`. The clients of URLs state only there why a file is not found."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def in_short(error: BaseException | str) -> str:
    """Return all lines of an error, or of its message, as one line of at most 200 characters, without secrets.

    This suits errors whose first line is only a heading, such as those of `load_state_dict`.
    """
    return masked(" ".join(str(error).split()))[:200] or type(error).__name__


def shortened(text: str) -> str:
    """Return the beginning of a text that a message quotes: at most 60 characters, on one line."""
    start = " ".join(text[:61].split())
    return start if len(text) <= 60 else f"{start[:60]}..."


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list and the number of the others, for a message: 'a', 'b', 'c' and 11 more."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def without_secrets(settings: Settings) -> Settings:
    """Copy an object with settings, to write it to a file. Settings named like secrets (`hub_token`) are None in the copy."""
    clean = copy.copy(settings)
    for name, value in vars(settings).items():
        secret = SECRET_WORDS & set(name.lower().split("_")) or name.lower().endswith("api_key")
        if secret and not isinstance(value, int | float):  # a number is not a secret: max_token_count
            setattr(clean, name, None)
    return clean


class InputError(ValueError):
    """Something that the user gave is wrong. The message says in one line what, where and how to fix it. Secrets are masked."""

    def __init__(self, message: str = "") -> None:
        message = masked(str(message))
        if TRACEBACK not in message:  # of a dataloader worker; the last line is the message
            message = CONTROL.sub(" ", message)
        super().__init__(message)


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Let the message of an `InputError` in the `with` block begin with `what` it is about: a file, a source, a flag."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def utf8(text: str) -> bytes:
    """Return a text in UTF-8. Raise InputError if the text holds half of a character (a surrogate), as cut JSON may do."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        raise InputError(
            f"the text {ascii(text[max(0, start - 20) : start + 20])} holds half of a character, {ascii(text[start])}; correct "
            "or delete it"
        ) from error


class EmptyTextError(InputError):
    """A row of the training data lacks a text. Such rows may be dropped."""


class RankError(InputError):
    """An error that a single process may meet in the middle of a run, so that this process must report it itself."""
