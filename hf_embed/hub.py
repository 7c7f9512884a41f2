"""A finished folder to the Hub: the model's own files, in one commit, tried again where the network or the Hub falters.

Only what a model is made of goes there: no optimizer state, no checkpoints, no data, no logs. Large files that an earlier,
broken push has uploaded are known by their hash and not sent again; files that the repository has are not committed again.
"""

import json
import logging
import time
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_embed.card import with_name
from hf_embed.errors import InputError

logger = logging.getLogger(__name__)

# Of a model's folder itself; folders of modules, 1_Pooling and so on, are named in modules.json.
FILES = ["README.md", "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
         "adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
         "vocab*", "merges.txt", "*.spm", "sentencepiece*", "spiece.model", "chat_template*", "modules.json",
         "config_sentence_transformers.json", "sentence_bert_config.json", "results.json", "geometry.png",
         "tempscale.png"]  # fmt: skip
TRIES = 5
FIRST_WAIT = 1.0  # seconds; doubled after each try


def push_folder(
    folder: str | Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload the model",
    token: str | None = None,
    everything: bool = False,
) -> str:
    """Upload a saved model to `repo`, "name" or "owner/name", made if it is not there. Returns the commit's address.

    Args:
        private: of a repository that is made.
        revision: a branch; made if it is not there. Default: main.
        create_pr: open a pull request in place of a commit.
        token: default: the one you are logged in with.
        everything: upload the folder as it is, checkpoints, optimizer state and logs too.

    Raises:
        InputError: a folder that is no model, a name or token that the Hub refuses, or a push that failed five times. The
            folder is as it was; the message has the command that finishes the push.
    """
    folder = Path(folder)
    kinds = (("config.json", "model*.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))
    if not any((folder / config).is_file() and any(folder.glob(weights)) for config, weights in kinds):
        raise InputError(f"{folder}: no model there (config.json and model.safetensors); give the folder of a finished run")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' is no name for a repository: {str(error).splitlines()[0]}") from error
    token = token or get_token()
    if token is None:
        raise InputError("no Hub token; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(token=token)

    def upload() -> str:
        repo_id = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = additions(folder, repo_id, everything)
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr)
        return commit.pr_url or commit.commit_url

    flags = {"private": private, "create_pr": create_pr, "everything": everything}
    return persist(upload, repo, command(folder, repo, revision, **flags))


def additions(folder: Path, repo: str, everything: bool = False) -> list[CommitOperationAdd]:
    """The files to upload, by their paths in the repository; in the card the model has the name that it has there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()] if everything else model_files(folder)
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    added = [CommitOperationAdd(name, str(path)) for name, path in named.items() if name != "README.md"]
    if "README.md" in named:
        card = with_name(named["README.md"].read_text(encoding="utf-8"), repo)
        added.append(CommitOperationAdd("README.md", card.encode()))
    return added


def model_files(folder: Path) -> list[Path]:
    """What a model is made of."""
    modules = folder / "modules.json"
    folders = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    inner = [path for name in folders if name for path in sorted((folder / name).glob("*")) if path.is_file()]
    return [p for p in sorted(folder.iterdir()) if p.is_file() and any(fnmatch(p.name, name) for name in FILES)] + inner


def command(folder: str | Path, repo: str, revision: str | None = None, **flags: bool) -> str:
    """What finishes a push."""
    words = [f"--revision {revision}"] if revision else []
    return " ".join([f"python recipes/push.py {folder} {repo}", *words, *(f"--{flag}" for flag, on in flags.items() if on)])


def persist(upload, repo: str, command: str) -> str:
    """Call `upload` until it succeeds, at most five times. Raises InputError for what trying again cannot mend."""
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            return upload()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
            raise InputError(f"push to {repo}: {' '.join(str(error).split())}") from error
        except Exception as error:  # the client wraps what goes wrong in a large file
            why = reason(error)
            if why is None:
                raise
            mend, again = why
            if not again or attempt == TRIES:
                raise InputError(f"push to {repo}: {mend}; the folder is whole, finish by: {command}") from error
            logger.warning(f"push to {repo}: {mend}; again in {wait:g} s ({attempt} of {TRIES} tries)")
            time.sleep(wait)
            wait *= 2
    raise AssertionError


def reason(error: BaseException) -> tuple[str, bool] | None:
    """What went wrong in one line, and whether it is worth another try; None for an error that is not of the network."""
    while not isinstance(error, OSError) and not of_client(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        said = " ".join((error.server_message or str(error)).split())[:200]
        known = {
            400: f"the Hub refuses it ({said})",
            401: "the Hub does not know this token (401); run `hf auth login`, or set HF_TOKEN",
            403: "this token may not write there (403); take one with write access, or a repository of your own",
            404: "there is no such repository or branch, or this token may not see it (404)",
        }
        if code in known:
            return known[code], False
        return f"the Hub answered {code} ({said})", code in (409, 412, 429) or code >= 500
    if of_client(error) or isinstance(error, ConnectionError | TimeoutError):
        return f"the connection failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})", True
    return None


def of_client(error: BaseException) -> bool:
    """Whether an error is of the HTTP client that huggingface_hub uses, httpx or its successor."""
    return type(error).__module__.split(".")[0].startswith("httpx")
