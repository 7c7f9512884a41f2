"""Upload a finished model folder to the Hub in one commit, and retry if the network or the Hub fails.

Only the files of the model are uploaded. They are selected by exact names: no optimizer state, checkpoints, data, logs or
links. Large files that an earlier, interrupted push has uploaded are recognized by their hash and are not sent again. Files
that are already in the repository are not committed again. Files of an earlier model in the repository that loaders would
prefer to the new ones are removed by the same commit; they stay in the history.

This module creates the commit itself and does not use `HfApi.upload_folder`, for three reasons. If Xet is installed,
`upload_folder` splits a failed commit into smaller ones, so that users can see half a model. It refuses `create_pr` together
with a branch. It uploads the model card unchanged, whereas this module writes the name of the repository into it.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_embed.checkpoint.card import read_results, title_of, with_repository
from hf_embed.checkpoint.layout import TransformerModule, read_modules
from hf_embed.checkpoint.model_files import FILES, MODULE, MODULE_FILES, ONNX, SHARD, Files, is_old
from hf_embed.entry import recipe_command
from hf_embed.errors import InputError, first_line, in_short
from hf_embed.files.read_files import read_json, read_text
from hf_embed.files.safe_files import link_tree

logger = logging.getLogger(__name__)

TRIES = 5
FIRST_WAIT = 1.0  # seconds before the second try; each later wait is twice as long
Result = TypeVar("Result")
COPY = "_pushing"  # in the output folder: a copy of the checkpoint that is being uploaded


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
    """Upload a saved model to a repository, which is created if it does not exist.

    Args:
        folder: a folder that `save_pretrained` or a training run has written.
        repo: "name" or "owner/name".
        private: whether a repository that is created is private.
        revision: the branch, which is created if it does not exist. Default: main.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: the message of the commit, or the title of the pull request.
        token: a Hub token. Default: the token of the current login.
        everything: upload the whole folder, including checkpoints, optimizer state and logs, but no links, no dotfiles and no
            `training_args.bin`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        InputError: if the folder is not a model or has links in place of its files, if the Hub refuses the name or the token,
            or if the push failed five times. The folder is unchanged. After a failed push, the message shows the command that
            finishes it.
    """
    folder = Path(folder)
    check_names(folder, repo)
    token = token or get_token()
    if token is None:
        raise InputError("no Hub token was found; run `hf auth login`, or set HF_TOKEN to a token with write access")
    api = HfApi(token=token)

    def upload() -> str:
        repo_id = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        added = commit(api, repo_id, additions(folder, repo_id, everything), commit_message, revision, create_pr)
        return added.pr_url or added.commit_url

    flags = {"private": private, "create_pr": create_pr, "everything": everything}
    return with_retries(upload, repo, command(folder, repo, revision, **flags))


def check_names(folder: Path, repo: str) -> None:
    """Raise InputError if the folder does not hold a model or an adapter, or if `repo` is not a valid repository name."""
    names = {path.name for path in folder.glob("*")}
    weights = any(name == "model.safetensors" or SHARD.fullmatch(name) for name in names)
    if not {"adapter_config.json", "adapter_model.safetensors"} <= names and not (weights and "config.json" in names):
        raise InputError(f"{folder} holds no model (config.json and model.safetensors); give the folder of a finished run")
    Files(str(folder)).weight_files()  # which raises an error if a shard is missing
    check_repository(repo)


def check_repository(repo: str) -> None:
    """Raise InputError if `repo` is not a valid repository name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' is not a valid name of a repository: {first_line(error)}") from error


# ---- from training ----


def init_repository(make: Callable[[], None], args: TrainingArguments) -> None:
    """Create the repository of a training run by calling `make`. Raise InputError if the Hub refuses the name or the token."""
    folder = Path(str(args.output_dir))
    repo = args.hub_model_id or folder.absolute().name
    check_repository(repo)
    with_retries(make, repo, command(folder, repo))


def push_checkpoint(checkpoint: str, repo: str, args: TrainingArguments, step: int) -> PushInProgress:
    """Upload a checkpoint in the background while training continues.

    The upload reads the files under a second name, because the checkpoint may be rotated away meanwhile. There are up to two
    commits: one with the model and, if `args.hub_strategy` asks for it, one with everything that resuming needs.
    """
    copy = Path(str(args.output_dir), COPY)
    shutil.rmtree(copy, ignore_errors=True)
    link_tree(Path(checkpoint), copy)
    message = f"Training in progress, step {step}"
    api = HfApi(token=args.hub_token)

    def start(operations: list[CommitOperationAdd], message: str) -> Future[Any]:
        return api.run_as_future(commit, api, repo, operations, message, args.hub_revision)

    jobs = [start(additions(copy, repo), message)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
        jobs.append(start(additions(copy, repo, everything=True, inside=name), f"{message}, checkpoint"))
    return PushInProgress(jobs)  # type: ignore[arg-type] # its hint says one Future


def commit(
    api: HfApi,
    repo: str,
    added: list[CommitOperationAdd],
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Commit the files of a model, and remove those of an earlier one that would change it."""
    new = {operation.path_in_repo for operation in added}
    removed: list[CommitOperationDelete] = []
    if "config.json" in new:  # a model, and not an adapter or a checkpoint below the model
        there = api.list_repo_files(repo, revision=revision)
        removed = [CommitOperationDelete(name) for name in there if is_old(name.split("/")[0]) and name not in new]
    if removed:
        names = ", ".join(operation.path_in_repo for operation in removed)
        logger.warning(f"{repo}: {names} belong to an earlier model and are removed; they stay in the history")
    return api.create_commit(repo, [*added, *removed], commit_message=message, revision=revision, create_pr=create_pr)


def finish_push(push: PushInProgress | None, args: TrainingArguments) -> None:
    """Wait for the upload of a checkpoint, warn if it failed, and remove the copy that it read."""
    jobs: Any = push.jobs if push is not None else []
    for job in jobs:
        if error := job.exception():
            logger.warning(f"a checkpoint was not uploaded to the Hub: {(reason(error) or (error, False))[0]}")
    shutil.rmtree(Path(str(args.output_dir), COPY), ignore_errors=True)


# ---- the files ----


def additions(folder: Path, repo: str, everything: bool = False, inside: str = "") -> list[CommitOperationAdd]:
    """Return the upload operations for a folder, with paths below `inside`. The model card gets the name of the repository.

    Raises:
        InputError: if one of the model's own files is a link. This holds even if `everything` is uploaded.
    """
    of_model = model_files(folder)  # also if everything is uploaded, for its checks
    paths = all_files(folder) if everything else of_model
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    card = named.pop("README.md", None)
    added = [CommitOperationAdd(f"{inside}/{name}".lstrip("/"), str(path)) for name, path in named.items()]
    if card is not None:
        own_title = read_results(folder).get("card", {}).get("title")
        text = with_repository(read_text(card), repo, None if own_title else title_of(folder))
        added.append(CommitOperationAdd(f"{inside}/README.md".lstrip("/"), text.encode()))
    return added


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model: those with known names, its modules, the code that its configs name, its ONNX graphs.

    Raises:
        InputError: if one of them is a link, which may lead anywhere, or if a module has no folder of its own.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name in FILES or SHARD.fullmatch(path.name)]
    for module in module_folders(folder):
        paths += [module / file for file in MODULE_FILES]
        left_out = sorted(path.name for path in module.iterdir() if path.name not in MODULE_FILES)
        if "pytorch_model.bin" in left_out and not (module / "model.safetensors").exists():
            raise InputError(
                f"{module}: the weights are not in model.safetensors; save the model again (Encoder.save_pretrained)"
            )
        if left_out:
            logger.warning(f"{module}: not uploaded, because they do not belong to the module: {', '.join(left_out)}")
    paths += code_files(folder)
    paths += [folder / "onnx", *(folder / "onnx" / name for name in ONNX)]
    for path in paths:
        if path.is_symlink():
            raise InputError(f"{path} is a link, and only real files are uploaded; replace the link with the file itself")
    return [path for path in paths if path.is_file()]


def module_folders(folder: Path) -> list[Path]:
    """Return the folders of the modules in modules.json, except the transformer, which is in the folder itself."""
    transformer, *others = read_modules(Files(str(folder))) or [TransformerModule()]
    if transformer.path:
        raise InputError(f"{folder}: the transformer is in '{transformer.path}'; save the model again, into the folder itself")
    for name in (module.path for module in others):
        if not MODULE.fullmatch(name) or (folder / name).is_symlink() or not (folder / name).is_dir():
            raise InputError(f"{folder}: modules.json names '{name}', which is not a subfolder such as 1_Pooling")
    return [folder / module.path for module in others]


def code_files(folder: Path) -> list[Path]:
    """Return the model's own Python files in the folder: those that `auto_map` names, and those that they import."""
    found: dict[Path, None] = {}
    for name in code_names(folder):
        path = folder / f"{name}.py"
        if path.is_file():
            try:
                found |= dict.fromkeys([path, *map(Path, get_relative_import_files(path))])
            except OSError as error:
                raise InputError(f"{path} imports {error.filename}, which cannot be read; add this file") from error
    return [path for path in found if path.parent == folder]


def code_names(folder: Path) -> list[str]:
    """Return the names of the Python files in the folder that `auto_map` names in the configs, without ".py"."""
    names: list[str] = []
    for config in (folder / "config.json", folder / "tokenizer_config.json"):
        auto_map = (read_json(config) if config.is_file() else {}).get("auto_map") or {}
        listed = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        classes = [name for entry in listed for name in (entry if isinstance(entry, list) else [entry])]
        # Code of another repository, OWNER/REPO--file.Class, is not uploaded.
        found = [re.fullmatch(r"(\w+)\.\w+", name) for name in classes if isinstance(name, str)]
        names += [file[1] for file in found if file]
    return names


def all_files(folder: Path) -> list[Path]:
    """Return all files in `folder` and its subfolders, except links, dotfiles and `training_args.bin`."""
    found, links = [], 0
    for parent, folders, files in os.walk(folder):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += sum(Path(parent, name).is_symlink() for name in [*folders, *files])
        files = [name for name in sorted(files) if not name.startswith(".") or name == ".metadata"]  # FSDP needs .metadata
        # Trainer's own settings are a pickle. They are useful only here, and loading a pickle from elsewhere is not safe.
        paths = [Path(parent, name) for name in files if name != TRAINING_ARGS_NAME]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    if links:
        logger.warning(f"{folder}: {links} links are not uploaded")
    return found


def command(folder: str | Path, repo: str, revision: str | None = None, **flags: bool) -> str:
    """Return the command line with which a user can finish a push."""
    words = [f"--revision {revision}"] if revision else []
    return " ".join([f"{recipe_command('push')} {folder} {repo}", *words, *(f"--{flag}" for flag, on in flags.items() if on)])


# ---- the network ----


def with_retries(upload: Callable[[], Result], repo: str, command: str) -> Result:
    """Call `upload` until it succeeds, at most five times. Raise InputError if a retry cannot help or the last one failed."""
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            return upload()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
            raise InputError(f"push to {repo}: {error}") from error
        except Exception as error:  # for large files, the client wraps it in other errors
            why = reason(error)
            if why is None:
                raise
            mend, again = why
            if not again or attempt == TRIES:
                raise InputError(f"push to {repo}: {mend}; the folder is complete, finish the push with: {command}") from error
            logger.warning(f"push to {repo}: {mend}; trying again in {wait:g} s (try {attempt} of {TRIES} failed)")
            time.sleep(wait)
            wait *= 2
    raise AssertionError


def reason(error: BaseException) -> tuple[str, bool] | None:
    """Describe a network error in one line, and tell whether a retry may help. Return None for any other error."""
    while not isinstance(error, OSError) and not is_of_client(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        said = in_short(error.server_message or error)
        known = {
            400: f"the Hub rejected the request ({said})",
            401: "the Hub rejected this token (401); run `hf auth login`, or set HF_TOKEN",
            403: "this token has no write access there (403); use a token with write access, or a repository of your own",
            404: "the repository or branch does not exist, or this token has no access to it (404)",
        }
        if code in known:
            return known[code], False
        return f"the Hub answered {code} ({said})", code in (409, 412, 429) or code >= 500
    if is_of_client(error) or isinstance(error, ConnectionError | TimeoutError):
        return f"the connection failed ({type(error).__name__}: {in_short(error)})", True
    return None


def is_of_client(error: BaseException) -> bool:
    """Return whether an error comes from the HTTP client of huggingface_hub, which is httpx or its successor."""
    return type(error).__module__.split(".")[0].startswith("httpx")
