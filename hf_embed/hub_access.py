"""Check whether a model or dataset exists. If its name cannot be reached, one line says so within seconds.

The libraries ask the Hub six times for each of several files, which takes a minute and prints thirty lines. Therefore this
module asks the Hub first, for one small file. If the Hub itself has trouble (too many requests, an internal error), the
libraries continue and retry as usual.
"""

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_embed.errors import InputError

logger = logging.getLogger(__name__)

TIMEOUT = 4.0  # seconds per request; HF_HUB_ETAG_TIMEOUT replaces it, if it is set
ATTEMPTS = 2
# A model has at least one of these files at the top of its repository.
TOP_FILES = ("config.json", "modules.json", "adapter_config.json")
WHAT_TO_GIVE = (
    "Give a local folder with config.json, weights and tokenizer; "
    "a recipe without arguments runs offline with the built-in quickstart encoder"
)
OFFLINE = "set HF_HUB_OFFLINE=1 to use the cache"
_answered: set[tuple[str, ...]] = set()  # (name, kind, revision) that need not be asked again


class Unreachable(str):
    """Why the Hub cannot be reached at all. A copy in the cache can then be used."""


def find_model(name: str | os.PathLike, **hub: Any) -> dict[str, bool]:
    """Check whether a model is a local folder or on the Hub.

    Args:
        name: a folder, or a model on the Hub.
        **hub: arguments of `from_pretrained`: revision, token, cache_dir, local_files_only.

    Returns:
        Further arguments for `from_pretrained`. If the Hub cannot be reached and the model is in the cache,
        {"local_files_only": True}, after a warning. Otherwise {}.

    Raises:
        InputError: if the model is neither a local folder nor available on the Hub, or if `name` is a model.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"the model is given as an object of the type {type(name).__name__}; give its name or its folder")
    name = str(name)
    if os.path.isfile(name):
        raise InputError(f"model '{name}' cannot be loaded: this is a file. {WHAT_TO_GIVE}")
    if os.path.exists(name):
        return {}
    if looks_local(name):
        raise InputError(f"model '{name}' cannot be loaded: this folder does not exist{similar(name)}. {WHAT_TO_GIVE}")
    if constants.is_offline_mode() or hub.get("local_files_only"):
        return {}
    trouble = ask_hub(name, "config.json", "model", hub.get("revision"), hub.get("token"))
    if trouble is None:
        return {}
    if isinstance(trouble, Unreachable) and is_cached(name, hub):
        logger.warning(f"{trouble}; using model '{name}' from the cache")
        return {"local_files_only": True}
    raise InputError(
        f"model '{name}' cannot be loaded: there is no such local folder{similar(name)}, and {trouble}. {WHAT_TO_GIVE}"
    )


def is_cached(name: str, hub: dict[str, Any]) -> bool:
    """Return whether a model is in the cache of earlier downloads."""
    where = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    return any(isinstance(try_to_load_from_cache(name, file, **where), str) for file in TOP_FILES)


def check_dataset(name: str) -> None:
    """Raise InputError if a dataset is not a local folder, not on the Hub and not in the cache."""
    if os.path.exists(name) or constants.is_offline_mode() or "/" not in name or "://" in name:
        return
    if looks_local(name):
        raise InputError(
            f"dataset '{name}' cannot be loaded: this folder does not exist{similar(name)}; give another folder or a local file"
        )
    from datasets import config

    if Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir():
        return
    if trouble := ask_hub(name, "README.md", "dataset"):
        raise InputError(
            f"dataset '{name}' cannot be loaded: there is no such local folder, and {trouble}; or give a local file"
        )


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path. Names on the Hub have the form NAME or OWNER/NAME."""
    return name.startswith((".", "~")) or name.count("/") > 1 or name.startswith("/") or "\\" in name or name.endswith("/")


def similar(name: str) -> str:
    """Return the end of a message that suggests a folder with a similar name, or "" if there is none."""
    path = Path(name)
    if not path.name or not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()], 1)
    return f" (did you mean '{path.parent / close[0]}'?)" if close else ""


def ask_hub(name: str, file: str, kind: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """Ask the Hub for the metadata of a file. Return why the repository is not available, or None if it is or may be."""
    question = (name, kind, str(revision))
    given = "HF_HUB_ETAG_TIMEOUT" in os.environ
    for attempt in range(ATTEMPTS):
        if question in _answered:
            return None
        try:
            address = hf_hub_url(name, file, repo_type=kind, revision=revision)
            get_hf_file_metadata(address, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT if given else TIMEOUT)
        except GatedRepoError:
            return f"the {kind} on the Hub is gated; ask for access on its page, and run `hf auth login`"
        except RepositoryNotFoundError:
            return f"the Hub has no such {kind} that you can read; check the spelling, or run `hf auth login` for a private one"
        except RevisionNotFoundError:
            return f"the {kind} on the Hub has no revision '{revision}'"
        except HFValidationError:
            return "it is not a valid name on the Hub; use OWNER/NAME"
        except (EntryNotFoundError, HfHubHTTPError):  # the repository exists, or the Hub has trouble that may pass
            pass
        except Exception as error:  # network errors are of many kinds
            if attempt + 1 < ATTEMPTS:
                continue
            reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".") or type(error).__name__
            return Unreachable(f"the Hub ({constants.ENDPOINT}) cannot be reached ({reason}); check the network, or {OFFLINE}")
        _answered.add(question)
    return None
