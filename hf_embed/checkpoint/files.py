"""The readers of a checkpoint's files: text, JSON and weights, in a local folder or on the Hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.library_internals import optional_file
from hf_embed.safe_files import write_text as write_whole  # noqa: F401 (for the card)

# The values that a key of a config file may have: a type or, where only some values change nothing, a list of these.
Allowed = Any
# What a key may always be: it then says nothing.
EMPTY: list[Any] = [None, False, "", [], {}]


def read_text(path: str | Path) -> str:
    """Return the text of a file."""
    return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds. Raises ValueError for a file that is not JSON."""
    return json.loads(read_text(path))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's model.safetensors, or of all its shards, by name."""
    tensors: dict[str, Tensor] = {}
    for shard in Path(folder).glob("model*.safetensors"):
        tensors |= load_file(shard)
    return tensors


class Files:
    """The files of a model: of a local folder, or on the Hub.

    Args:
        name: the folder, or the model's name on the Hub.
        **hub: what `cached_file` takes: revision, token, cache_dir, local_files_only, subfolder.
    """

    def __init__(self, name: str, **hub: Any):
        self.name, self.hub = name, hub

    def path(self, file: str) -> str | None:
        """Return where a file lies on this machine, after a download if need be; None without the file."""
        return optional_file(self.name, file, **self.hub)

    def json(self, file: str, kind: type = dict) -> Any:
        """Return what a JSON file says, a `kind`; None without the file."""
        path = self.path(file)
        if path is None:
            return None
        try:
            content = read_json(path)
        except ValueError as error:
            raise InputError(f"model '{self.name}': {file} is not JSON ({error}); correct it or copy it anew") from error
        if not isinstance(content, kind):
            raise InputError(f"model '{self.name}': {file} has no {kind.__name__} at its top; copy it anew")
        return content

    def config(self, file: str, keys: dict[str, Allowed]) -> dict[str, Any]:
        """Return what a config file says, checked by `check_keys`; {} without the file."""
        config = self.json(file) or {}
        self.check_keys(file, config, keys)
        return config

    def check_keys(self, file: str, config: dict[str, Any], keys: dict[str, Allowed]) -> None:
        """Raise InputError for a key of `config` that `keys` does not have, or a value that it does not allow, unless empty."""
        for key, value in config.items():
            allowed = keys.get(key, EMPTY)
            if not (value in allowed if isinstance(allowed, list) else isinstance(value, allowed) or value in EMPTY):
                shown = json.dumps(value)
                raise self.refused(f"{key} {shown if len(shown) < 100 else shown[:100] + ' ...'} of {file}")

    def tensors(self, folder: str) -> dict[str, Tensor]:
        """Return the weights of a module's folder."""
        if file := self.path(f"{folder}/model.safetensors"):
            return load_file(file)
        if file := self.path(f"{folder}/pytorch_model.bin"):
            return torch.load(file, map_location="cpu", weights_only=True)
        raise InputError(
            f"model '{self.name}': '{folder}' has no weights (model.safetensors or pytorch_model.bin); copy it anew"
        )

    def refused(self, what: str, mend: str = "load it with sentence-transformers") -> InputError:
        """Return the error for what sentence-transformers would do and this package cannot."""
        return InputError(f"model '{self.name}': {what} cannot be represented here; {mend}")
