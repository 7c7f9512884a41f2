"""Errors of the user's making, in one line; and what no message and no file may hold."""

import copy
import re
from typing import TypeVar

# Scheme; user name and password; host and path; query and fragment, without the punctuation of the sentence around it.
ADDRESS = re.compile(
    r"\b([a-z][\w+.-]*://)(?:[^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*?(?=[.,:;)\]]*(?:[\s'\"<>]|$)))?", re.IGNORECASE
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=\bBearer )[^\s'\"]+")
TRACEBACK = "Traceback (most recent call last)"
# Line ends, and what moves the cursor of a terminal: a column, a key or a path may hold them.
CONTROL = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*")
SECRET_WORDS = {"token", "secret", "password", "credentials"}
Settings = TypeVar("Settings")


def masked(text: str, *addresses: str) -> str:
    """Reduce each address in `text` to scheme, host and path, and mask tokens of the Hub.

    User name, password, query and fragment of an address may be secret. Of the `addresses` given, these parts are masked
    wherever they stand, for errors of other libraries quote them one by one.

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


def in_short(error: BaseException) -> str:
    """Return what an error says, in one line of at most 200 letters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def without_secrets(settings: Settings) -> Settings:
    """Copy an object with settings, for a file: what is named as a secret, `hub_token` and the like, is None in the copy."""
    clean = copy.copy(settings)
    for name, value in vars(settings).items():
        secret = SECRET_WORDS & set(name.lower().split("_")) or name.lower().endswith("api_key")
        if secret and not isinstance(value, int | float):  # a number is none: max_token_count
            setattr(clean, name, None)
    return clean


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where and how to mend it, in one line; secrets are masked."""

    def __init__(self, message: str = "") -> None:
        message = masked(str(message))
        if TRACEBACK not in message:  # of a dataloader's worker, whose last line is the message
            message = CONTROL.sub(" ", message)
        super().__init__(message)


class RankError(InputError):
    """One that a single process may meet in the middle of a run, so that it has to say so itself."""
