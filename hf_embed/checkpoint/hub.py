"""A finished folder to the Hub: the model's own files, in one commit, tried again where the network or the Hub falters.

Only what a model is made of goes there, by exact names: no optimizer state, no checkpoints, no data, no logs, no links. Large
files that an earlier, broken push has uploaded are known by their hash and not sent again; files that the repository has are
not committed again.

The commit is made here and not by `HfApi.upload_folder`: where Xet is installed, that splits a commit that fails into smaller
ones, so that half a model can be seen; it refuses a branch for a pull request; and it uploads a card only as the file has it.
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

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_embed.checkpoint.card import with_repository
from hf_embed.entry import recipe_command
from hf_embed.errors import InputError, masked
from hf_embed.read_files import read_json, read_text

logger = logging.getLogger(__name__)

# The files of a model's folder, by their exact names: a pattern would take a vocabulary of customers along.
WEIGHTS = {"model.safetensors", "adapter_model.safetensors"}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What the tokenizers of transformers call theirs (`vocab_files_names`), and what any of them has.
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.txt", "vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "entity_vocab.json", "merges.txt", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json",
    "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "spiece.model",
    "spm.model", "spm_char.model", "tokenizer.model", "word_pronunciation.json", "word_shape.json",
}  # fmt: skip
FILES = frozenset({
    "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "adapter_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "results.json", "geometry.png",
    "tempscale.png", *WEIGHTS, *TOKENIZER,
})  # fmt: skip
MODULE = re.compile(r"\d+_[A-Z]\w*")  # 1_Pooling, 2_Dense
MODULE_FILES = ("config.json", "model.safetensors")
# Trainer's own settings, a pickle: of use here only, and nobody should load one from elsewhere.
TRAINING_ARGS = "training_args.bin"
TRIES = 5
FIRST_WAIT = 1.0  # seconds; doubled after each try
Result = TypeVar("Result")
COPY = "_pushing"  # in the output folder: the checkpoint that is being uploaded


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
    """Upload a saved model to a repository, which is made if it is not there. Returns the commit's address.

    Args:
        folder: what `save_pretrained` or a run has written.
        repo: "name" or "owner/name".
        private: of a repository that is made.
        revision: a branch; made if it is not there. Default: main.
        create_pr: open a pull request in place of a commit.
        commit_message: the commit's, or the title of the pull request.
        token: default: the one you are logged in with.
        everything: upload the folder as it is, checkpoints, optimizer state and logs too; but no links, no dotfiles, and no
            `training_args.bin`.

    Raises:
        InputError: a folder that is no model, or has links in the place of its files; a name or token that the Hub refuses, or
            a push that failed five times. The folder is as it was; the message has the command that finishes the push.
    """
    folder = Path(folder)
    check_names(folder, repo)
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
    return with_retries(upload, repo, command(folder, repo, revision, **flags))


def check_names(folder: Path, repo: str) -> None:
    """Raise InputError for a folder that is no model, or a name that no repository can have."""
    if not has_model(folder):
        raise InputError(f"{folder}: no model there (config.json and model.safetensors); give the folder of a finished run")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' is no name for a repository: {str(error).splitlines()[0]}") from error


# ---- from training ----


def init_repository(make: Callable[[], None], args: TrainingArguments) -> None:
    """Make the repository of a training by `make`. Raises InputError for a name or a token that the Hub refuses."""
    folder = Path(str(args.output_dir))
    repo = args.hub_model_id or folder.absolute().name
    with_retries(make, repo, command(folder, repo))


def push_checkpoint(checkpoint: str, repo: str, args: TrainingArguments, step: int) -> PushInProgress:
    """Upload a checkpoint while the training goes on, from a copy: the checkpoint may be rotated away meanwhile.

    Two commits: the model, and all that resuming needs, where `args.hub_strategy` asks for it.
    """
    copy = Path(str(args.output_dir), COPY)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, symlinks=True)
    message = f"Training in progress, step {step}"
    api = HfApi(token=args.hub_token)

    def commit(operations: list[CommitOperationAdd], message: str) -> Future[Any]:
        return api.create_commit(repo, operations, commit_message=message, revision=args.hub_revision, run_as_future=True)

    jobs = [commit(additions(copy, repo), message)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
        jobs.append(commit(additions(copy, repo, everything=True, inside=name), f"{message}, checkpoint"))
    return PushInProgress(jobs)  # type: ignore[arg-type] # its hint says one Future


def finish_push(push: PushInProgress | None, args: TrainingArguments) -> None:
    """Warn of a checkpoint that did not reach the Hub, and remove the copy that it was uploaded from."""
    jobs: Any = push.jobs if push is not None else []
    for job in jobs:
        if error := job.exception():
            logger.warning(f"a checkpoint did not reach the Hub: {(reason(error) or (error, False))[0]}")
    shutil.rmtree(Path(str(args.output_dir), COPY), ignore_errors=True)


# ---- the files ----


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a model, or an adapter, with all its weights."""
    names = {path.name for path in folder.glob("*")}
    adapter, model = ({"adapter_config.json", "adapter_model.safetensors"}, {"config.json", "model.safetensors"})
    return adapter <= names or model <= names or ("config.json" in names and any(map(SHARD.fullmatch, names)))


def additions(folder: Path, repo: str, everything: bool = False, inside: str = "") -> list[CommitOperationAdd]:
    """Return the files to upload, by their paths in `repo`, below `inside`. The card has the name of the repository.

    Raises:
        InputError: a link in the place of one of the model's own files, even where `everything` is uploaded.
    """
    paths = model_files(folder)
    paths = all_files(folder) if everything else paths
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    card = named.pop("README.md", None)
    added = [CommitOperationAdd(f"{inside}/{name}".lstrip("/"), str(path)) for name, path in named.items()]
    if card is not None:
        text = with_repository(read_text(card), repo)
        added.append(CommitOperationAdd(f"{inside}/README.md".lstrip("/"), text.encode()))
    return added


def model_files(folder: Path) -> list[Path]:
    """Return what a model is made of: regular files of known names, its modules' folders, the code that its config names.

    Raises:
        InputError: one of them is a link, which may lead anywhere, or a module is not in a folder of its own.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name in FILES or SHARD.fullmatch(path.name)]
    for module in module_folders(folder):
        paths += [module / file for file in MODULE_FILES]
        left_out = sorted(path.name for path in module.iterdir() if path.name not in MODULE_FILES)
        if "pytorch_model.bin" in left_out and not (module / "model.safetensors").exists():
            raise InputError(f"{module}: the weights are no model.safetensors; save the model anew (Encoder.save_pretrained)")
        if left_out:
            logger.warning(f"{module}: {', '.join(left_out)}: not of the module, not uploaded")
    paths += code_files(folder)
    for path in paths:
        if path.is_symlink():
            raise InputError(f"{path} is a link; only files that lie in the folder are uploaded: put the file itself there")
    return [path for path in paths if path.is_file()]


def module_folders(folder: Path) -> list[Path]:
    """Return the folders of the modules that modules.json lists, beside the transformer in the folder itself."""
    listed = read_json(folder / "modules.json", list) if (folder / "modules.json").is_file() else []
    if wrong := [module for module in listed if not (isinstance(module, dict) and are_texts(module, "path", "type"))]:
        raise InputError(f"{folder}: modules.json lists {wrong[0]!r}, which has no path and type; save the model anew")
    modules = [module for module in listed if module["path"]]
    folders = [folder / module["path"] for module in modules]
    for module, path in zip(modules, folders):
        if not MODULE.fullmatch(module["path"]) or path.is_symlink() or not path.is_dir():
            raise InputError(f"{folder}: modules.json names '{module['path']}', which is no folder like 1_Pooling in there")
        if module["type"].endswith("Transformer"):
            raise InputError(f"{folder}: the transformer lies in '{module['path']}'; save the model anew, at the folder's top")
    return folders


def are_texts(content: dict[str, Any], *keys: str) -> bool:
    """Return whether these keys are there and have texts."""
    return all(isinstance(content.get(key), str) for key in keys)


def code_files(folder: Path) -> list[Path]:
    """Return the code that a model brings: the files that `auto_map` names in its configs, and those that they import."""
    found: dict[Path, None] = {}
    for name in code_names(folder):
        path = folder / f"{name}.py"
        if path.is_file():
            try:
                found |= dict.fromkeys([path, *map(Path, get_relative_import_files(path))])
            except OSError as error:
                raise InputError(f"{path}: imports {error.filename}, which cannot be read") from error
    return [path for path in found if path.parent == folder]


def code_names(folder: Path) -> list[str]:
    """Return the names of the Python files, in the folder itself, that `auto_map` of the configs names."""
    names: list[str] = []
    for config in (folder / "config.json", folder / "tokenizer_config.json"):
        auto_map = (read_json(config) if config.is_file() else {}).get("auto_map") or {}
        listed = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        classes = [name for entry in listed for name in (entry if isinstance(entry, list) else [entry])]
        # OWNER/REPO--file.Class stays where it is.
        found = [re.fullmatch(r"(\w+)\.\w+", name) for name in classes if isinstance(name, str)]
        names += [file[1] for file in found if file]
    return names


def all_files(folder: Path) -> list[Path]:
    """Return the files in `folder` and in the folders within; no links, no dotfiles, no `training_args.bin`."""
    found, links = [], 0
    for parent, folders, files in os.walk(folder):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += sum(Path(parent, name).is_symlink() for name in [*folders, *files])
        files = [name for name in sorted(files) if not name.startswith(".") or name == ".metadata"]  # of FSDP's checkpoints
        paths = [Path(parent, name) for name in files if name != TRAINING_ARGS]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    if links:
        logger.warning(f"{folder}: {links} links are not uploaded")
    return found


def command(folder: str | Path, repo: str, revision: str | None = None, **flags: bool) -> str:
    """Return the command line that finishes a push."""
    words = [f"--revision {revision}"] if revision else []
    return " ".join([f"{recipe_command('push')} {folder} {repo}", *words, *(f"--{flag}" for flag, on in flags.items() if on)])


# ---- the network ----


def with_retries(upload: Callable[[], Result], repo: str, command: str) -> Result:
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
    """Return what went wrong in one line, and whether it is worth another try; None for an error that is not of the network."""
    while not isinstance(error, OSError) and not is_of_client(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        said = masked(" ".join((error.server_message or str(error)).split()))[:200]
        known = {
            400: f"the Hub refuses it ({said})",
            401: "the Hub does not know this token (401); run `hf auth login`, or set HF_TOKEN",
            403: "this token may not write there (403); take one with write access, or a repository of your own",
            404: "there is no such repository or branch, or this token may not see it (404)",
        }
        if code in known:
            return known[code], False
        return f"the Hub answered {code} ({said})", code in (409, 412, 429) or code >= 500
    if is_of_client(error) or isinstance(error, ConnectionError | TimeoutError):
        return f"the connection failed ({type(error).__name__}: {masked(' '.join(str(error).split()))[:200]})", True
    return None


def is_of_client(error: BaseException) -> bool:
    """Return whether an error is of the HTTP client that huggingface_hub uses, httpx or its successor."""
    return type(error).__module__.split(".")[0].startswith("httpx")
