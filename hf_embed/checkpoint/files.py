"""The files of a model, in a local folder or on the Hub: its configs and its weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.library_internals import optional_file
from hf_embed.read_files import COPY_ANEW, read_json, read_tensors

# The values that a key of a config file may have: a type or, where only some values change nothing, a list of these.
Allowed = Any
# What a key may always be: it then says nothing.
EMPTY: list[Any] = [None, False, "", [], {}]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's model.safetensors, or of all its shards, by name.

    Raises:
        InputError: there are none, or a file of them is missing, damaged, or has other tensors than the index says.
    """
    files = Files(str(folder))
    listed = files.weight_map()
    names = sorted(set(listed.values())) if listed else [WEIGHTS]
    shards = {name: read_tensors(Path(folder, name)) for name in names}
    if listed is None:
        return shards[WEIGHTS]
    if missing := [key for key, name in listed.items() if key not in shards[name]]:
        raise InputError(f"{folder}: '{missing[0]}' is not in {listed[missing[0]]}, where {INDEX} has it; copy both anew")
    return {key: shards[name][key] for key, name in listed.items()}


def check_numbers(tensors: dict[str, Tensor], name: str) -> None:
    """Raise InputError for tensors that are not of floating-point numbers, or not finite; `name` is of what messages speak."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{name}: '{key}' is stored as {tensor.dtype}; save it in floating point")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}: '{key}' has values that are NaN or infinite; the weights are spoilt")


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
        return read_json(path, kind, f"model '{self.name}': {file}")

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
        for name in (WEIGHTS, "pytorch_model.bin"):
            if path := self.path(f"{folder}/{name}"):
                tensors = read_tensors(path, f"model '{self.name}': {folder}/{name}")
                check_numbers(tensors, f"model '{self.name}': {folder}/{name}")
                return tensors
        raise InputError(
            f"model '{self.name}': '{folder}' has no weights (model.safetensors or pytorch_model.bin); copy it anew"
        )

    def weight_map(self) -> dict[str, str] | None:
        """Return the name of the file that has each tensor of a model in shards; None where one file has them all.

        Raises:
            InputError: the index of the shards is not one, or names a file outside of the folder.
        """
        if self.path(WEIGHTS) or (index := self.json(INDEX)) is None:  # transformers takes the single file where it is there
            return None
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
            raise InputError(f"model '{self.name}': {INDEX} has no weight_map of tensors to files; {COPY_ANEW}")
        if outside := [shard for shard in listed.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)]:
            raise InputError(f"model '{self.name}': {INDEX} names '{outside[0]}', which is no file in the folder; {COPY_ANEW}")
        return listed

    def weight_files(self) -> dict[str, str]:
        """Return the safetensors files of the model, where they lie on this machine, by name; {} if it has others.

        Raises:
            InputError: one of the shards is missing.
        """
        listed = self.weight_map()
        found = {name: self.path(name) for name in (sorted(set(listed.values())) if listed else [WEIGHTS])}
        if listed and (missing := [name for name, path in found.items() if path is None]):
            raise InputError(f"model '{self.name}': {missing[0]}, which {INDEX} names, is not there; {COPY_ANEW}")
        return {name: path for name, path in found.items() if path is not None}

    def refused(self, what: str, mend: str = "load it with sentence-transformers") -> InputError:
        """Return the error for what sentence-transformers would do and this package cannot."""
        return InputError(f"model '{self.name}': {what} cannot be represented here; {mend}")
